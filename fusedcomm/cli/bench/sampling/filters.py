"""The filters that renormalise: top-k, top-p, both, min-p. k = 50, p = 0.9, min-p 0.05, the same for all rows.

    torch       torch.topk and a mask; for top-p sort, cumsum, mask, scatter back; for both one sort; for min-p a mask
    two_calls   both filters: this library's top-k, then its top-p
    flashinfer  its top_k_renorm_probs and top_p_renorm_probs; both filters: one after the other. It has no such min-p

A call has to read and to write every row once.
"""

from __future__ import annotations

from collections.abc import Mapping

from fusedcomm.cli.bench.collectives import OURS
from fusedcomm.cli.bench.sampling import torch_forms
from fusedcomm.cli.bench.sampling.checks import (
    Filter,
    Precision,
    check_renormalised,
    min_p_filter,
    top_k_filter,
    top_k_first_filter,
    top_p_filter,
)
from fusedcomm.cli.bench.sampling.rows import TOP_K, TOP_P, TORCH, TWO_CALLS, OfFlashInfer, Rows, RowsOp, Way
from fusedcomm.cli.bench.single.workload import Results
from fusedcomm.ops.sampling import (
    min_p_renorm_probs,
    top_k_renorm_probs,
    top_k_top_p_renorm_probs,
    top_p_renorm_probs,
)

TOP_P_OP, TOP_K_OP, BOTH_OP, MIN_P_OP = "top_p_renorm", "top_k_renorm", "top_k_top_p_renorm", "min_p_renorm"
MIN_P = 0.05


def _filter_op(
    op: str, kept: Filter, ways: Mapping[str, Way[Rows]], of_flashinfer: OfFlashInfer[Rows] | None = None
) -> RowsOp[Rows]:
    def check(own: Rows, results: Results, precision: Precision, peer: str) -> None:
        check_renormalised(own.probs, results[0], own.band(kept, precision), precision)

    return RowsOp(op, 2, Rows, check, ways, of_flashinfer)


def _two_calls(own: Rows) -> Results:
    top_k_renorm_probs(own.probs, TOP_K, out=own.first)
    return (top_p_renorm_probs(own.first, TOP_P, out=own.out),)


FILTERS = (
    _filter_op(
        TOP_P_OP,
        top_p_filter(TOP_P),
        {
            TORCH: lambda own: (torch_forms.top_p_renorm(own.probs, TOP_P),),
            OURS: lambda own: (top_p_renorm_probs(own.probs, TOP_P, out=own.out),),
        },
        lambda library: lambda own: (library.top_p_renorm_probs(own.probs, TOP_P),),
    ),
    _filter_op(
        TOP_K_OP,
        top_k_filter(TOP_K),
        {
            TORCH: lambda own: (torch_forms.top_k_renorm(own.probs, TOP_K),),
            OURS: lambda own: (top_k_renorm_probs(own.probs, TOP_K, out=own.out),),
        },
        lambda library: lambda own: (library.top_k_renorm_probs(own.probs, TOP_K),),
    ),
    _filter_op(
        BOTH_OP,
        top_k_first_filter(TOP_K, TOP_P),
        {
            TORCH: lambda own: (torch_forms.top_k_top_p_renorm(own.probs, TOP_K, TOP_P),),
            TWO_CALLS: _two_calls,
            OURS: lambda own: (top_k_top_p_renorm_probs(own.probs, TOP_K, TOP_P, out=own.out),),
        },
        lambda library: lambda own: (library.top_p_renorm_probs(library.top_k_renorm_probs(own.probs, TOP_K), TOP_P),),
    ),
    _filter_op(
        MIN_P_OP,
        min_p_filter(MIN_P),
        {
            TORCH: lambda own: (torch_forms.min_p_renorm(own.probs, MIN_P),),
            OURS: lambda own: (min_p_renorm_probs(own.probs, MIN_P, out=own.out),),
        },
    ),
)
