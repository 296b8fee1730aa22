"""The layers of a Qwen3-8B-shaped model with random block-FP8 weights, for one decode step."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, cast

import torch

from fusedcomm import ops
from fusedcomm.groups.coordinator import GroupCoordinator
from fusedcomm.layers import BlockFP8Linear, LayerOutput, PartialSum, RMSNorm
from fusedcomm.layers.sharding import kv_head_shard
from fusedcomm.models.config import BlockFP8Config, Qwen3Config
from fusedcomm.models.kv_cache import KVCache
from fusedcomm.models.qwen3_layers import Qwen3DecoderLayer, Step
from fusedcomm.models.rope import rope_tables
from fusedcomm.ops import reference
from fusedcomm.ops.types import AddRMSNorm, AddRMSNormQuant

QWEN3_8B = Qwen3Config(
    vocab_size=151936,
    hidden_size=4096,
    intermediate_size=12288,
    num_layers=36,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    rms_norm_eps=1e-6,
    rope_theta=1e6,
    max_position_embeddings=40960,
    tie_word_embeddings=False,
    attention_bias=False,
    dtype=torch.bfloat16,
    eos_token_ids=(),
    pad_token_id=None,
    fp8=BlockFP8Config(),
)


class LocalGroup:
    """A group's place in the sharding without its communication: each operation is the local launch that is left of it.

    What a step takes with it, against the step itself, is what communication costs.
    """

    def __init__(self, group: GroupCoordinator, way: str) -> None:
        self.rank, self.world_size, self.device = group.rank, group.world_size, group.device
        self.way = way
        self._ops: Any = reference if way == "process_group" else ops

    def all_reduce(self, x: torch.Tensor, *, out: torch.Tensor | None = None) -> torch.Tensor:
        """x itself."""
        return x if out is None else out.copy_(x)

    def allreduce_rmsnorm(
        self,
        x: torch.Tensor,
        residual: torch.Tensor | None,
        weight: torch.Tensor,
        eps: float,
        *,
        out: None = None,
        **options: Any,
    ) -> AddRMSNorm:
        """Add and norm; layers give no ``out``."""
        result: AddRMSNorm = self._ops.fused_add_rms_norm(x, residual, weight, eps, **options)
        return result

    def allreduce_rmsnorm_quant(
        self,
        x: torch.Tensor,
        residual: torch.Tensor | None,
        weight: torch.Tensor,
        eps: float,
        *,
        out: None = None,
        **options: Any,
    ) -> AddRMSNormQuant:
        """Add, norm and quantise, in as many launches as the stage has beside its all-reduce; no ``out``."""
        if self.way != "fused_norm":
            result: AddRMSNormQuant = self._ops.fused_add_rms_norm_quant(x, residual, weight, eps, **options)
            return result
        weight_bias = options.pop("weight_bias", 0.0)
        emit_bf16 = options.pop("emit_bf16", False)
        norm, residual_out = self._ops.fused_add_rms_norm(x, residual, weight, eps, weight_bias=weight_bias)
        fp8, scale, layout = self._ops.per_group_quant_fp8(norm, **options)
        return AddRMSNormQuant(fp8, scale, residual_out, norm if emit_bf16 else None, layout)


@dataclass(frozen=True)
class DecodeInputs:
    """What one step reads: rows ``[batch, hidden_size]`` of the embedding's sum, and a filled cache."""

    rows: torch.Tensor
    step: Step


class DecodeStack:
    """All decoder layers and the final norm over one group; the weights depend on the rank alone, not on the group."""

    def __init__(self, config: Qwen3Config, group: GroupCoordinator | LocalGroup) -> None:
        self.config = config
        # Layers ask a group for its rank, its device and the collectives above.
        self.group = cast(GroupCoordinator, group)
        self.layers = [
            Qwen3DecoderLayer(config, self.group, index, config.dtype, True) for index in range(config.num_layers)
        ]
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype=config.dtype, device=group.device)

    def fill(self) -> None:
        """Random weights: matrices that keep the size of their inputs, norms near one."""
        for index, layer in enumerate([*self.layers, self.norm]):
            matrices = torch.Generator(self.group.device).manual_seed(1000 * index + self.group.rank)
            norms = torch.Generator(self.group.device).manual_seed(1000 * index + 999)
            for module in layer.modules():
                if isinstance(module, BlockFP8Linear):
                    _fill_matrix(module, matrices)
                elif isinstance(module, RMSNorm):
                    weight = module.weight
                    noise = torch.randn(weight.shape, generator=norms, device=weight.device)
                    weight.copy_(1 + 0.1 * noise)

    def share_weights(self, other: DecodeStack) -> None:
        """Takes the parameters of a stack of the same shape and rank as its own."""
        for own, theirs in zip([*self.layers, self.norm], [*other.layers, other.norm], strict=True):
            for to, source in zip(own.modules(), theirs.modules(), strict=True):
                for name, parameter in source.named_parameters(recurse=False):
                    setattr(to, name, parameter)

    def forward(self, inputs: DecodeInputs) -> torch.Tensor:
        """The final norm's rows ``[batch, hidden_size]``."""
        output = LayerOutput(PartialSum(inputs.rows, self.group), None)  # type: ignore[arg-type]  # no residual yet
        for layer in self.layers:
            output = layer(output.hidden_states, output.residual, inputs.step)
        return self.norm.forward_with_allreduce_fusion(output.hidden_states, output.residual).norm


def make_inputs(config: Qwen3Config, group: GroupCoordinator, batch: int, context: int) -> DecodeInputs:
    """Random rows, different on each rank, and a cache that holds ``context`` positions."""
    device = group.device
    generator = torch.Generator(device).manual_seed(7 + group.rank)
    heads = len(kv_head_shard(config.num_kv_heads, group.rank, group.world_size).rows)
    cache = KVCache(config.num_layers, batch, heads, context + 1, config.head_dim, dtype=config.dtype, device=device)
    for layer in range(config.num_layers):
        shape = (batch, heads, context, config.head_dim)
        keys = torch.randn(shape, generator=generator, device=device).to(config.dtype)
        cache.append(layer, keys, keys)
    cache.advance(context)
    cos, sin = rope_tables(torch.tensor([context], device=device), config.head_dim, config.rope_theta)
    rows = torch.randn((batch, config.hidden_size), generator=generator, device=device).to(config.dtype)
    return DecodeInputs(rows, Step(batch, cos, sin, cache))


def shortened(config: Qwen3Config, num_layers: int) -> Qwen3Config:
    """The same layers, fewer or more of them."""
    return replace(config, num_layers=num_layers)


def _fill_matrix(linear: BlockFP8Linear, generator: torch.Generator) -> None:
    weight = linear.weight
    # one row block at a time: fp32 noise for all of it would take four times the matrix
    for part in weight.split(1024):
        noise = torch.randn(part.shape, generator=generator, device=weight.device)
        part.copy_(noise.clamp(-448, 448).to(weight.dtype))
    linear.weight_scale.fill_(linear.in_features**-0.5)
