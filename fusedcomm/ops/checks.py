"""Argument checks that the ops and the collectives share: they name the argument, what was expected and what came."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch

from fusedcomm.ops.types import ScaleLayout

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
FP8_DTYPES = (torch.float8_e4m3fn, torch.float8_e4m3fnuz)
GROUP_SIZES = (32, 64, 128, 256)
MAX_NORM_HIDDEN = 32768


def check_x(x: torch.Tensor, name: str = "x") -> None:
    """A dense bf16, fp16 or fp32 tensor with at least one dimension."""
    if not isinstance(x, torch.Tensor):
        raise ValueError(f"{name}: expected a torch.Tensor, got {type(x).__name__}")
    if x.dtype not in DTYPES:
        raise ValueError(f"{name}: expected dtype bfloat16, float16 or float32, got {x.dtype}")
    if x.layout is not torch.strided:
        raise ValueError(f"{name}: expected a dense tensor, got {x.layout}")
    if x.dim() < 1:
        raise ValueError(f"{name}: expected at least one dimension, got a scalar")


def check_device(x: torch.Tensor, device: torch.device) -> None:
    """The tensor lives where the group does."""
    if x.device != device:
        raise ValueError(f"x: expected a tensor on {device}, got {x.device}")


def check_norm(
    x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, eps: float, weight_bias: float
) -> None:
    """The arguments of every op that norms: x ``[..., H]``, residual like x or None, weight ``[H]``."""
    check_x(x)
    hidden = x.shape[-1]
    if not 1 <= hidden <= MAX_NORM_HIDDEN:
        raise ValueError(f"x: expected a last dimension between 1 and {MAX_NORM_HIDDEN}, got {hidden}")
    if residual is not None:
        check_like(residual, x, "residual")
    if not isinstance(weight, torch.Tensor) or weight.shape != (hidden,):
        got = tuple(weight.shape) if isinstance(weight, torch.Tensor) else type(weight).__name__
        raise ValueError(f"weight: expected shape ({hidden},), got {got}")
    if weight.dtype not in (x.dtype, torch.float32):
        raise ValueError(f"weight: expected dtype {x.dtype} or torch.float32, got {weight.dtype}")
    if weight.device != x.device:
        raise ValueError(f"weight: expected device {x.device}, got {weight.device}")
    if not (math.isfinite(eps) and eps >= 0.0):
        raise ValueError(f"eps: expected a finite number >= 0, got {eps}")
    if not math.isfinite(weight_bias):
        raise ValueError(f"weight_bias: expected a finite number, got {weight_bias}")


def check_like(t: torch.Tensor, x: torch.Tensor, name: str) -> None:
    """t has the shape, dtype and device of x."""
    if not isinstance(t, torch.Tensor):
        raise ValueError(f"{name}: expected a torch.Tensor, got {type(t).__name__}")
    for what in ("shape", "dtype", "device"):
        expected, got = getattr(x, what), getattr(t, what)
        if expected != got:
            if what == "shape":
                expected, got = tuple(expected), tuple(got)
            raise ValueError(f"{name}: expected {what} {expected} like x, got {got}")


def check_out(t: torch.Tensor, x: torch.Tensor, name: str) -> None:
    """An output that the caller gives: like x and contiguous."""
    check_like(t, x, name)
    if not t.is_contiguous():
        raise ValueError(f"{name}: expected a contiguous tensor, got strides {t.stride()}")


def contiguous_strides(shape: Sequence[int]) -> tuple[int, ...]:
    """The strides of a new tensor of this shape."""
    strides = [1] * len(shape)
    for d in range(len(shape) - 2, -1, -1):
        strides[d] = strides[d + 1] * max(shape[d + 1], 1)
    return tuple(strides)


def has_address(t: torch.Tensor) -> bool:
    """Whether the tensor is memory: in torch.compile and among fake tensors none is."""
    return not torch.compiler.is_compiling() and type(t) in (torch.Tensor, torch.nn.Parameter)


def check_apart(t: torch.Tensor, name: str, others: Mapping[str, torch.Tensor], *, or_same: bool = False) -> None:
    """An output shares no memory with the others; ``or_same``: or it begins where one does, all of them being alike."""
    for other_name, other in others.items():
        if not (has_address(t) and has_address(other)):
            continue
        begin, other_begin = t.data_ptr(), other.data_ptr()
        if or_same and begin == other_begin:
            continue
        if begin < other_begin + _extent_bytes(other) and other_begin < begin + _extent_bytes(t):
            allowed = f"{other_name} itself, or memory apart from it" if or_same else f"memory apart from {other_name}"
            raise ValueError(f"{name}: expected {allowed}, got a tensor that overlaps {other_name}")


def _extent_bytes(t: torch.Tensor) -> int:
    """From the first element to the end of the last one."""
    if t.numel() == 0:
        return 0
    return (1 + sum((n - 1) * stride for n, stride in zip(t.shape, t.stride(), strict=True))) * t.element_size()


def check_group_size(hidden: int, group_size: int) -> None:
    """A supported group size that divides H."""
    if group_size not in GROUP_SIZES:
        raise ValueError(f"group_size: expected one of {GROUP_SIZES}, got {group_size}")
    if hidden < 1:
        raise ValueError(f"x: expected a last dimension of at least {group_size}, got {hidden}")
    if hidden % group_size:
        raise ValueError(f"group_size: expected a divisor of H = {hidden}, got {group_size}")


def check_scale_layout(scale_layout: ScaleLayout) -> None:
    """A layout, and not its name: anything else would silently be taken for another one."""
    if not isinstance(scale_layout, ScaleLayout):
        raise ValueError(f"scale_layout: expected a ScaleLayout, got {scale_layout!r}")


def check_fp8_dtype(dtype: torch.dtype) -> None:
    """An FP8 format of the library."""
    if dtype not in FP8_DTYPES:
        raise ValueError(f"fp8_dtype: expected one of {FP8_DTYPES}, got {dtype}")
