"""What multi-head latent attention (MLA) needs before it: queries in one piece, and the key in the cache."""

from __future__ import annotations

import torch

from fusedcomm.ops.attention.qk_checks import (
    as_fp8,
    check_dims,
    check_head_dim,
    check_latent_cache,
    check_neox,
    check_num_heads,
    check_outputs,
    check_rope,
    check_scale,
    check_tensor,
)
from fusedcomm.ops.attention.qk_norm import unit_stride
from fusedcomm.ops.attention.qk_operators import qk_operators


def fused_qk_rope_cat_and_cache_mla(
    q_nope: torch.Tensor,
    q_pe: torch.Tensor,
    k_nope: torch.Tensor,
    k_pe: torch.Tensor,
    kv_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    positions: torch.Tensor,
    cos_sin: torch.Tensor,
    k_scale: torch.Tensor | None,
    neox: bool,
    *,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Rotates the pe parts, writes the key to the cache and returns the query in one piece: one launch on a GPU.

    For the absorbed form of MLA (DeepSeek-V2, 2024), in which all heads attend to one latent key. The query is
    contiguous, so attention takes it as it is and nobody concatenates again. Rotary embedding (Su et al., 2021) is
    computed in fp32 and rounded once; an FP8 cache gets ``clamp(k / k_scale)`` of the rounded key, to nearest even.
    Makes no host synchronisation and can be captured in a graph; positions, slots and the scale are read when the
    kernel runs.

    Args:
        q_nope: ``[B, H, N]``, bf16, fp16 or fp32; N, up to 1024, is 512 for DeepSeek. Any strides: the transposed
            result of a batched product is taken as it is; only a last dimension with a stride other than 1 is copied
            first.
        q_pe: ``[B, H, R]``, of the dtype of q_nope, any strides as there; R is 64 for DeepSeek.
        k_nope: ``[B, 1, N]``, of the dtype of q_nope, any strides as there.
        k_pe: ``[B, 1, R]``, likewise.
        kv_cache: ``[blocks, block_size, N + R]`` or ``[blocks, block_size, 1, N + R]``; of the dtype of q_nope, or FP8:
            float8_e4m3fn, float8_e4m3fnuz, or uint8 for the bytes of the device's FP8. Blocks may be padded. Mutated.
        slot_mapping: ``[B]`` int64: the key goes to ``kv_cache[slot // block_size, slot % block_size]``. One that is
            negative or past the end of the cache is skipped. Of two tokens with one slot either may stay, for each
            element.
        positions: ``[B]`` int64. One outside of ``[0, P)`` is not looked up: what it would rotate becomes NaN.
        cos_sin: ``[P, R]``, dtype of q_nope or fp32: a row has the R / 2 cosines of a position, then its sines.
        k_scale: fp32, one element, on the device, for an FP8 cache only: what is stored stands for ``fp8 * k_scale``.
            None: 1.
        neox: element i is rotated with i + R / 2; otherwise 2i with 2i + 1, where each stays (DeepSeek).
        out: written and returned; ``[B, H, N + R]``, contiguous, apart from the inputs.

    Returns:
        ``[B, H, N + R]``, contiguous: q_nope, then the rotated q_pe of each head.

    Raises:
        ValueError: a bad argument, with what was expected; nothing has been written.
    """
    check_dims(q_nope, "q_nope", "B, H, N")
    batch, num_heads, nope_dim = q_nope.shape
    check_num_heads(q_nope, "q_nope")
    check_head_dim(nope_dim, "q_nope")
    check_dims(q_pe, "q_pe", "B, H, R")
    rotary_dim, dtype, device = q_pe.shape[2], q_nope.dtype, q_nope.device
    if not 2 <= rotary_dim <= nope_dim or rotary_dim % 2:
        raise ValueError(f"q_pe: expected an even last dimension between 2 and N = {nope_dim}, got {rotary_dim}")
    check_tensor(q_pe, "q_pe", (batch, num_heads, rotary_dim), (dtype,), device)
    check_tensor(k_nope, "k_nope", (batch, 1, nope_dim), (dtype,), device)
    check_tensor(k_pe, "k_pe", (batch, 1, rotary_dim), (dtype,), device)
    width = nope_dim + rotary_dim
    check_latent_cache(kv_cache, "kv_cache", width, q_nope)
    check_tensor(slot_mapping, "slot_mapping", (batch,), (torch.int64,), device)
    check_rope(cos_sin, positions, rotary_dim, rotary_dim, q_nope)
    check_scale(k_scale, "k_scale", kv_cache, q_nope)
    check_neox(neox)
    if out is None:
        out = q_nope.new_empty((batch, num_heads, width))
    else:
        inputs = {"q_nope": q_nope, "q_pe": q_pe, "k_nope": k_nope, "k_pe": k_pe, "kv_cache": kv_cache}
        check_outputs({"out": (out, (batch, num_heads, width))}, inputs, q_nope)
        if not out.is_contiguous():
            raise ValueError(f"out: expected a contiguous tensor, got strides {out.stride()}")
    qk_operators(device.type).mla_prepare_out(
        unit_stride(q_nope),
        unit_stride(q_pe),
        unit_stride(k_nope).squeeze(1),
        unit_stride(k_pe).squeeze(1),
        as_fp8(kv_cache if kv_cache.dim() == 3 else kv_cache.squeeze(2)),
        slot_mapping.contiguous(),
        positions.contiguous(),
        cos_sin,
        k_scale,
        neox,
        out,
    )
    return out
