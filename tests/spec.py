"""The arithmetic of the specification in NumPy, one IEEE operation at a time: what the tests expect.

It shares nothing with the library: the conversions, the tree and the FP8 rounding are written down again, as the
text has them. A value of type T is held as the fp32 number it stands for.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

F32 = NDArray[np.float32]
Bytes = NDArray[np.uint8]

FP8_MAX = {torch.float8_e4m3fn: 448.0, torch.float8_e4m3fnuz: 240.0}
FP8_NAN = {torch.float8_e4m3fn: 0x7F, torch.float8_e4m3fnuz: 0x80}
FP8_BIAS = {torch.float8_e4m3fn: 7, torch.float8_e4m3fnuz: 8}
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


# ---- storage types ----


def widen(t: torch.Tensor) -> F32:
    """The fp32 values of a bf16, fp16 or fp32 tensor, from any device; exact."""
    t = t.detach().cpu().contiguous()
    if t.dtype is torch.bfloat16:
        bits = t.view(torch.int16).numpy().view(np.uint16).astype(np.uint32) << 16
        return bits.view(np.float32)
    with np.errstate(invalid="ignore"):
        return t.numpy().astype(np.float32)


def round_to(x: F32, dtype: torch.dtype) -> F32:
    """x rounded to T, to nearest even, overflow to infinity; still fp32."""
    assert x.dtype == np.float32
    if dtype is torch.float32:
        return x
    with np.errstate(over="ignore", invalid="ignore"):
        if dtype is torch.float16:
            return x.astype(np.float16).astype(np.float32)
        bits = x.view(np.uint32)
        half, odd = np.uint32(0x7FFF), (bits >> 16) & 1
        rounded = ((bits + half + odd) & np.uint32(0xFFFF0000)).view(np.float32)
    return np.where(np.isnan(x), np.float32(np.nan), rounded)


def fp8_values(fp8: torch.dtype) -> NDArray[np.float64]:
    """The 256 values of an FP8 format by their definition."""
    codes = np.arange(256)
    sign = np.where(codes & 0x80, -1.0, 1.0)
    exponent, mantissa = codes >> 3 & 15, (codes & 7) / 8
    bias = FP8_BIAS[fp8]
    values = sign * np.where(exponent == 0, mantissa * 2.0 ** (1 - bias), (1 + mantissa) * 2.0 ** (exponent - bias))
    nans = (0x7F, 0xFF) if fp8 is torch.float8_e4m3fn else (0x80,)
    values[list(nans)] = np.nan
    return values


def to_fp8(x: F32, fp8: torch.dtype) -> Bytes:
    """clamp(x, ±FP8_MAX) as FP8 codes, to nearest, ties to the even code; NaN gives the format's positive NaN."""
    table = fp8_values(fp8)[:128]
    table = table[np.isfinite(table)]
    magnitude = np.minimum(np.abs(x.astype(np.float64)), table[-1])  # minimum keeps NaN
    known = np.nan_to_num(magnitude)
    below = np.searchsorted(table, known, side="right") - 1
    above = np.minimum(below + 1, len(table) - 1)
    down, up = known - table[below], table[above] - known  # exact: few bits, far from the limits of fp64
    take_above = (up < down) | ((up == down) & (above % 2 == 0))
    code = np.where(take_above, above, below)
    sign = np.signbit(x) & ((code != 0) | (fp8 is torch.float8_e4m3fn))  # fnuz has no negative zero
    return np.where(np.isnan(x), FP8_NAN[fp8], code | sign * 0x80).astype(np.uint8)


# ---- the sequence ----


def rank_order_sum(parts: list[torch.Tensor]) -> F32:
    """round_T(+0 + x_0 + x_1 + …) in fp32."""
    total = np.zeros(tuple(parts[0].shape), dtype=np.float32)
    with np.errstate(over="ignore", invalid="ignore"):
        for part in parts:
            total = total + widen(part)
    return round_to(total, parts[0].dtype)


