"""The cache of DeepSeek's indexer, and its logits, in Triton; layouts as in fusedcomm.ops.attention.indexer.

What is written is what fusedcomm.ops.attention.indexer_reference writes, to the bit.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fusedcomm.kernels.convert import INTERPRETED, encode_fp8, widen

HEAD_DIM: tl.constexpr = tl.constexpr(128)
SCALE_BYTES: tl.constexpr = tl.constexpr(4)
TILE: tl.constexpr = tl.constexpr(16)
MIN_AMAX: tl.constexpr = tl.constexpr(1e-4)

# ---- where things are ----


@triton.jit
def value_positions(offset, PRESHUFFLE: tl.constexpr):
    """Where in its block the values of the tokens at offsets ``[T]`` lie: ``[T, 128]``, in runs of 16 bytes or more."""
    o, c = offset[:, None], tl.arange(0, HEAD_DIM)[None, :]
    if PRESHUFFLE:
        return o // TILE * (TILE * HEAD_DIM) + c // TILE * (TILE * TILE) + o % TILE * TILE + c % TILE
    else:
        return o * HEAD_DIM + c


@triton.jit
def scale_pointers(block_ptr, offset, BLOCK_SIZE: tl.constexpr):
    """The addresses of the fp32 scales of tokens, ``[T]``, from those of their blocks."""
    at = block_ptr + (BLOCK_SIZE * HEAD_DIM + offset * SCALE_BYTES)
    return at.to(tl.pointer_type(tl.float32), bitcast=True)


@triton.jit
def find_block(table_ptr, token, is_asked, max_blocks, num_blocks, BLOCK_SIZE: tl.constexpr):
    """(block, offset in it, whether there is one) of tokens of requests with these rows of the table, ``[T]`` each."""
    column = token // BLOCK_SIZE
    is_listed = is_asked & (token >= 0) & (column < max_blocks)
    block = tl.load(table_ptr + column, mask=is_listed, other=-1)
    is_found = (block >= 0) & (block < num_blocks)
    return tl.where(is_found, block, 0).to(tl.int64), tl.where(is_found, token % BLOCK_SIZE, 0), is_found


@triton.jit
def find_request(row, first, last, cu_seq_lens_ptr, num_requests, spread, WIDTH: tl.constexpr):
    """The request of each row ``[T]``, first to last: the last entry of cu_seq_lens that is not above the row.

    Below 0 before the first request, num_requests past the end of the last one. Two steps: every spread-th entry (there
    are up to WIDTH of them) is compared with the first and the last row at once, then each row is searched for by
    halves between what was found. The rows of a program mostly are of one request, and if spread is 1, as it is for up
    to WIDTH - 1 requests, nothing is left to search: one load, where halves alone are a chain of them.
    """
    entry = tl.arange(0, WIDTH) * spread
    value = tl.load(cu_seq_lens_ptr + entry, mask=entry <= num_requests, other=0x7FFFFFFF)
    # both counts in one sum: WIDTH is far below 2^16
    counts = tl.sum((value <= first).to(tl.int32) + ((value <= last).to(tl.int32) << 16), axis=0)
    begin = ((counts & 0xFFFF) - 1) * spread
    num_entries = tl.minimum((counts >> 16) * spread, num_requests + 1) - begin
    request = tl.full(row.shape, 0, tl.int32) + begin
    size = tl.full(row.shape, 0, tl.int32) + num_entries  # of entries, from that of the request on
    while num_entries > 1:
        middle = request + size // 2
        goes_on = tl.load(cu_seq_lens_ptr + middle, mask=(middle >= 0) & (size > 1), other=-1) <= row
        size = tl.where(goes_on, size - size // 2, size // 2)
        request = tl.where(goes_on, middle, request)
        num_entries -= num_entries // 2
    return request


# ---- numbers ----


@triton.jit
def quantise_rows(x, UE8M0: tl.constexpr, FNUZ: tl.constexpr, HARDWARE_FP8: tl.constexpr):
    """(codes ``[T, 128]``, scales ``[T]``) of fp32 rows."""
    FP8_MAX: tl.constexpr = 240.0 if FNUZ else 448.0
    # The larger magnitude, compared as integers: a NaN is larger than everything, so it survives.
    amax = tl.max(x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=1).to(tl.float32, bitcast=True)
    scale = tl.div_rn(tl.where(amax < MIN_AMAX, MIN_AMAX, amax), FP8_MAX)
    if UE8M0:
        # the smallest power of two >= scale
        is_finite = scale < float("inf")
        bits = tl.where(is_finite, scale.to(tl.int32, bitcast=True), 0)
        power = ((bits + 0x7FFFFF) >> 23) << 23
        scale = tl.where(is_finite, power.to(tl.float32, bitcast=True), float("nan"))
    q = tl.div_rn(x, tl.broadcast_to(scale[:, None], x.shape))
    q = tl.where(q > FP8_MAX, FP8_MAX, q)  # NaN compares false and stays
    q = tl.where(q < -FP8_MAX, -FP8_MAX, q)
    return encode_fp8(q, FNUZ, HARDWARE_FP8), scale


@triton.jit
def decode_fp8(codes, FNUZ: tl.constexpr):
    """The fp32 values of FP8 codes (uint8)."""
    code = codes.to(tl.int32)
    # The exponent, in the place of fp32's, is off by the difference of the biases: of subnormals too.
    REBIAS: tl.constexpr = 2.0**119 if FNUZ else 2.0**120
    magnitude = ((code & 0x7F) << 20).to(tl.float32, bitcast=True) * REBIAS
    is_nan = (code == 0x80) if FNUZ else ((code & 0x7F) == 0x7F)
    return tl.where(is_nan, float("nan"), tl.where(code >= 0x80, -magnitude, magnitude))


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
    token = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    element = tl.arange(0, HEAD_DIM)
    is_token = token < num_tokens
    slot = tl.load(slot_mapping_ptr + token, mask=is_token, other=-1)
    # not for known slots alone: so it does not wait for them
    x = tl.load(k_ptr + token[:, None] * k_stride + element[None, :], mask=is_token[:, None], other=0.0)
    codes, scale = quantise_rows(widen(x), UE8M0, FNUZ, HARDWARE_FP8)
    is_known = (slot >= 0) & (slot < num_slots)
    slot = tl.where(is_known, slot, 0)
    block_ptr = cache_ptr + slot // BLOCK_SIZE * block_stride * STRIDE_UNIT
    offset = (slot % BLOCK_SIZE).to(tl.int32)
    tl.store(block_ptr[:, None] + value_positions(offset, PRESHUFFLE), codes, mask=is_known[:, None])
    tl.store(scale_pointers(block_ptr, offset, BLOCK_SIZE), scale, mask=is_known)


@triton.jit(do_not_specialize=["num_rows", "num_requests", "num_blocks", "max_blocks", "spread"])
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
    block_stride,  # in STRIDE_UNIT bytes: so its divisor is known
    table_stride,
    BLOCK_SIZE: tl.constexpr,
    STRIDE_UNIT: tl.constexpr,
    PRESHUFFLE: tl.constexpr,
    WIDTH: tl.constexpr,
    TOKENS: tl.constexpr,
):
    """A program copies TOKENS rows."""
    first = tl.program_id(0) * TOKENS
    row = first + tl.arange(0, TOKENS)
    request = find_request(row, first, first + TOKENS - 1, cu_seq_lens_ptr, num_requests, spread, WIDTH)
    is_known = (row < num_rows) & (request >= 0) & (request < num_requests)
    begin = tl.load(cu_seq_lens_ptr + request, mask=is_known, other=0)
    table_ptr = block_table_ptr + tl.where(is_known, request, 0).to(tl.int64) * table_stride
    block, offset, is_found = find_block(table_ptr, row - begin, is_known, max_blocks, num_blocks, BLOCK_SIZE)
    block_ptr = cache_ptr + block * block_stride * STRIDE_UNIT
    codes = tl.load(block_ptr[:, None] + value_positions(offset, PRESHUFFLE), mask=is_found[:, None], other=0)
    scale = tl.load(scale_pointers(block_ptr, offset, BLOCK_SIZE), mask=is_found, other=0.0)
    at = row.to(tl.int64)[:, None] * HEAD_DIM + tl.arange(0, HEAD_DIM)[None, :]
    tl.store(k_ptr + at, codes, mask=is_found[:, None])
    tl.store(scale_ptr + row, scale, mask=is_found)


@triton.jit(do_not_specialize=["next_n", "length", "num_tiles", "num_blocks", "max_blocks"])
def indexer_logits_kernel(
    q_ptr,  # [batch, next_n, NUM_HEADS, 128] bytes
    cache_ptr,  # bytes
    weights_ptr,  # [batch, next_n, NUM_HEADS] fp32
    context_lens_ptr,  # [batch] or, with LENS_BY_QUERY, [batch, next_n] int32
    block_table_ptr,  # [batch, max_blocks] int32
    out_ptr,  # [batch, next_n, length] fp32
    next_n,
    length,
    num_tiles,
    num_blocks,
    max_blocks,
    block_stride,  # in STRIDE_UNIT bytes: so its divisor is known
    lens_stride,
    table_stride,
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
    """A program scores TOKENS tokens of a request for all its queries."""
    request = (tl.program_id(0) // num_tiles).to(tl.int64)
    first = tl.program_id(0) % num_tiles * TOKENS
    token = first + tl.arange(0, TOKENS)
    in_row = token < length
    out_ptr += token
    lens_ptr = context_lens_ptr + request * lens_stride
    longest = tl.load(lens_ptr)  # the last query sees the whole context, each before it one token fewer
    if LENS_BY_QUERY:
        query = 1
        while query < next_n:
            longest = tl.maximum(longest, tl.load(lens_ptr + query))
            query += 1
    if first < longest:
        table_ptr = block_table_ptr + request * table_stride
        is_asked = in_row & (token < longest)
        block, offset, is_found = find_block(table_ptr, token, is_asked, max_blocks, num_blocks, BLOCK_SIZE)
        block_ptr = cache_ptr + block * block_stride * STRIDE_UNIT
        codes = tl.load(block_ptr[:, None] + value_positions(offset, PRESHUFFLE), mask=is_found[:, None], other=0)
        scale = tl.load(scale_pointers(block_ptr, offset, BLOCK_SIZE), mask=is_found, other=0.0)
        k = dot_operand(codes, FNUZ, FP8_DOT)
        head = tl.arange(0, BLOCK_HEADS)
        is_head = head < NUM_HEADS
        at = head[:, None] * HEAD_DIM + tl.arange(0, HEAD_DIM)[None, :]
        query = 0
        while query < next_n:
            row = request * next_n + query
            q = tl.load(q_ptr + row * (NUM_HEADS * HEAD_DIM) + at, mask=is_head[:, None], other=0)
            weight = tl.load(weights_ptr + row * NUM_HEADS + head, mask=is_head, other=0.0)
            scores = tl.dot(k, tl.trans(dot_operand(q, FNUZ, FP8_DOT)))
            scores = tl.where(scores < 0.0, 0.0, scores)  # NaN compares false and stays
            logits = tl.sum(scores * weight[None, :], axis=1) * scale
            visible = longest - (next_n - 1) + query
            if LENS_BY_QUERY:
                visible = tl.load(lens_ptr + query)
            logits = tl.where(is_found & (token < visible), logits, float("-inf"))
            tl.store(out_ptr + row * length, logits, mask=in_row)
            query += 1
    else:
        query = 0
        while query < next_n:
            at = out_ptr + (request * next_n + query) * length
            tl.store(at, tl.full([TOKENS], float("-inf"), tl.float32), mask=in_row)
            query += 1
