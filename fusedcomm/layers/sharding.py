"""How parameters are divided among the ranks of a group, and where their pieces come from."""

from __future__ import annotations

from dataclasses import dataclass

import torch

FP8_BLOCK = 128
"""Rows and columns that share a weight scale, and neighbours that share an activation scale."""


@dataclass(frozen=True)
class WeightSlice:
    """One read of a checkpoint: ``target`` (a view of a parameter) becomes ``source[index]``."""

    source: str
    full_shape: tuple[int, ...]
    index: tuple[slice, ...]
    target: torch.Tensor


@dataclass(frozen=True)
class RowShard:
    """The rows of one ``full_rows``-row matrix that this rank holds."""

    full_rows: int
    rows: range

    @property
    def index(self) -> slice:
        return slice(self.rows.start, self.rows.stop)

    @property
    def block_index(self) -> slice:
        """The same in blocks of FP8_BLOCK rows."""
        return slice(self.rows.start // FP8_BLOCK, ceil_div(self.rows.stop, FP8_BLOCK))


def ceil_div(a: int, b: int) -> int:
    """``a / b`` rounded up."""
    return -(-a // b)


def even_shard(size: int, rank: int, world_size: int, *, name: str) -> RowShard:
    """Rank ``rank``'s equal share of ``size`` rows.

    Raises:
        ValueError: ``size`` is not a multiple of ``world_size``.
    """
    if size % world_size:
        raise ValueError(f"{name}: expected a multiple of the group's {world_size} ranks, got {size}")
    rows = size // world_size
    return RowShard(size, range(rank * rows, (rank + 1) * rows))


def ragged_shard(size: int, rank: int, world_size: int) -> RowShard:
    """Rank ``rank``'s share of ``size`` rows where the last ranks may hold fewer, or none."""
    rows = ceil_div(size, world_size)
    return RowShard(size, range(min(rank * rows, size), min((rank + 1) * rows, size)))


def kv_head_shard(num_kv_heads: int, rank: int, world_size: int) -> RowShard:
    """The key/value heads of rank ``rank``: an equal share, or one head that several ranks hold alike.

    Raises:
        ValueError: neither number divides the other.
    """
    if num_kv_heads % world_size == 0:
        return even_shard(num_kv_heads, rank, world_size, name="num_kv_heads")
    if world_size % num_kv_heads:
        raise ValueError(f"num_kv_heads: expected a multiple or a divisor of {world_size} (ranks), got {num_kv_heads}")
    head = rank * num_kv_heads // world_size
    return RowShard(num_kv_heads, range(head, head + 1))


def check_fp8_shard(shard: RowShard, *, name: str) -> None:
    """Refuses a share whose edges cut an FP8 block of FP8_BLOCK rows (or columns) in two.

    Raises:
        ValueError: the share is not the whole and not a whole number of blocks.
    """
    if len(shard.rows) != shard.full_rows and (shard.rows.start % FP8_BLOCK or len(shard.rows) % FP8_BLOCK):
        raise ValueError(
            f"{name}: expected a multiple of {FP8_BLOCK} a rank for block-FP8 weights, "
            f"got {len(shard.rows)} of {shard.full_rows}; use fewer ranks"
        )
