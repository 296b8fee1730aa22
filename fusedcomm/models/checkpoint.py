"""Reading parts of tensors from a directory of safetensors files."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from fusedcomm.layers.sharding import WeightSlice
from fusedcomm.models.errors import CheckpointError

_LISTED = 20
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


class Checkpoint:
    """The tensors of a checkpoint directory, in one file or many; a context manager that closes them."""

    def __init__(self, path: str | Path) -> None:
        """Opens ``path``.

        Raises:
            CheckpointError: no safetensors files there, or an index that names files that are not.
        """
        self.path = Path(path)
        self._stack = ExitStack()
        self._file_of: dict[str, Any] = {}
        try:
            for name in self._file_names():
                file = self._stack.enter_context(safe_open(self.path / name, framework="pt"))
                self._file_of.update(dict.fromkeys(file.keys(), file))
        except (OSError, SafetensorError) as error:
            self.close()
            raise CheckpointError(f"path: expected readable safetensors files in {self.path}, got {error}") from error

    def _file_names(self) -> Iterable[str]:
        index = self.path / INDEX
        if not index.is_file():
            return [SINGLE]
        try:
            return sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, AttributeError) as error:
            raise CheckpointError(f"{index}: expected JSON with a weight_map, got {error!r}") from error

    def close(self) -> None:
        self._stack.close()
        self._file_of.clear()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def load(self, slices: Sequence[WeightSlice], on_progress: Callable[[int, int], None] | None = None) -> None:
        """Fills every slice's target, reading only what it names; ``on_progress(done, total)`` counts reads.

        Raises:
            CheckpointError: tensors are missing (all are listed), or one has another shape or kind of dtype.
        """
        missing = sorted({s.source for s in slices} - self._file_of.keys())
        if missing:
            more = f" and {len(missing) - _LISTED} more" if len(missing) > _LISTED else ""
            raise CheckpointError(
                f"{self.path}: {len(missing)} tensors are missing: {', '.join(missing[:_LISTED])}{more}"
            )
        for done, wanted in enumerate(slices, start=1):
            self._read(wanted)
            if on_progress is not None:
                on_progress(done, len(slices))

    def _read(self, wanted: WeightSlice) -> None:
        stored = self._file_of[wanted.source].get_slice(wanted.source)
        shape = tuple(stored.get_shape())
        if shape != wanted.full_shape:
            raise CheckpointError(f"{wanted.source}: expected shape {list(wanted.full_shape)}, got {list(shape)}")
        if wanted.target.numel() == 0:  # a vocabulary smaller than the padded shares
            return
        values: torch.Tensor = stored[wanted.index]
        quantized = wanted.target.dtype is torch.float8_e4m3fn
        if (values.dtype is torch.float8_e4m3fn) != quantized or not values.dtype.is_floating_point:
            expected = "float8_e4m3fn (quantization_config says fp8)" if quantized else "bf16, fp16 or fp32"
            raise CheckpointError(f"{wanted.source}: expected {expected}, got {values.dtype}")
        with torch.no_grad():
            wanted.target.copy_(values)
