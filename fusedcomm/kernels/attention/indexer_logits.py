"""The logits of DeepSeek's indexer in Triton, from its cache in both layouts."""

from __future__ import annotations

import triton
import triton.language as tl

from fusedcomm.kernels.attention.fp8_rows import decode_fp8
from fusedcomm.kernels.attention.indexer import (
    HEAD_DIM,
    PIECE,
    PIECES,
    TILE,
    find_block,
    piece_pointers,
    scale_pointers,
    value_positions,
)
from fusedcomm.kernels.convert import INTERPRETED


@triton.jit
def dot_operand(codes, FNUZ: tl.constexpr, FP8_DOT: tl.constexpr):
    """FP8 codes as tl.dot takes them: as FP8 where the device multiplies it, else as bf16, which has all its values."""
    if FP8_DOT and FNUZ:
        return codes.to(tl.float8e4b8, bitcast=True)
    elif FP8_DOT:
        return codes.to(tl.float8e4nv, bitcast=True)
    elif INTERPRETED:
        return decode_fp8(codes, FNUZ)  # whose products of bf16 are those of its bits
    else:
        return decode_fp8(codes, FNUZ).to(tl.bfloat16)


@triton.jit
def weighted_scores(k, q, weight):
    """``sum_h weight_h relu(q_h . k_t)``: fp32 ``[T]`` of keys ``[T, 128]`` and queries ``[128, heads]``."""
    scores = tl.dot(k, q)
    scores = tl.maximum(scores, 0.0, propagate_nan=tl.PropagateNan.ALL)
    return tl.sum(scores * weight[None, :], axis=1)


@triton.jit
def load_tile(
    cache_ptr,
    table_ptr,
    first,
    end,
    max_blocks,
    num_blocks,
    block_stride,
    BLOCK_SIZE: tl.constexpr,
    STRIDE_UNIT: tl.constexpr,
    PRESHUFFLE: tl.constexpr,
    TOKENS: tl.constexpr,
):
    """(codes ``[T * 8, 16]`` as they lie in memory, scales ``[T]``, whether there is such a token) from a token on.

    Where a tile lies in one block, one look into the table serves all of it.
    """
    IN_ONE_BLOCK: tl.constexpr = BLOCK_SIZE % TOKENS == 0
    place = tl.arange(0, TOKENS * PIECES)
    token = tl.arange(0, TOKENS)
    if PRESHUFFLE:
        of_piece, piece = place // (TILE * PIECES) * TILE + place % TILE, place // TILE % PIECES
    else:
        of_piece, piece = place // PIECES, place % PIECES
    if IN_ONE_BLOCK:
        block, offset, is_found = find_block(table_ptr, first, first < end, max_blocks, num_blocks, BLOCK_SIZE)
        block_ptr = cache_ptr + block * block_stride * STRIDE_UNIT
        is_token = tl.full([TOKENS], 0, tl.int1) | is_found
        is_found = tl.full([TOKENS * PIECES], 0, tl.int1) | is_found
        scale = tl.load(scale_pointers(block_ptr, offset + token, BLOCK_SIZE), mask=is_token, other=0.0)
        at = block_ptr + value_positions(offset + of_piece, piece, PRESHUFFLE)
    else:
        asked = first + token
        block, offset, is_token = find_block(table_ptr, asked, asked < end, max_blocks, num_blocks, BLOCK_SIZE)
        block_ptr = cache_ptr + block * block_stride * STRIDE_UNIT
        scale = tl.load(scale_pointers(block_ptr, offset, BLOCK_SIZE), mask=is_token, other=0.0)
        asked = first + of_piece
        block, offset, is_found = find_block(table_ptr, asked, asked < end, max_blocks, num_blocks, BLOCK_SIZE)
        at = cache_ptr + block * block_stride * STRIDE_UNIT + value_positions(offset, piece, PRESHUFFLE)
    codes = tl.load(piece_pointers(at), mask=is_found[:, None], other=0)
    return codes, scale, is_token


