"""Result types and options that the ops share."""

from __future__ import annotations

from enum import Enum
from typing import NamedTuple

import torch


class ScaleLayout(Enum):
    """How the scales of per-group quantisation lie in memory (T rows, G = H / group_size groups)."""

    ROW_MAJOR = "row_major"
    """fp32 ``[..., G]``, contiguous."""
    COLUMN_MAJOR = "column_major"
    """fp32 ``[T, G]`` with strides ``(1, round_up(T, 4))``: what DeepGEMM and CUTLASS read."""
    UE8M0_PACKED = "ue8m0_packed"
    """int32 ``[T, ceil(G / 4)]`` with strides ``(1, round_up(T, 4))``; byte j of word w is the biased exponent of
    group 4w + j, the scale rounded up to a power of two: DeepGEMM's packed form."""

    # There is one object a layout. Enum's own is a function in Python, on the path of every fused collective.
    __hash__ = object.__hash__


class AddRMSNorm(NamedTuple):
    """The normed rows and the residual they were made from."""

    norm: torch.Tensor
    residual: torch.Tensor


class GroupQuant(NamedTuple):
    """FP8 values and one scale a group; ``fp8 * scale`` is the value."""

    fp8: torch.Tensor
    scale: torch.Tensor
    scale_layout: ScaleLayout


class AddRMSNormQuant(NamedTuple):
    """Quantised normed rows, the new residual, and the normed rows where they were asked for."""

    fp8: torch.Tensor
    scale: torch.Tensor
    residual: torch.Tensor
    norm: torch.Tensor | None
    scale_layout: ScaleLayout
