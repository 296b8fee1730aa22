"""The token embedding and the output projection, divided over the ranks by vocabulary."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from fusedcomm.groups.coordinator import GroupCoordinator
from fusedcomm.layers.partial_sum import PartialSum
from fusedcomm.layers.sharding import WeightSlice, ceil_div, ragged_shard


class _VocabParallel(nn.Module):
    """This rank's rows of a ``[vocab_size, hidden_size]`` table; zeros pad the last ranks to as many rows."""

    def __init__(
        self,
        vocab_size: int,
        hidden_size: int,
        group: GroupCoordinator,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | None = None,
    ) -> None:
        super().__init__()
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.group = group
        self.shard = ragged_shard(vocab_size, group.rank, group.world_size)
        table = torch.zeros(ceil_div(vocab_size, group.world_size), hidden_size, dtype=dtype, device=device)
        self.weight = nn.Parameter(table, requires_grad=False)

    def weight_slices(self, source: str) -> Iterator[WeightSlice]:
        """The checkpoint tensors this module reads; ``source`` is its name there."""
        target = self.weight[: len(self.shard.rows)]
        full = (self.vocab_size, self.hidden_size)
        yield WeightSlice(f"{source}.weight", full, (self.shard.index, slice(None)), target)

    def extra_repr(self) -> str:
        rows = self.shard.rows
        return f"{self.vocab_size}, {self.hidden_size}, rows={rows.start}:{rows.stop}"


class VocabParallelEmbedding(_VocabParallel):
    """Rows of a table by token id; each rank holds an equal share of the vocabulary."""

    def __init__(
        self,
        vocab_size: int,
        hidden_size: int,
        group: GroupCoordinator,
        *,
        reduce_results: bool = True,
        dtype: torch.dtype | None = None,
        device: torch.device | None = None,
    ) -> None:
        super().__init__(vocab_size, hidden_size, group, dtype=dtype, device=device)
        self.reduce_results = reduce_results

    def forward(self, ids: torch.Tensor) -> torch.Tensor | PartialSum:
        """``ids [...]`` int64 (the same on every rank) to ``[..., hidden_size]``, or its PartialSum.

        Raises:
            ValueError: an id outside the vocabulary; checked where it costs no device synchronisation (CPU).
        """
        if ids.device.type == "cpu" and ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < self.vocab_size:
            raise ValueError(f"ids: expected 0 to {self.vocab_size - 1}, got {int(ids.min())} to {int(ids.max())}")
        rows = self.shard.rows
        elsewhere = (ids < rows.start) | (ids >= rows.stop)
        local = (ids - rows.start).masked_fill(elsewhere, 0)
        values = nn.functional.embedding(local, self.weight).masked_fill_(elsewhere.unsqueeze(-1), 0)
        partial = PartialSum(values, self.group)
        return partial.reduce() if self.reduce_results else partial


class ParallelLMHead(_VocabParallel):
    """Logits of the full vocabulary on every rank, from rows divided by vocabulary."""

    def tie_to(self, embedding: VocabParallelEmbedding) -> None:
        """Uses the embedding's table as this layer's weight.

        Raises:
            ValueError: the embedding holds another table shape.
        """
        if embedding.weight.shape != self.weight.shape:
            raise ValueError(f"embedding: expected {list(self.weight.shape)}, got {list(embedding.weight.shape)}")
        self.weight = embedding.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``x [..., hidden_size]`` to ``[..., vocab_size]``, gathered, so the same bits on every rank."""
        logits = nn.functional.linear(x, self.weight)
        return self.group.all_gather(logits, dim=-1)[..., : self.vocab_size]
