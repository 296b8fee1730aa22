"""The operators of sampling that a backend offers; no checks."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from fusedcomm.ops.sampling import reference
from fusedcomm.ops.sampling.dispatch import sampling_backend


class SamplingOperators(NamedTuple):
    """One backend's operators, with the signatures of fusedcomm.ops.sampling.reference."""

    top_k_renorm_probs_out: Callable[..., None]
    top_p_renorm_probs_out: Callable[..., None]
    top_k_top_p_renorm_probs_out: Callable[..., None]
    min_p_renorm_probs_out: Callable[..., None]
    softmax_temperature_out: Callable[..., None]
    sampling_from_probs_out: Callable[..., None]
    top_k_top_p_sampling_from_probs_out: Callable[..., None]


_operators: dict[str, SamplingOperators] = {}


def sampling_operators(device_type: str) -> SamplingOperators:
    """The operators for tensors of this device type."""
    backend = sampling_backend(device_type)
    operators = _operators.get(backend)
    if operators is None:
        operators = _operators[backend] = _operators_of(backend)
    return operators


def _operators_of(backend: str) -> SamplingOperators:
    if backend == "native":
        return SamplingOperators(*(getattr(torch.ops.fusedcomm, name).default for name in SamplingOperators._fields))
    return SamplingOperators(*(getattr(reference, name) for name in SamplingOperators._fields))
