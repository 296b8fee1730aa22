"""Norm and rotary embedding of queries and keys, and where the keys and values go."""

from __future__ import annotations

import torch

from fusedcomm.ops.attention.kv import QKV, PagedKV
from fusedcomm.ops.attention.qk_checks import (
    as_fp8,
    check_count,
    check_dims,
    check_head_dim,
    check_neox,
    check_outputs,
    check_paged,
    check_rope,
    check_weights,
)
from fusedcomm.ops.attention.qk_norm import unit_stride
from fusedcomm.ops.attention.qk_operators import qk_operators


def fused_qk_norm_rope(
    qkv: torch.Tensor,
    q_weight: torch.Tensor,
    k_weight: torch.Tensor,
    cos_sin: torch.Tensor,
    positions: torch.Tensor,
    num_heads_q: int,
    num_heads_k: int,
    head_dim: int,
    eps: float,
    *,
    neox: bool = True,
    rotary_dim: int | None = None,
    weight_bias: float = 0.0,
    cache: PagedKV | None = None,
    slot_mapping: torch.Tensor | None = None,
    out: QKV | None = None,
) -> QKV:
    """Splits a packed qkv, norms and rotates its queries and keys, and writes keys and values: one launch on a GPU.

    q and k are what ``fused_qk_rmsnorm`` and then rotary embedding (Su et al., 2021) make of them, to the bit: fp32,
    rounded to the dtype of qkv after the norm and again after the rotation. A cache gets the returned keys and the
    values; an FP8 one ``clamp(value / scale)`` of them, rounded to nearest even. Makes no host synchronisation and can
    be captured in a graph; positions, slots and scales are read when the kernel runs.

    Args:
        qkv: ``[T, (Hq + 2 Hk) D]``, bf16, fp16 or fp32: all queries, all keys, all values. Rows may be apart.
        q_weight, k_weight: ``[D]``, dtype of qkv or fp32.
        cos_sin: ``[P, rotary_dim]``, dtype of qkv or fp32: a row has the rotary_dim / 2 cosines of a position, then its
            sines.
        positions: ``[T]`` int64. One outside of ``[0, P)`` is not looked up: what it would rotate becomes NaN.
        num_heads_q, num_heads_k, head_dim: Hq, Hk and D; D up to 1024.
        eps: added to the mean of squares; >= 0.
        neox: element i is rotated with i + rotary_dim / 2 (GPT-NeoX, Llama, Qwen); otherwise 2i with 2i + 1 (GPT-J).
        rotary_dim: how many elements of a head, from its first on, are rotated; even; None: all D.
        weight_bias: added to the weights (1 for Gemma).
        cache: written at slot_mapping. Mutated.
        slot_mapping: ``[T]`` int64. A token whose slot is negative or past the end of the cache is not written there.
            Of two tokens with one slot either may stay, for each element.
        out: written and returned; ``[T, Hq, D]``, ``[T, Hk, D]`` twice, dtype of qkv, any strides with a last one of 1,
            apart from qkv and each other: what attention over a block of a draft takes. Without it q and k are
            contiguous and v is a view of qkv.

    Raises:
        ValueError: a bad argument, with what was expected; nothing has been written.
    """
    check_dims(qkv, "qkv", "T, (Hq + 2 Hk) D")
    for count, name in ((num_heads_q, "num_heads_q"), (num_heads_k, "num_heads_k"), (head_dim, "head_dim")):
        check_count(count, name)
    check_head_dim(head_dim, "head_dim")
    width = (num_heads_q + 2 * num_heads_k) * head_dim
    if qkv.shape[1] != width:
        raise ValueError(f"qkv: expected (Hq + 2 Hk) D = {width} columns, got {qkv.shape[1]}")
    check_weights({"q_weight": q_weight, "k_weight": k_weight}, (head_dim,), qkv, eps, weight_bias)
    check_neox(neox)
    check_rope(cos_sin, positions, head_dim if rotary_dim is None else rotary_dim, head_dim, qkv)
    check_paged(cache, slot_mapping, num_heads_k, head_dim, qkv)
    rows = qkv.shape[0]
    q_shape, k_shape = (rows, num_heads_q, head_dim), (rows, num_heads_k, head_dim)
    if out is not None:
        outputs = {"out.q": (out.q, q_shape), "out.k": (out.k, k_shape), "out.v": (out.v, k_shape)}
        check_outputs(outputs, {"qkv": qkv}, qkv)
    packed = unit_stride(qkv)
    if out is None:
        v = packed[:, -num_heads_k * head_dim :].unflatten(-1, (num_heads_k, head_dim))
        result, v_out = QKV(qkv.new_empty(q_shape), qkv.new_empty(k_shape), v), None
    else:
        result, v_out = out, out.v
    qk_operators(qkv.device.type).qk_norm_rope_out(
        packed,
        q_weight.contiguous(),
        k_weight.contiguous(),
        cos_sin,
        positions.contiguous(),
        eps,
        weight_bias,
        neox,
        result.q,
        result.k,
        v_out,
        None if cache is None else as_fp8(cache.k),
        None if cache is None else as_fp8(cache.v),
        None if slot_mapping is None else slot_mapping.contiguous(),
        None if cache is None else cache.k_scale,
        None if cache is None else cache.v_scale,
    )
    return result
