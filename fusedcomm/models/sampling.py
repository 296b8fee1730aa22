"""Choosing tokens from logits, as a pure function of logits and uniforms."""

from __future__ import annotations

import torch


def greedy(logits: torch.Tensor) -> torch.Tensor:
    """The most likely token of each row of ``logits [B, V]``, int64 ``[B]``; the lowest index wins ties."""
    return logits.argmax(-1)


def sample(logits: torch.Tensor, temperature: float, top_p: float, uniforms: torch.Tensor) -> torch.Tensor:
    """A token of each row of ``logits [B, V]``, int64 ``[B]``, by inverse CDF of ``uniforms [B]`` in [0, 1).

    Kept are the most likely tokens whose mass reaches ``top_p`` (nucleus sampling, Holtzman et al., 2020),
    ties at the threshold included; among them the first in index order whose cumulative mass exceeds ``u`` of
    the kept mass.
    """
    # fp64, so that cumulative sums over a large vocabulary keep the order of neighbours.
    probs = torch.softmax(logits.double() / temperature, dim=-1)
    if top_p < 1.0:
        ranked = probs.sort(dim=-1, descending=True).values
        reached = ranked.cumsum(-1) >= top_p
        reached[:, -1] = True
        threshold = ranked.gather(-1, reached.int().argmax(-1, keepdim=True))
        probs = probs.masked_fill(probs < threshold, 0.0)
    mass = probs.cumsum(-1)
    target = uniforms.to(mass).unsqueeze(-1) * mass[:, -1:]
    chosen = torch.searchsorted(mass, target, right=True).squeeze(-1)
    # u · mass may round up to all of the mass: the last kept token then.
    last = probs.shape[-1] - 1 - probs.flip(-1).gt(0).int().argmax(-1)
    return torch.minimum(chosen, last)
