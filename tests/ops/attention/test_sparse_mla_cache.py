"""What is written to the sparse MLA caches, byte by byte from the specification; torch and Triton alike."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import sparse_mla_bodies as bodies
import spec
import torch
from cases import DTYPES, FP8_DTYPES, KINDS, make
from indexer_bodies import backends
from triton_backend import TritonOps

from fusedcomm import platform
from fusedcomm.ops.attention.sparse_mla_reference import read_keys

TOKEN_BYTES = (584, 656)


@pytest.fixture(scope="module", params=["torch", "interpreter", "gpu"])
def ops(request: pytest.FixtureRequest) -> Iterator[TritonOps]:
    if request.param != "torch" and importlib.util.find_spec("triton") is None:
        pytest.skip("Triton is not installed")
    with backends(request.param) as found:
        yield found


def blocks(num_blocks: int, block_size: int, token_bytes: int, padding: int = 1) -> torch.Tensor:
    """Random bytes ``[num_blocks, stride]``; strides are multiples of 576 with bytes that belong to nobody."""
    stride = (-(-block_size * token_bytes // 576) + padding) * 576
    rng = np.random.default_rng(5)
    return torch.from_numpy(rng.integers(0, 256, (num_blocks, stride), dtype=np.uint8))


def expected(
    memory: torch.Tensor, kv: torch.Tensor, slots: torch.Tensor, block_size: int, token_bytes: int, fp8: torch.dtype
) -> np.ndarray:
    want = memory.numpy().copy()
    bodies.put(want, kv, slots.tolist(), block_size, token_bytes, fp8)
    return want


@pytest.mark.parametrize("fp8", FP8_DTYPES)
@pytest.mark.parametrize("block_size", [1, 4, 64, 256])
@pytest.mark.parametrize("token_bytes", TOKEN_BYTES)
def test_every_byte(ops: TritonOps, token_bytes: int, block_size: int, fp8: torch.dtype) -> None:
    """Values, scales, the pad byte, slots of nobody, and what lies between blocks; slots that there are not."""
    memory = blocks(max(12 // block_size, 2), block_size, token_bytes)
    end = len(memory) * block_size
    slots = torch.from_numpy(np.random.default_rng(3).permutation(end)[:9])
    slots = torch.cat((slots, torch.tensor([-1, end, 1 << 40, -(1 << 40)])))[torch.tensor([9, 0, 10, 1, 11, 12, 2, 3])]
    kv = make(7, (8, bodies.HEAD_DIM[token_bytes]), torch.bfloat16, "ordinary")
    got = ops.run(bodies.write, memory, kv, slots, block_size, token_bytes, fp8)
    want = expected(memory, kv, slots, block_size, token_bytes, fp8)
    assert (want != memory.numpy()).any()
    np.testing.assert_array_equal(got.numpy(), want)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_kind_of_values(ops: TritonOps, dtype: torch.dtype, kind: str) -> None:
    """Each value is what its bytes stand for; NaN and infinite groups are NaN."""
    for token_bytes in TOKEN_BYTES:
        kv = make(9, (6, bodies.HEAD_DIM[token_bytes]), dtype, kind)
        memory = ops.run(bodies.write, blocks(1, 16, token_bytes), kv, torch.arange(6), 16, token_bytes, None)
        fp8 = platform.fp8_dtype(torch.device(ops.device))
        nope = bodies.NOPE[token_bytes]
        with np.errstate(all="ignore"):
            got = bodies.keys_at(memory.numpy(), np.arange(6), 16, token_bytes, fp8)
            want = expected(blocks(1, 16, token_bytes), kv, torch.arange(6), 16, token_bytes, fp8)
            np.testing.assert_array_equal(got, bodies.keys_at(want, np.arange(6), 16, token_bytes, fp8))
            groups = spec.widen(kv)[:, :nope].reshape(6, -1, bodies.GROUP[token_bytes]).astype(np.float64)
            amax = np.abs(groups).max(-1, keepdims=True)
            error = np.abs(got[:, :nope].reshape(groups.shape) - groups)
            # Half a unit of the three bits of a mantissa; where those end, half of 2^-10, by twice amax / 240 at most.
            limit = np.maximum(np.abs(groups) / 16, np.maximum(amax, 1e-4) * 2.0**-17)
        usual = np.isfinite(amax[..., 0])
        assert (error[usual] <= limit[usual]).all()
        assert np.isnan(error[~usual]).all()


def test_scales(ops: TritonOps) -> None:
    """Of the smallest group, of powers of two and their neighbours, and of a NaN."""
    amax = np.array([1e-9, 448.0, np.nextafter(np.float32(448), np.float32(500)), 447.0, np.nan, np.inf], np.float32)
    kv = torch.zeros(6, 512)
    kv[:, 7] = torch.from_numpy(amax)
    memory = ops.run(bodies.write, blocks(1, 6, 584), kv, torch.arange(6), 6, 584, torch.float8_e4m3fn).numpy()
    scales = memory[0, 6 * 576 : 6 * 584].reshape(6, 8)
    assert scales[:, 0].tolist() == [127 - 22, 127, 128, 127, 255, 255]
    assert (scales[:, 1:7] == 127 - 22).all()
    assert (scales[:, 7] == 0).all()
    kv = torch.zeros(6, 576)
    kv[:, 7] = torch.from_numpy(amax)
    memory = ops.run(bodies.write, blocks(1, 6, 656), kv, torch.arange(6), 6, 656, torch.float8_e4m3fn).numpy()
    scales = memory[0, : 6 * 656].reshape(6, 656)[:, 512:528].copy().view(np.float32)
    np.testing.assert_array_equal(scales[:4, 0], np.maximum(amax[:4], np.float32(1e-4)) / np.float32(448))
    assert np.isnan(scales[4, 0])
    assert scales[5, 0] == np.inf


@pytest.mark.parametrize("token_bytes", TOKEN_BYTES)
def test_rows_that_are_apart(ops: TritonOps, token_bytes: int) -> None:
    width = bodies.HEAD_DIM[token_bytes]
    wide = make(2, (5, 2 * width + 8), torch.bfloat16, "ordinary")
    for columns in (slice(3, 3 + width), slice(0, 2 * width, 2)):
        given = (torch.arange(5), 4, token_bytes, torch.float8_e4m3fn)
        got = ops.run(bodies.write, blocks(2, 4, token_bytes), wide, *given, columns)
        want = ops.run(bodies.write, blocks(2, 4, token_bytes), wide[:, columns].contiguous(), *given)
        assert torch.equal(got, want)


@pytest.mark.parametrize("slots", [[], [-1, -9, 8, 1 << 50]])
@pytest.mark.parametrize("token_bytes", TOKEN_BYTES)
def test_nothing_to_write(ops: TritonOps, token_bytes: int, slots: list[int]) -> None:
    kv = make(3, (len(slots), bodies.HEAD_DIM[token_bytes]), torch.bfloat16, "ordinary")
    for num_blocks in (2, 0):
        memory = blocks(num_blocks, 4, token_bytes)
        given: Any = (torch.tensor(slots, dtype=torch.int64), 4, token_bytes, None)
        assert torch.equal(ops.run(bodies.write, memory, kv, *given), memory)


@pytest.mark.parametrize("fp8", FP8_DTYPES)
@pytest.mark.parametrize("token_bytes", TOKEN_BYTES)
def test_reading_every_code_and_scale(token_bytes: int, fp8: torch.dtype) -> None:
    """The torch backend's reader on random bytes: every code, every UE8M0 byte (0 is 2^-127, 255 NaN), every bf16."""
    rng = np.random.default_rng(8)
    cache = bodies.cache_of(8, 64, token_bytes, padding=1, fp8=fp8)
    cache.memory.copy_(torch.from_numpy(rng.integers(0, 256, cache.memory.shape, dtype=np.uint8)))
    slots = rng.permutation(512)
    with np.errstate(all="ignore"):
        want = bodies.keys_at(cache.memory.numpy(), slots, 64, token_bytes, fp8).astype(np.float32)
    paged = cache.paged(cache.memory, as_bytes=True)
    got = read_keys(paged, torch.from_numpy(slots), fp8 is torch.float8_e4m3fnuz)
    np.testing.assert_array_equal(got.numpy(), want)
    outside = read_keys(paged, torch.tensor([-1, 512, 1 << 40]), fp8 is torch.float8_e4m3fnuz)
    assert (outside == 0).all()
