"""Qwen3 decoding over a tensor-parallel group."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import nn

from fusedcomm.groups.coordinator import GroupCoordinator
from fusedcomm.layers import ParallelLMHead, PartialSum, RMSNorm, VocabParallelEmbedding
from fusedcomm.layers.sharding import WeightSlice, kv_head_shard
from fusedcomm.models import generation
from fusedcomm.models.checkpoint import Checkpoint
from fusedcomm.models.config import Qwen3Config
from fusedcomm.models.kv_cache import KVCache
from fusedcomm.models.loader import load_together
from fusedcomm.models.qwen3_layers import Qwen3DecoderLayer, Step
from fusedcomm.models.rope import rope_tables


class Qwen3ForCausalLM(nn.Module):
    """Qwen3, divided over the ranks of ``group``; every rank makes the same calls with the same ids.

    All-reduces run inside the norms that follow them, and in block-FP8 models the quantisers too;
    ``enable_fusion=False`` runs each as a step of its own, to compare.
    """

    def __init__(
        self,
        config: Qwen3Config,
        group: GroupCoordinator,
        dtype: torch.dtype | None = None,
        *,
        enable_fusion: bool = True,
    ) -> None:
        """Builds the model with its weights at zero; ``dtype`` None is the config's.

        Raises:
            ValueError: heads, sizes or FP8 blocks that the group's ranks cannot divide.
        """
        super().__init__()
        config.check_world_size(group.world_size)
        self.config = config
        self.group = group
        self.dtype = config.dtype if dtype is None else dtype
        self.enable_fusion = enable_fusion
        self.embed_tokens = VocabParallelEmbedding(
            config.vocab_size,
            config.hidden_size,
            group,
            reduce_results=False,  # the first layer's input norm completes it
            dtype=self.dtype,
            device=group.device,
        )
        self.layers = nn.ModuleList(
            Qwen3DecoderLayer(config, group, index, self.dtype, enable_fusion) for index in range(config.num_layers)
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype=self.dtype, device=group.device)
        self.lm_head = ParallelLMHead(
            config.vocab_size, config.hidden_size, group, dtype=self.dtype, device=group.device
        )
        if config.tie_word_embeddings:
            self.lm_head.tie_to(self.embed_tokens)

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        group: GroupCoordinator,
        dtype: torch.dtype | None = None,
        *,
        enable_fusion: bool = True,
        on_progress: Callable[[int, int], None] | None = None,
    ) -> Qwen3ForCausalLM:
        """Loads a Hugging Face checkpoint directory, each rank its slices; a collective call.

        ``dtype`` None is the checkpoint's. ``on_progress(done, total)`` counts the reads of this rank.

        Raises:
            CheckpointError: another architecture, missing or ill-shaped tensors, quantisation other than
            block-FP8. A
                file that only one rank cannot read is an error on all of them.
            ValueError: heads, sizes or FP8 blocks that the group's ranks cannot divide.
        """

        def load() -> Qwen3ForCausalLM:
            model = cls(Qwen3Config.from_pretrained(path), group, dtype, enable_fusion=enable_fusion)
            with Checkpoint(path) as checkpoint:
                checkpoint.load(list(model.weight_slices()), on_progress)
            return model.eval()

        return load_together(load, group)

    def weight_slices(self) -> Iterator[WeightSlice]:
        """The parts of the checkpoint's tensors that this rank holds."""
        yield from self.embed_tokens.weight_slices("model.embed_tokens")
        for layer in self.layers:
            yield from layer.weight_slices()  # type: ignore[operator]
        yield from self.norm.weight_slices("model.norm")
        if not self.config.tie_word_embeddings:
            yield from self.lm_head.weight_slices("lm_head")

    @torch.no_grad()
    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Full-vocabulary logits ``[B, S, V]`` of ``input_ids [B, S]`` int64, the same bits on every rank."""
        generation.check_input_ids(input_ids, self.config)
        hidden, residual = self._decode(input_ids, None)
        logits: torch.Tensor = self.lm_head(self._final_norm(hidden, residual))
        return logits.view(*input_ids.shape, -1)

    @torch.no_grad()
    def next_logits(self, input_ids: torch.Tensor, cache: KVCache) -> torch.Tensor:
        """Logits ``[B, V]`` behind the last of ``input_ids [B, S]``, which are appended to ``cache``.

        The cache is empty (a prompt) or S is 1 (a step).
        """
        hidden, residual = self._decode(input_ids, cache)
        cache.advance(input_ids.shape[1])
        # Only the last row of each sequence is summed, normed and projected.
        last = slice(input_ids.shape[1] - 1, None, input_ids.shape[1])
        hidden = PartialSum(hidden.tensor[last], hidden.group)
        logits: torch.Tensor = self.lm_head(self._final_norm(hidden, residual[last]))
        return logits

    def new_cache(self, batch_size: int, max_length: int) -> KVCache:
        """An empty cache for ``batch_size`` sequences of up to ``max_length`` positions."""
        heads = kv_head_shard(self.config.num_kv_heads, self.group.rank, self.group.world_size)
        return KVCache(
            self.config.num_layers,
            batch_size,
            len(heads.rows),
            max_length,
            self.config.head_dim,
            dtype=self.dtype,
            device=self.group.device,
        )

    def generate(
        self,
        input_ids: torch.Tensor,
        max_new_tokens: int,
        temperature: float = 0.0,
        top_p: float = 1.0,
        generator: torch.Generator | None = None,
        *,
        on_token: Callable[[torch.Tensor], None] | None = None,
        ignore_eos: bool = False,
    ) -> torch.Tensor:
        """``input_ids [B, S]`` continued by up to ``max_new_tokens``; generation.generate says how."""
        return generation.generate(
            self,
            input_ids,
            max_new_tokens,
            temperature,
            top_p,
            generator,
            on_token=on_token,
            ignore_eos=ignore_eos,
        )

    def _decode(self, input_ids: torch.Tensor, cache: KVCache | None) -> tuple[PartialSum, torch.Tensor]:
        """The last layer's unreduced output and the residual stream, ``[B·S, H]`` each."""
        batch_size, count = input_ids.shape
        input_ids = input_ids.to(self.group.device)
        past = 0 if cache is None else cache.length
        positions = torch.arange(past, past + count, device=self.group.device)
        cos, sin = rope_tables(positions, self.config.head_dim, self.config.rope_theta)
        step = Step(batch_size, cos, sin, cache)
        first, *others = self.layers
        hidden, residual = first(self.embed_tokens(input_ids.reshape(-1)), None, step)
        for layer in others:
            hidden, residual = layer(hidden, residual, step)
        return hidden, residual

    def _final_norm(self, hidden: PartialSum, residual: torch.Tensor) -> torch.Tensor:
        if self.enable_fusion:
            return self.norm.forward_with_allreduce_fusion(hidden, residual).norm
        normed: torch.Tensor = self.norm(hidden.reduce() + residual)
        return normed
