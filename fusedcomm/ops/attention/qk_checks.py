"""Argument checks of the QK and MLA ops: they name the argument, what was expected and what came."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch

from fusedcomm import platform
from fusedcomm.ops.attention.kv import PagedKV
from fusedcomm.ops.checks import FP8_DTYPES, check_apart, check_x

MAX_HEAD_DIM = 1024


def check_tensor(
    t: torch.Tensor, name: str, shape: tuple[int, ...], dtypes: Sequence[torch.dtype], device: torch.device
) -> None:
    """t has this shape, one of these dtypes and this device."""
    if not isinstance(t, torch.Tensor):
        raise ValueError(f"{name}: expected a torch.Tensor, got {type(t).__name__}")
    if t.shape != shape:
        raise ValueError(f"{name}: expected shape {tuple(shape)}, got {tuple(t.shape)}")
    if t.dtype not in dtypes:
        expected = " or ".join(map(str, dtypes))
        raise ValueError(f"{name}: expected dtype {expected}, got {t.dtype}")
    if t.device != device:
        raise ValueError(f"{name}: expected device {device}, got {t.device}")


def check_dims(t: torch.Tensor, name: str, dims: str) -> None:
    """A dense bf16, fp16 or fp32 tensor with as many dimensions as ``dims`` names: ``"T, Hq, D"``."""
    check_x(t, name)
    if t.dim() != dims.count(",") + 1:
        raise ValueError(f"{name}: expected dimensions [{dims}], got shape {tuple(t.shape)}")


def check_strides(t: torch.Tensor, name: str) -> None:
    """A tensor that is written: neighbours in the last dimension are neighbours in memory, no two elements are one."""
    if t.shape[-1] > 1 and t.stride(-1) != 1:
        raise ValueError(f"{name}: expected a last dimension of stride 1, got strides {t.stride()}")
    if any(size > 1 and stride == 0 for size, stride in zip(t.shape, t.stride(), strict=True)):
        raise ValueError(f"{name}: expected no stride of 0, got strides {t.stride()}")


def check_outputs(
    outputs: Mapping[str, tuple[torch.Tensor, tuple[int, ...]]], inputs: Mapping[str, torch.Tensor], like: torch.Tensor
) -> None:
    """Outputs that the caller gives: their shapes, dtype and device of ``like``, their strides, apart from inputs."""
    for name, (t, shape) in outputs.items():
        check_tensor(t, name, shape, (like.dtype,), like.device)
        check_strides(t, name)
        check_apart(t, name, inputs)
    names = list(outputs)
    for i, name in enumerate(names):
        if any(outputs[name][0] is outputs[other][0] for other in names[:i]):
            raise ValueError(f"{name}: expected a tensor of its own, got that of another output")


def check_head_dim(head_dim: int, name: str) -> None:
    """The number of elements that a norm or a rotation goes over."""
    if not 1 <= head_dim <= MAX_HEAD_DIM:
        raise ValueError(f"{name}: expected a head dimension between 1 and {MAX_HEAD_DIM}, got {head_dim}")


def check_num_heads(t: torch.Tensor, name: str) -> None:
    """``[T, heads, D]`` has heads."""
    if t.shape[1] < 1:
        raise ValueError(f"{name}: expected at least one head, got shape {tuple(t.shape)}")


def check_count(count: int, name: str) -> None:
    """A number of heads."""
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise ValueError(f"{name}: expected an int >= 1, got {count!r}")


def check_weights(
    weights: dict[str, torch.Tensor], shape: tuple[int, ...], x: torch.Tensor, eps: float, weight_bias: float
) -> None:
    """Norm weights in the dtype of x or fp32, and the numbers that go with them."""
    for name, weight in weights.items():
        check_tensor(weight, name, shape, tuple({x.dtype: 0, torch.float32: 0}), x.device)
    if not (math.isfinite(eps) and eps >= 0.0):
        raise ValueError(f"eps: expected a finite number >= 0, got {eps}")
    if not math.isfinite(weight_bias):
        raise ValueError(f"weight_bias: expected a finite number, got {weight_bias}")


def check_rope(cos_sin: torch.Tensor, positions: torch.Tensor, rotary_dim: int, most: int, x: torch.Tensor) -> None:
    """The table ``[P, rotary_dim]`` and the positions ``[T]`` (T: rows of x), for a rotation of ``most`` elements."""
    if isinstance(rotary_dim, bool) or not isinstance(rotary_dim, int) or not 2 <= rotary_dim <= most or rotary_dim % 2:
        raise ValueError(f"rotary_dim: expected an even int between 2 and {most}, got {rotary_dim!r}")
    check_dims(cos_sin, "cos_sin", "P, rotary_dim")
    check_tensor(
        cos_sin,
        "cos_sin",
        (cos_sin.shape[0], rotary_dim),
        tuple({x.dtype: 0, torch.float32: 0}),
        x.device,
    )
    if cos_sin.shape[0] < 1:
        raise ValueError(f"cos_sin: expected at least one position, got shape {tuple(cos_sin.shape)}")
    if cos_sin.stride(-1) != 1:
        raise ValueError(f"cos_sin: expected a last dimension of stride 1, got strides {cos_sin.stride()}")
    check_tensor(positions, "positions", (x.shape[0],), (torch.int64,), x.device)


def check_neox(neox: bool) -> None:
    """A bool: rotation styles have had other names and numbers elsewhere."""
    if not isinstance(neox, bool):
        raise ValueError(f"neox: expected a bool, got {neox!r}")


def check_paged(
    cache: PagedKV | None, slot_mapping: torch.Tensor | None, num_heads: int, head_dim: int, x: torch.Tensor
) -> None:
    """The cache fits keys and values ``[T, num_heads, head_dim]`` like x; slot_mapping comes exactly with a cache."""
    if (cache is None) != (slot_mapping is None):
        missing, given = ("cache", "slot_mapping") if cache is None else ("slot_mapping", "cache")
        raise ValueError(f"{missing}: expected one with {given}, got None")
    if cache is None or slot_mapping is None:
        return
    if not isinstance(cache, PagedKV):
        raise ValueError(f"cache: expected a PagedKV, got {type(cache).__name__}")
    k, v = cache.k, cache.v
    for name, t in (("cache.k", k), ("cache.v", v)):
        if not isinstance(t, torch.Tensor):
            raise ValueError(f"{name}: expected a torch.Tensor, got {type(t).__name__}")
    if k.dim() not in (4, 5):
        raise ValueError(
            f"cache.k: expected [blocks, block, Hk, D] or [blocks, Hk, D / x, block, x], got shape {tuple(k.shape)}"
        )
    dtypes = (x.dtype, *FP8_DTYPES, torch.uint8)
    if cache.is_shuffled:
        x_elements, block = k.shape[4], k.shape[3]
        if x_elements < 1 or head_dim % x_elements:
            raise ValueError(f"cache.k: expected a last dimension that divides D = {head_dim}, got {x_elements}")
        if block < 1 or block % x_elements:
            raise ValueError(f"cache.k: expected a block size that is a multiple of x = {x_elements}, got {block}")
        k_shape: tuple[int, ...] = (k.shape[0], num_heads, head_dim // x_elements, block, x_elements)
        v_shape: tuple[int, ...] = (k.shape[0], num_heads, block // x_elements, head_dim, x_elements)
    else:
        if k.shape[1] < 1:
            raise ValueError(f"cache.k: expected a block size of at least 1, got shape {tuple(k.shape)}")
        k_shape = v_shape = (k.shape[0], k.shape[1], num_heads, head_dim)
    check_tensor(k, "cache.k", k_shape, dtypes, x.device)
    check_tensor(v, "cache.v", v_shape, (k.dtype,), x.device)
    check_strides(k, "cache.k")
    check_strides(v, "cache.v")
    if k is v:
        raise ValueError("cache.v: expected a tensor of its own, got cache.k")
    check_scale(cache.k_scale, "cache.k_scale", k, x)
    check_scale(cache.v_scale, "cache.v_scale", v, x)
    check_tensor(slot_mapping, "slot_mapping", (x.shape[0],), (torch.int64,), x.device)


def check_latent_cache(cache: torch.Tensor, name: str, width: int, x: torch.Tensor) -> None:
    """``[blocks, block_size, width]``, or with a dimension of 1 before the last one; in the dtype of x or FP8."""
    if not isinstance(cache, torch.Tensor):
        raise ValueError(f"{name}: expected a torch.Tensor, got {type(cache).__name__}")
    one_head = (1,) if cache.dim() == 4 else ()
    if cache.dim() not in (3, 4) or cache.shape[1] < 1 or cache.shape[2:] != (*one_head, width):
        raise ValueError(
            f"{name}: expected shape [blocks, block_size, {width}] or [blocks, block_size, 1, {width}], "
            f"got {tuple(cache.shape)}"
        )
    check_tensor(cache, name, tuple(cache.shape), (x.dtype, *FP8_DTYPES, torch.uint8), x.device)
    check_strides(cache, name)


def check_scale(scale: torch.Tensor | None, name: str, cache: torch.Tensor, x: torch.Tensor) -> None:
    """The scale of a whole cache: one fp32 element on the device, and only where the cache is FP8."""
    if scale is None:
        return
    if cache.dtype == x.dtype:
        raise ValueError(f"{name}: expected None for a cache of {cache.dtype}, got a scale")
    if not isinstance(scale, torch.Tensor):
        raise ValueError(f"{name}: expected a torch.Tensor, got {type(scale).__name__}")
    if scale.numel() != 1:
        raise ValueError(f"{name}: expected one element, got shape {tuple(scale.shape)}")
    check_tensor(scale, name, tuple(scale.shape), (torch.float32,), x.device)


def as_fp8(cache: torch.Tensor) -> torch.Tensor:
    """The cache by its FP8 dtype where it came as bytes; any other as it is."""
    return cache.view(platform.fp8_dtype(cache.device)) if cache.dtype is torch.uint8 else cache
