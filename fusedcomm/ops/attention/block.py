"""Attention of a draft model's block: every query sees the whole context of its request and the whole block.

Block-diffusion drafts (DFlash) guess a block of tokens at once, so the attention is not causal and needs no mask of
queries against keys; only the lengths of the contexts differ. It is torch's scaled_dot_product_attention (SDPA) that
attends. What else could have, and why it does not:

- FlexAttention has to be compiled where it runs (uncompiled it keeps all scores in memory), and a NaN past the end of a
  context leaks: in a tile with both, its weight is 0, and 0 * NaN is NaN.
- ``torch.nn.attention.varlen.varlen_attn`` knows neither CPUs nor fp32, its FlashAttention 2 takes pages of 256 tokens
  and multiples only, and context and block would be two calls to merge.

SDPA runs on every device, with the same signature from torch 2.11 on, and takes lengths that stay on the device as a
mask of keys. The price is a copy: keys and values of context and block are put side by side first. So a dense context
crosses memory three times (read, written, read by SDPA) where a kernel that reads the cache in place takes one, and a
paged one five times, unless torch.compile fuses the steps.
"""

from __future__ import annotations

import math

import torch
from torch.nn.functional import scaled_dot_product_attention

from fusedcomm.ops.attention.paged_checks import check_integers
from fusedcomm.ops.attention.qk_checks import as_fp8, check_dims, check_outputs, check_scale, check_tensor
from fusedcomm.ops.checks import FP8_DTYPES


