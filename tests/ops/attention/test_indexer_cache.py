"""The indexer's cache: what is written where, byte by byte, and what is gathered from it; torch and Triton alike."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from typing import Any

import indexer_bodies as bodies
import numpy as np
import pytest
import spec
import torch
from cases import DTYPES, FP8_DTYPES, KINDS, make
from indexer_bodies import LAYOUTS, TOKEN_BYTES, backends, blocks_of, get, put, quantised, slot_of, table_of
from qk_bodies import all_same
from torch._subclasses.fake_tensor import FakeTensorMode
from triton_backend import TritonOps

from fusedcomm import platform
from fusedcomm.ops.attention import cp_gather_indexer_k_quant_cache, indexer_k_quant_and_cache

layouts = pytest.mark.parametrize(("block_size", "preshuffle"), LAYOUTS)


@pytest.fixture(scope="module", params=["torch", "interpreter", "gpu"])
def ops(request: pytest.FixtureRequest) -> Iterator[TritonOps]:
    if request.param != "torch" and importlib.util.find_spec("triton") is None:
        pytest.skip("Triton is not installed")
    with backends(request.param) as found:
        yield found


def slots_of(num_tokens: int, num_slots: int) -> torch.Tensor:
    """Slots in no order, none twice; some negative, some past the end."""
    slots = torch.from_numpy(np.random.default_rng(3).permutation(num_slots)[:num_tokens])
    slots[2::7] = torch.tensor([-1, num_slots, -7, 1 << 40, num_slots + 5])[: len(slots[2::7])]
    return slots


# ---- write ----


@pytest.mark.parametrize("fp8", FP8_DTYPES)
@pytest.mark.parametrize("ue8m0", [False, True])
@layouts
def test_every_byte(ops: TritonOps, block_size: int, preshuffle: bool, ue8m0: bool, fp8: torch.dtype) -> None:
    """All of the memory: values, scales, the slots of nobody and the padding between blocks."""
    num_tokens = 35  # a program's worth and three more
    for padding in (0, 12, 64):
        memory = blocks_of(-(-80 // block_size), block_size, padding)
        slots = slots_of(num_tokens, len(memory) * block_size)
        k = make(padding, (num_tokens, 128), torch.bfloat16, "ordinary")
        got = ops.run(bodies.write, memory, k, slots, block_size, fp8, ue8m0, preshuffle)
        want = memory.numpy().copy()
        put(want, quantised(k, fp8, ue8m0), slots, block_size, preshuffle)
        assert (want != memory.numpy()).any()
        np.testing.assert_array_equal(got.numpy(), want)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("ue8m0", [False, True])
def test_every_kind_of_values(ops: TritonOps, ue8m0: bool, dtype: torch.dtype, kind: str) -> None:
    k = make(9, (33, 128), dtype, kind)
    for fp8 in FP8_DTYPES:
        memory = ops.run(bodies.write, blocks_of(3, 16, 0), k, torch.arange(33), 16, fp8, ue8m0, True)
        got, want = get(memory.numpy(), list(range(33)), 16, True), quantised(k, fp8, ue8m0)
        spec.assert_codes(torch.from_numpy(got.codes).view(fp8), want.codes)
        spec.assert_same(torch.from_numpy(got.scale), want.scale, "scale")


def test_scales(ops: TritonOps) -> None:
    """The smallest one, one that is a power of two already, its neighbours, and that of a NaN."""
    k = torch.zeros(5, 128)
    k[:, 7] = torch.tensor([1e-9, -448.0, np.nextafter(np.float32(448), np.float32(500)), 447.0, np.nan])
    for ue8m0, expected in ((False, [1e-4 / 448, 1.0, 1.0 + 2.0**-23, 447 / 448]), (True, [2.0**-22, 1.0, 2.0, 1.0])):
        memory = ops.run(bodies.write, blocks_of(5, 1, 0), k, torch.arange(5), 1, torch.float8_e4m3fn, ue8m0, False)
        scale = get(memory.numpy(), list(range(5)), 1, False).scale
        np.testing.assert_array_equal(scale[:4], np.array(expected, np.float32))
        assert np.isnan(scale[4])


def test_a_slot_that_is_there_twice(ops: TritonOps) -> None:
    """Each of its bytes is that of one of its tokens; all others are as ever."""
    memory, k = blocks_of(2, 16, 0), make(1, (40, 128), torch.bfloat16, "ordinary")
    slots = torch.arange(40) % 32
    slots[20:30] = 7
    keys = quantised(k, torch.float8_e4m3fn, False)
    got = ops.run(bodies.write, memory, k, slots, 16, torch.float8_e4m3fn, False, False)
    for slot in range(32):
        tokens = [token for token in range(40) if slots[token] == slot]
        candidates = []
        for token in tokens or [None]:
            one = memory.numpy().copy()
            if token is not None:
                put(one, bodies.Keys(keys.codes[[token]], keys.scale[[token]]), torch.tensor([slot]), 16, False)
            mine = get(one, [slot], 16, False)
            candidates.append(np.concatenate((mine.codes[0], mine.scale.view(np.uint8))))
        here = get(got.numpy(), [slot], 16, False)
        bytes_here = np.concatenate((here.codes[0], here.scale.view(np.uint8)))
        assert (np.stack(candidates) == bytes_here).any(0).all(), slot


def test_keys_with_strides(ops: TritonOps) -> None:
    """Rows that lie apart, and elements that do."""
    wide = make(2, (20, 300), torch.bfloat16, "ordinary")
    for columns in (slice(51, 179), slice(0, 256, 2)):
        arguments = (torch.arange(20), 64, torch.float8_e4m3fn, False, False)
        got = ops.run(bodies.write, blocks_of(1, 64, 0), wide, *arguments, columns)
        want = ops.run(bodies.write, blocks_of(1, 64, 0), wide[:, columns].contiguous(), *arguments)
        assert torch.equal(got, want)


def test_bytes_are_the_format_of_the_device(ops: TritonOps) -> None:
    memory, k = blocks_of(1, 16, 0), make(3, (9, 128), torch.float16, "ordinary")
    got = ops.run(bodies.write, memory, k, torch.arange(9), 16, None, False, True)
    fp8 = platform.fp8_dtype(torch.device(ops.device))
    assert torch.equal(got, ops.run(bodies.write, memory, k, torch.arange(9), 16, fp8, False, True))


@pytest.mark.parametrize("slots", [[], [-1, -5, 48, 999]])
def test_nothing_to_write(ops: TritonOps, slots: list[int]) -> None:
    memory = blocks_of(3, 16, 32)
    k = make(3, (len(slots), 128), torch.bfloat16, "ordinary")
    arguments = (torch.tensor(slots, dtype=torch.int64), 16, torch.float8_e4m3fn, False, True)
    assert torch.equal(ops.run(bodies.write, memory, k, *arguments), memory)
    no_blocks = blocks_of(0, 16, 32)
    assert ops.run(bodies.write, no_blocks, k, *arguments).shape == no_blocks.shape


# ---- gather ----


def gathered(
    memory: torch.Tensor, table: torch.Tensor, bounds: torch.Tensor, num_rows: int, block_size: int, preshuffle: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Row by row, from the text: the values and the bytes of the scales, 0xA5 where a row is left as it is."""
    codes, scale = np.full((num_rows, 128), 0xA5, np.uint8), np.full((num_rows, 4), 0xA5, np.uint8)
    for request, (first, last) in enumerate(zip(bounds.tolist()[:-1], bounds.tolist()[1:], strict=True)):
        for row in range(max(first, 0), min(last, num_rows)):
            slot = slot_of(table, request, row - first, len(memory), block_size)
            if slot is not None:
                keys = get(memory.numpy(), [slot], block_size, preshuffle)
                codes[row], scale[row] = keys.codes[0], keys.scale.view(np.uint8)
    return torch.from_numpy(codes), torch.from_numpy(scale)


