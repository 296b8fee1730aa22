"""The cache of DeepSeek's indexer, written and gathered in Triton; layouts as in fusedcomm.ops.attention.indexer.

What is written is what fusedcomm.ops.attention.indexer_reference writes, to the bit.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fusedcomm.kernels.attention.fp8_rows import codes_of, magnitude_bits, scale_of
from fusedcomm.kernels.convert import widen

HEAD_DIM: tl.constexpr = tl.constexpr(128)
SCALE_BYTES: tl.constexpr = tl.constexpr(4)
TILE: tl.constexpr = tl.constexpr(16)
PIECE: tl.constexpr = tl.constexpr(16)  # codes that lie together in both layouts: as much as a thread moves at once
PIECES: tl.constexpr = tl.constexpr(8)  # of a token
# Entries of a block table in the 32 bytes that a GPU reads at least.
SECTOR: tl.constexpr = tl.constexpr(8)
LANES: tl.constexpr = tl.constexpr(32)

# ---- where things are ----


@triton.jit
def piece_order(TOKENS: tl.constexpr, PRESHUFFLE: tl.constexpr):
    """(token, its piece) of every piece of TOKENS tokens, ``[TOKENS * 8]``, as threads take them.

    All that a kernel knows of a token is held once for each of its pieces, so by the thread that moves it: nothing of
    it goes through shared memory. A GPU reads and writes 32 bytes at least, and looks at eight threads at a time where
    each has 16: in both layouts those have whole lines of 32 bytes of the cache and of rows. Plain, they have a row.
    Preshuffled, where the same pieces of neighbours lie together, they have four pieces of two tokens.
    """
    place = tl.arange(0, TOKENS * PIECES)
    if PRESHUFFLE:
        return place // 16 * 2 + place // 4 % 2, place // 8 % 2 * 4 + place % 4
    else:
        return place // PIECES, place % PIECES


@triton.jit
def value_positions(offset, piece, PRESHUFFLE: tl.constexpr):
    """Where in its block a piece of the token at an offset lies."""
    if PRESHUFFLE:
        return offset // TILE * (TILE * HEAD_DIM) + piece * (TILE * PIECE) + offset % TILE * PIECE
    else:
        return offset * HEAD_DIM + piece * PIECE


@triton.jit
def piece_pointers(at):
    """The addresses of the 16 bytes from each of these on."""
    return at[:, None] + tl.arange(0, PIECE)[None, :]


@triton.jit
def scale_pointers(block_ptr, offset, BLOCK_SIZE: tl.constexpr):
    """The addresses of the fp32 scales of tokens, from those of their blocks."""
    at = block_ptr + (BLOCK_SIZE * HEAD_DIM + offset * SCALE_BYTES)
    return at.to(tl.pointer_type(tl.float32), bitcast=True)


@triton.jit
def find_block(table_ptr, token, is_asked, max_blocks, num_blocks, BLOCK_SIZE: tl.constexpr):
    """(block, offset in it, whether there is one) of tokens of requests with these rows of the table.

    Unsigned: what is below 0 is past every end.
    """
    token = token.to(tl.uint32, bitcast=True)
    column = token // BLOCK_SIZE
    block = tl.load(table_ptr + column, mask=is_asked & (column < max_blocks.to(tl.uint32)), other=-1)
    block = block.to(tl.uint32, bitcast=True)
    return block.to(tl.int64), (token % BLOCK_SIZE).to(tl.int32), block < num_blocks.to(tl.uint32)


@triton.jit
def touch_tables(block_table_ptr, table_stride, num_requests, max_blocks, touched_log2):
    """Has the first columns of the table, 2^touched_log2 times 8 of each request, read into the caches of the GPU.

    Which columns a program needs it knows only when it has read cu_seq_lens: from a cold cache it would wait for one
    after the other. While they wait, a few programs ask for what all of them are likely to need. Volatile, or a load
    that nobody uses would be left out.
    """
    sector = tl.program_id(0) * LANES + tl.arange(0, LANES)
    request, column = sector >> touched_log2, (sector & ((1 << touched_log2) - 1)) * SECTOR
    at = block_table_ptr + request.to(tl.int64) * table_stride + column
    tl.load(at, mask=(request < num_requests) & (column < max_blocks), volatile=True)


@triton.jit
def find_requests(entries, row, first, last, cu_seq_lens_ptr, num_requests, spread):
    """(request, its first row) of each row, which are first to last: the last one that begins at or before the row.

    The request is below 0 before the first one, num_requests past the end of the last one. Two steps: every spread-th
    entry of cu_seq_lens, ``entries [32]``, is compared with the first and the last row at once, then each row is
    searched for by halves between what was found. The rows of a program mostly are of one request, and if spread is 1,
    as it is for up to 31 requests, nothing is left to search: one load, where halves alone are a chain of them. Every
    warp compares for itself, so none waits for another.
    """
    # both counts in one sum
    counts = tl.sum((entries <= first).to(tl.int32) + ((entries <= last).to(tl.int32) << 16), axis=0)
    before = ((counts & 0xFFFF) - 1) * spread
    num_entries = tl.minimum((counts >> 16) * spread, num_requests + 1) - before
    request = tl.full(row.shape, 0, tl.int32) + before
    begin = tl.full(row.shape, 0, tl.int32) + tl.max(tl.where(entries <= first, entries, 0), axis=0)  # none decreases
    if num_entries > 1:
        size = tl.full(row.shape, 0, tl.int32) + num_entries  # of entries, from that of the request on
        while num_entries > 1:
            middle = request + size // 2
            goes_on = tl.load(cu_seq_lens_ptr + middle, mask=(middle >= 0) & (size > 1), other=-1) <= row
            size = tl.where(goes_on, size - size // 2, size // 2)
            request = tl.where(goes_on, middle, request)
            num_entries -= num_entries // 2
        begin = tl.load(cu_seq_lens_ptr + request, mask=request >= 0, other=0)
    return request, begin


# ---- numbers ----


@triton.jit
def over_pieces(of_piece, TOKENS: tl.constexpr, PRESHUFFLE: tl.constexpr):
    """The largest of the pieces of each token, ``[TOKENS * 8]`` as piece_order has them, for each piece."""
    NEIGHBOURS: tl.constexpr = 2 if PRESHUFFLE else 1
    shape: tl.constexpr = [TOKENS // NEIGHBOURS, NEIGHBOURS, NEIGHBOURS, PIECES // NEIGHBOURS]
    largest = tl.max(tl.max(tl.reshape(of_piece, shape), axis=3), axis=1)
    return tl.reshape(tl.broadcast_to(largest[:, None, :, None], shape), of_piece.shape)


@triton.jit
def quantise_pieces(
    x,
    TOKENS: tl.constexpr,
    PRESHUFFLE: tl.constexpr,
    UE8M0: tl.constexpr,
    FNUZ: tl.constexpr,
    HARDWARE_FP8: tl.constexpr,
):
    """(codes ``[TOKENS * 8, 16]``, scales ``[TOKENS * 8]``) of fp32 pieces as piece_order has them."""
    amax_bits = over_pieces(tl.max(magnitude_bits(x), axis=1), TOKENS, PRESHUFFLE)
    scale, inverse = scale_of(amax_bits, UE8M0, FNUZ)
    return codes_of(x, scale[:, None], inverse[:, None], UE8M0, FNUZ, HARDWARE_FP8), scale


# ---- kernels ----


@triton.jit(do_not_specialize=["num_tokens", "num_slots"])
def indexer_k_write_kernel(
    k_ptr,  # [num_tokens, 128]
    cache_ptr,  # bytes
    slot_mapping_ptr,  # [num_tokens] int64
    num_tokens,
    num_slots,
    k_stride,
    block_stride,  # in STRIDE_UNIT bytes: so its divisor is known
    BLOCK_SIZE: tl.constexpr,
    STRIDE_UNIT: tl.constexpr,
    PRESHUFFLE: tl.constexpr,
    UE8M0: tl.constexpr,
    FNUZ: tl.constexpr,
    HARDWARE_FP8: tl.constexpr,
    TOKENS: tl.constexpr,
):
    """A program quantises TOKENS keys and writes them."""
    first = tl.program_id(0).to(tl.int64) * TOKENS
    token, piece = piece_order(TOKENS, PRESHUFFLE)
    is_token = token < num_tokens - first
    slot = tl.load(slot_mapping_ptr + first + token, mask=is_token, other=-1)
    # not for known slots alone: so it does not wait for them
    at = piece_pointers(k_ptr + first * k_stride + token.to(tl.int64) * k_stride + piece * PIECE)
    x = widen(tl.load(at, mask=is_token[:, None], other=0.0))
    codes, scale = quantise_pieces(x, TOKENS, PRESHUFFLE, UE8M0, FNUZ, HARDWARE_FP8)
    slot = slot.to(tl.uint64, bitcast=True)
    is_known = slot < num_slots.to(tl.uint64)
    block_ptr = cache_ptr + (slot // BLOCK_SIZE).to(tl.int64, bitcast=True) * block_stride * STRIDE_UNIT
    offset = (slot % BLOCK_SIZE).to(tl.int32)
    tl.store(piece_pointers(block_ptr + value_positions(offset, piece, PRESHUFFLE)), codes, mask=is_known[:, None])
    tl.store(scale_pointers(block_ptr, offset, BLOCK_SIZE), scale, mask=is_known & (piece == 0))


@triton.jit(do_not_specialize=["num_rows", "num_requests", "num_blocks", "max_blocks", "spread", "touched_log2"])
def indexer_k_gather_kernel(
    cache_ptr,  # bytes
    k_ptr,  # [num_rows, 128] bytes
    scale_ptr,  # [num_rows] fp32
    block_table_ptr,  # [num_requests, max_blocks] int32
    cu_seq_lens_ptr,  # [num_requests + 1] int32
    num_rows,
    num_requests,
    num_blocks,
    max_blocks,
    spread,
    touched_log2,
    block_stride,  # in STRIDE_UNIT bytes: so its divisor is known
    table_stride,
    BLOCK_SIZE: tl.constexpr,
    STRIDE_UNIT: tl.constexpr,
    PRESHUFFLE: tl.constexpr,
    TOKENS: tl.constexpr,
):
    """A program copies TOKENS rows."""
    touch_tables(block_table_ptr, table_stride, num_requests, max_blocks, touched_log2)
    entry = tl.arange(0, LANES) * spread
    entries = tl.load(cu_seq_lens_ptr + entry, mask=entry <= num_requests, other=0x7FFFFFFF)
    first = tl.program_id(0) * TOKENS
    token, piece = piece_order(TOKENS, PRESHUFFLE)
    row = first + token
    request, begin = find_requests(entries, row, first, first + TOKENS - 1, cu_seq_lens_ptr, num_requests, spread)
    request = request.to(tl.uint32, bitcast=True)
    is_known = (row < num_rows) & (request < num_requests.to(tl.uint32))
    table_ptr = block_table_ptr + request.to(tl.int64) * table_stride
    block, offset, is_found = find_block(table_ptr, row - begin, is_known, max_blocks, num_blocks, BLOCK_SIZE)
    block_ptr = cache_ptr + block * block_stride * STRIDE_UNIT
    at = piece_pointers(block_ptr + value_positions(offset, piece, PRESHUFFLE))
    codes = tl.load(at, mask=is_found[:, None], other=0)
    is_first = is_found & (piece == 0)
    scale = tl.load(scale_pointers(block_ptr, offset, BLOCK_SIZE), mask=is_first, other=0.0)
    at = piece_pointers(k_ptr + first.to(tl.int64) * HEAD_DIM + (token * HEAD_DIM + piece * PIECE))
    tl.store(at, codes, mask=is_found[:, None])
    tl.store(scale_ptr + first + token, scale, mask=is_first)
