"""The kernels of csrc/gpu/sampling on an emulated GPU, called as their references are."""

from __future__ import annotations

import ctypes
from ctypes import Structure, byref, c_bool, c_float, c_int32, c_int64, c_uint64, c_void_p
from pathlib import Path
from typing import Any, NamedTuple

import torch

# ---- csrc/include/fusedcomm/sampling.h ----


class Integers(Structure):
    _fields_ = [("data", c_void_p), ("is_wide", c_bool)]


class Rows(Structure):
    _fields_ = [
        ("data", c_void_p),
        ("dtype", c_int32),
        ("stride", c_int64),
        ("num_rows", c_int64),
        ("indices", Integers),
        ("count", c_int64),
        ("vocab", c_int32),
    ]


class Limit(Structure):
    _fields_ = [("rows", Integers), ("value", c_int32)]


class PerRow(Structure):
    _fields_ = [("rows", c_void_p), ("value", c_float)]


class ChainArguments(Structure):
    _fields_ = [
        ("draft_probs", c_void_p),
        ("draft_ids", Integers),
        ("target_probs", c_void_p),
        ("uniforms", c_void_p),
        ("final_uniforms", c_void_p),
        ("output_ids", c_void_p),
        ("accepted", c_void_p),
        ("batch", c_int64),
        ("num_drafts", c_int32),
        ("vocab", c_int32),
    ]


class Verified(Structure):
    _fields_ = [("accept_len", c_void_p), ("bonus", c_void_p), ("tokens", c_void_p)]


class BlockArguments(Structure):
    _fields_ = [
        ("candidates", c_void_p),
        ("target_probs", c_void_p),
        ("uniforms", c_void_p),
        ("final_uniforms", c_void_p),
        ("threshold_single", c_float),
        ("threshold_acc", c_float),
        ("out", Verified),
        ("batch", c_int64),
        ("size", c_int32),
        ("vocab", c_int32),
    ]


class GreedyArguments(Structure):
    _fields_ = [
        ("candidates", Integers),
        ("target_predict", Integers),
        ("out", Verified),
        ("batch", c_int64),
        ("size", c_int32),
    ]


class TreeArguments(Structure):
    _fields_ = [
        ("predicts", c_void_p),
        ("accept_index", c_void_p),
        ("accept_token_num", c_void_p),
        ("candidates", c_void_p),
        ("retrive_index", c_void_p),
        ("retrive_next_token", c_void_p),
        ("retrive_next_sibling", c_void_p),
        ("uniforms", c_void_p),
        ("final_uniforms", c_void_p),
        ("target_probs", c_void_p),
        ("draft_probs", c_void_p),
        ("threshold_single", c_float),
        ("threshold_acc", c_float),
        ("batch", c_int64),
        ("num_positions", c_int64),
        ("size", c_int32),
        ("path_size", c_int32),
        ("vocab", c_int32),
    ]


DTYPES = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}


def _integers(t: torch.Tensor | None) -> Integers:
    return Integers() if t is None else Integers(t.data_ptr(), t.dtype is torch.int64)


def _rows(probs: torch.Tensor, indices: torch.Tensor | None) -> Rows:
    count = len(probs if indices is None else indices)
    stride, vocab = probs.stride(0), probs.shape[1]
    return Rows(probs.data_ptr(), DTYPES[probs.dtype], stride, len(probs), _integers(indices), count, vocab)


def _per_row(rows: torch.Tensor | None, value: float) -> PerRow:
    return PerRow(None if rows is None else rows.data_ptr(), value)


def _pointers(*tensors: torch.Tensor) -> tuple[int, ...]:
    return tuple(t.data_ptr() for t in tensors)


class Schedule(NamedTuple):
    """How a launch runs: the order of its threads, and the blocks and threads of a row; 0: by the launch's own rule.

    With an even seed what blocks send to each other arrives only once no thread can go on without it.
    """

    seed: int = 1
    accesses_between_switches: int = 0
    blocks: int = 0
    threads: int = 0


class FoundError(Exception):
    """What the emulator found, a line each."""


