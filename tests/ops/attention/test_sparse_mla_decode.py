"""sparse_mla_decode against its formula in fp64; torch and Triton alike."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import sparse_mla_bodies as bodies
import torch
from indexer_bodies import backends
from sparse_mla_bodies import Problem, assert_close, decode, in_fp64, keys_of, problem
from triton_backend import TritonOps

layouts = pytest.mark.parametrize("token_bytes", [584, 656])


@pytest.fixture(scope="module", params=["torch", "interpreter", "gpu"])
def ops(request: pytest.FixtureRequest) -> Iterator[TritonOps]:
    if request.param != "torch" and importlib.util.find_spec("triton") is None:
        pytest.skip("Triton is not installed")
    with backends(request.param) as found:
        yield found


def is_interpreted(ops: TritonOps) -> bool:
    return type(ops).__name__ == "InterpretedOps"


def small(num_heads: int, token_bytes: int, *, extra: bool = True, sink: bool = True, seed: int = 2) -> Problem:
    """A row with keys and one without; lists that end within a tile, one into a cache of another block size."""
    other = keys_of([9, 0], 12, 4, token_bytes, padding=1, seed=seed + 7) if extra else None
    return problem(num_heads, keys_of([66, 0], 70, 64, token_bytes, seed=seed), other, sink=sink)


# ---- the matrix ----


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("extra", [False, True])
@pytest.mark.parametrize("num_heads", [16, 32, 64, 128])
@layouts
def test_against_fp64(ops: TritonOps, token_bytes: int, num_heads: int, extra: bool, ragged: bool) -> None:
    p = small(num_heads, token_bytes, extra=extra, sink=ragged)
    if ragged:
        p = replace(p, main=p.main.ragged(), extra=p.extra and p.extra.ragged())
    got = ops.run(decode, p)
    assert_close(got, in_fp64(p))
    assert (got[1] == 0).all()


@pytest.mark.parametrize("num_heads", [1, 5, 17, 48, 100])
@layouts
def test_other_numbers_of_heads(ops: TritonOps, token_bytes: int, num_heads: int) -> None:
    p = problem(num_heads, keys_of([40], 40, 64, token_bytes), None)
    assert_close(ops.run(decode, p), in_fp64(p))


@pytest.mark.parametrize("mixed", [False, True])
@layouts
def test_dense_and_ragged_together(ops: TritonOps, token_bytes: int, mixed: bool) -> None:
    p = small(16, token_bytes)
    assert p.extra is not None
    p = replace(p, main=p.main.ragged()) if mixed else replace(p, extra=p.extra.ragged())
    assert_close(ops.run(decode, p), in_fp64(p))


@layouts
def test_lengths(ops: TritonOps, token_bytes: int) -> None:
    """Of the main list, beside none, few or many of the other one; also such as no list has."""
    lens = [0, 1, 31, 32, 33, 63, 64, 65, 128]
    main = keys_of(lens, 128, 64, token_bytes)
    p = problem(16, main, keys_of([0, 0, 1, 0, 33, 0, 31, 0, 65], 65, 64, token_bytes, seed=5))
    assert_close(ops.run(decode, p), in_fp64(p))
    # below 0 is none, and past the end of the list is all of it
    outside = replace(main, lens=torch.tensor([-5, -(2**31), *lens[2:-1], 2**31 - 1], dtype=torch.int32))
    got = ops.run(decode, replace(p, main=outside))
    assert_close(got, in_fp64(replace(p, main=replace(main, lens=torch.tensor([0, 0, *lens[2:]])))))


@pytest.mark.parametrize("num_heads", [16, 128])
@layouts
def test_two_thousand_keys(ops: TritonOps, token_bytes: int, num_heads: int) -> None:
    if is_interpreted(ops) and num_heads == 128:
        pytest.skip("minutes under the interpreter; 16 heads go through as many tiles")
    p = problem(num_heads, keys_of([2048], 2048, 64, token_bytes), keys_of([128], 128, 256, token_bytes, seed=4))
    assert_close(ops.run(decode, p), in_fp64(p))


@pytest.mark.parametrize("rows", [1, 2, 7, 64, 512])
@layouts
def test_rows(ops: TritonOps, token_bytes: int, rows: int) -> None:
    if is_interpreted(ops) and rows > 7:
        pytest.skip("minutes under the interpreter")
    lens = np.random.default_rng(rows).integers(0, 100 if rows > 7 else 30, rows).tolist()
    extra = keys_of([n // 3 for n in lens], 33, 4, token_bytes, seed=9)
    p = problem(16, keys_of(lens, 100, 64, token_bytes), extra)
    assert_close(ops.run(decode, p), in_fp64(p))


@pytest.mark.parametrize(("main_block", "extra_block"), [(4, 64), (64, 4), (256, 64), (1, 256), (3, 5)])
@layouts
def test_block_sizes_and_strides(ops: TritonOps, token_bytes: int, main_block: int, extra_block: int) -> None:
    main = keys_of([70, 5], 80, main_block, token_bytes, padding=2)
    p = problem(32, main, keys_of([0, 20], 20, extra_block, token_bytes, padding=1, seed=6))
    assert_close(ops.run(decode, p), in_fp64(p))


@pytest.mark.parametrize("as_bytes", [False, True])
@pytest.mark.parametrize("fp8", [torch.float8_e4m3fn, torch.float8_e4m3fnuz])
@layouts
def test_formats(ops: TritonOps, token_bytes: int, fp8: torch.dtype, as_bytes: bool) -> None:
    """The dtype of a cache says which format it is; that of bytes is the device's."""
    from fusedcomm import platform

    if as_bytes and fp8 is not platform.fp8_dtype(torch.device(ops.device)):
        pytest.skip("not the format of this device")
    p = problem(16, keys_of([70], 70, 64, token_bytes, fp8=fp8))
    assert_close(ops.run(decode, p, None, as_bytes), in_fp64(p))


