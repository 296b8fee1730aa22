"""The operators of sampling: those of the backend that serves an op; no checks."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import torch

from fusedcomm.ops.sampling import reference
from fusedcomm.ops.sampling.dispatch import sampling_backend
from fusedcomm.ops.sampling.plan import OPERATORS

NAMESPACES = {"native": "fusedcomm", "triton": "fusedcomm_triton", "aiter": "fusedcomm_aiter"}
"""Where torch has the operators of a backend; those of torch itself are functions."""

_operators: dict[tuple[str, str], Callable[..., None]] = {}


def sampling_operator(op: str, device_type: str) -> Callable[..., None]:
    """The operator of an op for tensors of this device type; fusedcomm.ops.sampling.reference has the signatures."""
    return operator_of(sampling_backend(device_type, op), op, reference)


def operator_of(backend: str, op: str, functions: ModuleType) -> Callable[..., None]:
    """A backend's operator of an op; torch's is one of these functions."""
    operator = _operators.get((backend, op))
    if operator is None:
        name = OPERATORS[op]
        if backend == "torch":
            operator = getattr(functions, name)
        else:
            operator = getattr(getattr(torch.ops, NAMESPACES[backend]), name).default
        _operators[backend, op] = operator
    return operator
