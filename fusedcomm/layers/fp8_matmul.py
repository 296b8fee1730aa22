"""Block-scaled FP8 matrix product, emulated in fp32 where no hardware does it."""

from __future__ import annotations

import torch

from fusedcomm.layers.sharding import FP8_BLOCK, ceil_div
from fusedcomm.ops.types import ScaleLayout

_MAX_PARTIALS = 1 << 24
"""fp32 elements of partial products alive at once (64 MiB); longer inputs are walked in pieces of rows."""


def decode_blocks(weight: torch.Tensor) -> torch.Tensor:
    """The FP8 ``weight [N, K]`` as fp32 ``[G, N, 128]``, G blocks of columns; the last is padded with zeros."""
    rows, columns = weight.shape
    blocks = ceil_div(columns, FP8_BLOCK)
    decoded = torch.nn.functional.pad(weight.float(), (0, blocks * FP8_BLOCK - columns))
    return decoded.view(rows, blocks, FP8_BLOCK).transpose(0, 1).contiguous()


def block_fp8_matmul(
    x: torch.Tensor, x_scale: torch.Tensor, weight_blocks: torch.Tensor, weight_scale: torch.Tensor
) -> torch.Tensor:
    """``y[t, n] = Σ_g (Σ_k x[t, g, k] · w[g, n, k]) · x_scale[t, g] · weight_scale[n // 128, g]``, all in fp32.

    x is FP8 ``[T, K]`` with scales fp32 ``[T, G]``, weight_blocks as decode_blocks gives them, weight_scale fp32
    ``[ceil(N / 128), G]``. Scales multiply finished block products and never the FP8 values, as on tensor cores.
    Returns fp32 ``[T, N]``.
    """
    blocks, columns, _ = weight_blocks.shape
    tokens, width = x.shape
    row_scale = weight_scale.repeat_interleave(FP8_BLOCK, 0)[:columns].t().unsqueeze(1)  # [G, 1, N]
    step = max(1, _MAX_PARTIALS // max(1, blocks * columns))
    out = x_scale.new_empty(tokens, columns)
    for start in range(0, tokens, step):
        rows = slice(start, min(start + step, tokens))
        values = torch.nn.functional.pad(x[rows].float(), (0, blocks * FP8_BLOCK - width))
        values = values.view(-1, blocks, FP8_BLOCK).transpose(0, 1)  # [G, t, 128]
        partial = torch.bmm(values, weight_blocks.transpose(1, 2))  # [G, t, N]
        partial.mul_(x_scale[rows].t().unsqueeze(2)).mul_(row_scale)
        torch.sum(partial, 0, out=out[rows])
    return out


def unpack_scales(scale: torch.Tensor, layout: ScaleLayout, groups: int) -> torch.Tensor:
    """Scales in any ScaleLayout as fp32 ``[T, groups]``."""
    if layout is not ScaleLayout.UE8M0_PACKED:
        return scale.reshape(-1, groups)
    exponent = scale.contiguous().view(torch.uint8)[:, :groups].to(torch.int32)
    value = (exponent << 23).view(torch.float32)
    return torch.where(exponent == 255, torch.nan, value)
