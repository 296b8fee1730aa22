"""The keys and values of all layers of a draft model at once."""

from __future__ import annotations

import torch

from fusedcomm.ops.attention.kv import KV
from fusedcomm.ops.attention.qk_checks import (
    check_dims,
    check_head_dim,
    check_neox,
    check_outputs,
    check_rope,
    check_weights,
)
from fusedcomm.ops.attention.qk_norm import unit_stride
from fusedcomm.ops.attention.qk_operators import qk_operators


def fused_kv_materialize(
    kv: torch.Tensor,
    k_weight: torch.Tensor,
    cos_sin: torch.Tensor,
    positions: torch.Tensor,
    eps: float,
    *,
    neox: bool = True,
    rotary_dim: int | None = None,
    weight_bias: float = 0.0,
    out: KV | None = None,
) -> KV:
    """Norms and rotates the keys of several draft layers, and puts keys and values in the order of layers.

    For a draft model that projects the context once for all its layers: one launch on a GPU, where each layer would
    norm, rotate and copy by itself. Keys are what ``fused_qk_norm_rope`` makes of them, to the bit: RMSNorm (Zhang and
    Sennrich, 2019) in fp32, rounded, then rotary embedding (Su et al., 2021) in fp32, rounded. Makes no host
    synchronisation and can be captured in a graph; positions are read when the kernel runs.

    Args:
        kv: ``[N, L, 2, Hk, D]``, bf16, fp16 or fp32, D up to 1024: of each token and layer the keys, then the values.
            Any strides; only a last dimension with a stride other than 1 is copied first.
        k_weight: ``[L, D]``, dtype of kv or fp32: the weights of each layer.
        cos_sin: ``[P, rotary_dim]``, dtype of kv or fp32: a row has the rotary_dim / 2 cosines of a position, then its
            sines.
        positions: ``[N]`` int64. One outside of ``[0, P)`` is not looked up: what it would rotate becomes NaN.
        eps: added to the mean of squares; >= 0.
        neox: element i is rotated with i + rotary_dim / 2 (GPT-NeoX, Llama, Qwen); otherwise 2i with 2i + 1 (GPT-J).
        rotary_dim: how many elements of a head, from its first on, are rotated; even; None: all D.
        weight_bias: added to the weights (1 for Gemma).
        out: written and returned; k and v ``[L, N, Hk, D]``, dtype of kv, any strides with a last one of 1, apart from
            kv and each other: the buffers of the draft's context, say. Without it contiguous tensors are allocated.

    Raises:
        ValueError: a bad argument, with what was expected; nothing has been written.
    """
    check_dims(kv, "kv", "N, L, 2, Hk, D")
    num_tokens, num_layers, two, num_heads, head_dim = kv.shape
    if num_layers < 1 or two != 2 or num_heads < 1:
        raise ValueError(f"kv: expected shape [N, L >= 1, 2, Hk >= 1, D], got {tuple(kv.shape)}")
    check_head_dim(head_dim, "kv")
    check_weights({"k_weight": k_weight}, (num_layers, head_dim), kv, eps, weight_bias)
    check_neox(neox)
    check_rope(cos_sin, positions, head_dim if rotary_dim is None else rotary_dim, head_dim, kv)
    shape = (num_layers, num_tokens, num_heads, head_dim)
    if out is None:
        out = KV(kv.new_empty(shape), kv.new_empty(shape))
    else:
        check_outputs({"out.k": (out.k, shape), "out.v": (out.v, shape)}, {"kv": kv}, kv)
    qk_operators(kv.device.type).kv_materialize_out(
        unit_stride(kv), k_weight.contiguous(), cos_sin, positions.contiguous(), eps, weight_bias, neox, *out
    )
    return out
