"""Tokens from probabilities, of all, and of what top-k and top-p keep in both orders. k = 50, p = 0.9.

    torch              sampling_from_probs: cumsum and a search; with filters: sort, masks, cumsum and a search
    torch:exponential  sampling_from_probs: argmax of p over exponential variates, as torch.multinomial
    flashinfer         its sampling_from_probs and top_k_top_p_sampling_from_probs; draws uniforms of its own

A call has to read every row once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

from fusedcomm.cli.bench.collectives import OURS
from fusedcomm.cli.bench.sampling import torch_forms
from fusedcomm.cli.bench.sampling.checks import (
    Filter,
    Precision,
    check_filtered_draw,
    everything,
    joint_filter,
    top_k_first_filter,
)
from fusedcomm.cli.bench.sampling.rows import TOP_K, TOP_P, TORCH, OfFlashInfer, Rows, RowsOp, Way
from fusedcomm.cli.bench.single.workload import Results
from fusedcomm.ops.sampling import sampling_from_probs, top_k_top_p_sampling_from_probs

PLAIN_OP, JOINT_OP, TOP_K_FIRST_OP = "sampling_from_probs", "joint_sampling", "top_k_first_sampling"
EXPONENTIAL = "torch:exponential"
Order = Literal["joint", "top_k_first"]


def _draw_op(
    op: str,
    kept: Filter,
    by_uniforms: tuple[str, ...],
    ways: Mapping[str, Way[Rows]],
    of_flashinfer: OfFlashInfer[Rows],
) -> RowsOp[Rows]:
    """``by_uniforms``: the peers whose token the set's uniforms say, in the order of ids."""

    def check(own: Rows, results: Results, precision: Precision, peer: str) -> None:
        uniforms = own.uniforms if peer in by_uniforms else None
        check_filtered_draw(own.probs, results[0], own.band(kept, precision), uniforms, precision)

    return RowsOp(op, 1, Rows, check, ways, of_flashinfer)


def _filtered_op(op: str, order: Order, kept: Filter, torch_form: Callable[..., Any]) -> RowsOp[Rows]:
    def in_torch(own: Rows) -> Results:
        return (torch_form(own.probs, TOP_K, TOP_P, own.uniforms),)

    def ours(own: Rows) -> Results:
        sample = top_k_top_p_sampling_from_probs
        return (sample(own.probs, TOP_K, TOP_P, own.uniforms, order=order, out=own.tokens),)

    def of_flashinfer(library: Any) -> Way[Rows]:
        sample = library.top_k_top_p_sampling_from_probs
        return lambda own: (sample(own.probs, TOP_K, TOP_P, filter_apply_order=order, **own.philox),)

    return _draw_op(op, kept, (OURS,), {TORCH: in_torch, OURS: ours}, of_flashinfer)


DRAWS = (
    _draw_op(
        PLAIN_OP,
        everything,
        (TORCH, OURS),
        {
            TORCH: lambda own: (torch_forms.inverse_cdf(own.probs, own.uniforms),),
            EXPONENTIAL: lambda own: (torch_forms.exponential_race(own.probs),),
            OURS: lambda own: (sampling_from_probs(own.probs, own.uniforms, out=own.tokens),),
        },
        lambda library: lambda own: (library.sampling_from_probs(own.probs, **own.philox),),
    ),
    _filtered_op(JOINT_OP, "joint", joint_filter(TOP_K, TOP_P), torch_forms.joint_draw),
    _filtered_op(TOP_K_FIRST_OP, "top_k_first", top_k_first_filter(TOP_K, TOP_P), torch_forms.top_k_first_draw),
)