def bounds_of(lens: list[int]) -> torch.Tensor:
    return torch.tensor(np.cumsum([0, *lens]), dtype=torch.int32)


@pytest.mark.parametrize("ue8m0", [False, True])
@layouts
def test_round_trip(ops: TritonOps, block_size: int, preshuffle: bool, ue8m0: bool) -> None:
    """Ragged requests, empty ones, and rows for more than there are: what comes back is the quantised keys."""
    lens = [5, 0, 17, 64, 0, 1, 33, 0, 0]
    bounds, total = bounds_of(lens), sum(lens)
    memory = blocks_of(3 + sum(-(-n // block_size) for n in lens), block_size, 48)
    table = table_of(lens, len(memory), block_size)
    slots = [slot_of(table, r, t, len(memory), block_size) for r, n in enumerate(lens) for t in range(n)]
    for fp8 in FP8_DTYPES:
        k = make(block_size, (total, 128), torch.bfloat16, "ordinary")
        written = ops.run(bodies.write, memory, k, torch.tensor(slots), block_size, fp8, ue8m0, preshuffle)
        want = quantised(k, fp8, ue8m0)
        for num_rows, as_bytes in ((total + 40, False), (total - 3, True)):
            codes, scale = ops.run(bodies.gather, written, table, bounds, num_rows, block_size, preshuffle, as_bytes)
            kept = min(num_rows, total)
            np.testing.assert_array_equal(codes[:kept].numpy(), want.codes[:kept])
            np.testing.assert_array_equal(scale[:kept].numpy().view(np.float32)[:, 0], want.scale[:kept])
            assert (codes[kept:] == 0xA5).all()
            assert (scale[kept:] == 0xA5).all()


@pytest.mark.parametrize("num_requests", [1, 2, 126, 127, 128, 129, 300])
def test_any_number_of_requests(ops: TritonOps, num_requests: int) -> None:
    """Many of them empty, so a program's rows are of many requests; around the entries that are compared at once."""
    lens = np.random.default_rng(num_requests).integers(0, 4, num_requests).tolist()
    lens[0], lens[-1] = 0, 70
    memory = blocks_of(sum(lens), 4, 0)
    table, bounds = table_of(lens, len(memory), 4), bounds_of(lens)
    num_rows = sum(lens) + 10
    got = ops.run(bodies.gather, memory, table, bounds, num_rows, 4, False)
    assert all_same(got, gathered(memory, table, bounds, num_rows, 4, False))


@layouts
def test_what_is_not_there_is_left(ops: TritonOps, block_size: int, preshuffle: bool) -> None:
    """Blocks below 0 and past the end, a table that is too narrow, rows before the first request and after the last."""
    lens = [40, 3 * block_size, 64]
    memory = blocks_of(200, block_size, 4)
    table = table_of(lens, 200, block_size)[:, :-1].contiguous()
    table[0, 0], table[1, 1], table[2, 0] = -1, 200, -(1 << 31)
    wide = torch.full((3, table.shape[1] + 5), 7, dtype=torch.int32)
    wide[:, : table.shape[1]] = table
    narrow = wide[:, : max(table.shape[1] - 1, 1)]  # rows apart
    bounds = bounds_of(lens) + 5
    num_rows = sum(lens) + 9
    for given in (table, narrow):
        want = gathered(memory, given, bounds, num_rows, block_size, preshuffle)
        assert (want[0] == 0xA5).all(1).sum() >= 12
        assert all_same(ops.run(bodies.gather, memory, given, bounds, num_rows, block_size, preshuffle), want)


@pytest.mark.parametrize(
    ("num_blocks", "table_shape", "num_rows"), [(0, (2, 3), 5), (3, (2, 0), 5), (3, (0, 3), 5), (3, (2, 3), 0)]
)
def test_nothing_to_gather(ops: TritonOps, num_blocks: int, table_shape: tuple[int, int], num_rows: int) -> None:
    bounds = torch.arange(table_shape[0] + 1, dtype=torch.int32) * 2
    table = torch.zeros(table_shape, dtype=torch.int32)
    codes, scale = ops.run(bodies.gather, blocks_of(num_blocks, 16, 0), table, bounds, num_rows, 16, True)
    assert codes.shape == (num_rows, 128)
    assert (codes == 0xA5).all()
    assert (scale == 0xA5).all()


def test_offsets_past_2_to_the_31(ops: TritonOps) -> None:
    """Blocks as far apart as those of one layer in a cache of many; the same as in blocks that are neighbours."""
    near, far = (ops.run(bodies.far_apart, *where) for where in ((16 * TOKEN_BYTES, 1), (1 << 24, 129)))
    want = quantised(make(1, (30, 128), torch.bfloat16, "ordinary"), torch.float8_e4m3fn, False)
    np.testing.assert_array_equal(far[0].numpy(), want.codes)
    assert all_same(far, near)


# ---- torch.compile, fake tensors, graphs ----


def test_compiles_without_graph_breaks(ops: TritonOps) -> None:
    ops.run(bodies.chain_compiles)


def test_fake_tensors() -> None:
    with FakeTensorMode() as mode:
        given = [mode.from_tensor(t) for t in bodies.chain_arguments(4)]
        codes, scale, out, again = bodies.chain(*given)
    assert [tuple(t.shape) for t in (codes, scale, out, again)] == [(24, 128), (24, 1), (4, 30), (4, 30)]


def test_graph_replay(ops: TritonOps) -> None:
    if ops.device == "cpu":
        pytest.skip("graphs are captured on a GPU")
    for replayed, eager in ops.run(bodies.chain_in_a_graph):
        assert all_same(replayed, eager)


# ---- refusals ----

K, SLOTS = torch.ones(4, 128), torch.arange(4)
CACHE = torch.full((3, 16, TOKEN_BYTES), 9, dtype=torch.uint8)
WIDE = torch.full((3, 16 * TOKEN_BYTES + 6), 9, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"k": [1.0]}, r"k: expected a torch\.Tensor, got list"),
        ({"k": K.int()}, r"k: expected dtype bfloat16, float16 or float32, got torch\.int32"),
        ({"k": K[0]}, r"k: expected shape \[T, 128\], got \(128,\)"),
        ({"k": torch.ones(4, 64)}, r"k: expected shape \[T, 128\], got \(4, 64\)"),
        ({"k": K.to("meta")}, r"k: expected device cpu like the cache, got meta"),
        ({"kv_cache": 3}, r"kv_cache: expected a torch\.Tensor, got int"),
        (
            {"kv_cache": CACHE.float()},
            r"kv_cache: expected dtype uint8, float8_e4m3fn or float8_e4m3fnuz, got torch\.fl",
        ),
        ({"kv_cache": CACHE[..., :128]}, r"kv_cache: expected shape \[blocks, block_size, 132\], got \(3, 16, 128\)"),
        ({"kv_cache": CACHE[0]}, r"kv_cache: expected shape \[blocks, block_size, 132\], got \(16, 132\)"),
        ({"kv_cache": CACHE[:, :0]}, r"kv_cache: expected shape \[blocks, block_size, 132\], got \(3, 0, 132\)"),
        ({"kv_cache": CACHE[:, ::2]}, r"kv_cache: expected strides .*, got \(2112, 264, 1\)"),
        ({"kv_cache": CACHE[:1].expand(3, 16, TOKEN_BYTES)}, r"kv_cache: expected strides .*, got \(0, 132, 1\)"),
        (
            {"kv_cache": WIDE.as_strided((3, 16, TOKEN_BYTES), (2118, TOKEN_BYTES, 1))},
            r"kv_cache: expected strides \(at least 2112 and a multiple of 4, 132, 1\), got \(2118, 132, 1\)",
        ),
        (
            {"kv_cache": WIDE.as_strided((2, 16, TOKEN_BYTES), (2116, TOKEN_BYTES, 1), 2)},
            r"kv_cache: expected an address that is a multiple of 4, got one 2 after",
        ),
        ({"slot_mapping": [0]}, r"slot_mapping: expected a torch\.Tensor, got list"),
        ({"slot_mapping": SLOTS.int()}, r"slot_mapping: expected dtype torch\.int64, got torch\.int32"),
        ({"slot_mapping": SLOTS[:3]}, r"slot_mapping: expected shape \[4\], got \(3,\)"),
        ({"slot_mapping": torch.arange(8)[::2]}, r"slot_mapping: expected a last dimension of stride 1, got strides"),
        ({"slot_mapping": SLOTS.to("meta")}, r"slot_mapping: expected device cpu like the cache, got meta"),
        ({"quant_block_size": 64}, r"quant_block_size: expected 128, got 64"),
        ({"scale_fmt": "e8m0"}, r"scale_fmt: expected None or 'ue8m0', got 'e8m0'"),
        ({"preshuffle": 1}, r"preshuffle: expected a bool, got 1"),
        (
            {"kv_cache": torch.zeros(3, 8, TOKEN_BYTES, dtype=torch.uint8), "preshuffle": True},
            r"kv_cache: expected a block size that is a multiple of 16 with preshuffle, got 8",
        ),
    ],
)
def test_bad_input_of_write(bad: dict[str, Any], message: str) -> None:
    given: dict[str, Any] = {"k": K, "kv_cache": CACHE, "slot_mapping": SLOTS} | bad
    with pytest.raises(ValueError, match=message):
        indexer_k_quant_and_cache(**given)
    assert (CACHE == 9).all()
    assert (WIDE == 9).all()