def test_several_tokens_of_a_request(ops: TritonOps) -> None:
    """The queries of four tokens, each with a key more than the one before: rows like any others, to the bit."""
    main = keys_of([40], 44, 64, 584)
    slots = main.indices[:, :40].expand(4, -1)
    lens = torch.tensor([37, 38, 39, 40], dtype=torch.int32)
    p = problem(16, replace(main, indices=torch.nn.functional.pad(slots, (0, 4), value=-1), lens=lens))
    got = ops.run(decode, p, 1)
    assert_close(got, in_fp64(p))
    for row in (0, 3):
        alone = replace(main, indices=p.main.indices[row : row + 1], lens=lens[row : row + 1])
        assert torch.equal(got[row], ops.run(decode, replace(p, q=p.q[row : row + 1], main=alone), 1)[0])


# ---- what must not matter ----


@pytest.mark.parametrize("num_heads", [16, 64])
@layouts
def test_nothing_but_listed_tokens_is_read(ops: TritonOps, token_bytes: int, num_heads: int) -> None:
    """Whatever the other bytes are, the result has the same bits; NaN, in most of them, is what all tests here have."""
    p = small(num_heads, token_bytes)
    assert p.extra is not None
    assert (p.main.cache.memory == bodies.NAN_BYTE).float().mean() > 0.4
    want = ops.run(decode, p, 1)
    assert not want.isnan().any()
    other = replace(p, main=p.main.with_poison(0x7E), extra=p.extra.with_poison(0x7E))
    assert torch.equal(ops.run(decode, other, 1), want)


def test_skipped_entries_do_not_count(ops: TritonOps) -> None:
    """A list with holes is what it is without them."""
    p = small(16, 584, extra=False)
    compact = torch.full_like(p.main.indices, -1)
    slots = p.main.slots_of(0)
    compact[0, : len(slots)] = torch.from_numpy(slots.astype(np.int32))
    assert (compact != p.main.indices).any()
    got = ops.run(decode, replace(p, main=replace(p.main, indices=compact)))
    assert_close(got, in_fp64(p))


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("num_heads", [16, 64])
def test_no_keys_at_all(ops: TritonOps, num_heads: int, splits: int) -> None:
    """Zeros, whatever the sink is: of empty lists, of lists of nothing, and of a cache without blocks."""
    sink = torch.full((num_heads,), torch.nan)
    sink[:3] = torch.tensor([torch.inf, -torch.inf, 3e38])
    empty = problem(num_heads, keys_of([0, 0], 0, 64, 584), keys_of([0, 0], 3, 4, 584))
    nowhere = problem(num_heads, keys_of([20, 5], 20, 64, 584))
    nowhere = replace(nowhere, main=replace(nowhere.main, indices=torch.full((2, 20), 1 << 30, dtype=torch.int32)))
    no_blocks = replace(nowhere.main.cache, memory=nowhere.main.cache.memory[:0])
    for p in (empty, nowhere, replace(nowhere, main=replace(nowhere.main, cache=no_blocks))):
        assert (ops.run(decode, replace(p, sink=sink), splits) == 0).all()


