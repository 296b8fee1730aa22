"""The token after the last draft that was accepted: sampled from what the target has over the draft."""

from __future__ import annotations

import torch

from fusedcomm.ops.sampling.fixed_point import inverse_cdf, masses_of, rows_of


def sample_residual(target: torch.Tensor, draft: torch.Tensor, uniforms: torch.Tensor) -> torch.Tensor:
    """An id for each row of ``relu(target - draft)``, both fp32 ``[b, V]``, by a uniform ``[b]``: int64 ``[b]``.

    The difference is rounded to fp32 once; then it is a row of fusedcomm.ops.sampling.fixed_point, which has the masses
    and the inverse CDF. Where no difference is above 0 (the distributions are equal, and a rounding or an id out of
    range refused the draft all the same) the target row takes its place; a target without any mass either gives 0.
    """
    difference = target - draft
    left = (difference > 0).any(-1, keepdim=True)
    return inverse_cdf(masses_of(rows_of(torch.where(left, difference, target)).y), uniforms)
