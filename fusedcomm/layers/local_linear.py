"""The part of a parallel linear layer that runs on one rank."""

from __future__ import annotations

import torch
from torch import nn

from fusedcomm.layers.activation import HiddenStates, NormFp8Activation
from fusedcomm.layers.fp8_linear import BlockFP8Linear


class UnquantizedLinear(nn.Module):
    """``y = x Wᵀ + bias`` on this rank alone; of a NormFp8Activation it reads the unquantised rows."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bias: bool = False,
        dtype: torch.dtype | None = None,
        device: torch.device | None = None,
    ) -> None:
        super().__init__()
        weight = torch.zeros(out_features, in_features, dtype=dtype, device=device)
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = nn.Parameter(torch.zeros(out_features, dtype=dtype, device=device), False) if bias else None

    def forward(self, x: HiddenStates) -> torch.Tensor:
        if isinstance(x, NormFp8Activation):
            x = x.norm
        if isinstance(x, tuple):
            raise ValueError("x: expected a tensor for an unquantised linear, got (fp8, scale); set keep_bf16")
        return nn.functional.linear(x, self.weight, self.bias)


def local_linear(
    in_features: int,
    out_features: int,
    *,
    bias: bool,
    dtype: torch.dtype | None,
    device: torch.device | None,
    block_fp8: bool,
) -> UnquantizedLinear | BlockFP8Linear:
    """The part of a parallel linear that runs on one rank, in the model's dtype or in block-scaled FP8."""
    dtype = torch.get_default_dtype() if dtype is None else dtype
    kind = BlockFP8Linear if block_fp8 else UnquantizedLinear
    return kind(in_features, out_features, bias=bias, dtype=dtype, device=device)
