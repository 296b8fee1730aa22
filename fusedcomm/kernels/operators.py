"""The Triton kernels behind functions of the names and signatures of the compiled operators.

Arguments have been checked and are contiguous. Whatever writes goes through torch operators (registration.py).
"""

from __future__ import annotations

from typing import Any

import torch
import triton

from fusedcomm.kernels.fp8 import converts_to
from fusedcomm.kernels.launching import launch
from fusedcomm.kernels.norm import rms_norm_kernel, rms_norm_quant_kernel
from fusedcomm.kernels.outputs import new_quant
from fusedcomm.kernels.quant import group_quant_kernel
from fusedcomm.kernels.registration import register

_MIN_BLOCK = 128
_QUANT_BLOCK = 4096  # elements that a program quantises
_ELEMENTS_A_THREAD = 16  # two loads of 16 bytes in bf16
_MAX_THREADS = 1024


# ---- the operators ----


def _rms_norm(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    eps: float,
    weight_bias: float,
    norm: torch.Tensor,
    residual_out: torch.Tensor | None,
) -> None:
    hidden = x.shape[-1]
    block = max(triton.next_power_of_2(hidden), _MIN_BLOCK)
    arguments = (x, residual, weight, norm, residual_out, eps, weight_bias)
    _launch(rms_norm_kernel, (_num_rows(x), 1), x.device, block, *arguments, HIDDEN=hidden)


def _rms_norm_quant(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    eps: float,
    weight_bias: float,
    group_size: int,
    fp8: torch.Tensor,
    scale: torch.Tensor,
    residual_out: torch.Tensor,
    norm: torch.Tensor | None,
) -> None:
    hidden = x.shape[-1]
    block = max(triton.next_power_of_2(hidden), 4 * group_size)
    arguments = (x, residual, weight, norm, residual_out, fp8.view(torch.uint8), scale, *_strides(scale))
    options = _quant_options(hidden, group_size, fp8, scale)
    _launch(rms_norm_quant_kernel, (_num_rows(x), 1), x.device, block, *arguments, eps, weight_bias, **options)


def _group_quant(x: torch.Tensor, group_size: int, fp8: torch.Tensor, scale: torch.Tensor) -> None:
    hidden = x.shape[-1]
    block = max(min(triton.next_power_of_2(hidden), _QUANT_BLOCK), 4 * group_size)
    grid = (_num_rows(x), triton.cdiv(hidden, block))
    arguments = (x, fp8.view(torch.uint8), scale, *_strides(scale))
    options = _quant_options(hidden, group_size, fp8, scale)
    _launch(group_quant_kernel, grid, x.device, block, *arguments, **options)


_rms_norm_op = register(
    _rms_norm,
    "rms_norm(Tensor x, Tensor? residual, Tensor weight, float eps, float weight_bias, "
    "Tensor(a!) norm, Tensor(b!)? residual_out) -> ()",
)
_rms_norm_quant_op = register(
    _rms_norm_quant,
    "rms_norm_quant(Tensor x, Tensor? residual, Tensor weight, float eps, float weight_bias, int group_size, "
    "Tensor(a!) fp8, Tensor(b!) scale, Tensor(c!) residual_out, Tensor(d!)? norm) -> ()",
)
_group_quant_op = register(
    _group_quant, "group_quant(Tensor x, int group_size, Tensor(a!) fp8, Tensor(b!) scale) -> ()"
)


# ---- launching ----


def _launch(
    kernel: Any, grid: tuple[int, int], device: torch.device, block: int, *arguments: Any, **options: Any
) -> None:
    lanes = 64 if torch.version.hip else 32
    num_warps = min(max(block // (_ELEMENTS_A_THREAD * lanes), 1), _MAX_THREADS // lanes)
    launch(kernel, grid, device, *arguments, BLOCK=block, num_warps=num_warps, enable_fp_fusion=False, **options)


def _num_rows(x: torch.Tensor) -> int:
    return x.numel() // x.shape[-1]


def _strides(scale: torch.Tensor) -> tuple[int, int]:
    """How far apart the scales of two rows and of two groups lie; row-major scales have the dimensions of x."""
    return (scale.shape[-1], 1) if scale.is_contiguous() else (scale.stride(0), scale.stride(1))


def _quant_options(hidden: int, group_size: int, fp8: torch.Tensor, scale: torch.Tensor) -> dict[str, int]:
    return {
        "HIDDEN": hidden,
        "GROUP_SIZE": group_size,
        "PACKED": scale.dtype is torch.int32,
        "FNUZ": fp8.dtype is torch.float8_e4m3fnuz,
        "HARDWARE_FP8": converts_to(fp8.dtype, fp8.device),
    }


# ---- as the compiled operators ----


def rms_norm_out(x: torch.Tensor, weight: torch.Tensor, eps: float, weight_bias: float, out: torch.Tensor) -> None:
    _rms_norm_op(x, None, weight, eps, weight_bias, out, None)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, weight_bias: float) -> torch.Tensor:
    out = torch.empty_like(x)
    rms_norm_out(x, weight, eps, weight_bias, out)
    return out


def fused_add_rms_norm_out(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    eps: float,
    weight_bias: float,
    norm: torch.Tensor,
    residual_out: torch.Tensor,
) -> None:
    _rms_norm_op(x, residual, weight, eps, weight_bias, norm, residual_out)


def fused_add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, eps: float, weight_bias: float
) -> tuple[torch.Tensor, torch.Tensor]:
    norm, residual_out = torch.empty_like(x), torch.empty_like(x)
    fused_add_rms_norm_out(x, residual, weight, eps, weight_bias, norm, residual_out)
    return norm, residual_out


def fused_add_rms_norm_quant_out(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    eps: float,
    weight_bias: float,
    group_size: int,
    fp8: torch.Tensor,
    scale: torch.Tensor,
    residual_out: torch.Tensor,
    norm: torch.Tensor | None,
) -> None:
    _rms_norm_quant_op(x, residual, weight, eps, weight_bias, group_size, fp8, scale, residual_out, norm)


def fused_add_rms_norm_quant(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    eps: float,
    weight_bias: float,
    group_size: int,
    column_major: bool,
    packed: bool,
    fnuz: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    fp8, scale = new_quant(x, group_size, column_major, packed, fnuz)
    residual_out = torch.empty_like(x)
    fused_add_rms_norm_quant_out(x, residual, weight, eps, weight_bias, group_size, fp8, scale, residual_out, None)
    return fp8, scale, residual_out


def per_group_quant_fp8_out(x: torch.Tensor, group_size: int, fp8: torch.Tensor, scale: torch.Tensor) -> None:
    _group_quant_op(x, group_size, fp8, scale)


def per_group_quant_fp8(
    x: torch.Tensor, group_size: int, column_major: bool, packed: bool, fnuz: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    fp8, scale = new_quant(x, group_size, column_major, packed, fnuz)
    per_group_quant_fp8_out(x, group_size, fp8, scale)
    return fp8, scale
