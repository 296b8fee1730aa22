"""A contiguous cache of keys and values."""

from __future__ import annotations

from typing import NamedTuple

import torch


class KeysValues(NamedTuple):
    """Keys and values ``[B, num_local_kv_heads, length, head_dim]`` of one layer."""

    keys: torch.Tensor
    values: torch.Tensor


class KVCache:
    """Keys and values of every layer, ``[B, num_local_kv_heads, max_length, head_dim]`` each."""

    def __init__(
        self,
        num_layers: int,
        batch_size: int,
        num_local_kv_heads: int,
        max_length: int,
        head_dim: int,
        *,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        shape = (num_layers, batch_size, num_local_kv_heads, max_length, head_dim)
        self._keys = torch.empty(shape, dtype=dtype, device=device)
        self._values = torch.empty(shape, dtype=dtype, device=device)
        self.max_length = max_length
        self.length = 0
        """Positions that every layer holds."""

    def append(self, layer: int, keys: torch.Tensor, values: torch.Tensor) -> KeysValues:
        """Writes ``keys`` and ``values [B, heads, S, D]`` to ``layer``; returns views of all it holds.

        Raises:
            ValueError: they do not fit.
        """
        end = self.length + keys.shape[2]
        if end > self.max_length:
            raise ValueError(f"keys: expected at most {self.max_length - self.length} positions, got {keys.shape[2]}")
        self._keys[layer, :, :, self.length : end] = keys
        self._values[layer, :, :, self.length : end] = values
        return KeysValues(self._keys[layer, :, :, :end], self._values[layer, :, :, :end])

    def advance(self, count: int) -> None:
        """Counts ``count`` positions as held, once every layer has appended them."""
        self.length += count
