"""Tiles ``[heads, elements]`` of the heads of one token, for use inside Triton kernels: loads, stores and RMSNorm.

Everything a program holds of one tile's shape lies on its threads in the same way, 16 bytes one behind the other, so
what is added or multiplied meets in one thread. Only the sum over a head goes across threads, and nothing goes through
shared memory.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fusedcomm.kernels.convert import encode_fp8, narrow, widen
from fusedcomm.kernels.norm import sqrt

# ---- memory ----
#
# ``heads`` is (pointer to the first head, stride of heads). EVEN: the tile has no head and no element too many.


@triton.jit
def load_heads(heads, head, element, num_heads, end, EVEN: tl.constexpr):
    """These elements of these heads; 0 from num_heads and from ``end`` on."""
    ptr, stride = heads
    at = ptr + head[:, None].to(tl.int64) * stride + element[None, :]
    if EVEN:
        return tl.load(at)
    else:
        return tl.load(at, mask=(head < num_heads)[:, None] & (element < end)[None, :], other=0.0)


@triton.jit
def load_for_each(ptr, element, end, BLOCK_HEADS: tl.constexpr, EVEN: tl.constexpr):
    """fp32 values of these elements, the same for each head; 0 from ``end`` on.

    Every thread loads what it needs. A single row would be spread over all threads, and sent to where it is needed
    through shared memory.
    """
    at = ptr + tl.broadcast_to(element[None, :], [BLOCK_HEADS, element.shape[0]])
    if EVEN:
        return widen(tl.load(at))
    else:
        return widen(tl.load(at, mask=(element < end)[None, :], other=0.0))


@triton.jit
def store_heads(heads, head, element, values, num_heads, end, EVEN: tl.constexpr):
    """Stores a tile where load_heads would load it."""
    ptr, stride = heads
    at = ptr + head[:, None].to(tl.int64) * stride + element[None, :]
    if EVEN:
        tl.store(at, values)
    else:
        tl.store(at, values, mask=(head < num_heads)[:, None] & (element < end)[None, :])


@triton.jit
def copy_heads(
    x,
    out,
    cache,
    piece,
    NUM_HEADS: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PACK: tl.constexpr,
    FNUZ: tl.constexpr,
    HARDWARE_FP8: tl.constexpr,
):
    """Loads BLOCK_HEADS heads and stores them as they are."""
    BLOCK: tl.constexpr = triton.next_power_of_2(HEAD_DIM)
    EVEN: tl.constexpr = NUM_HEADS % BLOCK_HEADS == 0 and BLOCK == HEAD_DIM
    head, element = piece * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS), tl.arange(0, BLOCK)
    values = load_heads(x, head, element, NUM_HEADS, HEAD_DIM, EVEN)
    store(out, cache, head, element, values, NUM_HEADS, HEAD_DIM, EVEN, PACK, FNUZ, HARDWARE_FP8)


@triton.jit
def store(
    out,
    cache,
    head,
    element,
    values,
    num_heads,
    end,
    EVEN: tl.constexpr,
    PACK: tl.constexpr,
    FNUZ: tl.constexpr,
    HARDWARE_FP8: tl.constexpr,
):
    """Stores a tile in the result and in the cache (as find_in_cache returns it), each where it is not None."""
    if out is not None:
        store_heads(out, head, element, values, num_heads, end, EVEN)
    if cache is not None:
        ptr, num_cached, head_stride, pack_stride, scale = cache
        inside = element
        if PACK > 0:
            inside = element // PACK * pack_stride + element % PACK
        at = ptr + head[:, None].to(tl.int64) * head_stride + inside[None, :]
        if ptr.dtype.element_ty == tl.uint8:
            values = as_fp8(values, scale, FNUZ, HARDWARE_FP8)
        tl.store(at, values, mask=(head < num_cached)[:, None] & (element < end)[None, :])


# ---- a token in a paged cache ----


@triton.jit
def find_in_cache(
    cache_ptr,
    slot_ptr,  # of the token
    num_slots,
    scale_ptr,  # one fp32; None: 1
    block_stride,
    head_stride,
    pack_stride,
    token_stride,
    NUM_HEADS: tl.constexpr,
    BLOCK: tl.constexpr,
    TOKENS: tl.constexpr,
):
    """The place of a token in a cache of blocks of BLOCK tokens, as ``store`` takes it.

    Element d of head h of the token at offset o of its block lies ``o // TOKENS * token_stride + o % TOKENS + h *
    head_stride + d // PACK * pack_stride + d % PACK`` after the first of the block. PACK is an argument of ``store``,
    where 0 stands for all elements. A token whose slot the cache has not is stored nowhere.
    """
    slot = tl.load(slot_ptr)
    is_there = (slot >= 0) & (slot < num_slots)
    slot = tl.where(is_there, slot, 0)
    offset = slot % BLOCK
    ptr = cache_ptr + slot // BLOCK * block_stride + offset // TOKENS * token_stride + offset % TOKENS
    scale = 1.0
    if scale_ptr is not None:
        scale = tl.load(scale_ptr)
    return ptr, tl.where(is_there, NUM_HEADS, 0), head_stride, pack_stride, scale


@triton.jit
def as_fp8(values, scale, FNUZ: tl.constexpr, HARDWARE_FP8: tl.constexpr):
    """The FP8 codes (uint8) of ``clamp(values / scale)``."""
    FP8_MAX: tl.constexpr = 240.0 if FNUZ else 448.0
    y = tl.div_rn(widen(values), tl.full(values.shape, scale, tl.float32))
    y = tl.where(y > FP8_MAX, FP8_MAX, y)  # NaN compares false and stays
    y = tl.where(y < -FP8_MAX, -FP8_MAX, y)
    return encode_fp8(y, FNUZ, HARDWARE_FP8)


# ---- norm: the bits of fusedcomm.ops.reference where it is compiled without fp fusion ----


@triton.jit
def sum_of_squares(x):
    """Of each row, in fp32, by the tree of fusedcomm.kernels.norm.tree_sum: ``[heads, 1]``."""
    x = widen(x)
    x = tl.fma(x, x, 0.0)
    for _ in tl.static_range(10):  # log2 of the largest head
        if x.shape[1] > 1:
            x = tl.sum(tl.reshape(x, [x.shape[0], x.shape[1] // 2, 2]), axis=2)
    return x


@triton.jit
def inverse_rms(total, eps, HEAD_DIM: tl.constexpr):
    """1 / sqrt(mean of squares + eps), from the sum of squares."""
    if triton.next_power_of_2(HEAD_DIM) == HEAD_DIM:
        mean = total * (1.0 / HEAD_DIM)  # the bits of the quotient
    else:
        mean = tl.div_rn(total, float(HEAD_DIM))
    return tl.div_rn(1.0, sqrt(mean + eps))


@triton.jit
def apply_norm(x, inverse, weight):
    """The normed values, rounded to the type of x."""
    return narrow(widen(x) * inverse * weight, x.dtype)
