"""Filters of probabilities: what they keep is divided by its mass, the rest becomes 0."""

from __future__ import annotations

import torch

from fusedcomm.ops.sampling.checks import check_probs, check_share, check_top_k, result
from fusedcomm.ops.sampling.operators import sampling_operator


def top_k_renorm_probs(
    probs: torch.Tensor,
    top_k: torch.Tensor | int,
    *,
    indices: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Keeps the probabilities that are at least the k-th largest of their row and divides them by their mass.

    Values that are equal stay or go together, so more than k may stay (top-k sampling, Fan et al., 2018). The same bits
    on every backend: see fusedcomm.ops.sampling for how sums are taken, and what becomes of values that are no
    probabilities. No host synchronisation, capturable in a graph; allocates nothing but the result.

    Args:
        probs: ``[B, V]``, fp32, bf16 or fp16, V up to 262,144; rows may lie apart, and only a last dimension with a
            stride other than 1 is copied first.
        top_k: an int, or int32 or int64 ``[N]``, one for each row of the result; below 1 or from V on: no limit.
        indices: int32 or int64 ``[N]``: the row of probs that each row of the result is of; past the ends: the row at
            that end. Without it, N is B.
        out: written and returned; fp32 ``[N, V]``, contiguous, apart from the inputs.

    Returns:
        fp32 ``[N, V]``; a row without any mass stays 0.

    Raises:
        ValueError: a bad argument, with what was expected; nothing has been written then. With ``FUSEDCOMM_DEBUG=1``
            also for values: probabilities that are negative or not finite, rows of zeros, indices past the ends.
    """
    source = check_probs(probs, indices)
    k = check_top_k(top_k, source)
    out = result(out, source, top_k=k.rows)
    sampling_operator("top_k_renorm_probs", probs.device.type)(source.rows, source.indices, *k, out)
    return out


def top_p_renorm_probs(
    probs: torch.Tensor,
    top_p: torch.Tensor | float,
    *,
    indices: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Keeps the smallest set of largest probabilities whose mass reaches top_p and divides them by their mass.

    Nucleus sampling (Holtzman et al., 2020). The threshold is the largest value v such that what is at least v adds up
    to top_p or more, so values that are equal stay or go together, and the largest stay. Rows are taken as they are: a
    row that does not reach top_p is kept whole. The same bits on every backend, graphs and allocations: as
    top_k_renorm_probs.

    Args:
        probs, indices, out: as for top_k_renorm_probs.
        top_p: a number from 0 to 1, or fp32 ``[N]``; 1 keeps all.

    Returns:
        fp32 ``[N, V]``; a row without any mass stays 0.

    Raises:
        ValueError: as top_k_renorm_probs; with ``FUSEDCOMM_DEBUG=1`` also for a top_p of a row that is not from 0 to 1.
    """
    source = check_probs(probs, indices)
    p = check_share(top_p, "top_p", source)
    out = result(out, source, top_p=p.rows)
    sampling_operator("top_p_renorm_probs", probs.device.type)(source.rows, source.indices, *p, out)
    return out


def top_k_top_p_renorm_probs(
    probs: torch.Tensor,
    top_k: torch.Tensor | int,
    top_p: torch.Tensor | float,
    *,
    indices: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """top_k_renorm_probs, then top_p_renorm_probs of its result, in one kernel on a GPU; the bits of the two calls.

    Args:
        probs, top_k, indices, out: as for top_k_renorm_probs.
        top_p: as for top_p_renorm_probs.

    Returns:
        fp32 ``[N, V]``; a row without any mass stays 0.

    Raises:
        ValueError: as the two.
    """
    source = check_probs(probs, indices)
    k, p = check_top_k(top_k, source), check_share(top_p, "top_p", source)
    out = result(out, source, top_k=k.rows, top_p=p.rows)
    sampling_operator("top_k_top_p_renorm_probs", probs.device.type)(source.rows, source.indices, *k, *p, out)
    return out


def min_p_renorm_probs(
    probs: torch.Tensor,
    min_p: torch.Tensor | float,
    *,
    indices: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Keeps the probabilities that are at least min_p times the largest of their row, divided by their mass.

    Min-p sampling (Nguyen et al., 2024); the product is taken exactly. The same bits on every backend, graphs and
    allocations: as top_k_renorm_probs.

    Args:
        probs, indices, out: as for top_k_renorm_probs.
        min_p: a number from 0 to 1, or fp32 ``[N]``; 0 keeps all, 1 the largest and what ties with it.

    Returns:
        fp32 ``[N, V]``; a row without any mass stays 0.

    Raises:
        ValueError: as top_k_renorm_probs; with ``FUSEDCOMM_DEBUG=1`` also for a min_p of a row that is not from 0 to 1.
    """
    source = check_probs(probs, indices)
    p = check_share(min_p, "min_p", source)
    out = result(out, source, min_p=p.rows)
    sampling_operator("min_p_renorm_probs", probs.device.type)(source.rows, source.indices, *p, out)
    return out
