"""The benchmark of the attention ops: which there are, and what they are held against."""

from __future__ import annotations

from fusedcomm.cli.bench.attention import (
    dual_stream,
    indexer,
    kv_materialize,
    logits,
    mla_prepare,
    qk_norm_rope,
    sparse_mla,
)
from fusedcomm.cli.bench.attention.targets import BARS
from fusedcomm.cli.bench.single.benchmark import Benchmark

ATTENTION = Benchmark(
    name="attention",
    module="fusedcomm.cli.bench.attention",
    makers={
        qk_norm_rope.OP: qk_norm_rope.workloads,
        kv_materialize.OP: kv_materialize.workloads,
        indexer.WRITE: indexer.write_workloads,
        indexer.GATHER: indexer.gather_workloads,
        logits.OP: logits.workloads,
        sparse_mla.OP: sparse_mla.workloads,
        mla_prepare.OP: mla_prepare.workloads,
        dual_stream.OP: dual_stream.workloads,
    },
    bars=BARS,
    flashinfer_modules={qk_norm_rope.OP: ("norm", "rope"), sparse_mla.OP: ("mla",)},
    has_products=True,
)