def tree_sum(x: F32) -> F32:
    """Sum over the last dimension: zero-padded to a power of two, neighbours added level by level."""
    size = 1
    while size < x.shape[-1]:
        size *= 2
    s = np.zeros((*x.shape[:-1], size), dtype=np.float32)
    s[..., : x.shape[-1]] = x
    while s.shape[-1] > 1:
        pairs = s.reshape(*s.shape[:-1], s.shape[-1] // 2, 2)
        with np.errstate(over="ignore", invalid="ignore"):
            s = pairs[..., 0] + pairs[..., 1]
    return s[..., 0]


class Norm(NamedTuple):
    norm: F32
    residual: F32


def add_norm(
    total: F32,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    eps: float,
    dtype: torch.dtype,
    weight_bias: float = 0.0,
) -> Norm:
    """r' and y from the (already rounded) sum."""
    f32 = np.float32
    with np.errstate(all="ignore"):
        r = total if residual is None else round_to(total + widen(residual), dtype)
        mean = tree_sum(r * r) / f32(r.shape[-1])
        inv = f32(1) / np.sqrt(mean + f32(eps))
        y = (r * inv[..., None]) * (widen(weight) + f32(weight_bias))
    return Norm(round_to(y, dtype), r)


class Quant(NamedTuple):
    codes: Bytes  # [..., H]
    scale: F32  # [..., G]: what the values were divided by
    exponents: Bytes | None  # [..., G] biased, for UE8M0


def quantise(y: F32, group_size: int, fp8: torch.dtype = torch.float8_e4m3fn, *, ue8m0: bool = False) -> Quant:
    """Scales and FP8 codes of each group of neighbours."""
    f32 = np.float32
    groups = y.reshape(*y.shape[:-1], y.shape[-1] // group_size, group_size)
    amax = np.abs(groups).max(-1)  # NaN wins
    with np.errstate(all="ignore"):
        scale = np.maximum(amax, f32(1e-10)) / f32(FP8_MAX[fp8])
        exponents = None
        if ue8m0:
            mantissa, exponent = np.frexp(np.where(np.isfinite(scale), scale, f32(1)))
            exponent = exponent - (mantissa == 0.5)  # the smallest power of two that is not below the scale
            exponents = np.where(np.isfinite(scale), exponent + 127, 255).astype(np.uint8)
            scale = np.where(np.isfinite(scale), np.ldexp(f32(1), exponent), f32(np.nan)).astype(np.float32)
        q = groups / scale[..., None]
    return Quant(to_fp8(q, fp8).reshape(y.shape), scale, exponents)


# ---- comparisons ----


def assert_same(got: torch.Tensor, want: F32, what: str = "") -> None:
    """got stands for exactly the values of want: NaN where it is NaN, else the same bits."""
    values = widen(got)
    assert values.shape == want.shape, f"{what}: shape {values.shape}, expected {want.shape}"
    nan = np.isnan(want)
    different = np.where(nan, ~np.isnan(values), values.view(np.uint32) != want.astype(np.float32).view(np.uint32))
    if different.any():
        at = tuple(int(i) for i in np.argwhere(different)[0])
        raise AssertionError(
            f"{what}: {int(different.sum())} of {different.size} differ, first at {at}: "
            f"got {values[at]!r}, expected {want[at]!r}"
        )


def assert_codes(got: torch.Tensor, want: Bytes, what: str = "fp8") -> None:
    """got (FP8) has exactly these codes; any NaN stands for any other."""
    codes = got.cpu().contiguous().view(torch.uint8).numpy()
    values = fp8_values(got.dtype)
    assert codes.shape == want.shape, f"{what}: shape {codes.shape}, expected {want.shape}"
    different = (codes != want) & ~(np.isnan(values[codes]) & np.isnan(values[want]))
    if different.any():
        at = tuple(int(i) for i in np.argwhere(different)[0])
        raise AssertionError(
            f"{what}: {int(different.sum())} of {different.size} differ, first at {at}: "
            f"got {codes[at]:#04x}, expected {want[at]:#04x}"
        )


def assert_scale(got: torch.Tensor, want: Quant, layout: str, what: str = "scale") -> None:
    """The scale tensor has the shape, the strides and, byte by byte, the content of its layout."""
    scale = want.scale
    groups = scale.shape[-1]
    rows = scale.size // groups
    if layout == "row_major":
        assert got.dtype is torch.float32
        assert got.is_contiguous()
        assert_same(got, scale, what)
        return
    words = groups if layout == "column_major" else (groups + 3) // 4
    padded = (rows + 3) // 4 * 4
    assert tuple(got.shape) == (rows, words), f"{what}: shape {tuple(got.shape)}"
    assert got.stride() == (1, padded), f"{what}: strides {got.stride()}"
    if rows == 0:
        return
    # the memory from the first element to the last: what a kernel that reads the layout would see
    memory = torch.as_strided(got, ((words - 1) * padded + rows,), (1,)).cpu()
    for row in range(rows):
        for group in range(groups):
            if layout == "column_major":
                assert got.dtype is torch.float32
                assert_same(memory[row + group * padded], scale.reshape(rows, groups)[row, group], f"{what}[{row}]")
            else:
                assert got.dtype is torch.int32
                assert want.exponents is not None
                word = int(memory[row + (group // 4) * padded]) & 0xFFFFFFFF
                byte = word >> (8 * (group % 4)) & 0xFF
                expected = int(want.exponents.reshape(rows, groups)[row, group])
                assert byte == expected, f"{what}[{row}, {group}]: got {byte}, expected {expected}"
        if layout == "ue8m0_packed" and groups % 4:
            word = int(memory[row + (groups // 4) * padded]) & 0xFFFFFFFF
            assert word >> (8 * (groups % 4)) == 0, f"{what}[{row}]: bytes of no group are {word:#010x}"