def test_no_rows(ops: TritonOps) -> None:
    p = problem(16, keys_of([], 8, 64, 656))
    assert ops.run(decode, p).shape == (0, 16, 512)


def test_sinks(ops: TritonOps) -> None:
    """One that takes everything, one that takes nothing, and one above all scores; in one part or in several."""
    p = small(16, 584, extra=False)
    sink = torch.linspace(-8.0, 30.0, 16)
    sink[0], sink[1] = -torch.inf, torch.inf
    p = replace(p, sink=sink)
    want = in_fp64(replace(p, sink=sink.clamp(max=1e30)))
    for splits in (1, 3):
        got = ops.run(decode, p, splits)
        assert_close(got, want)
        assert (got[:, 1] == 0).all()
    without = ops.run(decode, replace(p, sink=None), 1)
    assert torch.equal(without[:, 0], ops.run(decode, p, 1)[:, 0])


def test_nan_in_a_listed_token_is_seen(ops: TritonOps) -> None:
    """It spoils the rows that list it and no other one."""
    p = problem(16, keys_of([40, 3], 40, 64, 584))
    slot = int(p.main.slots_of(0)[0])
    assert slot not in p.main.slots_of(1)
    block, o, _, _, _ = bodies.positions(slot, 64, 584)
    p.main.cache.memory[block, 64 * 576 + o * 8] = 255  # the scale of its first group
    for splits in (1, 3):
        got = ops.run(decode, p, splits)
        assert got[0].isnan().any()
        assert not got[1].isnan().any()


def test_large_scores(ops: TritonOps) -> None:
    """The largest score is taken off: nothing overflows, of either sign of the scale."""
    for scale in (40.0, -40.0, 0.0):
        p = replace(small(16, 656, extra=False), scale=scale)
        got = ops.run(decode, p, 1)
        assert not got.isnan().any()
        if scale == 0.0:  # with others, one key takes all, and which one rounding may decide
            assert_close(got, in_fp64(p))


# ---- splits ----


@pytest.mark.parametrize("num_heads", [16, 64])
@layouts
def test_splits(ops: TritonOps, token_bytes: int, num_heads: int) -> None:
    """1 to 16 parts, most of them without a key, in memory that is NaN: the same within the rounding of weights.

    A weight is rounded to bf16 relative to the largest of its part: 2^-9 of each, and the result another 2^-9.
    """
    p = small(num_heads, token_bytes)
    every: list[int | None] = [*range(1, 17), None]
    if is_interpreted(ops):  # a program takes a tenth of a second
        every = [1, 2, 16]
    want = in_fp64(p)
    results = ops.run(bodies.decode_splits, p, every)
    for got in results:
        assert_close(got, want)
        assert (got - results[0]).abs().max() <= 1e-2 * np.abs(want).max()


def test_lengths_that_change(ops: TritonOps) -> None:
    """With the same tensors, as in a graph that is replayed: nothing is remembered of the call before."""
    p = problem(16, keys_of([66, 3], 70, 64, 584))
    changes = [[0, 3], [66, 0], [1, 3]]
    for splits in (1, 2):
        found = ops.run(bodies.decode_changing, p, changes, splits)
        for lens, got in zip(changes, found, strict=True):
            fresh = replace(p.main, lens=torch.tensor(lens, dtype=torch.int32))
            assert_close(got, in_fp64(replace(p, main=fresh)))


# ---- memory ----


