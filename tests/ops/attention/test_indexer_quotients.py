"""The quotients that the indexer's keys are quantised by, where a division's last bit decides a code.

The kernels take the product with the inverse and correct it (fusedcomm.kernels.attention.fp8_rows.divide), and scales
that are powers of two come from the bits of the largest magnitude.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Iterator
from fractions import Fraction

import indexer_bodies as bodies
import numpy as np
import pytest
import spec
import torch
from cases import FP8_DTYPES
from indexer_bodies import backends, blocks_of, get, quantised
from numpy.typing import NDArray
from triton_backend import TritonOps

from fusedcomm import platform
from fusedcomm.kernels import fp8 as kernels_fp8

# Mantissas of scales by which a quotient of fp32 numbers may come close to the middle between two of them where an FP8
# code changes.
MANTISSAS = [m for j in range(8, 17) for s in range(-8, 9) if 2**23 <= (m := j * 2**20 + s) < 2**24]


@pytest.fixture(scope="module", params=["torch", "interpreter", "gpu"])
def ops(request: pytest.FixtureRequest) -> Iterator[TritonOps]:
    if request.param != "torch" and importlib.util.find_spec("triton") is None:
        pytest.skip("Triton is not installed")
    with backends(request.param) as found:
        yield found


def closest(mantissa: int) -> list[int]:
    """Mantissas whose quotients by this one are the closest to those middles, and to where a code changes."""
    found = set()
    for code in range(16, 33):  # five bits: four of a value, and its middle to the next
        for middle in (code * 2**20 - 1, code * 2**20, code * 2**20 + 1):
            x = middle * mantissa
            x >>= x.bit_length() - 24
            found.update(m for m in range(x - 2, x + 4) if 2**23 <= m < 2**24)
    return sorted(found)


def rounded(x: Fraction) -> Fraction:
    """To 24 bits, to nearest even."""
    if x == 0:
        return x
    exponent = abs(x.numerator).bit_length() - x.denominator.bit_length() - 24
    unit = Fraction(2) ** (exponent if abs(x) < Fraction(2) ** (exponent + 24) else exponent + 1)
    return round(x / unit) * unit


def test_corrected_products_are_quotients() -> None:
    """As the kernel computes them, and as a division is defined."""
    compared = 0
    for mantissa in MANTISSAS:
        scale = Fraction(mantissa)
        inverse = rounded(1 / scale)
        for numerator in closest(mantissa):
            x = Fraction(numerator)
            product = rounded(x * inverse)
            excess = rounded(product * scale - x)
            assert rounded(excess * -inverse + product) == rounded(x / scale), (numerator, mantissa)
            compared += 1
    assert compared > 15000


def test_rounding_is_that_of_fp32() -> None:
    """The judge of the test above."""
    values = np.random.default_rng(1).standard_normal(2000) * 10.0 ** np.random.default_rng(2).integers(-9, 9, 2000)
    for value in values.tolist():
        assert float(rounded(Fraction(value))) == float(np.float32(value))


def keys_at_the_brink(fp8: torch.dtype, seed: int) -> NDArray[np.float32]:
    """Keys ``[T, 128]`` whose scales have these mantissas, as far as amax gives them, and closest quotients."""
    rng, rows = np.random.default_rng(seed), []
    limit = np.float32(spec.FP8_MAX[fp8])
    for mantissa in MANTISSAS:
        scale = np.float32(math.ldexp(mantissa, int(rng.integers(-40, 60))))
        near = scale * limit
        candidates = near, np.nextafter(near, np.float32(0)), np.nextafter(near, np.float32(np.inf))
        largest = [a for a in candidates if a / limit == scale]
        if not largest:
            continue
        numerators = rng.permutation(np.array(closest(mantissa), np.float64))[:127]
        # a numerator over the mantissa is from 0.5 to 2: these quotients are from 2^-11 to 128
        values = numerators * np.float64(scale) / mantissa * 2.0 ** rng.integers(-10, 7, len(numerators))
        row = np.zeros(128, np.float32)
        row[: len(values)] = values * rng.choice([-1.0, 1.0], len(values))
        row[127] = largest[0]
        rows.append(row)
    return np.stack(rows)


@pytest.mark.parametrize("fp8", FP8_DTYPES)
def test_codes_at_the_brink(ops: TritonOps, fp8: torch.dtype) -> None:
    for seed in range(2):
        k = torch.from_numpy(keys_at_the_brink(fp8, seed))
        assert len(k) > 50
        want, slots = quantised(k, fp8, False), list(range(len(k)))
        mantissas = (want.scale.view(np.int32) & 0x7FFFFF) | 0x800000
        assert set(mantissas.tolist()) <= set(MANTISSAS)
        memory = ops.run(bodies.write, blocks_of(9, 16, 0), k, torch.arange(len(k)), 16, fp8, False, True)
        got = get(memory.numpy(), slots, 16, True)
        np.testing.assert_array_equal(got.scale, want.scale)
        np.testing.assert_array_equal(got.codes, want.codes)


@pytest.mark.parametrize("fp8", FP8_DTYPES)
def test_powers_of_two_at_the_brink(ops: TritonOps, fp8: torch.dtype) -> None:
    """Largest magnitudes around FP8_MAX times each power of two that fp32 has; infinity and its neighbour."""
    limit = np.float32(spec.FP8_MAX[fp8])
    exact = np.ldexp(limit, np.arange(-24, 120)).astype(np.float32)
    largest = np.concatenate([exact, *(np.nextafter(exact, np.float32(to)) for to in (0, np.inf))])
    largest = np.concatenate([largest, np.array([np.finfo(np.float32).max, np.inf, 1e-4, 0], np.float32)])
    rng = np.random.default_rng(7)
    with np.errstate(invalid="ignore"):
        k = (rng.uniform(-1, 1, (len(largest), 128)) * np.minimum(largest, 3e38)[:, None]).astype(np.float32)
    k[:, 77] = largest * rng.choice([-1.0, 1.0], len(largest))
    want, slots = quantised(torch.from_numpy(k), fp8, True), list(range(len(k)))
    where = blocks_of(-(-len(k) // 16), 16, 0)
    memory = ops.run(bodies.write, where, torch.from_numpy(k), torch.arange(len(k)), 16, fp8, True, True)
    got = get(memory.numpy(), slots, 16, True)
    np.testing.assert_array_equal(got.scale, want.scale)
    spec.assert_codes(torch.from_numpy(got.codes).view(fp8), want.codes)


@pytest.mark.parametrize("fp8", FP8_DTYPES)
def test_zeros_keep_their_sign(ops: TritonOps, fp8: torch.dtype) -> None:
    """Under ordinary scales and under an infinite one; quotients that are too small for the format likewise."""
    k = torch.zeros(4, 128)
    k[:, ::2] = -0.0
    k[1:, 3], k[1:, 4] = 1e-30, -1e-30
    k[2, 100], k[3, 100] = 37.0, torch.inf
    memory = ops.run(bodies.write, blocks_of(1, 16, 0), k, torch.arange(4), 16, fp8, False, False)
    got = get(memory.numpy(), [0, 1, 2, 3], 16, False)
    want = quantised(k, fp8, False)
    spec.assert_codes(torch.from_numpy(got.codes).view(fp8), want.codes)
    np.testing.assert_array_equal(got.scale, want.scale)


@pytest.mark.parametrize(
    ("arch", "fn", "fnuz"),
    [
        ("sm_80", False, False),
        ("sm_89", True, False),
        ("sm_90", True, False),
        ("sm_120", True, False),
        ("gfx90a", False, False),
        ("gfx942", False, True),
        ("gfx950", True, False),
        ("cpu", False, False),
    ],
)
def test_formats_of_devices(monkeypatch: pytest.MonkeyPatch, arch: str, fn: bool, fnuz: bool) -> None:
    """Which formats have matrix instructions."""
    facts = platform.DeviceFacts(arch, "", b"", 1)
    monkeypatch.setattr(kernels_fp8, "device_facts", lambda device: facts)
    computes_with = kernels_fp8.computes_with.__wrapped__
    device = torch.device("cuda", 0)
    assert computes_with(torch.float8_e4m3fn, device) == fn
    assert computes_with(torch.float8_e4m3fnuz, device) == fnuz
