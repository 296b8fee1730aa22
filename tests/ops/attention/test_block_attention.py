"""block_attention against fp64, over dense and paged contexts, with poison in all that no query sees."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import pytest
import spec
import torch
from qk_bodies import same
from torch._subclasses.fake_tensor import FakeTensorMode

from fusedcomm.ops.attention import block_attention
from fusedcomm.platform import fp8_dtype

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# (D, Hq, Hk, d): grouped queries, as many keys as queries, one key head; dimensions that fill no tile
SHAPES = [(16, 8, 2, 64), (5, 4, 4, 128), (1, 6, 1, 80), (7, 32, 8, 96), (3, 2, 1, 1)]
LENS = (0, 1, 17, 63, 64, 100, -3)
COLUMNS = 100  # of the longest
# Of the largest value: weights and result are rounded to the dtype of q (half an ulp each), the rest is in fp32, and
# what is summed up there is less than twice that. fp32: sums of d products and of the weights, a few exponentials.
TOLERANCE = {torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10, torch.float32: 2.0**-18}


@pytest.fixture(params=["cpu", "cuda"])
def device(request: pytest.FixtureRequest) -> str:
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no GPU: torch.cuda.is_available() is False")
    return str(request.param)


@dataclass(frozen=True)
class Block:
    """The arguments of block_attention with a dense context."""

    q: torch.Tensor
    k_ctx: torch.Tensor
    v_ctx: torch.Tensor
    k_blk: torch.Tensor
    v_blk: torch.Tensor
    context_lens: torch.Tensor

    def attend(self, **options: Any) -> torch.Tensor:
        return block_attention(**vars(self), **options)

    def expected(self, scale: float | None = None, seen: torch.Tensor | None = None) -> torch.Tensor:
        """fp64, a request and a head at a time, over the tokens that it sees and no others."""
        q, k_ctx, v_ctx, k_blk, v_blk = (t.cpu().double() for t in list(vars(self).values())[:5])
        scale = q.shape[3] ** -0.5 if scale is None else scale
        result, group = torch.empty_like(q), q.shape[2] // k_blk.shape[2]
        for row, length in enumerate(self.context_lens.tolist()):
            tokens = torch.arange(k_ctx.shape[1]) < length
            if seen is not None:
                tokens &= seen[row]
            k, v = torch.cat((k_ctx[row, tokens], k_blk[row])), torch.cat((v_ctx[row, tokens], v_blk[row]))
            for head in range(q.shape[2]):
                weights = (scale * q[row, :, head] @ k[:, head // group].T).softmax(-1)
                result[row, :, head] = weights @ v[:, head // group]
        return result

    def poisoned(self) -> Block:
        """With NaNs and infinities in place of what is not seen."""
        unseen = torch.arange(self.k_ctx.shape[1], device=self.q.device) >= self.context_lens.unsqueeze(1)
        unseen = unseen.view(*unseen.shape, 1, 1)
        k_ctx, v_ctx = self.k_ctx.masked_fill(unseen, torch.nan), self.v_ctx.masked_fill(unseen, torch.nan)
        k_ctx[..., ::2].masked_fill_(unseen, torch.inf)
        return dataclasses.replace(self, k_ctx=k_ctx, v_ctx=v_ctx)


def random_block(
    shape: tuple[int, int, int, int],
    dtype: torch.dtype,
    device: str = "cpu",
    lens: tuple[int, ...] = LENS,
    columns: int = COLUMNS,
    seed: int = 1,
) -> Block:
    block, heads_q, heads_k, head_dim = shape
    generator = torch.Generator().manual_seed(seed)

    def normal(*size: int, factor: float = 1.0) -> torch.Tensor:
        return (torch.randn(size, generator=generator) * factor).to(dtype).to(device)

    batch = len(lens)
    return Block(
        normal(batch, block, heads_q, head_dim, factor=2.0),  # so that some tokens weigh much more than others
        normal(batch, columns, heads_k, head_dim),
        normal(batch, columns, heads_k, head_dim),
        normal(batch, block, heads_k, head_dim),
        normal(batch, block, heads_k, head_dim, factor=3.0),
        torch.tensor(lens, dtype=torch.int32, device=device),
    )


def assert_close(got: torch.Tensor, want: torch.Tensor, block: Block) -> None:
    values = torch.cat((block.v_blk, block.v_ctx), dim=1).nan_to_num(0.0, 0.0, 0.0)
    assert got.dtype is block.q.dtype
    error = float((got.cpu().double() - want).abs().max())
    assert error <= TOLERANCE[got.dtype] * float(values.abs().max())  # not so for NaN


@dataclass(frozen=True)
class Pages:
    """A paged context with the tokens of a dense one, in blocks in random order."""

    k: torch.Tensor
    v: torch.Tensor
    block_table: torch.Tensor


def paged(block: Block, block_size: int, spare: int = 3) -> Pages:
    """The blocks that no request has hold NaNs; those that a request does not need have indices that do not exist."""
    assert block.k_ctx.shape[1] % block_size == 0
    batch, per_request = block.q.shape[0], block.k_ctx.shape[1] // block_size
    device = block.q.device
    order = torch.randperm(batch * per_request + spare, generator=torch.Generator().manual_seed(3)).to(device)
    table = order[: batch * per_request].view(batch, per_request)
    caches = []
    for dense in (block.k_ctx, block.v_ctx):
        poison = 0x7F if dense.dtype is torch.uint8 else torch.nan  # a NaN of e4m3fn
        cache = dense.new_full((len(order), block_size, *dense.shape[2:]), poison)
        cache[table] = dense.unflatten(1, (per_request, block_size))
        caches.append(cache)
    first = torch.arange(per_request, device=device) * block_size
    nowhere = torch.tensor([-1, len(order), 2**31 - 1, -(2**31)], device=device)[torch.arange(per_request) % 4]
    table = torch.where(first < block.context_lens.unsqueeze(1), table, nowhere)
    return Pages(*caches, table.int())


def attend_paged(block: Block, pages: Pages, **options: Any) -> torch.Tensor:
    return block_attention(
        block.q, pages.k, pages.v, block.k_blk, block.v_blk, block.context_lens, pages.block_table, **options
    )


# ---- values ----


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_against_fp64(shape: tuple[int, int, int, int], dtype: torch.dtype, device: str) -> None:
    block = random_block(shape, dtype, device).poisoned()
    got = block.attend()
    assert got.is_contiguous()
    assert_close(got, block.expected(), block)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block_size", [1, 4, 25, 100])
def test_a_paged_context_gives_the_bits_of_a_dense_one(block_size: int, dtype: torch.dtype, device: str) -> None:
    """With as many columns the same copy is made, and SDPA gets the same input."""
    block = random_block((5, 8, 2, 64), dtype, device).poisoned()
    got = attend_paged(block, paged(block, block_size))
    assert same(got, block.attend())
    assert_close(got, block.expected(), block)


def test_blocks_that_are_not_there_are_skipped(device: str) -> None:
    """In the midst of a context: their tokens are not seen, whatever block 0 holds."""
    block = random_block((4, 4, 2, 64), torch.float32, device, lens=(100, 90, 40))
    pages = paged(block, 10)
    for row, columns, index in ((0, [0, 3], -1), (1, [8], len(pages.k)), (2, [0, 1, 2, 3], 2**31 - 1)):
        pages.block_table[row, columns] = index
    seen = ((pages.block_table >= 0) & (pages.block_table < len(pages.k))).repeat_interleave(10, dim=1).cpu()
    assert not seen[2, :40].any()
    pages.k[0], pages.v[0] = torch.nan, torch.nan
    seen &= (pages.block_table != 0).repeat_interleave(10, dim=1).cpu()
    pages.block_table.masked_fill_(pages.block_table == 0, -1)
    assert_close(attend_paged(block, pages), block.expected(seen=seen), block)


def test_the_scale_of_the_scores(device: str) -> None:
    block = random_block((5, 4, 2, 64), torch.float32, device)
    for scale in (0.0, 0.3, -1.0):
        assert_close(block.attend(scale=scale), block.expected(scale), block)
    assert same(block.attend(scale=0.125), block.attend())


@pytest.mark.parametrize("with_scales", [True, False])
@pytest.mark.parametrize("stored", [torch.float8_e4m3fn, torch.float8_e4m3fnuz, torch.uint8])
@pytest.mark.parametrize("dtype", DTYPES)
def test_fp8_contexts(dtype: torch.dtype, stored: torch.dtype, with_scales: bool, device: str) -> None:
    """The bits of a dense context of ``fp8 * scale``, rounded once; decoded here by the tables of the formats."""
    values = torch.from_numpy(spec.fp8_values(fp8_dtype(torch.device(device)) if stored is torch.uint8 else stored))
    block = random_block((5, 4, 2, 64), dtype, device)
    seen = torch.arange(COLUMNS).view(1, -1, 1, 1) < block.context_lens.cpu().view(-1, 1, 1, 1)
    scales, codes, decoded = {"k": 0.0371, "v": 1.7} if with_scales else {"k": 1.0, "v": 1.0}, {}, {}
    for name, scale in scales.items():
        any_codes = torch.randint(0, 256, block.k_ctx.shape, generator=torch.Generator().manual_seed(len(codes)))
        any_codes = torch.where(seen & values[any_codes].isnan(), 17, any_codes)  # NaNs only where nobody sees them
        decoded[name] = (values[any_codes].float() * torch.tensor(scale)).to(dtype).to(device)
        codes[name] = any_codes.to(torch.uint8).to(device)
    options = {f"{name}_scale": torch.tensor([scale], device=device) for name, scale in scales.items()}
    options = options if with_scales else {}
    dense = dataclasses.replace(block, k_ctx=decoded["k"], v_ctx=decoded["v"])
    want = dense.attend()
    assert want.isfinite().all()
    as_bytes = dataclasses.replace(block, k_ctx=codes["k"], v_ctx=codes["v"])
    as_stored = dataclasses.replace(block, k_ctx=codes["k"].view(stored), v_ctx=codes["v"].view(stored))
    assert same(as_stored.attend(**options), want)
    pages = paged(as_bytes, 20)
    pages = dataclasses.replace(pages, k=pages.k.view(stored), v=pages.v.view(stored))
    assert same(attend_paged(block, pages, **options), want)


def test_a_context_longer_than_its_columns(device: str) -> None:
    block = random_block((3, 4, 2, 64), torch.float32, device, lens=(100, 101, 2**31 - 1))
    full = dataclasses.replace(block, context_lens=torch.full_like(block.context_lens, COLUMNS))
    assert same(block.attend(), full.attend())


@pytest.mark.parametrize("dtype", DTYPES)
def test_no_context_at_all(dtype: torch.dtype, device: str) -> None:
    """No columns, no blocks in the cache, no blocks in the table: the block sees itself."""
    block = random_block((6, 4, 2, 64), dtype, device, lens=(5, 0))
    alone = dataclasses.replace(block, k_ctx=block.k_ctx[:, :0], v_ctx=block.v_ctx[:, :0])
    want = alone.attend()
    assert_close(want, alone.expected(), alone)
    table = torch.zeros(2, 3, dtype=torch.int32, device=device)
    empty = Pages(block.k_ctx.new_empty(0, 16, 2, 64), block.v_ctx.new_empty(0, 16, 2, 64), table)
    assert same(attend_paged(block, empty), want)
    no_table = Pages(block.k_ctx, block.v_ctx, table[:, :0])
    assert same(attend_paged(block, no_table), want)


@pytest.mark.parametrize(("batch", "size"), [(0, 4), (2, 0), (0, 0)])
def test_nothing_to_attend(batch: int, size: int, device: str) -> None:
    block = random_block((size, 4, 2, 64), torch.bfloat16, device, lens=(3,) * batch)
    got = block.attend()
    assert got.shape == (batch, size, 4, 64)
    out = torch.empty_like(got)
    assert block.attend(out=out) is out


# ---- memory ----


def test_strided_inputs(device: str) -> None:
    """Views of a packed qkv, keys and values of one cache, blocks that are padded: the same as copies of them."""
    block = random_block((5, 4, 2, 64), torch.bfloat16, device)
    packed = torch.cat((block.q, block.k_blk, block.v_blk), dim=2)
    q, k_blk, v_blk = packed.split([4, 2, 2], dim=2)
    both = torch.stack((block.k_ctx, block.v_ctx), dim=2)
    views = Block(q, both[:, :, 0], both[:, :, 1], k_blk, v_blk, block.context_lens)
    assert not views.q.is_contiguous()
    assert not views.k_ctx.is_contiguous()
    want = block.attend()
    assert same(views.attend(), want)
    pages = paged(block, 20)
    padded = torch.full((len(pages.k), 23, 2, 2, 64), torch.nan, dtype=torch.bfloat16, device=device)
    padded[:, :20, 0], padded[:, :20, 1] = pages.k, pages.v
    strided = Pages(padded[:, :20, 0], padded[:, :20, 1], torch.stack((pages.block_table,) * 2, dim=1)[:, 0])
    assert same(attend_paged(views, strided), want)


@pytest.mark.parametrize("dtype", DTYPES)
def test_out_may_be_strided(dtype: torch.dtype, device: str) -> None:
    block = random_block((5, 4, 2, 64), dtype, device).poisoned()
    memory = torch.full((len(LENS), 5, 7, 64), torch.nan, dtype=dtype, device=device)
    out = memory[:, :, 2:6]
    assert block.attend(out=out) is out
    assert same(out, block.attend())
    assert memory[:, :, [0, 1, 6]].isnan().all()


def test_inputs_stay(device: str) -> None:
    block = random_block((5, 4, 2, 64), torch.bfloat16, device)
    pages = paged(block, 20)
    given = [*vars(block).values(), *vars(pages).values()]
    before = [t.clone() for t in given]
    block.attend()
    attend_paged(block, pages)
    assert all(same(t, was) for t, was in zip(given, before, strict=True))


# ---- graphs, compilers, synchronisation ----


@pytest.mark.parametrize("with_table", [False, True])
def test_compiles_without_graph_breaks(with_table: bool, device: str) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(block_attention, backend="aot_eager", fullgraph=True)
    for lens in ((3, 20), (0, 7), (40, 1, 0), (1, 2, 3, 4, 5)):
        block = random_block((4, 4, 2, 64), torch.bfloat16, device, lens=lens, columns=40).poisoned()
        pages = paged(block, 8)
        context = (pages.k, pages.v) if with_table else (block.k_ctx, block.v_ctx)
        arguments = (block.q, *context, block.k_blk, block.v_blk, block.context_lens)
        arguments += (pages.block_table,) if with_table else ()
        assert same(compiled(*arguments), block_attention(*arguments))
        out = torch.full_like(block.q, torch.nan)
        compiled(*arguments, out=out)
        assert same(out, block_attention(*arguments))


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float8_e4m3fn])
def test_fake_tensors(stored: torch.dtype) -> None:
    """Which know no values: nothing asks for one."""
    block = random_block((4, 4, 2, 64), torch.bfloat16)
    pages = paged(block, 20)
    pages = dataclasses.replace(pages, k=pages.k.to(stored), v=pages.v.to(stored))
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fakes = [mode.from_tensor(t) for t in vars(block).values()]
        got = block_attention(*fakes)
        table = mode.from_tensor(pages.block_table)
        got_paged = block_attention(fakes[0], mode.from_tensor(pages.k), mode.from_tensor(pages.v), *fakes[3:], table)
    for fake in (got, got_paged):
        assert fake.shape == block.q.shape
        assert fake.stride() == block.attend().stride()
        assert fake.dtype is torch.bfloat16


def test_a_cuda_graph_sees_lengths_and_blocks_of_its_replay() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no GPU: torch.cuda.is_available() is False")
    block = random_block((8, 8, 2, 128), torch.bfloat16, "cuda", lens=(5, 100, 0, 33))
    pages = paged(block, 20)
    out = torch.full_like(block.q, torch.nan)
    attend_paged(block, pages)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        attend_paged(block, pages, out=out)
    for seed, lens in ((2, (100, 1, 40, 0)), (3, (0, 0, 0, 0)), (4, (19, 20, 21, 100))):
        fresh = random_block((8, 8, 2, 128), torch.bfloat16, "cuda", lens=lens, seed=seed).poisoned()
        for name, t in vars(fresh).items():
            getattr(block, name).copy_(t)
        for name, t in vars(paged(fresh, 20)).items():
            getattr(pages, name).copy_(t)
        out.fill_(torch.nan)
        graph.replay()
        assert_close(out, fresh.expected(), fresh)


def test_the_host_does_not_wait_for_a_gpu() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no GPU: torch.cuda.is_available() is False")
    block = random_block((8, 8, 2, 128), torch.bfloat16, "cuda")
    pages = paged(block, 20)
    torch.cuda.set_sync_debug_mode("error")
    try:
        block.attend()
        attend_paged(block, pages)
    finally:
        torch.cuda.set_sync_debug_mode("default")


# ---- refusals ----

GOOD = random_block((4, 8, 2, 64), torch.float32, lens=(3, 5), columns=16)
CACHE = torch.ones(6, 16, 2, 64)
TABLE = torch.zeros(2, 3, dtype=torch.int32)
ONE = torch.ones(1)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"q": 1}, r"q: expected a torch\.Tensor, got int"),
        ({"q": GOOD.q.long()}, r"q: expected dtype bfloat16, float16 or float32, got torch\.int64"),
        ({"q": GOOD.q[0]}, r"q: expected dimensions \[bs, D, Hq, d\], got shape \(4, 8, 64\)"),
        ({"q": GOOD.q[:, :, :0]}, r"q: expected at least one head of at least one element, got shape \(2, 4, 0, 64\)"),
        ({"q": GOOD.q[..., :0]}, r"q: expected at least one head of at least one element, got shape \(2, 4, 8, 0\)"),
        ({"q": GOOD.q[:, :, :7]}, r"k_blk: expected a number of heads that divides Hq = 7, got 2"),
        ({"k_blk": GOOD.k_blk[:, :, :0]}, r"k_blk: expected a number of heads that divides Hq = 8, got 0"),
        ({"k_blk": GOOD.k_blk[:, :3]}, r"k_blk: expected shape \(2, 4, 2, 64\), got \(2, 3, 2, 64\)"),
        ({"k_blk": GOOD.k_blk.half()}, r"k_blk: expected dtype torch\.float32, got torch\.float16"),
        ({"k_blk": None}, r"k_blk: expected a torch\.Tensor, got NoneType"),
        ({"v_blk": GOOD.v_blk[:, :, :1]}, r"v_blk: expected shape \(2, 4, 2, 64\), got \(2, 4, 1, 64\)"),
        ({"v_blk": GOOD.v_blk.to("meta")}, r"v_blk: expected device cpu, got meta"),
        ({"k_ctx": None}, r"k_ctx: expected a torch\.Tensor, got NoneType"),
        ({"k_ctx": GOOD.k_ctx[0]}, r"k_ctx: expected dimensions \[bs, C, Hk, d\], got shape \(16, 2, 64\)"),
        ({"k_ctx": GOOD.k_ctx[:1]}, r"k_ctx: expected shape \(2, 16, 2, 64\), got \(1, 16, 2, 64\)"),
        ({"k_ctx": GOOD.k_ctx[:, :, :1]}, r"k_ctx: expected shape \(2, 16, 2, 64\), got \(2, 16, 1, 64\)"),
        ({"k_ctx": GOOD.k_ctx.half()}, r"k_ctx: expected dtype torch\.float32 or torch\.float8_e4m3fn or .*uint8"),
        ({"v_ctx": GOOD.v_ctx[:, :9]}, r"v_ctx: expected shape \(2, 16, 2, 64\), got \(2, 9, 2, 64\)"),
        ({"v_ctx": GOOD.v_ctx.half()}, r"v_ctx: expected dtype torch\.float32, got torch\.float16"),
        ({"context_lens": [3, 5]}, r"context_lens: expected a torch\.Tensor, got list"),
        ({"context_lens": GOOD.context_lens.long()}, r"context_lens: expected dtype torch\.int32, got torch\.int64"),
        ({"context_lens": GOOD.context_lens[:1]}, r"context_lens: expected shape \[2\], got \(1,\)"),
        ({"k_scale": ONE}, r"k_scale: expected None for a cache of torch\.float32, got a scale"),
        ({"v_scale": ONE}, r"v_scale: expected None for a cache of torch\.float32, got a scale"),
        ({"scale": float("nan")}, r"scale: expected a finite number or None, got nan"),
        ({"out": torch.empty(2, 4, 8, 63)}, r"out: expected shape \(2, 4, 8, 64\), got \(2, 4, 8, 63\)"),
        ({"out": GOOD.q.half()}, r"out: expected dtype torch\.float32, got torch\.float16"),
        ({"out": GOOD.q}, r"out: expected memory apart from q, got a tensor that overlaps q"),
        ({"out": torch.empty(2, 4, 8, 128)[..., ::2]}, r"out: expected a last dimension of stride 1"),
        ({"out": torch.empty(2, 4, 1, 64).expand(2, 4, 8, 64)}, r"out: expected no stride of 0"),
    ],
)
def test_bad_input(bad: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        block_attention(**vars(GOOD) | bad)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (
            {"k_ctx": torch.ones(6, 2, 8, 16, 8)},
            r"k_ctx: expected dimensions \[blocks, block_size, Hk, d\], got shape \(6, 2, 8, 16, 8\)",
        ),
        ({"k_ctx": CACHE[:, :0]}, r"k_ctx: expected a block size of at least 1, got shape \(6, 0, 2, 64\)"),
        ({"k_ctx": CACHE[..., :32]}, r"k_ctx: expected shape \(6, 16, 2, 64\), got \(6, 16, 2, 32\)"),
        ({"v_ctx": CACHE[:5]}, r"v_ctx: expected shape \(6, 16, 2, 64\), got \(5, 16, 2, 64\)"),
        ({"block_table": TABLE.long()}, r"block_table: expected dtype torch\.int32, got torch\.int64"),
        ({"block_table": TABLE[:1]}, r"block_table: expected shape \[2, any\], got \(1, 3\)"),
        ({"block_table": TABLE[0]}, r"block_table: expected shape \[2, any\], got \(3,\)"),
        ({"k_scale": torch.ones(2)}, r"k_scale: expected one element, got shape \(2,\)"),
        ({"v_scale": ONE.double()}, r"v_scale: expected dtype torch\.float32, got torch\.float64"),
        ({"v_scale": 1.0}, r"v_scale: expected a torch\.Tensor, got float"),
    ],
)
def test_bad_pages(bad: dict[str, Any], message: str) -> None:
    fp8 = {"k_ctx": CACHE.to(torch.float8_e4m3fn), "v_ctx": CACHE.to(torch.float8_e4m3fn)} if "scale" in message else {}
    given: dict[str, Any] = vars(GOOD) | {"k_ctx": CACHE, "v_ctx": CACHE, "block_table": TABLE} | fp8 | bad
    if "k_ctx" in bad and "size" in message:
        given["v_ctx"] = given["k_ctx"]
    with pytest.raises(ValueError, match=message):
        block_attention(**given)


def test_what_is_refused_writes_nothing() -> None:
    out = torch.full_like(GOOD.q, 7.0)
    with pytest.raises(ValueError, match="context_lens"):
        block_attention(**vars(GOOD) | {"context_lens": GOOD.context_lens[:1]}, out=out)
    assert (out == 7).all()
