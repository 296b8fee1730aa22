"""Keys of the sparse MLA caches, for use inside Triton kernels: from the bytes of a token to operands of tl.dot.

A token's bytes are held as int32 words until they are used: a loop that carries bytes (or bf16) to its next turn keeps
each of them in a register of its own.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fusedcomm.kernels.attention.fp8_rows import decode_fp8
from fusedcomm.kernels.convert import INTERPRETED, narrow, widen

VALUES: tl.constexpr = tl.constexpr(512)
"""What attention returns for a head, in both layouts."""
PIECE: tl.constexpr = tl.constexpr(64)
"""Elements that are gathered together: 64 bytes of codes, 16 for each of four threads."""
PIECE_WORDS: tl.constexpr = tl.constexpr(16)
NUM_CODE_PIECES_584: tl.constexpr = tl.constexpr(7)
NUM_CODE_PIECES_656: tl.constexpr = tl.constexpr(8)
ROPE_AT_584: tl.constexpr = tl.constexpr(448)  # bytes from the codes
ROPE_AT_656: tl.constexpr = tl.constexpr(512 + 16)
DATA_BYTES_584: tl.constexpr = tl.constexpr(576)  # codes and RoPE values; the scales lie behind all tokens of a block


@triton.jit
def nothing():
    """A tuple to add to; the type checker takes a literal one for a tuple that stays empty."""
    return ()


# ---- where things are ----


@triton.jit
def token_at(block, offset, block_stride, block_size, TOKEN_BYTES: tl.constexpr):
    """Where the codes and where the scales of tokens ``[T]`` begin, in bytes; ``block_stride``: in 16 bytes."""
    block_at = block.to(tl.int64) * block_stride * 16
    if TOKEN_BYTES == 584:
        return block_at + offset * DATA_BYTES_584, block_at + (offset * 8 + block_size * DATA_BYTES_584)
    else:
        return block_at + offset * TOKEN_BYTES, block_at + (offset * TOKEN_BYTES + VALUES)


@triton.jit
def gather(data_ptr, is_token, FIRST: tl.constexpr, LAST: tl.constexpr, TOKEN_BYTES: tl.constexpr):
    """The pieces FIRST to LAST of tokens, ``[T, 16]`` words each, that of RoPE in two halves; 0 for no token."""
    ROPE_WORD: tl.constexpr = ROPE_AT_584 // 4 if TOKEN_BYTES == 584 else ROPE_AT_656 // 4
    at = data_ptr[:, None] + tl.arange(0, PIECE_WORDS)[None, :]
    words = nothing()
    for i in tl.static_range(FIRST, LAST):
        if i < (NUM_CODE_PIECES_584 if TOKEN_BYTES == 584 else NUM_CODE_PIECES_656):
            words += (tl.load(at + i * PIECE_WORDS, mask=is_token[:, None], other=0),)
        else:
            words += (tl.load(at + ROPE_WORD, mask=is_token[:, None], other=0),)
            words += (tl.load(at + ROPE_WORD + PIECE_WORDS, mask=is_token[:, None], other=0),)
    return words


@triton.jit
def gather_scales(scale_ptr, is_token, TOKEN_BYTES: tl.constexpr):
    """The scales of tokens, eight bytes ``[T]`` at a time; 0 where there is no token."""
    scales = nothing()
    scales += (tl.load(scale_ptr, mask=is_token, other=0),)
    if TOKEN_BYTES == 656:
        scales += (tl.load(scale_ptr + 1, mask=is_token, other=0),)
    return scales


@triton.jit
def rope_column(element):
    """The RoPE value at an element of the piece that rope_values makes.

    A thread has gathered 8 values of the first half and 8 of the second. They lie side by side in the piece, so that it
    lies among threads as the pieces of codes do.
    """
    return element // 8 % 2 * 32 + element // 16 * 8 + element % 8


@triton.jit
def column(element, TOKEN_BYTES: tl.constexpr):
    """The column of q and of the result at an element of the 512 values that attention returns."""
    if TOKEN_BYTES == 584:
        return tl.where(element < 448, element, rope_column(element - 448) + 448)
    else:
        return element


# ---- what they stand for ----


@triton.jit
def scale_of(scales, PIECE_IDX: tl.constexpr, TOKEN_BYTES: tl.constexpr):
    """The fp32 scales ``[T]`` of a piece of codes."""
    if TOKEN_BYTES == 584:
        exponent = ((scales[0] >> (8 * PIECE_IDX)) & 0xFF).to(tl.int32)
        bits = tl.where(exponent == 0, 1 << 22, exponent << 23)
        bits = tl.where(exponent == 255, 0x7FC00000, bits)
    else:  # a scale is that of two pieces
        bits = (scales[PIECE_IDX // 4] >> (PIECE_IDX // 2 % 2 * 32)).to(tl.int32)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def hide(x):
    """x itself. For the operand of a tensor core's product that has a tl.join behind it, Triton takes a layout into
    which memory cannot be transposed on its way to registers. It does not look past a reduction.
    """
    return tl.max(tl.reshape(x, [x.shape[0], x.shape[1], 1]), axis=2)


@triton.jit
def operand(x):
    """fp32 as tl.dot takes it: bf16; for the interpreter, which has no products of bf16, fp32 that is rounded to it."""
    if INTERPRETED:
        return widen(narrow(x, tl.bfloat16))
    else:
        return x.to(tl.bfloat16)


@triton.jit
def code_values(words, scale, FNUZ: tl.constexpr, HARDWARE_FP8: tl.constexpr):
    """A dequantised piece ``[T, 64]`` of codes; HARDWARE_FP8: the device converts from this format by itself."""
    pairs = tl.join(tl.join(words, words >> 16), tl.join(words >> 8, words >> 24))
    codes = tl.reshape(pairs.to(tl.uint8), [words.shape[0], PIECE])
    if HARDWARE_FP8 and FNUZ:
        values = codes.to(tl.float8e4b8, bitcast=True).to(tl.float32)
    elif HARDWARE_FP8:
        values = codes.to(tl.float8e4nv, bitcast=True).to(tl.float32)
    else:
        values = decode_fp8(codes, FNUZ)
    return operand(hide(values * scale[:, None]))


@triton.jit
def rope_values(first, second):
    """The piece ``[T, 64]`` of RoPE values, in the order of rope_column, from its two halves."""
    T: tl.constexpr = first.shape[0]
    first = tl.reshape(tl.join(first, first >> 16), [T, 4, 8])
    second = tl.reshape(tl.join(second, second >> 16), [T, 4, 8])
    bits = tl.reshape(tl.permute(tl.join(first, second), (0, 1, 3, 2)), [T, PIECE])
    values = hide(bits.to(tl.int16)).to(tl.int16).to(tl.bfloat16, bitcast=True)
    if INTERPRETED:
        return widen(values)
    else:
        return values


@triton.jit
def piece_of(
    words, scales, PIECE_IDX: tl.constexpr, TOKEN_BYTES: tl.constexpr, FNUZ: tl.constexpr, HARDWARE_FP8: tl.constexpr
):
    """A piece ``[T, 64]`` of the tokens that words and scales are of; that of RoPE is the last one."""
    NUM_CODE_PIECES: tl.constexpr = NUM_CODE_PIECES_584 if TOKEN_BYTES == 584 else NUM_CODE_PIECES_656
    if PIECE_IDX < NUM_CODE_PIECES:
        return code_values(words[PIECE_IDX], scale_of(scales, PIECE_IDX, TOKEN_BYTES), FNUZ, HARDWARE_FP8)
    else:
        return rope_values(words[PIECE_IDX], words[PIECE_IDX + 1])


# ---- operands ----


@triton.jit
def beside(a, b):
    """``[T, n]`` twice as ``[T, 2 n]``."""
    return tl.reshape(tl.permute(tl.join(a, b), (0, 2, 1)), [a.shape[0], 2 * a.shape[1]])


@triton.jit
def register_order(element):
    """The element of a piece that is the k-th of the contraction where scores are made out of registers.

    Four threads have gathered a piece of a token, 16 elements each. The matrix instruction (m16n8k16) wants two
    neighbours of each of the four, twice, for 16 elements of the contraction. Their order does not matter to the sum
    if it is that of both operands: keys stay in the registers where they are, and queries are loaded in this order.
    """
    return element % 2 + element // 2 % 4 * 16 + element // 8 * 2


@triton.jit
def transposed(piece, IN_REGISTERS: tl.constexpr):
    """A piece ``[T, 64]`` as the right operand of the scores, ``[64, T]``; IN_REGISTERS: in register_order."""
    if IN_REGISTERS:
        parts = tl.permute(tl.reshape(piece, [piece.shape[0], 4, 8, 2]), (2, 1, 3, 0))
        return tl.reshape(parts, [PIECE, piece.shape[0]])
    else:
        return tl.trans(piece)
