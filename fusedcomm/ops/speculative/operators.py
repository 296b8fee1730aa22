"""The operators of verification: those of the backend that serves an op; no checks, contiguous tensors."""

from __future__ import annotations

from collections.abc import Callable

from fusedcomm.ops.sampling.dispatch import sampling_backend
from fusedcomm.ops.sampling.operators import operator_of
from fusedcomm.ops.speculative import reference


def speculative_operator(op: str, device_type: str) -> Callable[..., None]:
    """The operator of an op for tensors of this device type; fusedcomm.ops.speculative.reference has the signatures."""
    return operator_of(sampling_backend(device_type, op), op, reference)