class EmulatedGpu:
    """A library of emulator_build, with the functions and the arguments of the references of sampling and verification.

    CPU tensors; results are written in place. All of them raise FoundError for what the emulator finds.
    """

    def __init__(self, library: Path) -> None:
        self._library = ctypes.CDLL(str(library))
        self._library.emulated_errors.restype = ctypes.c_char_p
        self.schedule = Schedule()

    def _launch(self, entry: str, arguments: tuple[Any, ...], read: tuple[Any, ...], written: tuple[Any, ...]) -> None:
        """Nothing but ``read`` may be read, and nothing but ``written`` written."""
        seed, switches, blocks, threads = self.schedule
        self._library.emulated_reset(c_uint64(seed), c_int32(switches), c_int32(blocks), c_int32(threads))
        for tensors, writes in ((read, False), (written, True)):
            for t in tensors:
                if isinstance(t, torch.Tensor) and t.numel() > 0:
                    extent = 1 + sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True))
                    address, size = c_void_p(t.data_ptr()), c_int64(extent * t.element_size())
                    self._library.emulated_allow(address, size, c_bool(writes))
        passed = [byref(a) if isinstance(a, Structure) else a for a in arguments]
        status = getattr(self._library, entry)(*passed)
        errors = self._library.emulated_errors().decode()
        if status != 0 or errors:
            raise FoundError(f"{entry} with {self.schedule}: status {status}\n{errors}")

    def layout(self, rows: int, vocab: int, narrow_bytes: int, wide_bytes: int) -> tuple[int, ...]:
        """Blocks of a row, threads and bytes of shared memory of a block, by the launch's own rule."""
        self._library.emulated_reset(c_uint64(0), c_int32(0), c_int32(0), c_int32(0))
        found = (c_int32 * 3)()
        self._library.emulated_layout(c_int64(rows), c_int32(vocab), c_int64(narrow_bytes), c_int64(wide_bytes), found)
        return tuple(found)

    def top_k_renorm_probs_out(self, probs: Any, indices: Any, top_k: Any, top_k_value: int, out: torch.Tensor) -> None:
        limit = Limit(_integers(top_k), top_k_value)
        arguments = (_rows(probs, indices), limit, c_void_p(out.data_ptr()))
        self._launch("top_k_renorm", arguments, (probs, indices, top_k), (out,))

    def top_p_renorm_probs_out(
        self, probs: Any, indices: Any, top_p: Any, top_p_value: float, out: torch.Tensor
    ) -> None:
        self._filter("top_p_renorm", probs, indices, top_p, top_p_value, out)

    def min_p_renorm_probs_out(
        self, probs: Any, indices: Any, min_p: Any, min_p_value: float, out: torch.Tensor
    ) -> None:
        self._filter("min_p_renorm", probs, indices, min_p, min_p_value, out)

    def softmax_temperature_out(
        self, logits: Any, indices: Any, temperature: Any, temperature_value: float, out: torch.Tensor
    ) -> None:
        self._filter("softmax_temperature", logits, indices, temperature, temperature_value, out)

    def _filter(self, entry: str, rows: Any, indices: Any, numbers: Any, number: float, out: torch.Tensor) -> None:
        arguments = (_rows(rows, indices), _per_row(numbers, number), c_void_p(out.data_ptr()))
        self._launch(entry, arguments, (rows, indices, numbers), (out,))

    def top_k_top_p_renorm_probs_out(
        self,
        probs: Any,
        indices: Any,
        top_k: Any,
        top_k_value: int,
        top_p: Any,
        top_p_value: float,
        out: torch.Tensor,
    ) -> None:
        limits = (Limit(_integers(top_k), top_k_value), _per_row(top_p, top_p_value))
        arguments = (_rows(probs, indices), *limits, c_void_p(out.data_ptr()))
        self._launch("top_k_top_p_renorm", arguments, (probs, indices, top_k, top_p), (out,))

    def sampling_from_probs_out(self, probs: Any, indices: Any, uniforms: torch.Tensor, out: torch.Tensor) -> None:
        arguments = (_rows(probs, indices), *map(c_void_p, _pointers(uniforms, out)))
        self._launch("sample", arguments, (probs, indices, uniforms), (out,))

    def top_k_top_p_sampling_from_probs_out(
        self,
        probs: Any,
        indices: Any,
        top_k: Any,
        top_k_value: int,
        top_p: Any,
        top_p_value: float,
        uniforms: torch.Tensor,
        joint: bool,
        out: torch.Tensor,
    ) -> None:
        limits = (Limit(_integers(top_k), top_k_value), _per_row(top_p, top_p_value))
        u, result = map(c_void_p, _pointers(uniforms, out))
        arguments = (_rows(probs, indices), *limits, u, c_bool(joint), result)
        self._launch("sample_top_k_top_p", arguments, (probs, indices, top_k, top_p, uniforms), (out,))

    def chain_speculative_sampling_out(
        self,
        draft_probs: torch.Tensor,
        draft_ids: torch.Tensor,
        target_probs: torch.Tensor,
        uniforms: torch.Tensor,
        final_uniforms: torch.Tensor,
        *out: torch.Tensor,
    ) -> None:
        batch, positions, vocab = target_probs.shape
        read = (target_probs, uniforms, final_uniforms)
        pointers = _pointers(*read, *out)
        ids = _integers(draft_ids)
        arguments = ChainArguments(draft_probs.data_ptr(), ids, *pointers, batch, positions - 1, vocab)
        self._launch("chain_speculative_sampling", (arguments,), (draft_probs, draft_ids, *read), out)

    def dflash_chain_verify_out(
        self,
        candidates: torch.Tensor,
        target_probs: torch.Tensor,
        uniforms: torch.Tensor,
        final_uniforms: torch.Tensor,
        threshold_single: float,
        threshold_acc: float,
        *out: torch.Tensor,
    ) -> None:
        read = (candidates, target_probs, uniforms, final_uniforms)
        thresholds = (threshold_single, threshold_acc)
        arguments = BlockArguments(*_pointers(*read), *thresholds, Verified(*_pointers(*out)), *target_probs.shape)
        self._launch("dflash_chain_verify", (arguments,), read, out)

    def greedy_chain_verify_out(
        self, candidates: torch.Tensor, target_predict: torch.Tensor, *out: torch.Tensor
    ) -> None:
        read = (candidates, target_predict)
        verified = Verified(*_pointers(*out))
        arguments = GreedyArguments(*map(_integers, read), verified, *candidates.shape)
        self._launch("greedy_chain_verify", (arguments,), read, out)

    def tree_speculative_sampling_target_only(
        self,
        predicts: torch.Tensor,
        accept_index: torch.Tensor,
        accept_token_num: torch.Tensor,
        *inputs: Any,
    ) -> None:
        *read, draft_probs, threshold_single, threshold_acc = inputs
        batch, size, vocab = draft_probs.shape
        out = (predicts, accept_index, accept_token_num)
        pointers = _pointers(*out, *read, draft_probs)
        sizes = (batch, len(predicts), size, accept_index.shape[1], vocab)
        arguments = TreeArguments(*pointers, threshold_single, threshold_acc, *sizes)
        self._launch("tree_speculative_sampling", (arguments,), tuple(read), (*out, draft_probs))
