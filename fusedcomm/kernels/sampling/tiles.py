"""How a row is spread over a program."""

from __future__ import annotations

import torch

_SMALLEST, _LARGEST = 512, 8192
_ELEMENTS_A_THREAD = 16  # four loads of 16 bytes in flight in fp32
_LEAST_WARPS, _MOST_WARPS = 4, 16


def tile_options(vocab: int) -> dict[str, int | bool]:
    """The options of a launch whose programs have rows of so many values each."""
    tile = min(max(power_of_two(vocab), _SMALLEST), _LARGEST)
    num_warps = min(max(tile // (_ELEMENTS_A_THREAD * _lanes()), _LEAST_WARPS), _MOST_WARPS)
    return {"TILE": tile, "num_warps": num_warps, "enable_fp_fusion": False}


def power_of_two(n: int) -> int:
    """The smallest one that is not below n >= 1."""
    return 1 << (n - 1).bit_length()


def _lanes() -> int:
    """Threads of a warp."""
    return 64 if torch.version.hip else 32
