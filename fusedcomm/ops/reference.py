"""The local ops in plain torch, bit for bit what the native kernels compute.

They serve where no native kernel does, and as the yardstick of the tests. The arithmetic is that of RMSNorm
(Zhang and Sennrich, 2019) with the rounding points of the unfused sequence of operations.
"""

from __future__ import annotations

import torch

from fusedcomm.kernels.outputs import new_quant
from fusedcomm.ops.types import AddRMSNorm, AddRMSNormQuant, GroupQuant, ScaleLayout

MIN_AMAX = 1e-10


def tree_sum(x: torch.Tensor) -> torch.Tensor:
    """Sum over the last dimension as a balanced tree over neighbours: fp32 ``[..., H]`` to ``[...]``.

    H is padded with zeros to a power of two; ``s[i] = s[2i] + s[2i + 1]`` level by level.
    """
    size = x.shape[-1]
    padded = 1 << max(size - 1, 0).bit_length()
    s = torch.nn.functional.pad(x, (0, padded - size))
    while s.shape[-1] > 1:
        s = s[..., 0::2] + s[..., 1::2]
    return s[..., 0]


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, *, weight_bias: float = 0.0) -> torch.Tensor:
    """RMSNorm of ``x [..., H]`` in fp32, rounded once to its dtype."""
    r = x.float()
    mean = _divide(tree_sum(r * r), x.shape[-1])
    # torch's fp32 sqrt is not always correctly rounded (it may come from a vector maths library); by way of fp64 both
    # steps are: 53 bits are enough for an innocuous second rounding of a 24-bit root or quotient.
    root = (mean + eps).double().sqrt().float()
    inv = root.double().reciprocal().float()
    return (r * inv.unsqueeze(-1) * (weight.float() + weight_bias)).to(x.dtype)


def fused_add_rms_norm(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    eps: float,
    *,
    weight_bias: float = 0.0,
) -> AddRMSNorm:
    """``r = x + residual`` rounded to the dtype of x, and RMSNorm of r; a residual of None adds nothing."""
    r = x.clone() if residual is None else (x.float() + residual.float()).to(x.dtype)
    return AddRMSNorm(rms_norm(r, weight, eps, weight_bias=weight_bias), r)


def per_group_quant_fp8(
    x: torch.Tensor,
    *,
    group_size: int = 128,
    scale_layout: ScaleLayout = ScaleLayout.ROW_MAJOR,
    fp8_dtype: torch.dtype = torch.float8_e4m3fn,
) -> GroupQuant:
    """FP8 of ``x [..., H]`` with one scale for each ``group_size`` neighbours; layouts as in ScaleLayout."""
    fp8_max = torch.finfo(fp8_dtype).max
    groups = x.float().unflatten(-1, (-1, group_size))
    amax = groups.abs().amax(-1)
    scale = _divide(torch.where(amax < MIN_AMAX, MIN_AMAX, amax), fp8_max)
    stored = scale
    if scale_layout is ScaleLayout.UE8M0_PACKED:
        exponent = ((scale.view(torch.int32) + 0x7FFFFF) >> 23).clamp(min=0, max=255)
        exponent = torch.where(scale.isnan(), 255, exponent)
        scale = torch.where(exponent == 255, torch.nan, (exponent << 23).to(torch.int32).view(torch.float32))
        stored = _pack_exponents(exponent)
    q = (groups / scale.unsqueeze(-1)).clamp(-fp8_max, fp8_max).flatten(-2)
    if scale_layout is ScaleLayout.ROW_MAJOR:
        return GroupQuant(q.to(fp8_dtype), stored, scale_layout)
    packed, fnuz = scale_layout is ScaleLayout.UE8M0_PACKED, fp8_dtype is torch.float8_e4m3fnuz
    fp8, columns = new_quant(x, group_size, not packed, packed, fnuz)
    return GroupQuant(fp8.copy_(q), columns.copy_(stored.reshape(columns.shape)), scale_layout)


def fused_add_rms_norm_quant(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    eps: float,
    *,
    group_size: int = 128,
    emit_bf16: bool = False,
    scale_layout: ScaleLayout = ScaleLayout.ROW_MAJOR,
    fp8_dtype: torch.dtype = torch.float8_e4m3fn,
    weight_bias: float = 0.0,
) -> AddRMSNormQuant:
    """fused_add_rms_norm followed by per_group_quant_fp8 of the normed rows."""
    norm, r = fused_add_rms_norm(x, residual, weight, eps, weight_bias=weight_bias)
    fp8, scale, layout = per_group_quant_fp8(
        norm, group_size=group_size, scale_layout=scale_layout, fp8_dtype=fp8_dtype
    )
    return AddRMSNormQuant(fp8, scale, r, norm if emit_bf16 else None, layout)


def _divide(x: torch.Tensor, by: float) -> torch.Tensor:
    """x / by, correctly rounded: for a number, torch multiplies by its reciprocal on GPUs."""
    return x / torch.full((), by, dtype=x.dtype, device=x.device)


def _pack_exponents(exponent: torch.Tensor) -> torch.Tensor:
    e = exponent.reshape(-1, exponent.shape[-1]).to(torch.uint8)
    e = torch.nn.functional.pad(e, (0, -e.shape[-1] % 4))
    return e.contiguous().view(torch.int32)