def block_attention(
    q: torch.Tensor,
    k_ctx: torch.Tensor,
    v_ctx: torch.Tensor,
    k_blk: torch.Tensor,
    v_blk: torch.Tensor,
    context_lens: torch.Tensor,
    block_table: torch.Tensor | None = None,
    *,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
    scale: float | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """``softmax(scale q k^T) v`` of a block of D queries over a context and the block's own D keys; not causal.

    Served by torch's SDPA (see the module). Lengths and blocks are read on the device: no host synchronisation,
    capturable in a graph (after a first call, in which SDPA's libraries set themselves up), and a replay sees what they
    are then. Every column of a context is copied and scored, however long the requests are: give a block_table (or
    k_ctx and v_ctx) cut to what the host knows to be enough. Besides the result it allocates that copy, as SDPA does
    its scratch.

    Args:
        q: ``[bs, D, Hq, d]``, bf16, fp16 or fp32.
        k_ctx, v_ctx: dense, ``[bs, C, Hk, d]``; or, with a block_table, the paged cache of a layer in the plain layout,
            ``[blocks, block_size, Hk, d]`` each. Of the dtype of q, or FP8: float8_e4m3fn, float8_e4m3fnuz, or uint8
            for the bytes of the device's FP8. Hk divides Hq. Any strides. What no query sees may hold anything, NaN
            too.
        k_blk, v_blk: ``[bs, D, Hk, d]``, of the dtype of q.
        context_lens: int32 ``[bs]``, tokens of each context; 0 or less: the block sees itself alone. Of a longer
            context than there are columns, these are seen.
        block_table: int32 ``[bs, max_blocks]``: the blocks of each request. Those of an index that is negative or past
            the end of the cache are skipped, and never read.
        k_scale, v_scale: fp32, one element, on the device; for FP8 only, None is 1. What is stored stands for
            ``fp8 * scale``, rounded to the dtype of q.
        scale: of the scores; None: ``1 / sqrt(d)``.
        out: written and returned; ``[bs, D, Hq, d]`` of the dtype of q, any strides with a last one of 1, apart from
            the other tensors.

    Returns:
        ``[bs, D, Hq, d]`` of the dtype of q, contiguous unless ``out`` is given.

    Raises:
        ValueError: a bad argument, with what was expected; nothing has been written.
    """
    _check_queries(q, k_blk, v_blk, scale)
    _check_context(k_ctx, v_ctx, context_lens, block_table, q, k_blk.shape[2])
    check_scale(k_scale, "k_scale", k_ctx, q)
    check_scale(v_scale, "v_scale", v_ctx, q)
    if out is not None:
        inputs = {"q": q, "k_ctx": k_ctx, "v_ctx": v_ctx, "k_blk": k_blk, "v_blk": v_blk}
        check_outputs({"out": (out, tuple(q.shape))}, inputs, q)
    if q.numel() == 0:
        return q.new_empty(q.shape) if out is None else out
    if block_table is None:
        visible = _within(context_lens, k_ctx.shape[1])
    elif k_ctx.shape[0] == 0:
        k_ctx, v_ctx = k_blk[:, :0], v_blk[:, :0]
        visible = _within(context_lens, 0)
    else:
        index, visible = _look_up(block_table, context_lens, k_ctx.shape[0], k_ctx.shape[1])
        k_ctx, v_ctx = _gather(k_ctx, index), _gather(v_ctx, index)
    k = _side_by_side(_as_values(k_ctx, k_scale, q.dtype), k_blk, visible)
    v = _side_by_side(_as_values(v_ctx, v_scale, q.dtype), v_blk, visible)
    return _attend(q, k, v, visible, scale, out)


def _check_queries(q: torch.Tensor, k_blk: torch.Tensor, v_blk: torch.Tensor, scale: float | None) -> None:
    check_dims(q, "q", "bs, D, Hq, d")
    check_dims(k_blk, "k_blk", "bs, D, Hk, d")
    batch, block, num_heads, head_dim = q.shape
    if num_heads < 1 or head_dim < 1:
        raise ValueError(f"q: expected at least one head of at least one element, got shape {tuple(q.shape)}")
    check_tensor(k_blk, "k_blk", (batch, block, k_blk.shape[2], head_dim), (q.dtype,), q.device)
    if k_blk.shape[2] < 1 or num_heads % k_blk.shape[2]:
        raise ValueError(f"k_blk: expected a number of heads that divides Hq = {num_heads}, got {k_blk.shape[2]}")
    check_tensor(v_blk, "v_blk", tuple(k_blk.shape), (q.dtype,), q.device)
    if scale is not None and not math.isfinite(scale):
        raise ValueError(f"scale: expected a finite number or None, got {scale}")


def _check_context(
    k_ctx: torch.Tensor,
    v_ctx: torch.Tensor,
    context_lens: torch.Tensor,
    block_table: torch.Tensor | None,
    q: torch.Tensor,
    num_heads: int,
) -> None:
    batch, head_dim = q.shape[0], q.shape[3]
    if not isinstance(k_ctx, torch.Tensor):
        raise ValueError(f"k_ctx: expected a torch.Tensor, got {type(k_ctx).__name__}")
    if k_ctx.dim() != 4:
        dims = "bs, C, Hk, d" if block_table is None else "blocks, block_size, Hk, d"
        raise ValueError(f"k_ctx: expected dimensions [{dims}], got shape {tuple(k_ctx.shape)}")
    rows = batch if block_table is None else k_ctx.shape[0]
    shape = (rows, k_ctx.shape[1], num_heads, head_dim)
    check_tensor(k_ctx, "k_ctx", shape, (q.dtype, *FP8_DTYPES, torch.uint8), q.device)
    check_tensor(v_ctx, "v_ctx", shape, (k_ctx.dtype,), q.device)
    check_integers(context_lens, "context_lens", (batch,), torch.int32, q.device)
    if block_table is not None:
        if k_ctx.shape[1] < 1:
            raise ValueError(f"k_ctx: expected a block size of at least 1, got shape {tuple(k_ctx.shape)}")
        check_integers(block_table, "block_table", (batch, None), torch.int32, q.device)


def _within(context_lens: torch.Tensor, columns: int) -> torch.Tensor:
    """Which columns of a context hold its tokens: bool ``[bs, columns]``."""
    return torch.arange(columns, device=context_lens.device) < context_lens.unsqueeze(1)


def _look_up(
    block_table: torch.Tensor, context_lens: torch.Tensor, num_blocks: int, block_size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The blocks to read ``[bs, max_blocks]``, and which of their tokens are seen ``[bs, max_blocks * block_size]``.

    Block 0 stands for those of which nothing is seen: memory is asked for it once.
    """
    batch, max_blocks = block_table.shape
    within = _within(context_lens, max_blocks * block_size).view(batch, max_blocks, block_size)
    known = (block_table >= 0) & (block_table < num_blocks)
    visible = within & known.unsqueeze(2)
    return torch.where(visible[:, :, 0], block_table, 0), visible.flatten(1)


def _gather(cache: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """The blocks of each request, one after the other: ``[bs, max_blocks * block_size, Hk, d]``."""
    batch, max_blocks = index.shape
    as_bytes = cache.view(torch.uint8) if cache.element_size() == 1 else cache  # FP8 cannot be indexed everywhere
    blocks = as_bytes.index_select(0, index.flatten()).view(cache.dtype)
    return blocks.view(batch, max_blocks * cache.shape[1], *cache.shape[2:])


def _as_values(context: torch.Tensor, scale: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
    """What is stored, in the dtype of q."""
    if context.dtype == dtype:
        return context
    values = as_fp8(context).float()
    return (values if scale is None else values * scale.view(())).to(dtype)


def _side_by_side(context: torch.Tensor, block: torch.Tensor, visible: torch.Tensor) -> torch.Tensor:
    """``[bs, C + D, Hk, d]``: the context, with zeros where nothing is seen, then the block.

    Zeros, because a key that is masked has the weight 0, and 0 times a NaN or an infinity would be NaN.
    """
    visible, zero = visible.view(*visible.shape, 1, 1), block.new_zeros(())
    if torch.compiler.is_compiling():  # it writes both in one pass, and takes no strided out=
        return torch.cat((torch.where(visible, context, zero), block), dim=1)
    columns = context.shape[1]
    both = block.new_empty((block.shape[0], columns + block.shape[1], *block.shape[2:]))
    torch.where(visible, context, zero, out=both[:, :columns])
    both[:, columns:] = block
    return both


def _attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    visible: torch.Tensor,
    scale: float | None,
    out: torch.Tensor | None,
) -> torch.Tensor:
    """Attention of ``q [bs, D, Hq, d]`` over ``k, v [bs, C + D, Hk, d]``; of the first C, those that are ``visible``.

    All queries of a request see the same keys. So the heads that share a key head are rows beside each other, more
    queries of one head: keys are read once a group, and no kernel has to know of grouped queries, which few that take
    a mask do.
    """
    num_heads, block = k.shape[2], q.shape[1]
    grouped = q.unflatten(2, (num_heads, -1)).permute(0, 2, 3, 1, 4)  # [bs, Hk, Hq / Hk, D, d]
    mask = None
    if visible.shape[1] > 0:
        every = visible.new_ones((visible.shape[0], block))
        mask = torch.cat((visible, every), dim=1).view(visible.shape[0], 1, 1, -1)
    attended: torch.Tensor = scaled_dot_product_attention(
        grouped.flatten(2, 3), k.transpose(1, 2), v.transpose(1, 2), attn_mask=mask, scale=scale
    )
    attended = attended.unflatten(2, (-1, block)).permute(0, 3, 1, 2, 4)  # [bs, D, Hk, Hq / Hk, d]
    if out is None:
        return attended.flatten(2, 3).contiguous()
    out.unflatten(2, (num_heads, -1)).copy_(attended)
    return out
