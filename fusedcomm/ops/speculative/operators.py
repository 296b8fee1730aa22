"""The operators of verification that a backend offers; no checks, contiguous tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from fusedcomm.ops.sampling.dispatch import sampling_backend
from fusedcomm.ops.speculative import reference


class SpeculativeOperators(NamedTuple):
    """One backend's operators, with the signatures of fusedcomm.ops.speculative.reference."""

    chain_speculative_sampling_out: Callable[..., None]
    dflash_chain_verify_out: Callable[..., None]
    greedy_chain_verify_out: Callable[..., None]
    tree_speculative_sampling_target_only: Callable[..., None]


_operators: dict[str, SpeculativeOperators] = {}


def speculative_operators(device_type: str) -> SpeculativeOperators:
    """The operators for tensors of this device type."""
    backend = sampling_backend(device_type)
    operators = _operators.get(backend)
    if operators is None:
        operators = _operators[backend] = _operators_of(backend)
    return operators


def _operators_of(backend: str) -> SpeculativeOperators:
    if backend == "native":
        return SpeculativeOperators(
            *(getattr(torch.ops.fusedcomm, name).default for name in SpeculativeOperators._fields)
        )
    return SpeculativeOperators(*(getattr(reference, name) for name in SpeculativeOperators._fields))
