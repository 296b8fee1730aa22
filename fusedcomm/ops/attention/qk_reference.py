"""The QK and MLA ops in plain torch: the CPU path, and the yardstick of the kernels.

The arithmetic is that of fusedcomm.ops.reference for RMSNorm (Zhang and Sennrich, 2019) and of rotary embeddings (Su et
al., 2021): fp32, each product rounded, one rounding to the dtype of the input after the norm and one after the
rotation, which are those of the unfused ops. Functions ending in ``_out`` are operators: arguments have been checked.
The host never waits for data, so torch.compile and graph capture take them.
"""

from __future__ import annotations

import torch

from fusedcomm.ops.reference import rms_norm


def rope(x: torch.Tensor, cos_sin: torch.Tensor, positions: torch.Tensor, neox: bool) -> torch.Tensor:
    """Rotates the first R elements of ``x [T, ..., D]`` by ``cos_sin [P, R]`` at ``positions [T]``.

    In fp32, rounded once to the dtype of x. A position outside of the table makes them NaN.
    """
    rotary_dim = cos_sin.shape[1]
    known = (positions >= 0) & (positions < cos_sin.shape[0])
    table = cos_sin[torch.where(known, positions, 0)].float()
    table = torch.where(known.unsqueeze(-1), table, torch.nan)
    cos, sin = table.view(-1, *[1] * (x.dim() - 2), rotary_dim).chunk(2, dim=-1)
    rotated, rest = x[..., :rotary_dim].float(), x[..., rotary_dim:]
    a, b = rotated.chunk(2, dim=-1) if neox else (rotated[..., 0::2], rotated[..., 1::2])
    a, b = a * cos - b * sin, b * cos + a * sin
    rotated = torch.cat((a, b), dim=-1) if neox else torch.stack((a, b), dim=-1).flatten(-2)
    return torch.cat((rotated.to(x.dtype), rest), dim=-1)


def qk_rmsnorm_out(
    q: torch.Tensor,
    k: torch.Tensor,
    q_weight: torch.Tensor,
    k_weight: torch.Tensor,
    eps: float,
    weight_bias: float,
    q_out: torch.Tensor,
    k_out: torch.Tensor,
) -> None:
    q_out.copy_(rms_norm(q, q_weight, eps, weight_bias=weight_bias))
    k_out.copy_(rms_norm(k, k_weight, eps, weight_bias=weight_bias))
