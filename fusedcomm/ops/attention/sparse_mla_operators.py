"""The operators of sparse MLA that a backend offers; no checks, caches as bytes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from fusedcomm.ops.attention.dispatch import attention_backend


class SparseMLAOperators(NamedTuple):
    """One backend's operators, with the signatures of fusedcomm.ops.attention.sparse_mla_reference."""

    sparse_mla_write: Callable[..., None]
    sparse_mla_decode_out: Callable[..., None]


_operators: dict[str, SparseMLAOperators] = {}


def sparse_mla_operators(device_type: str) -> SparseMLAOperators:
    """The operators for tensors of this device type."""
    backend = attention_backend(device_type)
    operators = _operators.get(backend)
    if operators is None:
        operators = _operators[backend] = _operators_of(backend)
    return operators


def _operators_of(backend: str) -> SparseMLAOperators:
    source: Any
    if backend == "triton":
        from fusedcomm.kernels.attention import sparse_mla_operators as source
    else:
        from fusedcomm.ops.attention import sparse_mla_reference as source
    return SparseMLAOperators(*(getattr(source, name) for name in SparseMLAOperators._fields))
