"""The Triton kernels of the QK and MLA ops behind the signatures of fusedcomm.ops.attention.qk_reference.

They are torch operators (``torch.ops.fusedcomm_triton``): see fusedcomm.kernels.registration.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from fusedcomm.kernels.attention.kv_materialize import kv_materialize_kernel
from fusedcomm.kernels.attention.mla import mla_prepare_kernel
from fusedcomm.kernels.attention.qk import qk_norm_rope_kernel, qk_rmsnorm_kernel
from fusedcomm.kernels.fp8 import converts_to
from fusedcomm.kernels.launching import launch
from fusedcomm.kernels.registration import register

_TILE = 1024  # elements of the heads that a program holds at a time: 8 heads of 128
_ROUNDS = 2  # times that a program takes as many heads, with the weights and angles that it has
_MLA_HEADS = 8  # heads that a program copies: 8 loads of 16 bytes a thread in flight
_MLA_THREADS = 64
_ELEMENTS_A_THREAD = 8  # a load of 16 bytes in bf16


def _qk_rmsnorm(
    q: torch.Tensor,
    k: torch.Tensor,
    q_weight: torch.Tensor,
    k_weight: torch.Tensor,
    eps: float,
    weight_bias: float,
    q_out: torch.Tensor,
    k_out: torch.Tensor,
) -> None:
    num_tokens, heads_q, head_dim = q.shape
    heads_k = k.shape[1]
    block = _block_heads(max(heads_q, heads_k), head_dim)
    q_pieces, k_pieces = _divide_up(heads_q, block), _divide_up(heads_k, block)
    launch(
        qk_rmsnorm_kernel,
        (num_tokens * (q_pieces + k_pieces),),
        q.device,
        q,
        k,
        q_weight,
        k_weight,
        q_out,
        k_out,
        *_outer(q),
        *_outer(k),
        *_outer(q_out),
        *_outer(k_out),
        eps,
        weight_bias,
        NUM_HEADS_Q=heads_q,
        NUM_HEADS_K=heads_k,
        HEAD_DIM=head_dim,
        BLOCK_HEADS=block,
        Q_PIECES=q_pieces,
        PIECES=q_pieces + k_pieces,
        num_warps=_num_warps(block * _power_of_two(head_dim)),
        enable_fp_fusion=False,
    )


def _qk_norm_rope(
    qkv: torch.Tensor,
    q_weight: torch.Tensor,
    k_weight: torch.Tensor,
    cos_sin: torch.Tensor,
    positions: torch.Tensor,
    eps: float,
    weight_bias: float,
    neox: bool,
    q_out: torch.Tensor,
    k_out: torch.Tensor,
    v_out: torch.Tensor | None,
    k_cache: torch.Tensor | None,
    v_cache: torch.Tensor | None,
    slot_mapping: torch.Tensor | None,
    k_scale: torch.Tensor | None,
    v_scale: torch.Tensor | None,
) -> None:
    num_tokens, heads_q, head_dim = q_out.shape
    heads_k = k_out.shape[1]
    block = _block_heads(max(heads_q, heads_k), head_dim)
    q, k = _pieces(heads_q, block), _pieces(heads_k, block)
    v_pieces = 0 if v_out is None and v_cache is None else _divide_up(heads_k, block)
    paged = _NO_CACHE if k_cache is None or v_cache is None else _paged(k_cache, v_cache)
    launch(
        qk_norm_rope_kernel,
        (num_tokens * (q.pieces + k.pieces + v_pieces),),
        qkv.device,
        qkv,
        q_weight,
        k_weight,
        cos_sin,
        positions,
        q_out,
        k_out,
        v_out,
        _as_bytes(k_cache),
        _as_bytes(v_cache),
        slot_mapping,
        k_scale,
        v_scale,
        cos_sin.shape[0],
        paged.num_slots,
        qkv.stride(0),
        cos_sin.stride(0),
        *_outer(q_out),
        *_outer(k_out),
        *((0, 0) if v_out is None else _outer(v_out)),
        *paged.k_strides,
        *paged.v_strides,
        eps,
        weight_bias,
        NUM_HEADS_Q=heads_q,
        NUM_HEADS_K=heads_k,
        HEAD_DIM=head_dim,
        BLOCK_HEADS=block,
        Q_ROUNDS=q.rounds,
        K_ROUNDS=k.rounds,
        Q_PIECES=q.pieces,
        K_PIECES=k.pieces,
        PIECES=q.pieces + k.pieces + v_pieces,
        ROTARY_DIM=cos_sin.shape[1],
        NEOX=neox,
        CACHE_BLOCK=paged.block_size,
        K_PACK=paged.k_pack,
        V_PACK=paged.v_pack,
        V_TOKENS=paged.v_tokens,
        **_fp8_options(k_cache),
        num_warps=_num_warps(block * _tile_width(head_dim, cos_sin.shape[1], neox)),
        enable_fp_fusion=False,
    )


def _kv_materialize(
    kv: torch.Tensor,
    k_weight: torch.Tensor,
    cos_sin: torch.Tensor,
    positions: torch.Tensor,
    eps: float,
    weight_bias: float,
    neox: bool,
    k_out: torch.Tensor,
    v_out: torch.Tensor,
) -> None:
    num_tokens, num_layers, _, num_heads, head_dim = kv.shape
    block = _block_heads(num_heads, head_dim)
    k, v_pieces = _pieces(num_heads, block), _divide_up(num_heads, block)
    launch(
        kv_materialize_kernel,
        (num_tokens * num_layers * (k.pieces + v_pieces),),
        kv.device,
        kv,
        k_weight,
        cos_sin,
        positions,
        k_out,
        v_out,
        cos_sin.shape[0],
        *_outer(kv),
        cos_sin.stride(0),
        *_outer(k_out),
        *_outer(v_out),
        eps,
        weight_bias,
        NUM_LAYERS=num_layers,
        NUM_HEADS=num_heads,
        HEAD_DIM=head_dim,
        BLOCK_HEADS=block,
        ROUNDS=k.rounds,
        K_PIECES=k.pieces,
        PIECES=k.pieces + v_pieces,
        ROTARY_DIM=cos_sin.shape[1],
        NEOX=neox,
        num_warps=_num_warps(block * _tile_width(head_dim, cos_sin.shape[1], neox)),
        enable_fp_fusion=False,
    )


def _mla_prepare(
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
    q_out: torch.Tensor,
) -> None:
    num_tokens, num_heads, nope_dim = q_nope.shape
    block = min(_power_of_two(num_heads), _MLA_HEADS)
    launch(
        mla_prepare_kernel,
        (num_tokens * (_divide_up(num_heads, block) + 1),),
        q_nope.device,
        q_nope,
        q_pe,
        k_nope,
        k_pe,
        cos_sin,
        positions,
        q_out,
        _as_bytes(kv_cache),
        slot_mapping,
        k_scale,
        cos_sin.shape[0],
        kv_cache.shape[0] * kv_cache.shape[1],
        *_outer(q_nope),
        *_outer(q_pe),
        k_nope.stride(0),
        k_pe.stride(0),
        cos_sin.stride(0),
        *_outer(kv_cache),
        NUM_HEADS=num_heads,
        NOPE_DIM=nope_dim,
        ROTARY_DIM=cos_sin.shape[1],
        BLOCK_HEADS=block,
        NEOX=neox,
        CACHE_BLOCK=kv_cache.shape[1],
        **_fp8_options(kv_cache),
        num_warps=_MLA_THREADS // _lanes(),
        enable_fp_fusion=False,
    )


# ---- caches ----


class _Paged(NamedTuple):
    """A cache of keys and values as qk_norm_rope_kernel takes it; the strides are those of find_in_cache."""

    num_slots: int
    block_size: int
    k_pack: int
    v_pack: int
    v_tokens: int
    k_strides: tuple[int, ...]
    v_strides: tuple[int, ...]


_NO_CACHE = _Paged(0, 1, 0, 0, 1, (0,) * 4, (0,) * 4)


def _paged(k_cache: torch.Tensor, v_cache: torch.Tensor) -> _Paged:
    k, v = k_cache.stride(), v_cache.stride()
    if k_cache.dim() == 4:  # [blocks, block, heads, D]
        blocks, block, _, _ = k_cache.shape
        return _Paged(blocks * block, block, 0, 0, 1, (k[0], k[2], 0, k[1]), (v[0], v[2], 0, v[1]))
    blocks, _, _, block, pack = k_cache.shape  # [blocks, heads, D / x, block, x] and [blocks, heads, block / x, D, x]
    return _Paged(blocks * block, block, pack, 1, pack, (k[0], k[1], k[2], k[3]), (v[0], v[1], v[3], v[2]))


def _as_bytes(cache: torch.Tensor | None) -> torch.Tensor | None:
    return cache.view(torch.uint8) if cache is not None and cache.element_size() == 1 else cache


def _fp8_options(cache: torch.Tensor | None) -> dict[str, bool]:
    if cache is None or cache.element_size() != 1:
        return {"FNUZ": False, "HARDWARE_FP8": False}
    return {"FNUZ": cache.dtype is torch.float8_e4m3fnuz, "HARDWARE_FP8": converts_to(cache.dtype, cache.device)}


# ---- the shape of a launch ----


class _Pieces(NamedTuple):
    """Programs that share the heads of a token, and how many blocks of heads each takes."""

    pieces: int
    rounds: int


def _block_heads(num_heads: int, head_dim: int) -> int:
    """How many heads a program holds: a power of two, as many as make a tile."""
    return max(min(_power_of_two(num_heads), _TILE // _power_of_two(head_dim)), 1)


def _pieces(num_heads: int, block: int) -> _Pieces:
    rounds = max(min(num_heads // block, _ROUNDS), 1)
    return _Pieces(_divide_up(num_heads, block * rounds), rounds)


def _tile_width(head_dim: int, rotary_dim: int, neox: bool) -> int:
    """Elements of a head of which a thread has 16 bytes: what one tile of norm_and_rotate has, or half a head."""
    half = rotary_dim // 2
    in_halves = neox and _power_of_two(half) == half and 8 * half >= head_dim
    return half if in_halves else _power_of_two(head_dim) // 2


def _num_warps(elements: int) -> int:
    return max(elements // (_ELEMENTS_A_THREAD * _lanes()), 1)


def _lanes() -> int:
    return 64 if torch.version.hip else 32


# Triton's own functions for these two take microseconds on the host.


def _power_of_two(n: int) -> int:
    """The smallest one that is not below n >= 1."""
    return 1 << (n - 1).bit_length()


def _divide_up(a: int, b: int) -> int:
    return -(-a // b)


def _outer(x: torch.Tensor) -> tuple[int, ...]:
    """All strides but the last one, which is 1."""
    return x.stride()[:-1]


# ---- registration ----


qk_rmsnorm_out = register(
    _qk_rmsnorm,
    "qk_rmsnorm_out(Tensor q, Tensor k, Tensor q_weight, Tensor k_weight, float eps, float weight_bias, "
    "Tensor(a!) q_out, Tensor(b!) k_out) -> ()",
)
qk_norm_rope_out = register(
    _qk_norm_rope,
    "qk_norm_rope_out(Tensor qkv, Tensor q_weight, Tensor k_weight, Tensor cos_sin, Tensor positions, float eps, "
    "float weight_bias, bool neox, Tensor(a!) q_out, Tensor(b!) k_out, Tensor(c!)? v_out, Tensor(d!)? k_cache, "
    "Tensor(e!)? v_cache, Tensor? slot_mapping, Tensor? k_scale, Tensor? v_scale) -> ()",
)
kv_materialize_out = register(
    _kv_materialize,
    "kv_materialize_out(Tensor kv, Tensor k_weight, Tensor cos_sin, Tensor positions, float eps, float weight_bias, "
    "bool neox, Tensor(a!) k_out, Tensor(b!) v_out) -> ()",
)
mla_prepare_out = register(
    _mla_prepare,
    "mla_prepare_out(Tensor q_nope, Tensor q_pe, Tensor k_nope, Tensor k_pe, Tensor(a!) kv_cache, "
    "Tensor slot_mapping, Tensor positions, Tensor cos_sin, Tensor? k_scale, bool neox, Tensor(b!) q_out) -> ()",
)
