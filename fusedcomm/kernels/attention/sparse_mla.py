"""Sparse MLA decode in Triton: gather, dequantisation, softmax and both products of attention in one kernel.

A program has one row of queries, a tile of its heads and a part of its keys. A tile of keys is gathered and dequantised
once, and is both K and V.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fusedcomm.kernels.attention.sparse_mla_keys import (
    NUM_CODE_PIECES_584,
    NUM_CODE_PIECES_656,
    PIECE,
    VALUES,
    beside,
    column,
    gather,
    gather_scales,
    nothing,
    operand,
    piece_of,
    register_order,
    rope_column,
    token_at,
    transposed,
)
from fusedcomm.kernels.convert import INTERPRETED, narrow, widen

LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)


# ---- the lists of keys ----


@triton.jit
def list_of(row, indices_ptr, bounds_ptr, size, last_slot, stride, RAGGED: tl.constexpr):
    """A row's list of keys: (address of its first index, how many it has, the last slot of its cache).

    ``size``: of a row of a dense list, or of all of a ragged one; nothing past it is read.
    """
    if RAGGED:
        begin = tl.minimum(tl.maximum(tl.load(bounds_ptr + row), 0), size)
        end = tl.minimum(tl.load(bounds_ptr + row + 1), size)
        return indices_ptr + begin, tl.maximum(end - begin, 0), last_slot
    else:
        length = tl.minimum(tl.load(bounds_ptr + row), size)
        return indices_ptr + row * stride, tl.maximum(length, 0), last_slot


@triton.jit
def slots_of_tile(tile, last_tile, num_main_tiles, main, extra, KEYS: tl.constexpr, HAS_EXTRA: tl.constexpr):
    """The slots ``[KEYS]`` that a tile lists, -1 for none and for one outside of the cache; the main list comes first.

    Nothing is read from last_tile on.
    """
    first = tile * KEYS
    indices_ptr, length, last_slot = main
    if HAS_EXTRA:
        is_extra = tile >= num_main_tiles
        first = tl.where(is_extra, tile - num_main_tiles, tile) * KEYS
        indices_ptr = tl.where(is_extra, extra[0], indices_ptr)
        length = tl.where(is_extra, extra[1], length)
        last_slot = tl.where(is_extra, extra[2], last_slot)
    position = first + tl.arange(0, KEYS)
    slot = tl.load(indices_ptr + position, mask=position < tl.where(tile < last_tile, length, 0), other=-1)
    return tl.where(slot <= last_slot, slot, -1)


@triton.jit
def addresses_of_tile(
    slot,
    tile,
    num_main_tiles,
    main_cache,  # (address, stride of blocks)
    extra_cache,
    MAIN_BLOCK: tl.constexpr,
    EXTRA_BLOCK: tl.constexpr,
    TOKEN_BYTES: tl.constexpr,
):
    """(addresses of codes as words, of scales as words of 8 bytes) of a tile's slots; of slot 0 where there is none."""
    slot = tl.maximum(slot, 0)
    cache_ptr, block_stride = main_cache
    block_size = MAIN_BLOCK
    block, offset = slot // MAIN_BLOCK, slot % MAIN_BLOCK
    if EXTRA_BLOCK:
        # On numbers, not on tensors of addresses: of those the compiler would forget that they are multiples of 16.
        is_extra = tile >= num_main_tiles
        cache_ptr = tl.where(is_extra, extra_cache[0], cache_ptr)
        block_stride = tl.where(is_extra, extra_cache[1], block_stride)
        if EXTRA_BLOCK != MAIN_BLOCK:
            block_size = tl.where(is_extra, EXTRA_BLOCK, MAIN_BLOCK)
            block = tl.where(is_extra, slot // EXTRA_BLOCK, block)
            offset = tl.where(is_extra, slot % EXTRA_BLOCK, offset)
    data_at, scale_at = token_at(block, offset, block_stride, block_size, TOKEN_BYTES)
    data_ptr = (cache_ptr + data_at).to(tl.pointer_type(tl.int32), bitcast=True)
    return data_ptr, (cache_ptr + scale_at).to(tl.pointer_type(tl.int64), bitcast=True)


# ---- operands ----


@triton.jit
def load_queries(q_ptr, head, head_stride, at, NUM_HEADS: tl.constexpr):
    """``[heads, elements]`` of q at these columns; 0 where there is no such head."""
    q = tl.load(q_ptr + head[:, None] * head_stride + at[None, :], mask=(head < NUM_HEADS)[:, None], other=0.0)
    if INTERPRETED:
        return widen(q)
    else:
        return q


@triton.jit
def queries(
    q_ptr,
    head,
    head_stride,
    NUM_HEADS: tl.constexpr,
    TOKEN_BYTES: tl.constexpr,
    MERGED: tl.constexpr,
    IN_REGISTERS: tl.constexpr,
):
    """The left operands of the scores, in the order of the pieces; the first eight of them in one if MERGED."""
    element = tl.arange(0, PIECE)
    if IN_REGISTERS:
        element = register_order(element)
    found = nothing()
    if MERGED:
        found += (load_queries(q_ptr, head, head_stride, column(tl.arange(0, VALUES), TOKEN_BYTES), NUM_HEADS),)
    else:
        for i in tl.static_range(VALUES // PIECE):
            at = column(element + i * PIECE, TOKEN_BYTES)
            found += (load_queries(q_ptr, head, head_stride, at, NUM_HEADS),)
    if TOKEN_BYTES == 656:
        found += (load_queries(q_ptr, head, head_stride, rope_column(element) + VALUES, NUM_HEADS),)
    return found


@triton.jit
def merge(p):
    """The first eight pieces as one ``[KEYS, 512]``."""
    left = beside(beside(p[0], p[1]), beside(p[2], p[3]))
    return beside(left, beside(beside(p[4], p[5]), beside(p[6], p[7])))


@triton.jit
def softmax_step(s, m, total, is_key, scale_log2):
    """(weights as an operand, alpha, m, total) with a tile of scores ``[heads, KEYS]`` (Milakov and Gimelshein, 2018).

    ``m``: the largest score so far, in powers of two; -inf before there is a key. ``total``: the sum of all weights.
    ``alpha``: by what the weights of the tiles before shrink.
    """
    s = tl.where(is_key[None, :], s * scale_log2, -float("inf"))
    m_new = tl.maximum(m, tl.max(s, axis=1))
    shift = tl.where(m_new == -float("inf"), 0.0, m_new)
    alpha = tl.exp2(m - shift)
    p = tl.exp2(s - shift[:, None])
    return operand(p), alpha, m_new, total * alpha + tl.sum(p, axis=1)


# ---- kernels ----


@triton.jit(do_not_specialize=["num_splits", "main_size", "main_last_slot", "extra_size", "extra_last_slot"])
def sparse_mla_decode_kernel(
    q_ptr,  # [rows, NUM_HEADS, 512 or 576] bf16
    main_cache_ptr,  # bytes
    main_indices_ptr,  # int32: [rows, main_size], or [main_size] if MAIN_RAGGED
    main_bounds_ptr,  # int32: lengths [rows], or where rows begin [rows + 1]
    extra_cache_ptr,  # like the main ones; None without an extra cache
    extra_indices_ptr,
    extra_bounds_ptr,
    sink_ptr,  # [NUM_HEADS] fp32, or None
    out_ptr,  # [rows, NUM_HEADS, 512]; that of each split, fp32, where lse_ptr is not None
    lse_ptr,  # [rows, num_splits, NUM_HEADS] fp32: log2 of the sum of weights
    scale_log2,
    num_splits,
    main_size,
    main_last_slot,
    main_indices_stride,
    main_block_stride,  # in 16 bytes: so its divisor is known
    extra_size,
    extra_last_slot,
    extra_indices_stride,
    extra_block_stride,
    q_row_stride,
    q_head_stride,
    out_row_stride,
    out_split_stride,
    out_head_stride,
    NUM_HEADS: tl.constexpr,
    HEADS: tl.constexpr,  # of a program
    KEYS: tl.constexpr,  # of a tile
    TOKEN_BYTES: tl.constexpr,  # 584 or 656: the layout of both caches
    MAIN_BLOCK: tl.constexpr,  # tokens
    EXTRA_BLOCK: tl.constexpr,  # 0 without an extra cache
    MAIN_RAGGED: tl.constexpr,
    EXTRA_RAGGED: tl.constexpr,
    FNUZ: tl.constexpr,
    HARDWARE_FP8: tl.constexpr,
    MERGED: tl.constexpr,  # one product over all 512 values, as wgmma likes it, in place of eight
    IN_REGISTERS: tl.constexpr,  # see register_order
):
    """The result, or that of a split with the logarithm of its sum of weights: 0 and -inf where it has no keys."""
    HEAD_TILES: tl.constexpr = (NUM_HEADS + HEADS - 1) // HEADS
    HAS_EXTRA: tl.constexpr = EXTRA_BLOCK > 0
    NUM_CODE_PIECES: tl.constexpr = NUM_CODE_PIECES_584 if TOKEN_BYTES == 584 else NUM_CODE_PIECES_656
    NUM_PIECES: tl.constexpr = NUM_CODE_PIECES + 1
    # What is asked for before the second product is in registers beside its operands. So part of it is not.
    EARLY_PIECES: tl.constexpr = NUM_CODE_PIECES if MERGED else 4
    NUM_PARTS: tl.constexpr = 1 if MERGED else VALUES // PIECE  # of the result
    WIDTH: tl.constexpr = VALUES // NUM_PARTS
    # The programs of a row lie together: what one of them has gathered is near for the others.
    program = tl.program_id(0)
    row = (program // HEAD_TILES // num_splits).to(tl.int64)
    split = program // HEAD_TILES % num_splits
    head = program % HEAD_TILES * HEADS + tl.arange(0, HEADS)

    main = list_of(row, main_indices_ptr, main_bounds_ptr, main_size, main_last_slot, main_indices_stride, MAIN_RAGGED)
    main_cache = (main_cache_ptr, main_block_stride)
    num_main_tiles = (main[1] + KEYS - 1) // KEYS
    num_tiles = num_main_tiles
    extra, extra_cache = main, main_cache
    if HAS_EXTRA:
        extra = list_of(
            row, extra_indices_ptr, extra_bounds_ptr, extra_size, extra_last_slot, extra_indices_stride, EXTRA_RAGGED
        )
        extra_cache = (extra_cache_ptr, extra_block_stride)
        num_tiles += (extra[1] + KEYS - 1) // KEYS
    first_tile = num_tiles * split // num_splits
    last_tile = num_tiles * (split + 1) // num_splits

    # Slots are known two tiles before the products want them, and what lies there one.
    slot = slots_of_tile(first_tile, last_tile, num_main_tiles, main, extra, KEYS, HAS_EXTRA)
    data_ptr, scale_ptr = addresses_of_tile(
        slot, first_tile, num_main_tiles, main_cache, extra_cache, MAIN_BLOCK, EXTRA_BLOCK, TOKEN_BYTES
    )
    scales = gather_scales(scale_ptr, slot >= 0, TOKEN_BYTES)
    early = gather(data_ptr, slot >= 0, 0, EARLY_PIECES, TOKEN_BYTES)
    late = gather(data_ptr, slot >= 0, EARLY_PIECES, NUM_PIECES, TOKEN_BYTES)
    slot = slots_of_tile(first_tile + 1, last_tile, num_main_tiles, main, extra, KEYS, HAS_EXTRA)
    q = queries(q_ptr + row * q_row_stride, head, q_head_stride, NUM_HEADS, TOKEN_BYTES, MERGED, IN_REGISTERS)

    m = tl.full([HEADS], -float("inf"), tl.float32)
    total = tl.zeros([HEADS], tl.float32)
    acc = nothing()
    for _ in tl.static_range(NUM_PARTS):
        acc += (tl.zeros([HEADS, WIDTH], tl.float32),)
    for tile in tl.range(first_tile, last_tile, num_stages=1):
        # The slots of this tile once more, from the nearest cache: kept, they would take registers of all threads.
        is_key = slots_of_tile(tile, last_tile, num_main_tiles, main, extra, KEYS, HAS_EXTRA) >= 0
        words = early + late
        s = tl.zeros([HEADS, KEYS], tl.float32)
        keys = nothing()
        if MERGED:
            for i in tl.static_range(NUM_PIECES):
                keys += (piece_of(words, scales, i, TOKEN_BYTES, FNUZ, HARDWARE_FP8),)
            values = merge(keys)  # in memory before the branches: the pieces need not be kept
            p = tl.zeros([HEADS, KEYS], tl.float32).to(values.dtype)
            alpha = tl.full([HEADS], 1.0, tl.float32)
            # Both branches are always taken. Where a product needs another one, Triton gives all warps to the rows of
            # the latter, heads, and with more warps than those take makes it twice. It does not look past a branch.
            if TOKEN_BYTES == 656:  # noqa: SIM102
                if tile >= first_tile:
                    s = tl.dot(q[1], tl.trans(keys[NUM_CODE_PIECES]), s)
            if tile < last_tile:
                s = tl.dot(q[0], tl.trans(values), s)
                p, alpha, m, total = softmax_step(s, m, total, is_key, scale_log2)
            keys = (values,)
        else:
            for i in tl.static_range(NUM_PIECES):
                keys += (piece_of(words, scales, i, TOKEN_BYTES, FNUZ, HARDWARE_FP8),)
                s = tl.dot(q[i], transposed(keys[i], IN_REGISTERS), s)
            p, alpha, m, total = softmax_step(s, m, total, is_key, scale_log2)

        is_next = slot >= 0
        data_ptr, scale_ptr = addresses_of_tile(
            slot, tile + 1, num_main_tiles, main_cache, extra_cache, MAIN_BLOCK, EXTRA_BLOCK, TOKEN_BYTES
        )
        scales = gather_scales(scale_ptr, is_next, TOKEN_BYTES)
        early = gather(data_ptr, is_next, 0, EARLY_PIECES, TOKEN_BYTES)
        slot = slots_of_tile(tile + 2, last_tile, num_main_tiles, main, extra, KEYS, HAS_EXTRA)
        weighed = nothing()
        for i in tl.static_range(NUM_PARTS):
            weighed += (tl.dot(p, keys[i], acc[i] * alpha[:, None]),)
        acc = weighed
        tl.debug_barrier()  # the compiler would ask for the rest before the product: there has to be a barrier anyway
        late = gather(data_ptr, is_next, EARLY_PIECES, NUM_PIECES, TOKEN_BYTES)

    is_empty = total == 0.0
    if lse_ptr is not None:
        at = (row * num_splits + split) * NUM_HEADS + head
        tl.store(lse_ptr + at, tl.where(is_empty, -float("inf"), m + tl.log2(total)), mask=head < NUM_HEADS)
    elif sink_ptr is not None:
        sink = tl.load(sink_ptr + head, mask=head < NUM_HEADS, other=0.0)
        total += tl.exp2(sink * LOG2_E - tl.where(is_empty, 0.0, m))
    factor = 1.0 / tl.where(is_empty, 1.0, total)  # 0 without any key, whatever the sink
    out_ptr += row * out_row_stride + split * out_split_stride
    for i in tl.static_range(NUM_PARTS):
        at = head[:, None] * out_head_stride + column(tl.arange(0, WIDTH) + i * WIDTH, TOKEN_BYTES)[None, :]
        y = narrow(acc[i] * factor[:, None], out_ptr.dtype.element_ty)
        tl.store(out_ptr + at, y, mask=(head < NUM_HEADS)[:, None])


@triton.jit(do_not_specialize=["num_splits"])
def sparse_mla_reduce_kernel(
    partial_ptr,  # [rows, num_splits, NUM_HEADS, 512] fp32
    lse_ptr,  # [rows, num_splits, NUM_HEADS] fp32
    sink_ptr,  # [NUM_HEADS] fp32, or None
    out_ptr,  # [rows, NUM_HEADS, 512]
    num_splits,
    out_row_stride,
    out_head_stride,
    NUM_HEADS: tl.constexpr,
    SPLITS: tl.constexpr,  # the power of two from num_splits on
):
    """The splits of one head of a row, each by its share of the sum of weights."""
    row = (tl.program_id(0) // NUM_HEADS).to(tl.int64)
    head = tl.program_id(0) % NUM_HEADS
    split, element = tl.arange(0, SPLITS), tl.arange(0, VALUES)
    is_split = split < num_splits
    at = (row * num_splits + split) * NUM_HEADS + head
    lse = tl.load(lse_ptr + at, mask=is_split, other=-float("inf"))
    partial = tl.load(partial_ptr + at[:, None] * VALUES + element[None, :], mask=is_split[:, None], other=0.0)
    m = tl.max(lse, axis=0)
    shift = tl.where(m == -float("inf"), 0.0, m)
    weight = tl.exp2(lse - shift)
    total = tl.sum(weight, axis=0)
    is_empty = total == 0.0
    if sink_ptr is not None:
        total += tl.exp2(tl.load(sink_ptr + head) * LOG2_E - shift)
    y = tl.sum(partial * weight[:, None], axis=0) / tl.where(is_empty, 1.0, total)
    tl.store(out_ptr + row * out_row_stride + head * out_head_stride + element, narrow(y, out_ptr.dtype.element_ty))
