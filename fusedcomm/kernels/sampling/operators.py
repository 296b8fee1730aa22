"""The Triton kernels of sampling behind the signatures of fusedcomm.ops.sampling.reference.

They are torch operators (``torch.ops.fusedcomm_triton``): see fusedcomm.kernels.registration. Importing this module
also registers those of verification.
"""

from __future__ import annotations

from typing import Any

import torch

from fusedcomm.kernels.launching import launch
from fusedcomm.kernels.registration import register
from fusedcomm.kernels.sampling import verify_operators
from fusedcomm.kernels.sampling.draw import sampling_kernel, top_k_top_p_sampling_kernel
from fusedcomm.kernels.sampling.filters import (
    min_p_renorm_kernel,
    top_k_renorm_kernel,
    top_k_top_p_renorm_kernel,
    top_p_renorm_kernel,
)
from fusedcomm.kernels.sampling.softmax import softmax_temperature_kernel
from fusedcomm.kernels.sampling.tiles import tile_options

__all__ = ["verify_operators"]


def _top_k_renorm_probs(
    probs: torch.Tensor, indices: torch.Tensor | None, top_k: torch.Tensor | None, top_k_value: int, out: torch.Tensor
) -> None:
    _launch(top_k_renorm_kernel, probs, indices, (top_k,), (top_k_value,), out)


def _top_p_renorm_probs(
    probs: torch.Tensor, indices: torch.Tensor | None, top_p: torch.Tensor | None, top_p_value: float, out: torch.Tensor
) -> None:
    _launch(top_p_renorm_kernel, probs, indices, (top_p,), (top_p_value,), out)


def _top_k_top_p_renorm_probs(
    probs: torch.Tensor,
    indices: torch.Tensor | None,
    top_k: torch.Tensor | None,
    top_k_value: int,
    top_p: torch.Tensor | None,
    top_p_value: float,
    out: torch.Tensor,
) -> None:
    _launch(top_k_top_p_renorm_kernel, probs, indices, (top_k, top_p), (top_k_value, top_p_value), out)


def _min_p_renorm_probs(
    probs: torch.Tensor, indices: torch.Tensor | None, min_p: torch.Tensor | None, min_p_value: float, out: torch.Tensor
) -> None:
    _launch(min_p_renorm_kernel, probs, indices, (min_p,), (min_p_value,), out)


def _softmax_temperature(
    logits: torch.Tensor,
    indices: torch.Tensor | None,
    temperature: torch.Tensor | None,
    temperature_value: float,
    out: torch.Tensor,
) -> None:
    _launch(softmax_temperature_kernel, logits, indices, (temperature,), (temperature_value,), out)


def _sampling_from_probs(
    probs: torch.Tensor, indices: torch.Tensor | None, uniforms: torch.Tensor, out: torch.Tensor
) -> None:
    _launch(sampling_kernel, probs, indices, (uniforms,), (), out)


def _top_k_top_p_sampling_from_probs(
    probs: torch.Tensor,
    indices: torch.Tensor | None,
    top_k: torch.Tensor | None,
    top_k_value: int,
    top_p: torch.Tensor | None,
    top_p_value: float,
    uniforms: torch.Tensor,
    joint: bool,
    out: torch.Tensor,
) -> None:
    given, values = (top_k, top_p, uniforms), (top_k_value, top_p_value)
    _launch(top_k_top_p_sampling_kernel, probs, indices, given, values, out, JOINT=joint)


def _launch(
    kernel: Any,
    rows: torch.Tensor,
    indices: torch.Tensor | None,
    of_rows: tuple[torch.Tensor | None, ...],
    of_all: tuple[float, ...],
    out: torch.Tensor,
    **options: Any,
) -> None:
    """A program for each row of the result. ``of_rows``: what each has of its own; ``of_all``: the numbers beside."""
    num_rows, vocab = rows.shape
    arguments = (rows, indices, *of_rows, out, num_rows, vocab, rows.stride(0), *of_all)
    launch(kernel, (out.shape[0],), out.device, *arguments, **options, **tile_options(vocab))


# ---- registration ----

top_k_renorm_probs_out = register(
    _top_k_renorm_probs,
    "top_k_renorm_probs_out(Tensor probs, Tensor? indices, Tensor? top_k, int top_k_value, Tensor(a!) out) -> ()",
)
top_p_renorm_probs_out = register(
    _top_p_renorm_probs,
    "top_p_renorm_probs_out(Tensor probs, Tensor? indices, Tensor? top_p, float top_p_value, Tensor(a!) out) -> ()",
)
top_k_top_p_renorm_probs_out = register(
    _top_k_top_p_renorm_probs,
    "top_k_top_p_renorm_probs_out(Tensor probs, Tensor? indices, Tensor? top_k, int top_k_value, Tensor? top_p, "
    "float top_p_value, Tensor(a!) out) -> ()",
)
min_p_renorm_probs_out = register(
    _min_p_renorm_probs,
    "min_p_renorm_probs_out(Tensor probs, Tensor? indices, Tensor? min_p, float min_p_value, Tensor(a!) out) -> ()",
)
softmax_temperature_out = register(
    _softmax_temperature,
    "softmax_temperature_out(Tensor logits, Tensor? indices, Tensor? temperature, float temperature_value, "
    "Tensor(a!) out) -> ()",
)
sampling_from_probs_out = register(
    _sampling_from_probs,
    "sampling_from_probs_out(Tensor probs, Tensor? indices, Tensor uniforms, Tensor(a!) out) -> ()",
)
top_k_top_p_sampling_from_probs_out = register(
    _top_k_top_p_sampling_from_probs,
    "top_k_top_p_sampling_from_probs_out(Tensor probs, Tensor? indices, Tensor? top_k, int top_k_value, "
    "Tensor? top_p, float top_p_value, Tensor uniforms, bool joint, Tensor(a!) out) -> ()",
)
