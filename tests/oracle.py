"""The arithmetic of the specification in torch, quick for large tensors and on any device.

tests/spec.py is the measure; tests/unit/test_oracle.py holds this one to it. Each line is one IEEE operation of torch,
and divisors are tensors: on GPUs torch divides by a Python number by multiplying with its reciprocal.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fusedcomm import ScaleLayout

FP8_MAX = {torch.float8_e4m3fn: 448.0, torch.float8_e4m3fnuz: 240.0}
INT_OF = {1: torch.uint8, 2: torch.int16, 4: torch.int32}


# ---- the sequence ----


def rank_order_sum(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """round_T(+0 + x_0 + x_1 + …) in fp32."""
    total = torch.zeros_like(parts[0], dtype=torch.float32)
    for part in parts:
        total = total + part.float()
    return total.to(parts[0].dtype)


def tree_sum(x: torch.Tensor) -> torch.Tensor:
    """Sum over the last dimension: zero-padded to a power of two, neighbours added level by level."""
    size = 1
    while size < x.shape[-1]:
        size *= 2
    s = torch.nn.functional.pad(x, (0, size - x.shape[-1]))
    while s.shape[-1] > 1:
        s = s[..., 0::2] + s[..., 1::2]
    return s[..., 0]


def _divided(x: torch.Tensor, by: float) -> torch.Tensor:
    return x / torch.full((), by, dtype=x.dtype, device=x.device)


def _rows(x: torch.Tensor) -> torch.Tensor:
    return x.reshape(-1, x.shape[-1])


@dataclass(frozen=True)
class Options:
    """Arguments of an operation besides tensors; those that it does not take are ignored."""

    eps: float = 1e-6
    weight_bias: float = 0.0
    group_size: int = 128
    emit_bf16: bool = False
    scale_layout: ScaleLayout = ScaleLayout.ROW_MAJOR
    fp8_dtype: torch.dtype = torch.float8_e4m3fn

    @property
    def norm(self) -> dict[str, Any]:
        """As keywords of a call that norms."""
        return {"weight_bias": self.weight_bias}

    @property
    def quant(self) -> dict[str, Any]:
        """As keywords of a collective that norms and quantises."""
        own = {"group_size": self.group_size, "emit_bf16": self.emit_bf16, "scale_layout": self.scale_layout}
        return {**self.norm, **own}


DEFAULTS = Options()


def add_norm(
    total: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, options: Options
) -> dict[str, torch.Tensor]:
    """``residual`` and ``norm`` from the (already rounded) sum."""
    r = total if residual is None else (total.float() + residual.float()).to(total.dtype)
    wide = r.float()
    mean = _divided(tree_sum(wide * wide), float(r.shape[-1]))
    # correctly rounded by way of fp64: 53 bits are enough for a 24-bit root or quotient
    root = (mean + options.eps).double().sqrt().float()
    inv = root.double().reciprocal().float()
    y = (wide * inv.unsqueeze(-1)) * (weight.float() + options.weight_bias)
    return {"residual": r, "norm": y.to(total.dtype)}


def quantised(y: torch.Tensor, options: Options) -> dict[str, torch.Tensor]:
    """``fp8``, and ``scale`` by its values ``[T, …]`` (its strides are checked by same_layout)."""
    limit, tiny = FP8_MAX[options.fp8_dtype], torch.full((), 1e-10, device=y.device)
    groups = y.float().unflatten(-1, (-1, options.group_size))
    amax = groups.abs().amax(-1)
    scale = _divided(torch.where(amax < tiny, tiny, amax), limit)  # where keeps NaN
    stored = scale
    if options.scale_layout is ScaleLayout.UE8M0_PACKED:
        finite = scale.isfinite()
        mantissa, exponent = torch.frexp(torch.where(finite, scale, torch.ones_like(scale)))
        exponent = exponent - (mantissa == 0.5).int()  # the smallest power of two that is not below the scale
        biased = torch.where(finite, exponent + 127, torch.full_like(exponent, 255))
        scale = torch.where(finite, (biased << 23).view(torch.float32), torch.nan)
        biased = biased.to(torch.int64)
        biased = torch.nn.functional.pad(_rows(biased), (0, -biased.shape[-1] % 4)).unflatten(-1, (-1, 4))
        shifts = torch.tensor([0, 8, 16, 24], device=y.device)
        stored = (biased << shifts).sum(-1).to(torch.int32)  # bytes 0 to 3 of a word
    elif options.scale_layout is ScaleLayout.COLUMN_MAJOR:
        stored = _rows(scale)
    q = (groups / scale.unsqueeze(-1)).clamp(-limit, limit).to(options.fp8_dtype)
    return {"fp8": q.flatten(-2), "scale": stored}


def expected(
    op: str,
    parts: Sequence[torch.Tensor],
    residual: torch.Tensor | None,
    weight: torch.Tensor | None,
    options: Options,
) -> dict[str, torch.Tensor]:
    """Every result of a collective by its name; ``out`` for the bare sum."""
    total = rank_order_sum(parts)
    if op == "all_reduce":
        return {"out": total}
    assert weight is not None
    results = add_norm(total, residual, weight, options)
    if op == "allreduce_rmsnorm":
        return results
    results |= quantised(results["norm"], options)
    if not options.emit_bf16:
        del results["norm"]
    return results


# ---- comparisons ----


def different(got: torch.Tensor, want: torch.Tensor) -> torch.Tensor:
    """How many values have other bits, NaN standing for any NaN: a number on the device, so nothing waits for it."""
    as_int = INT_OF[want.element_size()]
    differ = got.contiguous().view(as_int) != want.contiguous().view(as_int)
    if want.is_floating_point():
        nans = got.float().isnan() & want.float().isnan() if want.element_size() == 1 else got.isnan() & want.isnan()
        differ = differ & ~nans
    return differ.sum()


def named(results: Any) -> dict[str, torch.Tensor]:
    """The tensors of a collective's result by the names that expected gives them."""
    if isinstance(results, torch.Tensor):
        return {"out": results}
    return {name: t for name, t in results._asdict().items() if isinstance(t, torch.Tensor)}


