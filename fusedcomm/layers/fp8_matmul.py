"""Block-scaled FP8 matrix product, emulated in fp32 where no hardware does it."""

from __future__ import annotations

from typing import NamedTuple

import torch

from fusedcomm.layers.sharding import FP8_BLOCK, ceil_div
from fusedcomm.ops.types import ScaleLayout

_MAX_PARTIALS = 1 << 24
"""fp32 elements of partial products alive at once (64 MiB); longer inputs are walked in pieces of rows."""


class DecodedWeight(NamedTuple):
    """A block-scaled FP8 weight ``[N, K]`` laid out for the product: G blocks of 128 columns."""

    blocks: torch.Tensor  # [G, N, 128] fp32, the FP8 values; zeros pad the last block
    scale: torch.Tensor  # [G, 1, N] fp32, the scale of each row in each block


def decode_weight(weight: torch.Tensor, weight_scale: torch.Tensor) -> DecodedWeight:
    """Decodes FP8 ``weight [N, K]`` with scales fp32 ``[ceil(N / 128), ceil(K / 128)]``."""
    rows, columns = weight.shape
    blocks = ceil_div(columns, FP8_BLOCK)
    values = torch.nn.functional.pad(weight.float(), (0, blocks * FP8_BLOCK - columns))
    scale = weight_scale.float().repeat_interleave(FP8_BLOCK, 0)[:rows]
    return DecodedWeight(
        values.view(rows, blocks, FP8_BLOCK).transpose(0, 1).contiguous(), scale.t().contiguous().unsqueeze(1)
    )


def block_fp8_matmul(x: torch.Tensor, x_scale: torch.Tensor, weight: DecodedWeight) -> torch.Tensor:
    """``y[t, n] = Σ_g (Σ_k x[t, g, k] · w[g, n, k]) · x_scale[t, g] · w_scale[g, n]`` in fp32.

    x is FP8 ``[T, K]`` with scales fp32 ``[T, G]``. Scales multiply finished block products and never the FP8
    values, as on tensor cores. Returns fp32 ``[T, N]``.
    """
    blocks, columns, _ = weight.blocks.shape
    tokens, width = x.shape
    step = max(1, _MAX_PARTIALS // max(1, blocks * columns))
    pieces = [
        _piece(x[start : start + step], x_scale[start : start + step], weight, blocks * FP8_BLOCK - width)
        for start in range(0, tokens, step)
    ]
    return pieces[0] if len(pieces) == 1 else torch.cat([x_scale.new_empty(0, columns), *pieces])


def _piece(x: torch.Tensor, x_scale: torch.Tensor, weight: DecodedWeight, padding: int) -> torch.Tensor:
    values = x.float()
    if padding:
        values = torch.nn.functional.pad(values, (0, padding))
    values = values.view(x.shape[0], -1, FP8_BLOCK).transpose(0, 1)  # [G, t, 128]
    partial = torch.bmm(values, weight.blocks.transpose(1, 2))  # [G, t, N]
    return partial.mul_(x_scale.t().unsqueeze(2)).mul_(weight.scale).sum(0)


def unpack_scales(scale: torch.Tensor, layout: ScaleLayout, groups: int) -> torch.Tensor:
    """Scales in any ScaleLayout as fp32 ``[T, groups]``."""
    if layout is not ScaleLayout.UE8M0_PACKED:
        return scale.reshape(-1, groups)
    exponent = scale.contiguous().view(torch.uint8)[:, :groups].to(torch.int32)
    value = (exponent << 23).view(torch.float32)
    return torch.where(exponent == 255, torch.nan, value)
