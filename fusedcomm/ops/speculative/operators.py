"""The operators of verification that a backend offers; no checks, contiguous tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from fusedcomm.ops.sampling.dispatch import sampling_backend
from fusedcomm.ops.speculative import reference


class SpeculativeOperators(NamedTuple):
    """One backend's operators, with the signatures of fusedcomm.ops.speculative.reference."""

    chain_speculative_sampling_out: Callable[..., None]
    dflash_chain_verify_out: Callable[..., None]
    greedy_chain_verify_out: Callable[..., None]
    tree_speculative_sampling_target_only: Callable[..., None]


_operators = {"torch": SpeculativeOperators(*(getattr(reference, name) for name in SpeculativeOperators._fields))}


def speculative_operators(device_type: str) -> SpeculativeOperators:
    """The operators for tensors of this device type."""
    return _operators[sampling_backend(device_type)]