def same_layout(scale: torch.Tensor, rows: int, layout: ScaleLayout) -> bool:
    """Whether a scale tensor has the strides of its layout."""
    if layout is ScaleLayout.ROW_MAJOR:
        return scale.is_contiguous()
    return scale.stride() == (1, (rows + 3) // 4 * 4)


def complaint(results: Any, want: dict[str, torch.Tensor], options: Options | None = None) -> str:
    """What is wrong with a result; empty if nothing is. Waits for the device."""
    got = named(results)
    if got.keys() != want.keys():
        return f"results {sorted(got)}, expected {sorted(want)}"
    for name, t in want.items():
        own = got[name]
        if (own.shape, own.dtype) != (t.shape, t.dtype):
            return f"{name}: {tuple(own.shape)} {own.dtype}, expected {tuple(t.shape)} {t.dtype}"
        if name == "scale" and options is not None and not same_layout(own, rows_of(want["fp8"]), options.scale_layout):
            return f"scale: strides {own.stride()} for {options.scale_layout}"
        if name != "scale" and not own.is_contiguous():
            return f"{name}: strides {own.stride()}"
        count = int(different(own, t))
        if count:
            return f"{name}: {count} of {t.numel()} differ, {_first(own, t)}"
    return ""


def rows_of(x: torch.Tensor) -> int:
    """The product of all dimensions but the last."""
    return x.numel() // x.shape[-1] if x.shape[-1] else 0


def _first(got: torch.Tensor, want: torch.Tensor) -> str:
    as_int = INT_OF[want.element_size()]
    a, b = got.contiguous().view(as_int), want.contiguous().view(as_int)
    differ = a != b
    if want.is_floating_point():
        differ &= ~(got.float().isnan() & want.float().isnan())
    where = differ.nonzero()
    at = tuple(int(i) for i in where[0])
    rows = sorted({int(i[0]) for i in where[:10_000]}) if want.dim() > 1 else []
    mask = (1 << 8 * want.element_size()) - 1
    shown = [f"{t[at].item()!r} (bits {int(i[at]) & mask:x})" for t, i in ((got, a), (want, b))]
    text = f"first at {at}: got {shown[0]}, expected {shown[1]}"
    return f"{text}; rows {rows[:12]}{'…' * (len(rows) > 12)}" if rows else text
