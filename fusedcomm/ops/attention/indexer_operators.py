"""The operators of the indexer's cache that a backend offers; no checks, caches as bytes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from fusedcomm.ops.attention.dispatch import aiter_is_forced, attention_backend


class IndexerOperators(NamedTuple):
    """One backend's operators, with the signatures of fusedcomm.ops.attention.indexer_reference."""

    indexer_k_write: Callable[..., None]
    indexer_k_gather: Callable[..., None]
    indexer_logits: Callable[..., None]


_operators: dict[str, IndexerOperators] = {}


def indexer_operators(device_type: str) -> IndexerOperators:
    """The operators for tensors of this device type."""
    backend = attention_backend(device_type)
    operators = _operators.get(backend)
    if operators is None:
        operators = _operators[backend] = _operators_of(backend)
    return operators


def indexer_writer(device_type: str) -> Callable[..., None]:
    """What writes the cache: aiter where FUSEDCOMM_BACKEND asks for it, else the backend of indexer_operators."""
    if aiter_is_forced():
        from fusedcomm.ops.attention import aiter

        return aiter.indexer_k_write
    return indexer_operators(device_type).indexer_k_write


def _operators_of(backend: str) -> IndexerOperators:
    source: Any
    if backend == "triton":
        from fusedcomm.kernels.attention import indexer_operators as source
    else:
        from fusedcomm.ops.attention import indexer_reference as source
    return IndexerOperators(*(getattr(source, name) for name in IndexerOperators._fields))
