"""The ops of sampling in plain torch: the CPU path where nothing faster is, and the yardstick of the kernels.

The functions are operators: arguments have been checked, the last dimension of probabilities has a stride of 1 and all
else is contiguous, results are written to a tensor of the caller. A parameter is a tensor, one value a row of the
result, or where that is None the number beside it, which is rounded to fp32 first. Rows are worked on together and
nothing depends on data on the host, so torch.compile and graph capture take them.

fusedcomm.ops.sampling.fixed_point has the arithmetic. A filter keeps the values of a row that are at least its
threshold, so values that are equal stay or go together.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from fusedcomm.ops.sampling.fixed_point import divisor, goal, inverse_cdf, masses_of, rows_of, take

_LARGEST = torch.finfo(torch.float32).max
_TINY = torch.finfo(torch.float32).tiny


def top_k_renorm_probs_out(
    probs: torch.Tensor, indices: torch.Tensor | None, top_k: torch.Tensor | None, top_k_value: int, out: torch.Tensor
) -> None:
    """``top_k_value`` is 0, for no limit, or from 1 to V - 1; in the tensor whatever is not from 1 to V - 1 is none."""
    y = rows_of(probs, indices).y
    out.copy_(_renormalised(y, _top_k_threshold(_descending(y), top_k, top_k_value)))


def top_p_renorm_probs_out(
    probs: torch.Tensor, indices: torch.Tensor | None, top_p: torch.Tensor | None, top_p_value: float, out: torch.Tensor
) -> None:
    rows = rows_of(probs, indices)
    aim = goal(_column(top_p, top_p_value, probs), rows.unit)
    out.copy_(_renormalised(rows.y, _top_p_threshold(_descending(rows.y), aim)))


def top_k_top_p_renorm_probs_out(
    probs: torch.Tensor,
    indices: torch.Tensor | None,
    top_k: torch.Tensor | None,
    top_k_value: int,
    top_p: torch.Tensor | None,
    top_p_value: float,
    out: torch.Tensor,
) -> None:
    """The two above in sequence, to the bit."""
    survivors = _survivors(rows_of(probs, indices).y, top_k, top_k_value)
    threshold = _top_p_threshold(survivors.ranked, goal(_column(top_p, top_p_value, probs)))
    out.copy_(_renormalised(survivors.y, threshold))


def min_p_renorm_probs_out(
    probs: torch.Tensor, indices: torch.Tensor | None, min_p: torch.Tensor | None, min_p_value: float, out: torch.Tensor
) -> None:
    y = rows_of(probs, indices).y
    # NaN counts as 0, and what is above 1 as 1: the largest stays
    share = _column(min_p, min_p_value, probs)
    share = torch.where(share > 0, share, 0.0).clamp(max=1.0)
    # the least fp32 that is not below the product, which is exact in fp64
    product = share.double() * y.amax(-1, keepdim=True).double()
    threshold = product.float()
    above = torch.nextafter(threshold, torch.full_like(threshold, torch.inf))
    out.copy_(_renormalised(y, torch.where(threshold.double() < product, above, threshold)))


def softmax_temperature_out(
    logits: torch.Tensor,
    indices: torch.Tensor | None,
    temperature: torch.Tensor | None,
    temperature_value: float,
    out: torch.Tensor,
) -> None:
    """A temperature that is not at least 2^-126 (0, negative, NaN) is greedy."""
    # NaN is never chosen; infinities are ties at the top
    x = take(logits, indices).float()
    x = torch.where(x > -torch.inf, x, -torch.inf).clamp(max=_LARGEST)
    largest = x.amax(-1, keepdim=True)
    chosen = torch.arange(x.shape[-1], device=x.device) == x.argmax(-1, keepdim=True)
    t = _column(temperature, temperature_value, logits)
    z = (x - largest) / t.clamp(_TINY, 2.0**126)
    weights = torch.where(t >= _TINY, z.exp(), chosen.float())
    weights = torch.where(x > -torch.inf, weights, 0.0)
    out.copy_(weights / divisor(masses_of(weights).sum(-1, keepdim=True)))


def sampling_from_probs_out(
    probs: torch.Tensor, indices: torch.Tensor | None, uniforms: torch.Tensor, out: torch.Tensor
) -> None:
    out.copy_(inverse_cdf(masses_of(rows_of(probs, indices).y), uniforms))


def top_k_top_p_sampling_from_probs_out(
    probs: torch.Tensor,
    indices: torch.Tensor | None,
    top_k: torch.Tensor | None,
    top_k_value: int,
    top_p: torch.Tensor | None,
    top_p_value: float,
    uniforms: torch.Tensor,
    joint: bool,
    out: torch.Tensor,
) -> None:
    """The masses are those of the given probabilities, in both orders; what is kept differs."""
    rows = rows_of(probs, indices)
    p = _column(top_p, top_p_value, probs)
    if joint:
        ranked = _descending(rows.y)
        by_k = _top_k_threshold(ranked, top_k, top_k_value)
        kept = rows.y >= torch.maximum(by_k, _top_p_threshold(ranked, goal(p, rows.unit)))
    else:
        survivors = _survivors(rows.y, top_k, top_k_value)
        by_p = _top_p_threshold(survivors.ranked, goal(p))
        kept = (rows.y >= survivors.threshold) & (survivors.y >= by_p)
    out.copy_(inverse_cdf(torch.where(kept, masses_of(rows.y), 0), uniforms))


# ---- what they share ----


def _column(parameter: torch.Tensor | None, value: float, like: torch.Tensor) -> torch.Tensor:
    """A parameter as fp32 ``[N, 1]``, or ``[1, 1]`` of the number."""
    if parameter is None:
        return torch.full((1, 1), value, dtype=torch.float32, device=like.device)
    return parameter.unsqueeze(-1)


def _descending(y: torch.Tensor) -> torch.Tensor:
    return y.sort(dim=-1, descending=True).values


def _top_k_threshold(ranked: torch.Tensor, top_k: torch.Tensor | None, top_k_value: int) -> torch.Tensor:
    """The k-th largest of each row, ``[N, 1]``; 0 without a limit."""
    if top_k is None:
        return ranked[:, top_k_value - 1 : top_k_value] if top_k_value else torch.zeros_like(ranked[:, :1])
    vocab, k = ranked.shape[-1], top_k.unsqueeze(-1).long()
    limited = (k > 0) & (k < vocab)
    return torch.where(limited, ranked.gather(-1, torch.where(limited, k - 1, 0)), 0.0)


def _top_p_threshold(ranked: torch.Tensor, aim: torch.Tensor) -> torch.Tensor:
    """The largest value of each row at which the mass of what is not below it reaches the aim, else the smallest."""
    sums = masses_of(ranked).cumsum(-1)
    at = torch.searchsorted(sums, aim.expand(ranked.shape[0], 1).contiguous())
    return ranked.gather(-1, at.clamp(max=ranked.shape[-1] - 1))


class _Survivors(NamedTuple):
    """What top-k keeps, renormalised, in the order of ids and of values: fp32 ``[N, V]``; and its threshold ``[N, 1]``.

    The largest of a row is at least 1 / V, so the unit of these rows is 1.
    """

    y: torch.Tensor
    ranked: torch.Tensor
    threshold: torch.Tensor


def _survivors(y: torch.Tensor, top_k: torch.Tensor | None, top_k_value: int) -> _Survivors:
    ranked = _descending(y)
    threshold = _top_k_threshold(ranked, top_k, top_k_value)
    return _Survivors(_renormalised(y, threshold), _renormalised(ranked, threshold), threshold)


def _renormalised(y: torch.Tensor, threshold: torch.Tensor) -> torch.Tensor:
    """What is at least the threshold, divided by its mass; 0 elsewhere."""
    kept = torch.where(y >= threshold, y, 0.0)
    return kept / divisor(masses_of(kept).sum(-1, keepdim=True))
