"""What the paged byte caches of the indexer and of sparse MLA share, in plain torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

MIN_AMAX = 1e-4
"""The smallest largest magnitude of a group; DeepSeek's kernels have it."""


class Quantised(NamedTuple):
    """Codes (bytes) ``[T, G, n]`` of groups of n neighbours, and their scales, fp32 ``[T, G]``."""

    codes: torch.Tensor
    scale: torch.Tensor


def fp8_of(fnuz: bool) -> torch.dtype:
    """The FP8 format by its flag."""
    return torch.float8_e4m3fnuz if fnuz else torch.float8_e4m3fn


def quantise(x: torch.Tensor, fnuz: bool, rounding: Callable[[torch.Tensor], torch.Tensor] | None = None) -> Quantised:
    """FP8 of ``x [T, G, n]`` with ``scale = max(amax, 1e-4) / FP8_MAX``, rounded as asked for.

    A group that holds a NaN has the scale NaN.
    """
    fp8_dtype = fp8_of(fnuz)
    limit = torch.finfo(fp8_dtype).max
    x = x.float()
    amax = x.abs().amax(-1)
    # correctly rounded: divided by a number, torch multiplies by its reciprocal on GPUs
    scale = torch.where(amax < MIN_AMAX, MIN_AMAX, amax) / torch.full((), limit, device=x.device)
    if rounding is not None:
        scale = rounding(scale)
    codes = (x / scale.unsqueeze(-1)).clamp(-limit, limit).to(fp8_dtype).view(torch.uint8)
    return Quantised(codes, scale)


def power_of_two_exponent(scale: torch.Tensor) -> torch.Tensor:
    """The biased exponent (int32) of the smallest power of two not below a positive fp32; 255 for inf and NaN."""
    finite = scale.isfinite()
    bits = torch.where(finite, scale.view(torch.int32), 0)
    return torch.where(finite, (bits + 0x7FFFFF) >> 23, 255)


def ue8m0_value(exponent: torch.Tensor) -> torch.Tensor:
    """The fp32 values ``2^(b - 127)`` of UE8M0 bytes; 255 is NaN, and 0 is 2^-127, a subnormal."""
    exponent = exponent.to(torch.int32)
    bits = torch.where(exponent == 0, 1 << 22, exponent << 23).to(torch.int32)
    return torch.where(exponent == 255, torch.nan, bits.view(torch.float32))


def round_up_to_power_of_two(scale: torch.Tensor) -> torch.Tensor:
    """The smallest power of two that is not below a positive fp32; NaN for inf and NaN."""
    return ue8m0_value(power_of_two_exponent(scale))


def decode(codes: torch.Tensor, fnuz: bool) -> torch.Tensor:
    """The fp32 values of FP8 codes (bytes)."""
    return codes.view(fp8_of(fnuz)).float()


def block_bytes(kv_cache: torch.Tensor) -> torch.Tensor:
    """The bytes of each block of a cache ``[blocks, block_size, token_bytes]`` in a row; blocks may be padded."""
    num_blocks, block_size, token_bytes = kv_cache.shape
    return kv_cache.as_strided((num_blocks, block_size * token_bytes), (kv_cache.stride(0), 1))


def byte_index(
    kv_cache: torch.Tensor, block: torch.Tensor, position: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The index of bytes at positions of their blocks: what block_bytes has there, to be written to as well.

    torch.compile takes no writes through a view of other strides.
    """
    token_bytes = kv_cache.shape[2]
    return block, position // token_bytes, position % token_bytes


def first_valid(known: torch.Tensor, slot: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(source row, slot) for each row: its own where the slot is known, else those of the first row that has one.

    So a scatter of all rows writes what one of only the known rows would, without asking the host which they are. With
    no known row, all slots are 0.
    """
    rows = torch.arange(known.shape[0], device=known.device)
    source = torch.where(known, rows, known.to(torch.int32).argmax())
    return source, torch.where(known.any(), slot[source], 0)
