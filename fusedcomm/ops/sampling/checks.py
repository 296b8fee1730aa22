"""Argument checks of the sampling ops: they name the argument, what was expected and what came.

What costs no wait for the device is always checked; values in tensors with ``FUSEDCOMM_DEBUG=1`` alone.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from fusedcomm.ops.attention.qk_checks import check_tensor
from fusedcomm.ops.checks import check_apart, check_x
from fusedcomm.ops.sampling.fixed_point import MAX_VOCAB, take
from fusedcomm.ops.sampling.values import refuse, sees_values

_INTEGERS = (torch.int32, torch.int64)
_LARGEST = torch.finfo(torch.float32).max


class Source(NamedTuple):
    """Checked probabilities or logits, as operators take them."""

    name: str
    rows: torch.Tensor
    """``[B, V]``, a last dimension of stride 1."""
    indices: torch.Tensor | None
    """``[N]``, contiguous."""

    @property
    def shape(self) -> tuple[int, int]:
        """``(N, V)`` of the result."""
        return (self.rows if self.indices is None else self.indices).shape[0], self.rows.shape[1]


class TopK(NamedTuple):
    """A limit for each row, int32 or int64 ``[N]``, or one for all from 1 to V - 1; 0 is none."""

    rows: torch.Tensor | None
    value: int


class PerRow(NamedTuple):
    """A number for each row, fp32 ``[N]``, or one for all."""

    rows: torch.Tensor | None
    value: float


def check_probs(probs: torch.Tensor, indices: torch.Tensor | None) -> Source:
    """Probabilities ``[B, V]`` in bf16, fp16 or fp32, and the rows of them that are named."""
    source = _check_source(probs, "probs", indices)
    if sees_values(probs):
        used = take(probs, indices)
        refuse(~(used >= 0) | used.isinf(), used, "probs", "finite numbers >= 0")
        refuse(used.amax(-1) == 0, used.amax(-1), "probs", "rows that are not all zero")
    return source


def check_logits(logits: torch.Tensor, indices: torch.Tensor | None) -> Source:
    """Logits ``[B, V]`` in bf16, fp16 or fp32, and the rows of them that are named."""
    source = _check_source(logits, "logits", indices)
    if sees_values(logits):
        used = take(logits, indices)
        refuse(~(used < torch.inf), used, "logits", "numbers below inf")
        refuse(used.amax(-1) == -torch.inf, used.amax(-1), "logits", "rows that are not all -inf")
    return source


def _check_source(rows: torch.Tensor, name: str, indices: torch.Tensor | None) -> Source:
    check_x(rows, name)
    if rows.dim() != 2 or not 1 <= rows.shape[1] <= MAX_VOCAB:
        raise ValueError(f"{name}: expected shape [B, V from 1 to {MAX_VOCAB}], got {tuple(rows.shape)}")
    if indices is not None:
        indices = _check_indices(indices, rows, name)
    return Source(name, rows if rows.stride(1) == 1 else rows.contiguous(), indices)


def _check_indices(indices: torch.Tensor, rows: torch.Tensor, name: str) -> torch.Tensor:
    if not isinstance(indices, torch.Tensor) or indices.dim() != 1:
        got = tuple(indices.shape) if isinstance(indices, torch.Tensor) else type(indices).__name__
        raise ValueError(f"indices: expected shape [N], got {got}")
    check_tensor(indices, "indices", (indices.shape[0],), _INTEGERS, rows.device)
    num_rows = rows.shape[0]
    if num_rows == 0 and indices.shape[0] > 0:
        raise ValueError(f"{name}: expected at least one row for indices, got shape {tuple(rows.shape)}")
    if sees_values(indices):
        refuse((indices < 0) | (indices >= num_rows), indices, "indices", f"rows of {name} from 0 to {num_rows - 1}")
    return indices.contiguous()


def check_top_k(top_k: torch.Tensor | int, source: Source) -> TopK:
    """Any int, or int32 or int64 ``[N]``."""
    if isinstance(top_k, torch.Tensor):
        check_tensor(top_k, "top_k", source.shape[:1], _INTEGERS, source.rows.device)
        return TopK(top_k.contiguous(), 0)
    if isinstance(top_k, bool) or not isinstance(top_k, int):
        raise ValueError(f"top_k: expected an int or a torch.Tensor, got {top_k!r}")
    return TopK(None, top_k if 0 < top_k < source.shape[1] else 0)


def check_share(share: torch.Tensor | float, name: str, source: Source) -> PerRow:
    """A number from 0 to 1, or fp32 ``[N]``."""
    return _check_per_row(share, name, source, 1.0, "a number from 0 to 1")


def check_temperature(temperature: torch.Tensor | float, source: Source) -> PerRow:
    """A finite number >= 0, or fp32 ``[N]``."""
    return _check_per_row(temperature, "temperature", source, _LARGEST, "a finite number >= 0")


def _check_per_row(value: torch.Tensor | float, name: str, source: Source, most: float, expected: str) -> PerRow:
    if isinstance(value, torch.Tensor):
        check_tensor(value, name, source.shape[:1], (torch.float32,), source.rows.device)
        if sees_values(value):
            refuse(~((value >= 0) & (value <= most)), value, name, expected)
        return PerRow(value.contiguous(), 0.0)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= most:
        raise ValueError(f"{name}: expected {expected} or a torch.Tensor, got {value!r}")
    return PerRow(None, float(value))


def check_uniforms(uniforms: torch.Tensor, source: Source) -> torch.Tensor:
    """fp32 ``[N]``."""
    check_tensor(uniforms, "uniforms", source.shape[:1], (torch.float32,), source.rows.device)
    if sees_values(uniforms):
        refuse(~((uniforms >= 0) & (uniforms < 1)), uniforms, "uniforms", "a number from 0 to below 1")
    return uniforms.contiguous()


def check_generator(generator: torch.Generator | None, device: torch.device) -> None:
    """A generator of this type of device, or none."""
    if generator is None:
        return
    if not isinstance(generator, torch.Generator):
        raise ValueError(f"generator: expected a torch.Generator, got {type(generator).__name__}")
    if generator.device.type != device.type:
        raise ValueError(f"generator: expected one of {device.type}, got one of {generator.device.type}")


def check_out(
    out: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype, source: Source, **others: torch.Tensor | None
) -> None:
    """A contiguous result that the caller gives, apart from the inputs."""
    check_tensor(out, "out", shape, (dtype,), source.rows.device)
    if not out.is_contiguous():
        raise ValueError(f"out: expected a contiguous tensor, got strides {out.stride()}")
    inputs = {source.name: source.rows, "indices": source.indices, **others}
    check_apart(out, "out", {name: t for name, t in inputs.items() if t is not None})


def result(out: torch.Tensor | None, source: Source, **others: torch.Tensor | None) -> torch.Tensor:
    """Probabilities to write to: those that the caller gives, or new ones."""
    if out is None:
        return source.rows.new_empty(source.shape, dtype=torch.float32)
    check_out(out, source.shape, torch.float32, source, **others)
    return out
