"""Tokens from probabilities, by inverse CDF of uniforms."""

from __future__ import annotations

from typing import Literal

import torch

from fusedcomm.ops.sampling.checks import (
    Source,
    check_generator,
    check_out,
    check_probs,
    check_share,
    check_top_k,
    check_uniforms,
)
from fusedcomm.ops.sampling.operators import sampling_operator

_ORDERS = ("top_k_first", "joint")


def sampling_from_probs(
    probs: torch.Tensor,
    uniforms: torch.Tensor | None = None,
    *,
    generator: torch.Generator | None = None,
    indices: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """A token of each row: the smallest i such that the mass of probabilities 0 to i is above u times that of the row.

    Given the uniforms, the same tokens on every backend, every rank and for every split of a row: sums are taken in
    fixed point (see fusedcomm.ops.sampling, also for what becomes of values that are no probabilities). A token has a
    probability above 0; of a row that has none it is 0. No host synchronisation, capturable in a graph; allocates the
    result, and uniforms where it draws them.

    Args:
        probs: ``[B, V]``, fp32, bf16 or fp16, V up to 262,144; they need not add up to 1. Rows may lie apart, and only
            a last dimension with a stride other than 1 is copied first.
        uniforms: fp32 ``[N]`` in [0, 1), of which 31 bits after the point count. Without them they are drawn by
            ``torch.rand``: a seed reproduces a run, and every replay of a graph draws others, as eager calls in its
            place would.
        generator: to draw from, in place of the device's own one; to capture a graph, register it with the graph.
        indices: int32 or int64 ``[N]``: the row of probs that each token is of; past the ends: the row at that end.
            Without it, N is B.
        out: written and returned; int32 ``[N]``, contiguous, apart from the inputs.

    Returns:
        int32 ``[N]``.

    Raises:
        ValueError: a bad argument, with what was expected; nothing has been written or drawn then. With
            ``FUSEDCOMM_DEBUG=1`` also for values: probabilities that are negative or not finite, rows of zeros,
            uniforms outside of [0, 1), indices past the ends.
    """
    source = check_probs(probs, indices)
    uniforms, out = _uniforms_and_result(source, uniforms, generator, out)
    sampling_operator("sampling_from_probs", probs.device.type)(source.rows, source.indices, uniforms, out)
    return out


def top_k_top_p_sampling_from_probs(
    probs: torch.Tensor,
    top_k: torch.Tensor | int,
    top_p: torch.Tensor | float,
    uniforms: torch.Tensor | None = None,
    *,
    generator: torch.Generator | None = None,
    order: Literal["top_k_first", "joint"] = "top_k_first",
    indices: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """sampling_from_probs over what top-k and top-p keep, with the given probabilities as masses.

    Args:
        probs, uniforms, generator, indices, out: as for sampling_from_probs.
        top_k: an int, or int32 or int64 ``[N]``, one for each token; below 1 or from V on: no limit.
        top_p: a number from 0 to 1, or fp32 ``[N]``.
        order: ``"top_k_first"`` keeps what top_k_top_p_renorm_probs keeps: top_p is a share of the k largest.
            ``"joint"`` keeps what both top_k_renorm_probs and top_p_renorm_probs of probs keep.

    Returns:
        int32 ``[N]``.

    Raises:
        ValueError: as sampling_from_probs and top_k_top_p_renorm_probs.
    """
    source = check_probs(probs, indices)
    k, p = check_top_k(top_k, source), check_share(top_p, "top_p", source)
    if order not in _ORDERS:
        raise ValueError(f"order: expected 'top_k_first' or 'joint', got {order!r}")
    uniforms, out = _uniforms_and_result(source, uniforms, generator, out, top_k=k.rows, top_p=p.rows)
    operator = sampling_operator("top_k_top_p_sampling_from_probs", probs.device.type)
    operator(source.rows, source.indices, *k, *p, uniforms, order == "joint", out)
    return out


def _uniforms_and_result(
    source: Source,
    uniforms: torch.Tensor | None,
    generator: torch.Generator | None,
    out: torch.Tensor | None,
    **others: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Both as operators take them; what is drawn is drawn after all checks."""
    check_generator(generator, source.rows.device)
    if uniforms is not None:
        if generator is not None:
            raise ValueError("generator: expected None beside uniforms, got a torch.Generator")
        uniforms = check_uniforms(uniforms, source)
    shape = source.shape[:1]
    if out is None:
        out = source.rows.new_empty(shape, dtype=torch.int32)
    else:
        check_out(out, shape, torch.int32, source, uniforms=uniforms, **others)
    if uniforms is None:
        uniforms = torch.rand(shape, generator=generator, dtype=torch.float32, device=source.rows.device)
    return uniforms, out
