"""Which sizes of each op are measured."""

from __future__ import annotations

from collections.abc import Callable

from fusedcomm.cli.bench.attention import (
    dual_stream,
    indexer,
    kv_materialize,
    logits,
    mla_prepare,
    qk_norm_rope,
    sparse_mla,
)
from fusedcomm.cli.bench.attention.spec import Spec
from fusedcomm.cli.bench.attention.workload import Workload

_MAKERS: dict[str, Callable[[Spec], list[Workload]]] = {
    "qk_norm_rope": qk_norm_rope.workloads,
    "kv_materialize": kv_materialize.workloads,
    "indexer_write": indexer.write_workloads,
    "indexer_gather": indexer.gather_workloads,
    "indexer_logits": logits.workloads,
    "sparse_mla_decode": sparse_mla.workloads,
    "mla_prepare": mla_prepare.workloads,
    "dual_stream": dual_stream.workloads,
}


def workloads(spec: Spec, op: str) -> list[Workload]:
    """The sizes of an op that ``spec`` asks for."""
    return [workload for workload in _MAKERS[op](spec) if spec.wants(op, workload.label)]