@triton.jit
def token_rows(codes, TOKENS: tl.constexpr, PRESHUFFLE: tl.constexpr):
    """``[T, 128]`` of the codes that load_tile loaded."""
    if PRESHUFFLE:
        codes = tl.permute(tl.reshape(codes, [TOKENS // TILE, PIECES, TILE, PIECE]), (0, 2, 1, 3))
    return tl.reshape(codes, [TOKENS, HEAD_DIM])


@triton.jit
def load_query(
    q_ptr, row, NUM_HEADS: tl.constexpr, BLOCK_HEADS: tl.constexpr, FNUZ: tl.constexpr, FP8_DOT: tl.constexpr
):
    """The heads of a query, ``[128, heads]``."""
    head = tl.arange(0, BLOCK_HEADS)
    at = head[:, None] * HEAD_DIM + tl.arange(0, HEAD_DIM)[None, :]
    q = tl.load(q_ptr + row * (NUM_HEADS * HEAD_DIM) + at, mask=(head < NUM_HEADS)[:, None], other=0)
    return tl.trans(dot_operand(q, FNUZ, FP8_DOT))


@triton.jit
def load_weights(weights_ptr, row, NUM_HEADS: tl.constexpr, BLOCK_HEADS: tl.constexpr):
    """The weights of the heads of a query."""
    head = tl.arange(0, BLOCK_HEADS)
    return tl.load(weights_ptr + row * NUM_HEADS + head, mask=head < NUM_HEADS, other=0.0)


@triton.jit(do_not_specialize=["next_n", "length", "num_parts", "num_tiles", "num_blocks", "max_blocks"])
def indexer_logits_kernel(
    q_ptr,  # [batch, next_n, NUM_HEADS, 128] bytes
    cache_ptr,  # bytes
    weights_ptr,  # [batch, next_n, NUM_HEADS] fp32
    context_lens_ptr,  # [batch] or, with LENS_BY_QUERY, [batch, next_n] int32
    block_table_ptr,  # [batch, max_blocks] int32
    out_ptr,  # [batch, next_n, length] fp32
    next_n,
    length,
    num_parts,  # programs of a request
    num_tiles,  # of TOKENS tokens, of a program
    num_blocks,
    max_blocks,
    block_stride,  # in STRIDE_UNIT bytes: so its divisor is known
    lens_stride,
    table_stride,
    ONE_QUERY: tl.constexpr,  # next_n is 1
    NUM_HEADS: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    STRIDE_UNIT: tl.constexpr,
    LENS_BY_QUERY: tl.constexpr,
    PRESHUFFLE: tl.constexpr,
    FNUZ: tl.constexpr,
    FP8_DOT: tl.constexpr,
    TOKENS: tl.constexpr,
):
    """A program scores tiles of a request for all its queries."""
    request = (tl.program_id(0) // num_parts).to(tl.int64)
    first = tl.program_id(0) % num_parts * (num_tiles * TOKENS)
    stop = tl.minimum(first + num_tiles * TOKENS, length)
    lens_ptr = context_lens_ptr + request * lens_stride
    longest = tl.load(lens_ptr)  # the last query sees the whole context, each before it one token fewer
    if LENS_BY_QUERY:
        query = 1
        while query < next_n:
            longest = tl.maximum(longest, tl.load(lens_ptr + query))
            query += 1
    end = tl.minimum(stop, longest)
    out_ptr += request * next_n * length
    token = tl.arange(0, TOKENS)
    if first < end:
        table_ptr = block_table_ptr + request * table_stride
        if ONE_QUERY:  # which stays where it is multiplied
            q = load_query(q_ptr, request, NUM_HEADS, BLOCK_HEADS, FNUZ, FP8_DOT)
        while first < end:
            codes, scale, is_found = load_tile(
                cache_ptr,
                table_ptr,
                first,
                end,
                max_blocks,
                num_blocks,
                block_stride,
                BLOCK_SIZE,
                STRIDE_UNIT,
                PRESHUFFLE,
                TOKENS,
            )
            k = dot_operand(token_rows(codes, TOKENS, PRESHUFFLE), FNUZ, FP8_DOT)
            if ONE_QUERY:
                weight = load_weights(weights_ptr, request, NUM_HEADS, BLOCK_HEADS)
                logits = weighted_scores(k, q, weight) * scale
                logits = tl.where(is_found & (first + token < longest), logits, float("-inf"))
                tl.store(out_ptr + first + token, logits, mask=first + token < stop)
            else:
                query, row_ptr = 0, out_ptr
                while query < next_n:
                    row = request * next_n + query
                    one_q = load_query(q_ptr, row, NUM_HEADS, BLOCK_HEADS, FNUZ, FP8_DOT)
                    weight = load_weights(weights_ptr, row, NUM_HEADS, BLOCK_HEADS)
                    logits = weighted_scores(k, one_q, weight) * scale
                    visible = longest - (next_n - 1) + query
                    if LENS_BY_QUERY:
                        visible = tl.load(lens_ptr + query)
                    logits = tl.where(is_found & (first + token < visible), logits, float("-inf"))
                    tl.store(row_ptr + first + token, logits, mask=first + token < stop)
                    row_ptr += length
                    query += 1
            first += TOKENS
    unseen = tl.full([TOKENS], float("-inf"), tl.float32)
    while first < stop:  # past the context
        query, row_ptr = 0, out_ptr
        while query < next_n:
            tl.store(row_ptr + first + token, unseen, mask=first + token < stop)
            row_ptr += length
            query += 1
        first += TOKENS
