"""The operators of the QK and MLA ops that a backend offers; no checks, results into tensors of the caller."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from fusedcomm.ops.attention.dispatch import attention_backend


class QKOperators(NamedTuple):
    """One backend's operators, with the signatures of fusedcomm.ops.attention.qk_reference.

    Inputs and outputs may be strided; their last dimensions are not.
    """

    qk_rmsnorm_out: Callable[..., None]
    qk_norm_rope_out: Callable[..., None]
    kv_materialize_out: Callable[..., None]
    mla_prepare_out: Callable[..., None]


_operators: dict[str, QKOperators] = {}


def qk_operators(device_type: str) -> QKOperators:
    """The operators for tensors of this device type."""
    backend = attention_backend(device_type)
    operators = _operators.get(backend)
    if operators is None:
        operators = _operators[backend] = _operators_of(backend)
    return operators


def _operators_of(backend: str) -> QKOperators:
    source: Any
    if backend == "triton":
        from fusedcomm.kernels.attention import qk_operators as source
    else:
        from fusedcomm.ops.attention import qk_reference as source
    return QKOperators(*(getattr(source, name) for name in QKOperators._fields))