DST_K, DST_SCALE = torch.zeros(6, 128, dtype=torch.uint8), torch.zeros(6, 1)
TABLE, BOUNDS = torch.zeros(2, 3, dtype=torch.int32), torch.tensor([0, 2, 4], dtype=torch.int32)
BYTES = torch.zeros(6 * 132, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"kv_cache": CACHE.int()}, r"kv_cache: expected dtype uint8"),
        ({"dst_k": None}, r"dst_k: expected a torch\.Tensor, got NoneType"),
        ({"dst_k": DST_K.float()}, r"dst_k: expected dtype torch\.uint8 or torch\.float8_e4m3fn, got torch\.float32"),
        (
            {"dst_k": DST_K.view(torch.float8_e4m3fnuz)},
            r"dst_k: expected dtype torch\.uint8 or torch\.float8_e4m3fn, got",
        ),
        ({"dst_k": DST_K[:, :64]}, r"dst_k: expected shape \(6, 128\), got \(6, 64\)"),
        ({"dst_k": torch.zeros(6, 256, dtype=torch.uint8)[:, :128]}, r"dst_k: expected a contiguous tensor"),
        ({"dst_k": DST_K.to("meta")}, r"dst_k: expected device cpu like the cache, got meta"),
        ({"dst_k": CACHE.flatten()[: 6 * 128].view(6, 128)}, r"dst_k: expected memory apart from kv_cache"),
        ({"dst_scale": DST_SCALE.double()}, r"dst_scale: expected dtype torch\.float32 or torch\.uint8, got"),
        ({"dst_scale": DST_SCALE[:5]}, r"dst_scale: expected shape \(6, 1\), got \(5, 1\)"),
        ({"dst_scale": torch.zeros(6, 1, dtype=torch.uint8)}, r"dst_scale: expected shape \(6, 4\), got \(6, 1\)"),
        ({"dst_scale": torch.zeros(6, 2)[:, :1]}, r"dst_scale: expected a contiguous tensor"),
        (
            {"dst_scale": BYTES[2:26].view(6, 4)},
            r"dst_scale: expected an address that is a multiple of 4, got one 2 af",
        ),
        (
            {"dst_k": BYTES[:768].view(6, 128), "dst_scale": BYTES[764:788].view(6, 4)},
            r"dst_scale: expected memory apart from dst_k, got a tensor that overlaps dst_k",
        ),
        ({"block_table": TABLE.long()}, r"block_table: expected dtype torch\.int32, got torch\.int64"),
        ({"block_table": TABLE[0]}, r"block_table: expected shape \[any, any\], got \(3,\)"),
        ({"block_table": TABLE.t()}, r"block_table: expected a last dimension of stride 1, got strides \(1, 3\)"),
        ({"cu_seq_lens": BOUNDS.long()}, r"cu_seq_lens: expected dtype torch\.int32, got torch\.int64"),
        ({"cu_seq_lens": BOUNDS[:2]}, r"cu_seq_lens: expected shape \[3\], got \(2,\)"),
        ({"preshuffle": None}, r"preshuffle: expected a bool, got None"),
        ({"kv_cache": torch.zeros(3, 24, TOKEN_BYTES, dtype=torch.uint8), "preshuffle": True}, r"multiple of 16 with"),
    ],
)
def test_bad_input_of_gather(bad: dict[str, Any], message: str) -> None:
    given: dict[str, Any] = {
        "kv_cache": CACHE,
        "dst_k": DST_K,
        "dst_scale": DST_SCALE,
        "block_table": TABLE,
        "cu_seq_lens": BOUNDS,
    } | bad
    with pytest.raises(ValueError, match=message):
        cp_gather_indexer_k_quant_cache(**given)
    assert not DST_K.any()
    assert not DST_SCALE.any()
    assert not BYTES.any()
