"""Argument checks of the ops on paged byte caches: they name the argument, what was expected and what came."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fusedcomm import platform
from fusedcomm.ops.checks import FP8_DTYPES, check_x, has_address


def check_paged_cache(cache: torch.Tensor, name: str, token_bytes: Sequence[int], alignment: int) -> None:
    """A packed cache ``[blocks, block_size, token_bytes]`` of bytes or FP8; blocks may lie apart.

    ``alignment``: where a block may begin, in bytes.
    """
    if not isinstance(cache, torch.Tensor):
        raise ValueError(f"{name}: expected a torch.Tensor, got {type(cache).__name__}")
    if cache.dtype not in (torch.uint8, *FP8_DTYPES):
        raise ValueError(f"{name}: expected dtype uint8, float8_e4m3fn or float8_e4m3fnuz, got {cache.dtype}")
    if cache.dim() != 3 or cache.shape[2] not in token_bytes or cache.shape[1] < 1:
        sizes = " or ".join(map(str, token_bytes))
        raise ValueError(f"{name}: expected shape [blocks, block_size, {sizes}], got {tuple(cache.shape)}")
    blocks, block_size, size = cache.shape
    packed = cache.stride(2) == 1 and (block_size == 1 or cache.stride(1) == size)
    apart = blocks <= 1 or (cache.stride(0) >= block_size * size and cache.stride(0) % alignment == 0)
    if not (packed and apart):
        raise ValueError(
            f"{name}: expected strides (at least {block_size * size} and a multiple of {alignment}, {size}, 1), "
            f"got {cache.stride()}"
        )
    check_aligned(cache, name, alignment)


def check_aligned(t: torch.Tensor, name: str, alignment: int) -> None:
    """The tensor begins at a multiple of this many bytes; unseen where there are no addresses."""
    if has_address(t) and t.data_ptr() % alignment:
        raise ValueError(
            f"{name}: expected an address that is a multiple of {alignment}, got one {t.data_ptr() % alignment} after"
        )


def cache_fp8_dtype(cache: torch.Tensor) -> torch.dtype:
    """The FP8 format of a cache: its dtype, or that of the device where it is bytes."""
    return platform.fp8_dtype(cache.device) if cache.dtype is torch.uint8 else cache.dtype


def check_rows(x: torch.Tensor, name: str, sizes: Sequence[int], device: torch.device) -> None:
    """bf16, fp16 or fp32 rows ``[T, n]``, n one of the sizes."""
    check_x(x, name)
    if x.dim() != 2 or x.shape[1] not in sizes:
        expected = " or ".join(map(str, sizes))
        raise ValueError(f"{name}: expected shape [T, {expected}], got {tuple(x.shape)}")
    if x.device != device:
        raise ValueError(f"{name}: expected device {device} like the cache, got {x.device}")


def check_integers(
    t: torch.Tensor, name: str, shape: Sequence[int | None], dtype: torch.dtype, device: torch.device
) -> None:
    """A tensor of one integer dtype; None in the shape stands for any size. Its last dimension has stride 1."""
    if not isinstance(t, torch.Tensor):
        raise ValueError(f"{name}: expected a torch.Tensor, got {type(t).__name__}")
    if t.dtype != dtype:
        raise ValueError(f"{name}: expected dtype {dtype}, got {t.dtype}")
    fits = t.dim() == len(shape) and all(n is None or n == m for n, m in zip(shape, t.shape, strict=True))
    if not fits:
        expected = ", ".join("any" if n is None else str(n) for n in shape)
        raise ValueError(f"{name}: expected shape [{expected}], got {tuple(t.shape)}")
    if t.shape[-1] > 1 and t.stride(-1) != 1:
        raise ValueError(f"{name}: expected a last dimension of stride 1, got strides {t.stride()}")
    if t.device != device:
        raise ValueError(f"{name}: expected device {device} like the cache, got {t.device}")


def check_dense(
    t: torch.Tensor, name: str, shape: Sequence[int], dtypes: Sequence[torch.dtype], device: torch.device
) -> None:
    """A contiguous tensor of this shape and one of these dtypes."""
    if not isinstance(t, torch.Tensor):
        raise ValueError(f"{name}: expected a torch.Tensor, got {type(t).__name__}")
    if t.dtype not in dtypes:
        raise ValueError(f"{name}: expected dtype {' or '.join(map(str, dtypes))}, got {t.dtype}")
    if tuple(t.shape) != tuple(shape):
        raise ValueError(f"{name}: expected shape {tuple(shape)}, got {tuple(t.shape)}")
    if not t.is_contiguous():
        raise ValueError(f"{name}: expected a contiguous tensor, got strides {t.stride()}")
    if t.device != device:
        raise ValueError(f"{name}: expected device {device} like the cache, got {t.device}")


def check_flag(value: bool, name: str) -> None:
    """A bool, and not something that counts as one."""
    if not isinstance(value, bool):
        raise ValueError(f"{name}: expected a bool, got {value!r}")