def test_strides_of_queries_and_results() -> None:
    """Rows and heads that lie apart, and a last dimension that does; into a part of a tensor."""
    for token_bytes in (584, 656):
        p = small(5, token_bytes)
        want = decode("cpu", p)
        given, options = bodies.arguments(p, "cpu")
        wide = torch.zeros(2, 7, 2 * p.q.shape[2], dtype=torch.bfloat16)
        for view in (wide[:, 1:6, : p.q.shape[2]], wide[:, 1:6, ::2]):
            view.copy_(p.q)
            memory = torch.full((2, 9, 600), 7.0, dtype=torch.bfloat16)
            out = memory[:, 2:7, 40:552]
            bodies.attention.sparse_mla_decode(view, *given[1:], **options, out=out)
            assert torch.equal(out, want)
            assert (memory[:, :2] == 7).all()
            assert (memory[..., 552:] == 7).all()
        assert torch.equal(bodies.attention.sparse_mla_decode(*given, **options), want)


def strided(device: str, p: Problem) -> list[torch.Tensor]:
    """Results of strided queries in strided memory that was 7: in one part, and in two."""
    (q, *given), options = bodies.arguments(p, device)
    wide = torch.zeros(2, 21, 2, q.shape[2], dtype=torch.bfloat16, device=device)
    wide[:, 2:18, 1] = q
    found = []
    for splits in (1, 2):
        memory = torch.full((2, 19, 600), 7.0, dtype=torch.bfloat16, device=device)
        out = memory[:, 2:18, 40:552]
        bodies.attention.sparse_mla_decode(wide[:, 2:18, 1], *given, **options, out=out, num_splits=splits)
        found.append(memory.cpu())
    return found


def test_strides(ops: TritonOps) -> None:
    p = small(16, 584)
    for memory in ops.run(strided, p):
        assert_close(memory[:, 2:18, 40:552], in_fp64(p))
        memory[:, 2:18, 40:552] = 7
        assert (memory == 7).all()


@pytest.mark.parametrize(
    "tile",
    [
        (16, 64, 4, False, False, 1),  # AMD's
        (32, 64, 4, False, False, 1),
        (64, 64, 4, False, False, 1),
        (16, 64, 4, False, True, 2),  # of a GPU that is not sm_90, with more heads than it has
    ],
)
@layouts
def test_tiles_of_other_devices(triton_ops: TritonOps, token_bytes: int, tile: tuple[int, ...]) -> None:
    p = problem(40, keys_of([66], 70, 64, token_bytes), keys_of([9], 12, 4, token_bytes, seed=9))
    assert_close(triton_ops.run(bodies.decode_with_tile, p, tile, 1), in_fp64(p))


# ---- torch.compile, graphs, streams ----


def test_compiles_without_graph_breaks() -> None:
    bodies.op_compiles("cpu")


def test_triton_compiles_without_graph_breaks(triton_ops: TritonOps) -> None:
    triton_ops.run(bodies.op_compiles)


def test_opcheck(triton_ops: TritonOps) -> None:
    triton_ops.run(bodies.opcheck)


@pytest.fixture
def gpu(triton_ops: TritonOps) -> TritonOps:
    if triton_ops.device != "cuda":
        pytest.skip("graphs and streams are those of a GPU")
    return triton_ops


@pytest.mark.parametrize("splits", [None, 1, 6])
@pytest.mark.parametrize("num_heads", [16, 128])
def test_graph_replays(gpu: TritonOps, num_heads: int, splits: int | None) -> None:
    main = keys_of([66, 3, 40], 70, 64, 584)
    p = problem(num_heads, main, keys_of([9, 0, 0], 12, 4, 584, seed=9))
    changes = [[66, 3, 40], [0, 0, 0], [5, 1, 33], [66, 3, 40]]
    for lens, got in zip(changes, gpu.run(bodies.graph_replays, p, changes, splits), strict=True):
        want = in_fp64(replace(p, main=replace(main, lens=torch.tensor(lens, dtype=torch.int32))))
        assert_close(got, want)


def test_streams(gpu: TritonOps) -> None:
    a, b = small(16, 584), small(64, 656, seed=11)
    found = gpu.run(bodies.two_streams, a, b)
    for p, results in ((a, found[::2]), (b, found[1::2])):
        assert_close(results[0], in_fp64(p))
        assert all(torch.equal(got, results[0]) for got in results)


def test_nothing_is_allocated(gpu: TritonOps) -> None:
    assert gpu.run(bodies.allocations, small(16, 584)) == 0
