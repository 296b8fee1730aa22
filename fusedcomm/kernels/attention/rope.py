"""Rotary embedding (Su et al., 2021) of heads, alone and after RMSNorm, for use inside Triton kernels.

The arithmetic is that of fusedcomm.ops.attention.qk_reference, to the bit where it is compiled without fp fusion.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fusedcomm.kernels.attention.heads import (
    apply_norm,
    inverse_rms,
    load_for_each,
    load_heads,
    store,
    sum_of_squares,
)
from fusedcomm.kernels.convert import narrow, widen


@triton.jit
def load_angles(angles, pair, HALF: tl.constexpr, BLOCK_HEADS: tl.constexpr):
    """Cosines and sines of these pairs for each head. A position that the table has not is not read: cosines are NaN.

    angles: (table ``[num_positions, 2 * HALF]``, its stride, num_positions, the position).
    """
    EVEN: tl.constexpr = pair.shape[0] == HALF
    table_ptr, stride, num_positions, position = angles
    is_known = (position >= 0) & (position < num_positions)
    row_ptr = table_ptr + tl.where(is_known, position, 0) * stride
    cos = load_for_each(row_ptr, pair, HALF, BLOCK_HEADS, EVEN)
    sin = load_for_each(row_ptr + HALF, pair, HALF, BLOCK_HEADS, EVEN)
    return tl.where(is_known, cos, float("nan")), sin


@triton.jit
def rotate(a, b, cos, sin):
    """The pairs (a, b) turned in fp32, rounded to their type."""
    wide_a, wide_b = widen(a), widen(b)
    return narrow(wide_a * cos - wide_b * sin, a.dtype), narrow(wide_b * cos + wide_a * sin, b.dtype)


@triton.jit
def load_angles_of_whole(
    angles, BLOCK: tl.constexpr, HALF: tl.constexpr, BLOCK_HEADS: tl.constexpr, NEOX: tl.constexpr
):
    """What rotate_whole takes: cosines and sines for each element (NEOX) or for each pair of neighbours."""
    if NEOX:
        return load_angles(angles, tl.arange(0, BLOCK) % HALF, HALF, BLOCK_HEADS)
    else:
        return load_angles(angles, tl.arange(0, BLOCK // 2), HALF, BLOCK_HEADS)


@triton.jit
def rotate_whole(x, cos, sin, HALF: tl.constexpr, NEOX: tl.constexpr):
    """The first HALF pairs in a tile turned: elements i and i + HALF (NEOX), or 2i and 2i + 1."""
    if NEOX:
        element, wide = tl.arange(0, x.shape[1]), widen(x)
        is_first, is_rotated = element < HALF, element < 2 * HALF
        partner = tl.where(is_first, element + HALF, tl.where(is_rotated, element - HALF, element))
        crossed = tl.gather(wide, tl.broadcast_to(partner[None, :], x.shape), axis=1) * sin
        scaled = wide * cos
        # No sum with what is negated: Triton 3.6 takes that from +0, which leaves +0 as it is.
        turned = tl.where(is_first[None, :], scaled - crossed, scaled + crossed)
        return tl.where(is_rotated[None, :], narrow(turned, x.dtype), x)
    else:
        PAIRS: tl.constexpr = x.shape[1] // 2
        a, b = tl.split(tl.reshape(x, [x.shape[0], PAIRS, 2]))
        turned_a, turned_b = rotate(a, b, cos, sin)
        if HALF < PAIRS:
            is_rotated = (tl.arange(0, PAIRS) < HALF)[None, :]
            turned_a, turned_b = tl.where(is_rotated, turned_a, a), tl.where(is_rotated, turned_b, b)
        return tl.reshape(tl.join(turned_a, turned_b), x.shape)


@triton.jit
def rotate_heads(
    x,  # (pointer, stride of heads)
    angles,  # as load_angles has them
    out,  # like x, or None
    cache,  # as find_in_cache returns it, or None
    head,
    NUM_HEADS: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    ROTARY_DIM: tl.constexpr,
    NEOX: tl.constexpr,
    FNUZ: tl.constexpr,
    HARDWARE_FP8: tl.constexpr,
):
    """Loads heads of ROTARY_DIM elements, rotates and stores them."""
    HALF: tl.constexpr = ROTARY_DIM // 2
    BLOCK: tl.constexpr = triton.next_power_of_2(ROTARY_DIM)
    EVEN: tl.constexpr = NUM_HEADS % BLOCK_HEADS == 0 and BLOCK == ROTARY_DIM
    if NEOX and BLOCK == ROTARY_DIM:
        first, second = tl.arange(0, HALF), HALF + tl.arange(0, HALF)
        a = load_heads(x, head, first, NUM_HEADS, ROTARY_DIM, EVEN)
        b = load_heads(x, head, second, NUM_HEADS, ROTARY_DIM, EVEN)
        cos, sin = load_angles(angles, first, HALF, BLOCK_HEADS)
        a, b = rotate(a, b, cos, sin)
        store(out, cache, head, first, a, NUM_HEADS, ROTARY_DIM, EVEN, 0, FNUZ, HARDWARE_FP8)
        store(out, cache, head, second, b, NUM_HEADS, ROTARY_DIM, EVEN, 0, FNUZ, HARDWARE_FP8)
    else:
        element = tl.arange(0, BLOCK)
        y = load_heads(x, head, element, NUM_HEADS, ROTARY_DIM, EVEN)
        cos, sin = load_angles_of_whole(angles, BLOCK, HALF, BLOCK_HEADS, NEOX)
        y = rotate_whole(y, cos, sin, HALF, NEOX)
        store(out, cache, head, element, y, NUM_HEADS, ROTARY_DIM, EVEN, 0, FNUZ, HARDWARE_FP8)


# ---- after RMSNorm ----


@triton.jit
def norm_and_rotate(
    x,  # the heads of a token: (pointer, stride of heads)
    weight_ptr,
    angles,  # as load_angles has them
    out,  # like x
    cache,  # as find_in_cache returns it, or None
    piece,  # of the token's heads: ROUNDS times BLOCK_HEADS
    eps,
    weight_bias,
    NUM_HEADS: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    ROUNDS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    ROTARY_DIM: tl.constexpr,
    NEOX: tl.constexpr,
    PACK: tl.constexpr,
    FNUZ: tl.constexpr,
    HARDWARE_FP8: tl.constexpr,
):
    """Norms, rotates and stores heads, with pairs half a ROTARY_DIM apart (NEOX) or of neighbours.

    Weights and angles are loaded once for all rounds, and the heads of a round while the one before is worked on.
    """
    HALF: tl.constexpr = ROTARY_DIM // 2
    head = piece * (ROUNDS * BLOCK_HEADS) + tl.arange(0, BLOCK_HEADS)
    if NEOX and triton.next_power_of_2(HALF) == HALF and 8 * HALF >= HEAD_DIM:
        _norm_and_rotate_halves(
            x,
            weight_ptr,
            angles,
            out,
            cache,
            head,
            eps,
            weight_bias,
            NUM_HEADS,
            BLOCK_HEADS,
            ROUNDS,
            HEAD_DIM,
            HALF,
            PACK,
            FNUZ,
            HARDWARE_FP8,
        )
    else:
        _norm_and_rotate_whole(
            x,
            weight_ptr,
            angles,
            out,
            cache,
            head,
            eps,
            weight_bias,
            NUM_HEADS,
            BLOCK_HEADS,
            ROUNDS,
            HEAD_DIM,
            HALF,
            NEOX,
            PACK,
            FNUZ,
            HARDWARE_FP8,
        )


@triton.jit
def _norm_and_rotate_halves(
    x,
    weight_ptr,
    angles,
    out,
    cache,
    head,
    eps,
    weight_bias,
    NUM_HEADS: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    ROUNDS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HALF: tl.constexpr,
    PACK: tl.constexpr,
    FNUZ: tl.constexpr,
    HARDWARE_FP8: tl.constexpr,
):
    """For HALF a power of two, an eighth of a head or more: tiles of HALF elements, so a pair lies in one thread."""
    EVEN_HEADS: tl.constexpr = NUM_HEADS % (ROUNDS * BLOCK_HEADS) == 0
    PARTS: tl.constexpr = (HEAD_DIM + HALF - 1) // HALF
    element = tl.arange(0, HALF)
    following = _load_parts(x, head, NUM_HEADS, HEAD_DIM, HALF, EVEN_HEADS)
    weights = ()
    for i in tl.static_range(PARTS):
        weight = load_for_each(weight_ptr, i * HALF + element, HEAD_DIM, BLOCK_HEADS, (i + 1) * HALF <= HEAD_DIM)
        weights += (weight + weight_bias,)  # type: ignore[assignment]
    cos, sin = load_angles(angles, element, HALF, BLOCK_HEADS)
    for r in tl.static_range(ROUNDS):
        parts = following
        if r + 1 < ROUNDS:
            following = _load_parts(x, head + BLOCK_HEADS, NUM_HEADS, HEAD_DIM, HALF, EVEN_HEADS)
        inverse = inverse_rms(_sum_of_squares_of(parts), eps, HEAD_DIM)
        first, second = weights[:2]  # type: ignore[misc]
        rotated = rotate(apply_norm(parts[0], inverse, first), apply_norm(parts[1], inverse, second), cos, sin)
        for i in tl.static_range(PARTS):
            y = rotated[i] if i < 2 else apply_norm(parts[i], inverse, weights[i])
            store(
                out,
                cache,
                head,
                i * HALF + element,
                y,
                NUM_HEADS,
                HEAD_DIM,
                EVEN_HEADS and (i + 1) * HALF <= HEAD_DIM,
                PACK,
                FNUZ,
                HARDWARE_FP8,
            )
        head += BLOCK_HEADS


@triton.jit
def _load_parts(
    x, head, NUM_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr, EVEN_HEADS: tl.constexpr
):
    """Heads as tiles of WIDTH elements, with zeros after the last one."""
    parts = ()
    for i in tl.static_range((HEAD_DIM + WIDTH - 1) // WIDTH):
        element = i * WIDTH + tl.arange(0, WIDTH)
        part = load_heads(x, head, element, NUM_HEADS, HEAD_DIM, EVEN_HEADS and (i + 1) * WIDTH <= HEAD_DIM)
        parts += (part,)  # type: ignore[assignment]
    return parts


@triton.jit
def _sum_of_squares_of(parts):
    """sum_of_squares of what lies in parts, whose sums are the leaves of what remains of the tree."""
    NUM: tl.constexpr = len(parts)
    if NUM == 1:
        return sum_of_squares(parts[0])
    else:
        LEFT: tl.constexpr = triton.next_power_of_2(NUM) // 2
        return _sum_of_squares_of(parts[:LEFT]) + _sum_of_squares_of(parts[LEFT:])


@triton.jit
def _norm_and_rotate_whole(
    x,
    weight_ptr,
    angles,
    out,
    cache,
    head,
    eps,
    weight_bias,
    NUM_HEADS: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    ROUNDS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HALF: tl.constexpr,
    NEOX: tl.constexpr,
    PACK: tl.constexpr,
    FNUZ: tl.constexpr,
    HARDWARE_FP8: tl.constexpr,
):
    """For any size: a head is one tile. The partners of distant pairs come through shared memory."""
    BLOCK: tl.constexpr = triton.next_power_of_2(HEAD_DIM)
    EVEN: tl.constexpr = NUM_HEADS % (ROUNDS * BLOCK_HEADS) == 0 and BLOCK == HEAD_DIM
    element = tl.arange(0, BLOCK)
    following = load_heads(x, head, element, NUM_HEADS, HEAD_DIM, EVEN)
    weight = load_for_each(weight_ptr, element, HEAD_DIM, BLOCK_HEADS, BLOCK == HEAD_DIM) + weight_bias
    cos, sin = load_angles_of_whole(angles, BLOCK, HALF, BLOCK_HEADS, NEOX)
    for i in tl.static_range(ROUNDS):
        y = following
        if i + 1 < ROUNDS:
            following = load_heads(x, head + BLOCK_HEADS, element, NUM_HEADS, HEAD_DIM, EVEN)
        y = apply_norm(y, inverse_rms(sum_of_squares(y), eps, HEAD_DIM), weight)
        y = rotate_whole(y, cos, sin, HALF, NEOX)
        store(out, cache, head, element, y, NUM_HEADS, HEAD_DIM, EVEN, PACK, FNUZ, HARDWARE_FP8)
        head += BLOCK_HEADS
