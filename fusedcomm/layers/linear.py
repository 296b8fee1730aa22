"""Linear layers divided over the ranks of a group, by output (column) or by input (row)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import nn

from fusedcomm.groups.coordinator import GroupCoordinator
from fusedcomm.layers.activation import HiddenStates
from fusedcomm.layers.fp8_linear import BlockFP8Linear
from fusedcomm.layers.local_linear import local_linear
from fusedcomm.layers.partial_sum import PartialSum
from fusedcomm.layers.sharding import (
    FP8_BLOCK,
    RowShard,
    WeightSlice,
    ceil_div,
    check_fp8_shard,
    even_shard,
    kv_head_shard,
)

_ALL = slice(None)


class _ColumnLinear(nn.Module):
    """Several matrices over the same input, stacked by rows, each divided by rows."""

    def __init__(
        self,
        in_features: int,
        shards: Sequence[RowShard],
        *,
        bias: bool,
        dtype: torch.dtype | None,
        device: torch.device | None,
        block_fp8: bool,
    ) -> None:
        super().__init__()
        self.in_features = in_features
        self.shards = tuple(shards)
        self.local_sizes = [len(shard.rows) for shard in shards]
        if block_fp8:
            for shard in self.shards:
                check_fp8_shard(shard, name="out_features")
            for size in self.local_sizes[:-1]:
                if size % FP8_BLOCK:  # the next matrix would begin inside a block
                    raise ValueError(f"out_features: expected multiples of {FP8_BLOCK} to stack, got {size}")
        self.local = local_linear(
            in_features, sum(self.local_sizes), bias=bias, dtype=dtype, device=device, block_fp8=block_fp8
        )

    def forward(self, x: HiddenStates) -> torch.Tensor:
        """``x [..., in_features]`` (the same on every rank) to this rank's ``[..., sum(local_sizes)]``."""
        return self.local(x)  # type: ignore[no-any-return]

    def weight_slices(self, *sources: str) -> Iterator[WeightSlice]:
        """The checkpoint tensors this module reads; ``sources`` are the names of its matrices there."""
        row, block = 0, 0
        for source, shard in zip(sources, self.shards, strict=True):
            rows = slice(row, row + len(shard.rows))
            full = (shard.full_rows, self.in_features)
            yield WeightSlice(f"{source}.weight", full, (shard.index, _ALL), self.local.weight[rows])
            if isinstance(self.local, BlockFP8Linear):
                blocks = slice(block, block + ceil_div(len(shard.rows), FP8_BLOCK))
                scales = (ceil_div(shard.full_rows, FP8_BLOCK), ceil_div(self.in_features, FP8_BLOCK))
                target = self.local.weight_scale[blocks]
                yield WeightSlice(f"{source}.weight_scale_inv", scales, (shard.block_index, _ALL), target)
                block = blocks.stop
            if self.local.bias is not None:
                yield WeightSlice(f"{source}.bias", full[:1], (shard.index,), self.local.bias[rows])
            row = rows.stop


