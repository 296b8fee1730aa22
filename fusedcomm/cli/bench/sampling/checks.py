"""What results of sampling are held against: thresholds of a sort in fp64, and places in sums in fp64.

Peers add in fp32, so which of the values around a threshold they keep is theirs to say. A result is right if it keeps
what a sum that is off by a ``slack`` one way keeps, and nothing that one off the other way drops.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from fusedcomm.cli.bench.registry import WrongResultError


class Precision(NamedTuple):
    """How far a way to compute is off."""

    slack: float
    """Of sums, over the sum of a row."""
    relative: float
    """Of results."""


EXACT = Precision(slack=2**-24, relative=2**-21)
"""Fixed point: sums are off by less than 2^-26 (docs/sampling.md), p by its rounding to fp32, 2^-25. A result has four
roundings of 2^-24 at most."""
FP32 = Precision(slack=2**-10, relative=2**-10)
"""2^18 additions in fp32 in any order are off by about 2^-15 if the roundings are random, by 2^-6 if all go one way."""


class Band(NamedTuple):
    """Thresholds of rows, fp32 ``[N, 1]``, both inclusive."""

    surely: torch.Tensor
    """What is not below it is kept."""
    possibly: torch.Tensor
    """What is below it is not."""


Filter = Callable[[torch.Tensor, float], Band]
"""``filter(probs, slack)``."""


def everything(probs: torch.Tensor, slack: float) -> Band:
    """No filter: zeros may stay or go, which is the same."""
    tiny = torch.full_like(probs[:, :1], torch.finfo(torch.float32).smallest_normal)
    return Band(tiny, tiny)


def top_k_filter(top_k: int) -> Filter:
    """The k largest, and what ties with the last of them."""

    def band(probs: torch.Tensor, slack: float) -> Band:
        kth = _ranked(probs)[:, top_k - 1 : top_k].float()
        return Band(kth, kth)

    return band


def top_p_filter(top_p: float) -> Filter:
    """The largest whose mass reaches p."""

    def band(probs: torch.Tensor, slack: float) -> Band:
        return _reaching(_ranked(probs), top_p, slack)

    return band


def top_k_first_filter(top_k: int, top_p: float) -> Filter:
    """Of the k largest those whose mass reaches that share of theirs."""

    def band(probs: torch.Tensor, slack: float) -> Band:
        ranked = _ranked(probs)
        ranked = torch.where(ranked >= ranked[:, top_k - 1 : top_k], ranked, 0.0)
        shares = ranked / ranked.sum(-1, keepdim=True)
        return _reaching(ranked, top_p, slack, shares)

    return band


def joint_filter(top_k: int, top_p: float) -> Filter:
    """What both keep."""

    def band(probs: torch.Tensor, slack: float) -> Band:
        by_k, by_p = top_k_filter(top_k)(probs, slack), top_p_filter(top_p)(probs, slack)
        return Band(torch.maximum(by_k.surely, by_p.surely), torch.maximum(by_k.possibly, by_p.possibly))

    return band


def min_p_filter(min_p: float) -> Filter:
    """What is at least that share of the largest; the product may be rounded."""

    def band(probs: torch.Tensor, slack: float) -> Band:
        threshold = min_p * probs.amax(-1, keepdim=True)
        return Band(threshold * (1 + 2**-22), threshold * (1 - 2**-22))

    return band


def _ranked(probs: torch.Tensor) -> torch.Tensor:
    return probs.double().sort(dim=-1, descending=True).values


def _reaching(ranked: torch.Tensor, top_p: float, slack: float, shares: torch.Tensor | None = None) -> Band:
    """The values at which the sums of ``shares``, if not given of ``ranked``, reach p less and plus the slack."""
    sums = (ranked if shares is None else shares).cumsum(-1)
    last = ranked.shape[-1] - 1
    places = ((sums < aim).sum(-1, keepdim=True).clamp(max=last) for aim in (top_p - slack, top_p + slack))
    return Band(*(ranked.gather(-1, place).float() for place in places))


def check_renormalised(probs: torch.Tensor, got: torch.Tensor, band: Band, precision: Precision) -> None:
    """WrongResultError unless ``got`` keeps what the band says, divided by the mass of that."""
    if got.shape != probs.shape or got.dtype is not probs.dtype:
        raise WrongResultError(
            f"probs: expected {probs.dtype} {tuple(probs.shape)}, got {got.dtype} {tuple(got.shape)}"
        )
    kept = got > 0
    if not bool((kept | (got == 0)).all()):
        raise WrongResultError("probs: expected numbers >= 0")
    wrong = (kept & (probs < band.possibly)) | (~kept & (probs >= band.surely))
    if bool(wrong.any()):
        raise WrongResultError(f"probs: {int(wrong.sum())} of {wrong.numel()} are kept or dropped that should not be")
    chosen = torch.where(kept, probs, 0.0).double()
    error = (got * chosen.sum(-1, keepdim=True) - chosen).abs()
    if not bool((error <= precision.relative * chosen).all()):
        raise WrongResultError(f"probs: off by up to {(error / chosen).nan_to_num().max().item():.3g} of a value")


def check_filtered_draw(
    probs: torch.Tensor, tokens: torch.Tensor, band: Band, uniforms: torch.Tensor | None, precision: Precision
) -> None:
    """WrongResultError unless each token is one that is kept; with uniforms, the one where they fall.

    Which of the values in the band are kept is open, so a token may be off by their mass.
    """
    weights = torch.where(probs >= band.possibly, probs, 0.0)
    open_mass = torch.where(probs < band.surely, weights, 0.0).double().sum(-1)
    check_draw(weights, tokens, uniforms, precision.slack + open_mass / weights.double().sum(-1))


def check_draw(
    weights: torch.Tensor, tokens: torch.Tensor, uniforms: torch.Tensor | None, slack: torch.Tensor | float
) -> None:
    """WrongResultError unless ``tokens [N]`` have a weight of ``[N, V]``; with uniforms, that of the inverse CDF."""
    tokens = tokens.long()
    if tokens.shape != weights.shape[:1] or not bool(((tokens >= 0) & (tokens < weights.shape[1])).all()):
        raise WrongResultError(f"tokens: expected one from 0 to {weights.shape[1] - 1} for each of {len(weights)} rows")
    at = tokens.unsqueeze(-1)
    own = weights.gather(-1, at).squeeze(-1).double()
    if not bool((own > 0).all()):
        raise WrongResultError(f"tokens: {int((own <= 0).sum())} of {len(own)} are not kept")
    if uniforms is None:
        return
    sums = weights.double().cumsum(-1)
    total = sums[:, -1]
    upper = sums.gather(-1, at).squeeze(-1)
    aim = uniforms.double() * total
    if not bool(((upper - own <= aim + slack * total) & (aim - slack * total <= upper)).all()):
        raise WrongResultError("tokens: not those at which the sums pass the uniforms")
