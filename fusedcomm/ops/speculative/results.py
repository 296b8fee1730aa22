"""What the verification ops return."""

from __future__ import annotations

from typing import NamedTuple

import torch


class ChainSampling(NamedTuple):
    """What chain_speculative_sampling makes of b chains of n drafts."""

    output_ids: torch.Tensor
    """int32 ``[b, n + 1]``: the drafts that were accepted, one token sampled after them, then -1."""
    accepted: torch.Tensor
    """int32 ``[b]``: how many drafts were accepted before the first refusal."""


class ChainVerify(NamedTuple):
    """What dflash_chain_verify and greedy_chain_verify make of bs chains of a current token and D - 1 drafts."""

    accept_len: torch.Tensor
    """int32 ``[bs]``: how many drafts were accepted; neither the current token nor the bonus counts."""
    bonus: torch.Tensor
    """int64 ``[bs]``: the token after them."""
    tokens: torch.Tensor
    """int64 ``[bs, D]``, what is committed: the drafts that were accepted, the bonus, then -1."""
