"""What happens between the sublayers of a decoder layer: reduce, add, norm and quantise, in one launch."""

from __future__ import annotations

from typing import NamedTuple

import torch

from fusedcomm import ops, platform
from fusedcomm.groups.coordinator import GroupCoordinator
from fusedcomm.layers.activation import Fp8Activation, LayerInput, NormFp8Activation
from fusedcomm.layers.fp8_matmul_gpu import scale_layout_of
from fusedcomm.layers.norm import RMSNorm
from fusedcomm.layers.partial_sum import PartialSum
from fusedcomm.layers.sharding import FP8_BLOCK


class LayerOutput(NamedTuple):
    """What a decoder layer hands on: its MLP's output (whole, or unreduced) and the residual stream."""

    hidden_states: torch.Tensor | PartialSum
    residual: torch.Tensor


class LayerCommunicator:
    """The communication of one decoder layer, after SGLang's class of that name.

    A layer is ``prepare_attn``, attention, ``prepare_mlp``, MLP, ``postprocess_layer``; hidden states and
    residual go through each. Where attention and MLP return a PartialSum, its all-reduce happens inside the
    norm that follows: prepare_mlp completes attention's sum, and the next layer's prepare_attn the MLP's.

    Args:
        group: over which the sums are.
        input_layernorm, post_attention_layernorm: before attention, before the MLP.
        enable_fused_ar_quant: attention receives ``(fp8, scale)`` in place of the normed rows.
        fused_ar_quant_keep_bf16: with it, attention receives ``(bf16, fp8, scale)``: parts of it read both.
        enable_fused_ar_quant_mlp: the MLP receives ``(fp8, scale)``. Off, it receives the normed rows, which a
            router needs whatever attention receives.
        is_last_layer: postprocess_layer reduces, so that an ordinary norm may follow. Leave it False where the final
            norm completes the sum itself (RMSNorm.forward_with_allreduce_fusion).
        enable_fusion: False does the same in separate steps (all-reduce, add, norm, quantise), with the same bits as
            long as the group's own kernels serve.
    """

    def __init__(
        self,
        group: GroupCoordinator,
        input_layernorm: RMSNorm,
        post_attention_layernorm: RMSNorm,
        *,
        enable_fused_ar_quant: bool = False,
        fused_ar_quant_keep_bf16: bool = False,
        enable_fused_ar_quant_mlp: bool = False,
        is_last_layer: bool = False,
        enable_fusion: bool = True,
    ) -> None:
        self.group = group
        self.input_layernorm = input_layernorm
        self.post_attention_layernorm = post_attention_layernorm
        self.enable_fused_ar_quant = enable_fused_ar_quant
        self.fused_ar_quant_keep_bf16 = fused_ar_quant_keep_bf16
        self.enable_fused_ar_quant_mlp = enable_fused_ar_quant_mlp
        self.is_last_layer = is_last_layer
        self.enable_fusion = enable_fusion

    def prepare_attn(self, hidden_states: torch.Tensor | PartialSum, residual: torch.Tensor | None) -> LayerInput:
        """Attention's input and the new residual, from the output of the embedding or previous layer.

        A residual of None starts the residual stream.
        """
        return self._prepare(
            self.input_layernorm,
            hidden_states,
            residual,
            quantize=self.enable_fused_ar_quant,
            keep_bf16=self.fused_ar_quant_keep_bf16,
        )

    def prepare_mlp(self, hidden_states: torch.Tensor | PartialSum, residual: torch.Tensor) -> LayerInput:
        """The MLP's input from attention's output ``[..., H]``, and the new residual."""
        return self._prepare(
            self.post_attention_layernorm,
            hidden_states,
            residual,
            quantize=self.enable_fused_ar_quant_mlp,
            keep_bf16=False,
        )

    def postprocess_layer(self, hidden_states: torch.Tensor | PartialSum, residual: torch.Tensor) -> LayerOutput:
        """What the layer hands on; an unreduced sum stays one unless this is the last layer."""
        if self.is_last_layer and isinstance(hidden_states, PartialSum):
            hidden_states = self._own(hidden_states).reduce()
        return LayerOutput(hidden_states, residual)

    def _own(self, partial: PartialSum) -> PartialSum:
        if partial.group is not self.group:
            raise ValueError("hidden_states: expected a PartialSum over this communicator's group, got another group's")
        return partial

    def _prepare(
        self,
        norm: RMSNorm,
        x: torch.Tensor | PartialSum,
        residual: torch.Tensor | None,
        *,
        quantize: bool,
        keep_bf16: bool,
    ) -> LayerInput:
        if not self.enable_fusion:
            tensor = self._own(x).reduce() if isinstance(x, PartialSum) else x
            return _separately(norm, tensor, residual, quantize=quantize, keep_bf16=keep_bf16)
        if isinstance(x, PartialSum):
            partial = self._own(x)
            if quantize:
                return norm.forward_with_allreduce_fusion_quant_per_group(partial, residual, keep_bf16=keep_bf16)
            return LayerInput(*norm.forward_with_allreduce_fusion(partial, residual))
        if quantize:
            return norm.forward_quant_per_group(x, residual, keep_bf16=keep_bf16)
        if residual is None:
            return LayerInput(norm(x), x)
        return LayerInput(*norm(x, residual))


def _separately(
    norm: RMSNorm, x: torch.Tensor, residual: torch.Tensor | None, *, quantize: bool, keep_bf16: bool
) -> LayerInput:
    """Add, norm and quantise as three operations."""
    residual = x if residual is None else x + residual
    normed = norm(residual)
    if not quantize:
        return LayerInput(normed, residual)
    quantized = ops.per_group_quant_fp8(
        normed,
        group_size=FP8_BLOCK,
        scale_layout=scale_layout_of(normed.device),
        fp8_dtype=platform.fp8_dtype(normed.device),
    )
    hidden = NormFp8Activation(normed, *quantized) if keep_bf16 else Fp8Activation(*quantized)
    return LayerInput(hidden, residual)
