"""The operators that a backend offers: contiguous tensors in, no checks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch


class Operators(NamedTuple):
    """One backend's operators, with the signatures of csrc/bind/ops.cpp.

    A form ending in ``_out`` writes to tensors of its caller and returns None; the others allocate.
    """

    rms_norm: Callable[..., torch.Tensor]
    rms_norm_out: Callable[..., None]
    fused_add_rms_norm: Callable[..., tuple[torch.Tensor, torch.Tensor]]
    fused_add_rms_norm_out: Callable[..., None]
    fused_add_rms_norm_quant: Callable[..., tuple[torch.Tensor, torch.Tensor, torch.Tensor]]
    fused_add_rms_norm_quant_out: Callable[..., None]
    per_group_quant_fp8: Callable[..., tuple[torch.Tensor, torch.Tensor]]
    per_group_quant_fp8_out: Callable[..., None]


def operators_of(backend: str) -> Operators:
    """The operators of ``"native"``, ``"triton"`` or ``"torch"``, which is available here."""
    source: Any
    if backend == "native":
        return Operators(*(getattr(torch.ops.fusedcomm, name).default for name in Operators._fields))
    if backend == "triton":
        from fusedcomm.kernels import operators as source
    else:
        from fusedcomm.ops import plain as source
    return Operators(*(getattr(source, name) for name in Operators._fields))
