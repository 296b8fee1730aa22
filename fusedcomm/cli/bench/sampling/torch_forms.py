"""Filters and draws in plain torch, as engines write them where no kernel is: sorts, sums along them, masks."""

from __future__ import annotations

import torch


def top_k_renorm(probs: torch.Tensor, top_k: int) -> torch.Tensor:
    """By ``topk``; ties with the k-th stay."""
    kth = probs.topk(top_k, dim=-1).values[:, -1:]
    return _renormalised(probs.masked_fill(probs < kth, 0.0))


def top_p_renorm(probs: torch.Tensor, top_p: float) -> torch.Tensor:
    """Sort, cumsum, mask, scatter back."""
    ranked, ids = probs.sort(dim=-1, descending=True)
    return _scattered(_within_top_p(ranked, top_p), ids)


def top_k_top_p_renorm(probs: torch.Tensor, top_k: int, top_p: float) -> torch.Tensor:
    """One sort for both."""
    ranked, ids = probs.sort(dim=-1, descending=True)
    return _scattered(_top_k_first(ranked, top_k, top_p), ids)


def min_p_renorm(probs: torch.Tensor, min_p: float) -> torch.Tensor:
    """A mask."""
    return _renormalised(probs.masked_fill(probs < min_p * probs.amax(-1, keepdim=True), 0.0))


def inverse_cdf(probs: torch.Tensor, uniforms: torch.Tensor) -> torch.Tensor:
    """int64 ``[N]``: cumsum, and a search in it."""
    sums = probs.cumsum(-1)
    found = torch.searchsorted(sums, uniforms.unsqueeze(-1) * sums[:, -1:], right=True)
    return found.clamp_(max=probs.shape[-1] - 1).squeeze(-1)


def exponential_race(probs: torch.Tensor) -> torch.Tensor:
    """int64 ``[N]``: the largest p over an exponential variate, which needs no sum; as torch.multinomial."""
    return (probs / torch.empty_like(probs).exponential_()).argmax(-1)


def joint_draw(probs: torch.Tensor, top_k: int, top_p: float, uniforms: torch.Tensor) -> torch.Tensor:
    """int64 ``[N]``: sort, both masks, a draw among what is left, in that order."""
    ranked, ids = probs.sort(dim=-1, descending=True)
    ranked = _within_top_p(ranked, top_p)
    ranked[:, top_k:] = 0.0
    return ids.gather(-1, inverse_cdf(ranked, uniforms).unsqueeze(-1)).squeeze(-1)


def top_k_first_draw(probs: torch.Tensor, top_k: int, top_p: float, uniforms: torch.Tensor) -> torch.Tensor:
    """The same, with p as a share of the k largest."""
    ranked, ids = probs.sort(dim=-1, descending=True)
    ranked = _top_k_first(ranked, top_k, top_p)
    return ids.gather(-1, inverse_cdf(ranked, uniforms).unsqueeze(-1)).squeeze(-1)


def _top_k_first(ranked: torch.Tensor, top_k: int, top_p: float) -> torch.Tensor:
    ranked[:, top_k:] = 0.0
    return _within_top_p(_renormalised(ranked), top_p)


def _within_top_p(ranked: torch.Tensor, top_p: float) -> torch.Tensor:
    """Drops what comes after p has been reached."""
    before = ranked.cumsum(-1) - ranked
    return ranked.masked_fill_(before >= top_p, 0.0)


def _scattered(ranked: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(ranked).scatter_(-1, ids, _renormalised(ranked))


def _renormalised(probs: torch.Tensor) -> torch.Tensor:
    return probs / probs.sum(-1, keepdim=True)