class ColumnParallelLinear(_ColumnLinear):
    """``y = x Wᵀ + bias`` with the rows of W ``[out_features, in_features]`` divided evenly.

    Returns this rank's ``[..., out_features / world_size]``, or all of y on every rank with
    ``gather_output``.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        group: GroupCoordinator,
        *,
        bias: bool = False,
        gather_output: bool = False,
        dtype: torch.dtype | None = None,
        device: torch.device | None = None,
        block_fp8: bool = False,
    ) -> None:
        shard = even_shard(out_features, group.rank, group.world_size, name="out_features")
        super().__init__(in_features, [shard], bias=bias, dtype=dtype, device=device, block_fp8=block_fp8)
        self.group = group
        self.gather_output = gather_output

    def forward(self, x: HiddenStates) -> torch.Tensor:
        y = super().forward(x)
        return self.group.all_gather(y, dim=-1) if self.gather_output else y


class MergedColumnParallelLinear(_ColumnLinear):
    """Column-parallel matrices over one input in a single product: gate and up of a gated MLP.

    Returns this rank's shares side by side, ``[..., sum(out_features) / world_size]``; local_sizes splits
    them.
    """

    def __init__(
        self,
        in_features: int,
        out_features: Sequence[int],
        group: GroupCoordinator,
        *,
        bias: bool = False,
        dtype: torch.dtype | None = None,
        device: torch.device | None = None,
        block_fp8: bool = False,
    ) -> None:
        shards = [even_shard(size, group.rank, group.world_size, name="out_features") for size in out_features]
        super().__init__(in_features, shards, bias=bias, dtype=dtype, device=device, block_fp8=block_fp8)


class QKVParallelLinear(_ColumnLinear):
    """The query, key and value projections in a single product, divided by heads.

    With fewer key/value heads than ranks, several ranks hold the same head. Returns this rank's
    ``[..., (num_local_heads + 2 · num_local_kv_heads) · head_dim]``, q then k then v.
    """

    def __init__(
        self,
        hidden_size: int,
        head_dim: int,
        num_heads: int,
        num_kv_heads: int,
        group: GroupCoordinator,
        *,
        bias: bool = False,
        dtype: torch.dtype | None = None,
        device: torch.device | None = None,
        block_fp8: bool = False,
    ) -> None:
        q = even_shard(num_heads, group.rank, group.world_size, name="num_heads")
        kv = kv_head_shard(num_kv_heads, group.rank, group.world_size)
        shards = [_times(q, head_dim), _times(kv, head_dim), _times(kv, head_dim)]
        super().__init__(hidden_size, shards, bias=bias, dtype=dtype, device=device, block_fp8=block_fp8)
        self.num_local_heads = len(q.rows)
        self.num_local_kv_heads = len(kv.rows)


def _times(shard: RowShard, factor: int) -> RowShard:
    return RowShard(shard.full_rows * factor, range(shard.rows.start * factor, shard.rows.stop * factor))


class RowParallelLinear(nn.Module):
    """``y = x Wᵀ + bias`` with the columns of W ``[out_features, in_features]`` divided evenly.

    x is this rank's ``[..., in_features / world_size]``. Returns the sum over the ranks ``[...,
    out_features]``, or with ``reduce_results=False`` this rank's PartialSum of it, for the next norm to
    complete.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        group: GroupCoordinator,
        *,
        bias: bool = False,
        reduce_results: bool = True,
        dtype: torch.dtype | None = None,
        device: torch.device | None = None,
        block_fp8: bool = False,
    ) -> None:
        super().__init__()
        self.shard = even_shard(in_features, group.rank, group.world_size, name="in_features")
        if block_fp8:
            check_fp8_shard(self.shard, name="in_features")
        self.out_features = out_features
        self.group = group
        self.reduce_results = reduce_results
        # The bias enters the sum once: the first rank's addend carries it.
        self.local = local_linear(
            len(self.shard.rows),
            out_features,
            bias=bias and group.rank == 0,
            dtype=dtype,
            device=device,
            block_fp8=block_fp8,
        )

    def forward(self, x: HiddenStates) -> torch.Tensor | PartialSum:
        partial = PartialSum(self.local(x), self.group)
        return partial.reduce() if self.reduce_results else partial

    def weight_slices(self, source: str) -> Iterator[WeightSlice]:
        """The checkpoint tensors this module reads; ``source`` is its name there."""
        shape = (self.out_features, self.shard.full_rows)
        yield WeightSlice(f"{source}.weight", shape, (_ALL, self.shard.index), self.local.weight)
        if isinstance(self.local, BlockFP8Linear):
            scale = (ceil_div(self.out_features, FP8_BLOCK), ceil_div(self.shard.full_rows, FP8_BLOCK))
            target = self.local.weight_scale
            yield WeightSlice(f"{source}.weight_scale_inv", scale, (_ALL, self.shard.block_index), target)
        if self.local.bias is not None:
            yield WeightSlice(f"{source}.bias", (self.out_features,), (_ALL,), self.local.bias)
