"""fp8_paged_mqa_logits against fp64 and against transformers' indexers of DeepSeek-V3.2 and GLM; both layouts alike."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import indexer_bodies as bodies
import numpy as np
import pytest
import spec
import torch
from cases import FP8_DTYPES, make
from indexer_bodies import LAYOUTS, TOKEN_BYTES, backends, blocks_of, get, slot_of, table_of
from torch.overrides import TorchFunctionMode
from triton_backend import TritonOps

from fusedcomm.ops.attention import fp8_paged_mqa_logits

FN = torch.float8_e4m3fn


@pytest.fixture(scope="module", params=["torch", "interpreter", "gpu"])
def ops(request: pytest.FixtureRequest) -> Iterator[TritonOps]:
    if request.param != "torch" and importlib.util.find_spec("triton") is None:
        pytest.skip("Triton is not installed")
    with backends(request.param) as found:
        yield found


def tolerance(ops: TritonOps) -> float:
    """Of the sum of the magnitudes of all terms.

    In fp32 a sum of 128 products and one of up to 128 heads round up to 256 times by 2^-24. Hopper's matrix
    instructions keep 13 bits of a sum of FP8 products below the largest of them, and round four of those for 128.
    """
    return 2.0**-16 if ops.device == "cpu" else 2.0**-10


# ---- fp64 ----


class Case(NamedTuple):
    """Requests, queries, heads; tokens in the cache and columns of the result."""

    lens: list[int]
    next_n: int
    num_heads: int
    max_context_len: int


CASES = [
    Case([1, 0, 130, 37], 1, 64, 150),
    Case([200, 3], 2, 16, 190),  # a context that is longer than the result
    Case([65, 2, 300], 3, 5, 301),  # heads that fill no tile; a query that sees nothing; an odd row
    Case([17], 1, 1, 400),  # tiles past the end of the context
    Case([128, 129], 1, 128, 129),
]


class Given(NamedTuple):
    """Arguments of bodies.logits, but for the layout."""

    memory: torch.Tensor
    q: torch.Tensor
    weights: torch.Tensor
    lens: torch.Tensor
    table: torch.Tensor
    max_context_len: int


def codes_like(seed: int, shape: tuple[int, ...], fp8: torch.dtype) -> torch.Tensor:
    """Any FP8 values of moderate size."""
    return make(seed, shape, torch.float32, "finite").nan_to_num(0).clamp(-3, 3).mul_(4).to(fp8)


def given(case: Case, layout: tuple[int, bool], fp8: torch.dtype, seed: int = 1) -> Given:
    """Keys that were drawn, in a cache that is full of NaN elsewhere."""
    block_size, preshuffle = layout
    num_blocks = 2 + sum(-(-n // block_size) for n in case.lens)
    memory = torch.full((num_blocks, block_size * TOKEN_BYTES + 20), 0xFF if fp8 is FN else 0x80, dtype=torch.uint8)
    table = table_of(case.lens, num_blocks, block_size)
    rng = np.random.default_rng(seed)
    for request, n in enumerate(case.lens):
        codes = codes_like(seed + request, (n, 128), fp8).view(torch.uint8).numpy()
        scale = rng.uniform(0.01, 2.0, n).astype(np.float32)
        slots = torch.tensor([slot_of(table, request, t, num_blocks, block_size) for t in range(n)])
        bodies.put(memory.numpy(), bodies.Keys(codes, scale), slots, block_size, preshuffle)
    batch = len(case.lens)
    q = codes_like(seed + 50, (batch, case.next_n, case.num_heads, 128), fp8)
    weights = make(seed + 60, (batch * case.next_n, case.num_heads), torch.float32, "ordinary")
    return Given(memory, q, weights, torch.tensor(case.lens, dtype=torch.int32), table, case.max_context_len)


class Exact(NamedTuple):
    """fp64 logits ``[B * next_n, max_context_len]``, and the sum of the magnitudes of their terms."""

    logits: np.ndarray
    magnitude: np.ndarray


def exact(g: Given, visible: list[list[int]], block_size: int, preshuffle: bool) -> Exact:
    """From the text, in fp64; ``visible``: how many tokens each query sees."""
    values = spec.fp8_values(g.q.dtype)
    batch, next_n, _, _ = g.q.shape
    logits = np.full((batch * next_n, g.max_context_len), -np.inf)
    magnitude = np.zeros_like(logits)
    q = values[g.q.view(torch.uint8).numpy()]
    for request in range(batch):
        for query in range(next_n):
            row = request * next_n + query
            for token in range(min(visible[request][query], g.max_context_len)):
                slot = slot_of(g.table, request, token, len(g.memory), block_size)
                if slot is None:
                    continue
                keys = get(g.memory.numpy(), [slot], block_size, preshuffle)
                products = q[request, query] * values[keys.codes[0]]
                weight, scale = g.weights[row].double().numpy(), float(keys.scale[0])
                logits[row, token] = (weight * np.maximum(products.sum(-1), 0)).sum() * scale
                magnitude[row, token] = (np.abs(weight) * np.abs(products).sum(-1)).sum() * scale
    return Exact(logits, magnitude)


def check(got: torch.Tensor, want: Exact, tolerance: float) -> None:
    seen = np.isfinite(want.logits)
    assert (got.numpy()[~seen] == -np.inf).all()
    error = np.abs(got.double().numpy()[seen] - want.logits[seen])
    assert (error <= want.magnitude[seen] * tolerance).all(), error.max()


def every_query(lens: list[int], next_n: int) -> list[list[int]]:
    """The last query sees the whole context, each before it one token fewer."""
    return [[max(n - next_n + 1 + query, 0) for query in range(next_n)] for n in lens]


@pytest.mark.parametrize("fp8", FP8_DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", CASES)
def test_against_fp64(ops: TritonOps, case: Case, layout: tuple[int, bool], fp8: torch.dtype) -> None:
    g = given(case, layout, fp8)
    want = exact(g, every_query(case.lens, case.next_n), *layout)
    assert np.isfinite(want.logits).any()
    check(ops.run(bodies.logits, *g, *layout), want, tolerance(ops))


@pytest.mark.parametrize("fp8", FP8_DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_both_layouts_to_the_bit(ops: TritonOps, case: Case, fp8: torch.dtype) -> None:
    results = [ops.run(bodies.logits, *given(case, layout, fp8), *layout) for layout in LAYOUTS]
    for result in results[1:]:
        assert torch.equal(result.view(torch.int32), results[0].view(torch.int32))


@pytest.mark.parametrize("num_tiles", [1, 2, 3, 100])
@pytest.mark.parametrize("layout", [(4, False), (64, False), (64, True)])
def test_tiles_of_a_program(ops: TritonOps, layout: tuple[int, bool], num_tiles: int) -> None:
    """To the bit, wherever the context and the result end; several queries likewise."""
    for case in (Case([449, 0, 64, 191], 1, 16, 450), Case([257, 3], 2, 16, 200)):
        g = given(case, layout, FN)
        want = ops.run(bodies.logits, *g, *layout)
        check(want, exact(g, every_query(case.lens, case.next_n), *layout), tolerance(ops))
        got = ops.run(bodies.logits_in_tiles, num_tiles, *g, *layout)
        assert torch.equal(got.view(torch.int32), want.view(torch.int32))


def test_tiles_that_are_not_there(ops: TritonOps) -> None:
    """Blocks of a whole tile below 0, past the end, or outside of the table."""
    case, layout = Case([300, 300, 300], 2, 8, 300), (64, True)
    g = given(case, layout, FN)
    table = g.table[:, :4].contiguous()
    table[0, 1], table[1, 0], table[2, 3] = -1, len(g.memory), 1 << 30
    g = g._replace(table=table)
    want = exact(g, every_query(case.lens, 2), *layout)
    assert (want.logits == -np.inf).sum() == 6 * (64 + 300 - 256)
    for num_tiles in (1, 5):
        check(ops.run(bodies.logits_in_tiles, num_tiles, *g, *layout), want, tolerance(ops))


def test_lengths_of_each_query(ops: TritonOps) -> None:
    """A tree of drafts, say: what a query sees grows with nothing."""
    case, layout = Case([140, 60], 3, 32, 140), (16, True)
    visible = [[139, 0, 64], [1, 60, 17]]
    g = given(case, layout, FN)
    apart = torch.full((2, 5), 999, dtype=torch.int32)
    apart[:, :3] = torch.tensor(visible)
    for lens in (apart[:, :3].contiguous(), apart[:, :3]):
        check(ops.run(bodies.logits, *g._replace(lens=lens), *layout), exact(g, visible, *layout), tolerance(ops))


def test_blocks_that_are_not_there(ops: TritonOps) -> None:
    """Below 0, past the end, or outside of the table: -inf, though they are in the context."""
    case, layout = Case([100, 100, 100], 1, 8, 100), (16, False)
    g = given(case, layout, FN)
    table = g.table[:, :6].contiguous()
    table[0, 1], table[1, 0], table[2, 5] = -1, len(g.memory), 1 << 30
    g = g._replace(table=table)
    want = exact(g, every_query(case.lens, 1), *layout)
    assert (want.logits == -np.inf).sum() == 3 * 16 + 3 * 4
    check(ops.run(bodies.logits, *g, *layout), want, tolerance(ops))


def test_a_nan_stays_where_it_is(ops: TritonOps) -> None:
    """In a code and in a scale: that token's logit is NaN, and no other."""
    case, layout = Case([90], 2, 16, 90), (16, True)
    g = given(case, layout, FN)
    want = exact(g, every_query(case.lens, 2), *layout)
    for token, position in ((20, bodies.value_position(4, 77, True)), (41, bodies.scale_position(9, 16) + 3)):
        g.memory[g.table[0, token // 16], position] = 0x7F
        if token == 41:
            g.memory[g.table[0, 2], position - 1] = 0xC0
    got = ops.run(bodies.logits, *g, *layout)
    assert got[:, [20, 41]].isnan().all()
    got[:, [20, 41]] = torch.from_numpy(want.logits[:, [20, 41]]).float()
    check(got, want, tolerance(ops))


@pytest.mark.parametrize(
    ("batch", "num_blocks", "columns", "length"), [(0, 2, 2, 5), (2, 0, 2, 5), (2, 2, 0, 5), (2, 2, 2, 0)]
)
def test_nothing_to_score(ops: TritonOps, batch: int, num_blocks: int, columns: int, length: int) -> None:
    q, weights = torch.zeros(batch, 2, 8, 128).to(FN), torch.ones(batch * 2, 8)
    lens, table = torch.full((batch,), 9, dtype=torch.int32), torch.zeros(batch, columns, dtype=torch.int32)
    got = ops.run(bodies.logits, blocks_of(num_blocks, 16, 0), q, weights, lens, table, length, 16, True)
    assert got.shape == (batch * 2, length)
    assert (got == -np.inf).all()


def test_operands_with_strides() -> None:
    """Copied where they are not contiguous; and a result that is allocated."""
    case, layout = Case([50], 2, 8, 50), (64, False)
    g = given(case, layout, FN)
    want = bodies.logits("cpu", *g, *layout)
    cache = bodies.paged(g.memory, 64, FN)
    q = torch.zeros(1, 8, 2, 128).to(FN).transpose(1, 2).copy_(g.q)
    weights = torch.zeros(8, 2).t().copy_(g.weights)
    assert not q.is_contiguous()
    assert not weights.is_contiguous()
    assert torch.equal(fp8_paged_mqa_logits(q, cache, weights, g.lens, g.table, 50), want)


# ---- transformers ----


class Recorded(NamedTuple):
    """What an indexer of transformers multiplied: q ``[B, S, H, 128]``, k ``[B, S, 128]``, weights ``[B, S, H]``."""

    q: torch.Tensor
    k: torch.Tensor
    weights: torch.Tensor
    scores: torch.Tensor
    """``[B, S, S]``, before the top k are taken; -inf where a token lies ahead."""


class Recorder(TorchFunctionMode):
    """Takes the operands and the scores out of an indexer's forward; ``change`` replaces q and k on their way in."""

    def __init__(self, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self._change = change
        self._products: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._scores: list[torch.Tensor] = []

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.matmul:
            if not self._products:
                q, k = args[0], args[1].transpose(-1, -2)
                self._products.append((q, k[:, 0]))
                args = (self._change(q), self._change(k).transpose(-1, -2))
            else:
                self._products.append(args)
        if function is torch.Tensor.topk:
            self._scores.append(args[0])
        return function(*args, **(kwargs or {}))

    def result(self) -> Recorded:
        (q, k), (weights, _) = self._products
        (scores,) = self._scores
        return Recorded(q, k, weights[..., 0, :], scores)


def indexer_of(family: str) -> torch.nn.Module:
    """A small indexer with random weights."""
    transformers = pytest.importorskip("transformers", reason="needs transformers: pip install fusedcomm[test]")
    sizes = {"hidden_size": 96, "q_lora_rank": 48, "qk_rope_head_dim": 64, "index_n_heads": 16, "index_head_dim": 128}
    torch.manual_seed(3)
    if family == "deepseek_v32":
        from transformers.models.deepseek_v32.modeling_deepseek_v32 import DeepseekV32Indexer

        return DeepseekV32Indexer(transformers.DeepseekV32Config(**sizes, index_topk=4096), 0)
    from transformers.models.glm_moe_dsa.modeling_glm_moe_dsa import GlmMoeDsaIndexer

    return GlmMoeDsaIndexer(transformers.GlmMoeDsaConfig(**sizes, index_topk=4096), 0)


def run_indexer(family: str, tokens: int, change: Callable[[torch.Tensor], torch.Tensor]) -> Recorded:
    """A causal forward over random hidden states of two requests."""
    indexer = indexer_of(family)
    hidden, residual = (
        make(11, (2, tokens, 96), torch.float32, "ordinary"),
        make(12, (2, tokens, 48), torch.float32, "ordinary"),
    )
    angles = make(13, (2, tokens, 32), torch.float32, "ordinary").repeat(1, 1, 2)
    causal = torch.ones(1, tokens, tokens, dtype=torch.bool).tril()
    with Recorder(change) as recorder:
        indexer(hidden, residual, (angles.cos(), angles.sin()), causal, torch.arange(tokens))
    return recorder.result()


def fp8_of(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """FP8 with a scale for each 128 elements, as the cache has it: (values, scales), both fp32."""
    keys = bodies.quantised(x.flatten(0, -2).float(), FN, False)
    values = spec.fp8_values(FN)[keys.codes].astype(np.float32)
    return torch.from_numpy(values).view(x.shape), torch.from_numpy(keys.scale).view(x.shape[:-1])


def through_the_cache(ops: TritonOps, r: Recorded, layout: tuple[int, bool]) -> torch.Tensor:
    """Our logits of what an indexer multiplies: its keys by way of the cache, its queries in FP8."""
    block_size, preshuffle = layout
    batch, tokens = r.q.shape[:2]
    num_blocks = batch * (-(-tokens // block_size)) + 1
    table = table_of([tokens] * batch, num_blocks, block_size)
    slots = [slot_of(table, b, t, num_blocks, block_size) for b in range(batch) for t in range(tokens)]
    arguments = (r.k.flatten(0, 1).contiguous(), torch.tensor(slots), block_size, FN, False, preshuffle)
    memory = ops.run(bodies.write, blocks_of(num_blocks, block_size, 0), *arguments)
    q, q_scale = fp8_of(r.q)
    # relu(a x) = a relu(x) for a > 0: the scales of q and of the softmax go to the weights
    weights = (r.weights * q_scale * 128**-0.5).flatten(0, 1).contiguous()
    lens = torch.full((batch,), tokens, dtype=torch.int32)
    given = (memory, q.to(FN), weights, lens, table, tokens, block_size, preshuffle)
    return ops.run(bodies.logits, *given).view(batch, tokens, tokens)


@pytest.mark.parametrize("layout", [(64, False), (16, True), (64, True)])
@pytest.mark.parametrize("family", ["deepseek_v32", "glm_moe_dsa"])
def test_transformers_on_the_same_fp8(ops: TritonOps, family: str, layout: tuple[int, bool]) -> None:
    """transformers' arithmetic on operands that went to FP8 and back: what is left is the rounding of fp32 sums."""

    def to_fp8_and_back(x: torch.Tensor) -> torch.Tensor:
        values, scale = fp8_of(x)
        return values * scale.unsqueeze(-1)

    r = run_indexer(family, 70, to_fp8_and_back)
    got = through_the_cache(ops, r, layout)
    ahead = r.scores == -torch.inf
    assert torch.equal(got == -torch.inf, ahead)
    magnitude = (r.weights.abs() * 128**-0.5 * r.q.norm(dim=-1)).sum(-1, keepdim=True) * r.k.norm(dim=-1).unsqueeze(1)
    error = (got - r.scores).abs()[~ahead]
    # 2^-20: an element times its scale is rounded to fp32 on their side, and ours is folded into the weights
    assert (error <= (magnitude.expand_as(got) * (tolerance(ops) + 2.0**-20))[~ahead]).all(), error.max()


@pytest.mark.parametrize("layout", [(64, False), (64, True)])
@pytest.mark.parametrize("family", ["deepseek_v32", "glm_moe_dsa"])
def test_transformers_without_fp8(ops: TritonOps, family: str, layout: tuple[int, bool]) -> None:
    """transformers' own logits, in fp32: what is left is FP8.

    A value of e4m3 is off by up to 2^-4 of itself, 2^-5 in the mean. The signs of 128 products with two such errors are
    random, so a dot product is off by about 2^-4.5 of |q| |k| / sqrt(128), and 16 heads with weights of either sign by
    that over sqrt(16): in the mean over all logits, that is.
    """
    r = run_indexer(family, 70, lambda x: x)
    got = through_the_cache(ops, r, layout)
    seen = r.scores > -torch.inf
    magnitude = (r.weights.abs() * 128**-0.5 * r.q.norm(dim=-1)).sum(-1, keepdim=True) * r.k.norm(dim=-1).unsqueeze(1)
    error = ((got - r.scores).abs() / magnitude)[seen]
    assert error.mean() < 2.0**-4.5 / (128 * 16) ** 0.5
    # and as a whole: the logits point where theirs do
    a, b = got[seen].double(), r.scores[seen].double()
    assert torch.dot(a, b) / (a.norm() * b.norm()) > 0.999


# ---- refusals ----

Q, CACHE = torch.zeros(2, 1, 8, 128).to(FN), torch.zeros(3, 16, TOKEN_BYTES, dtype=torch.uint8)
WEIGHTS, LENS, TABLE = torch.ones(2, 8), torch.ones(2, dtype=torch.int32), torch.zeros(2, 3, dtype=torch.int32)
OUT = torch.full((2, 20), 5.0)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"q": None}, r"q: expected a torch\.Tensor, got NoneType"),
        ({"q": Q.view(torch.uint8)}, r"q: expected dtype torch\.float8_e4m3fn like the cache, got torch\.uint8"),
        ({"q": Q.view(torch.float8_e4m3fnuz)}, r"q: expected dtype torch\.float8_e4m3fn like the cache, got"),
        (
            {"kv_cache": CACHE.view(torch.float8_e4m3fnuz)},
            r"q: expected dtype torch\.float8_e4m3fnuz like the cache, got",
        ),
        ({"q": Q[0]}, r"q: expected shape \[B, next_n >= 1, H from 1 to 128, 128\], got \(1, 8, 128\)"),
        ({"q": Q[..., :64]}, r"q: expected shape .*, got \(2, 1, 8, 64\)"),
        ({"q": Q[:, :0]}, r"q: expected shape .*, got \(2, 0, 8, 128\)"),
        ({"q": torch.zeros(2, 1, 129, 128).to(FN)}, r"q: expected shape .*, got \(2, 1, 129, 128\)"),
        ({"q": Q.to("meta")}, r"q: expected device cpu like the cache, got meta"),
        (
            {"kv_cache": CACHE[:, :8], "preshuffle": True},
            r"kv_cache: expected a block size that is a multiple of 16 with",
        ),
        ({"weights": WEIGHTS.half()}, r"weights: expected dtype torch\.float32, got torch\.float16"),
        ({"weights": WEIGHTS[:, :7]}, r"weights: expected shape \(2, 8\), got \(2, 7\)"),
        ({"weights": [1.0]}, r"weights: expected a torch\.Tensor, got list"),
        ({"context_lens": LENS.long()}, r"context_lens: expected dtype torch\.int32, got torch\.int64"),
        ({"context_lens": LENS[:1]}, r"context_lens: expected shape \[2\], got \(1,\)"),
        ({"context_lens": LENS.view(1, 2)}, r"context_lens: expected shape \[2, 1\], got \(1, 2\)"),
        ({"block_table": TABLE[:1]}, r"block_table: expected shape \[2, any\], got \(1, 3\)"),
        ({"block_table": TABLE.float()}, r"block_table: expected dtype torch\.int32, got torch\.float32"),
        ({"max_context_len": -1}, r"max_context_len: expected an int >= 0, got -1"),
        ({"max_context_len": True}, r"max_context_len: expected an int >= 0, got True"),
        ({"max_context_len": torch.tensor(20)}, r"max_context_len: expected an int >= 0, got tensor"),
        ({"preshuffle": 0}, r"preshuffle: expected a bool, got 0"),
        ({"out": OUT[:, :19]}, r"out: expected shape \(2, 20\), got \(2, 19\)"),
        ({"out": OUT.double()}, r"out: expected dtype torch\.float32, got torch\.float64"),
        ({"out": torch.zeros(20, 2).t()}, r"out: expected a contiguous tensor, got strides \(1, 2\)"),
        ({"weights": OUT.flatten()[:16].view(2, 8), "out": OUT}, r"out: expected memory apart from weights"),
    ],
)
def test_bad_input(bad: dict[str, Any], message: str) -> None:
    given: dict[str, Any] = {
        "q": Q,
        "kv_cache": CACHE,
        "weights": WEIGHTS,
        "context_lens": LENS,
        "block_table": TABLE,
        "max_context_len": 20,
        "out": OUT,
    } | bad
    with pytest.raises(ValueError, match=message):
        fp8_paged_mqa_logits(**given)
    assert (OUT == 5).all()
