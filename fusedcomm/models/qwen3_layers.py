"""The decoder layer of Qwen3: grouped-query attention with per-head norms, and a gated MLP."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

from fusedcomm.groups.coordinator import GroupCoordinator
from fusedcomm.layers import (
    LayerCommunicator,
    LayerOutput,
    MergedColumnParallelLinear,
    PartialSum,
    QKVParallelLinear,
    RMSNorm,
    RowParallelLinear,
)
from fusedcomm.layers.activation import HiddenStates
from fusedcomm.layers.sharding import WeightSlice
from fusedcomm.models.config import Qwen3Config
from fusedcomm.models.errors import CheckpointError
from fusedcomm.models.kv_cache import KVCache
from fusedcomm.models.rope import apply_rope


@dataclass(frozen=True)
class Step:
    """What the layers share in one forward pass over B sequences of S new positions each."""

    batch_size: int
    cos: torch.Tensor  # [S, head_dim / 2] fp32
    sin: torch.Tensor
    cache: KVCache | None  # empty, or S is 1: then causal attention needs no mask


def is_block_fp8(config: Qwen3Config, *modules: str) -> bool:
    """Whether these matrices, which share a product, are block-FP8.

    Raises:
        CheckpointError: some are and some are not.
    """
    covered = {config.fp8 is not None and config.fp8.covers(module) for module in modules}
    if len(covered) > 1:
        raise CheckpointError(f"modules_to_not_convert: expected all or none of {', '.join(modules)}, got some")
    return covered.pop()


class Qwen3Attention(nn.Module):
    """Causal attention (torch SDPA) from rows ``[B·S, H]``, also as FP8, to a PartialSum ``[B·S, H]``."""

    def __init__(self, config: Qwen3Config, group: GroupCoordinator, index: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.index = index
        self.head_dim = config.head_dim
        self.name = f"model.layers.{index}.self_attn"
        self.sources = tuple(f"{self.name}.{x}_proj" for x in "qkv")
        self.qkv_proj = QKVParallelLinear(
            config.hidden_size,
            config.head_dim,
            config.num_heads,
            config.num_kv_heads,
            group,
            bias=config.attention_bias,
            dtype=dtype,
            device=group.device,
            block_fp8=is_block_fp8(config, *self.sources),
        )
        self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps, dtype=dtype, device=group.device)
        self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps, dtype=dtype, device=group.device)
        self.o_proj = RowParallelLinear(
            config.num_heads * config.head_dim,
            config.hidden_size,
            group,
            bias=config.attention_bias,
            reduce_results=False,
            dtype=dtype,
            device=group.device,
            block_fp8=is_block_fp8(config, f"{self.name}.o_proj"),
        )

    def forward(self, x: HiddenStates, step: Step) -> PartialSum:
        heads, kv_heads = self.qkv_proj.num_local_heads, self.qkv_proj.num_local_kv_heads
        qkv = self.qkv_proj(x).view(step.batch_size, -1, heads + 2 * kv_heads, self.head_dim)  # [B, S, heads, D]
        q, k, v = qkv.split([heads, kv_heads, kv_heads], dim=2)
        q = apply_rope(self.q_norm(q).transpose(1, 2), step.cos, step.sin)  # [B, heads, S, D]
        k = apply_rope(self.k_norm(k).transpose(1, 2), step.cos, step.sin)
        v = v.transpose(1, 2)
        if step.cache is not None:
            k, v = step.cache.append(self.index, k, v)
        out = nn.functional.scaled_dot_product_attention(
            q,
            k,
            v,
            is_causal=q.shape[2] > 1,
            enable_gqa=heads != kv_heads,
        )
        return self.o_proj(out.transpose(1, 2).reshape(-1, heads * self.head_dim))  # type: ignore[no-any-return]

    def weight_slices(self) -> Iterator[WeightSlice]:
        yield from self.qkv_proj.weight_slices(*self.sources)
        yield from self.q_norm.weight_slices(f"{self.name}.q_norm")
        yield from self.k_norm.weight_slices(f"{self.name}.k_norm")
        yield from self.o_proj.weight_slices(f"{self.name}.o_proj")


class Qwen3MLP(nn.Module):
    """``down(silu(gate(x)) · up(x))`` of rows ``[B·S, H]``, as a PartialSum ``[B·S, H]``."""

    def __init__(self, config: Qwen3Config, group: GroupCoordinator, index: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.name = f"model.layers.{index}.mlp"
        self.sources = (f"{self.name}.gate_proj", f"{self.name}.up_proj")
        self.gate_up_proj = MergedColumnParallelLinear(
            config.hidden_size,
            [config.intermediate_size] * 2,
            group,
            dtype=dtype,
            device=group.device,
            block_fp8=is_block_fp8(config, *self.sources),
        )
        self.down_proj = RowParallelLinear(
            config.intermediate_size,
            config.hidden_size,
            group,
            reduce_results=False,
            dtype=dtype,
            device=group.device,
            block_fp8=is_block_fp8(config, f"{self.name}.down_proj"),
        )

    def forward(self, x: HiddenStates) -> PartialSum:
        gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
        return self.down_proj(nn.functional.silu(gate) * up)  # type: ignore[no-any-return]

    def weight_slices(self) -> Iterator[WeightSlice]:
        yield from self.gate_up_proj.weight_slices(*self.sources)
        yield from self.down_proj.weight_slices(f"{self.name}.down_proj")


class Qwen3DecoderLayer(nn.Module):
    """Attention and MLP with a LayerCommunicator before, between and after them."""

    def __init__(
        self,
        config: Qwen3Config,
        group: GroupCoordinator,
        index: int,
        dtype: torch.dtype,
        enable_fusion: bool,
    ) -> None:
        super().__init__()
        self.name = f"model.layers.{index}"
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype=dtype, device=group.device)
        self.post_attention_layernorm = RMSNorm(
            config.hidden_size, config.rms_norm_eps, dtype=dtype, device=group.device
        )
        self.self_attn = Qwen3Attention(config, group, index, dtype)
        self.mlp = Qwen3MLP(config, group, index, dtype)
        # No layer is the last to the communicator: the model's final norm completes the last MLP's sum.
        self.communicator = LayerCommunicator(
            group,
            self.input_layernorm,
            self.post_attention_layernorm,
            enable_fused_ar_quant=is_block_fp8(config, *self.self_attn.sources),
            enable_fused_ar_quant_mlp=is_block_fp8(config, *self.mlp.sources),
            enable_fusion=enable_fusion,
        )

    def forward(self, hidden: torch.Tensor | PartialSum, residual: torch.Tensor | None, step: Step) -> LayerOutput:
        attn_input, residual = self.communicator.prepare_attn(hidden, residual)
        mlp_input, residual = self.communicator.prepare_mlp(self.self_attn(attn_input, step), residual)
        return self.communicator.postprocess_layer(self.mlp(mlp_input), residual)

    def weight_slices(self) -> Iterator[WeightSlice]:
        yield from self.input_layernorm.weight_slices(f"{self.name}.input_layernorm")
        yield from self.post_attention_layernorm.weight_slices(f"{self.name}.post_attention_layernorm")
        yield from self.self_attn.weight_slices()
        yield from self.mlp.weight_slices()
