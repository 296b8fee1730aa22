"""Argument checks of the verification ops: they name the argument, what was expected and what came."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from fusedcomm.ops.attention.qk_checks import check_tensor
from fusedcomm.ops.checks import check_apart, check_x
from fusedcomm.ops.sampling.fixed_point import MAX_VOCAB

INTEGERS = (torch.int32, torch.int64)


def check_probs(probs: torch.Tensor, name: str, dims: str, least: int) -> None:
    """fp32 probabilities ``[b, n, V]``, n at least this, which the other arguments have to fit."""
    check_x(probs, name)
    if probs.dim() != 3 or probs.shape[1] < least or not 1 <= probs.shape[2] <= MAX_VOCAB:
        raise ValueError(f"{name}: expected shape [{dims}, V from 1 to {MAX_VOCAB}], got {tuple(probs.shape)}")
    check_tensor(probs, name, tuple(probs.shape), (torch.float32,), probs.device)


def check_candidates(candidates: torch.Tensor) -> None:
    """Ids ``[bs, D]``, int32 or int64, that nothing but ids has to fit."""
    check_dims(candidates, "candidates", "bs, D >= 1")
    if candidates.shape[1] < 1:
        raise ValueError(f"candidates: expected shape [bs, D >= 1], got {tuple(candidates.shape)}")
    check_tensor(candidates, "candidates", tuple(candidates.shape), INTEGERS, candidates.device)


def check_written(
    written: Mapping[str, tuple[torch.Tensor, tuple[int, ...], torch.dtype]], read: Mapping[str, torch.Tensor]
) -> None:
    """Tensors that are written: their shapes and dtypes, contiguous, apart from those that are read and each other."""
    others = dict(read)
    device = next(iter(read.values())).device
    for name, (t, shape, dtype) in written.items():
        check_tensor(t, name, shape, (dtype,), device)
        if not t.is_contiguous():
            raise ValueError(f"{name}: expected a contiguous tensor, got strides {t.stride()}")
        check_apart(t, name, others)
        others[name] = t


def check_dims(t: torch.Tensor, name: str, dims: str) -> None:
    """As many dimensions as ``dims`` names."""
    if not isinstance(t, torch.Tensor) or t.dim() != dims.count(",") + 1:
        got = tuple(t.shape) if isinstance(t, torch.Tensor) else type(t).__name__
        raise ValueError(f"{name}: expected shape [{dims}], got {got}")


def check_result(out: object, kind: type) -> None:
    """The results that a caller gives are of the type that the op returns."""
    if not isinstance(out, kind):
        raise ValueError(f"out: expected a {kind.__name__}, got {type(out).__name__}")


def check_thresholds(threshold_single: float, threshold_acc: float) -> None:
    """Numbers from 0 to 1, not tensors: the host knows them."""
    for name, value in (("threshold_single", threshold_single), ("threshold_acc", threshold_acc)):
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
            raise ValueError(f"{name}: expected a number from 0 to 1, got {value!r}")
