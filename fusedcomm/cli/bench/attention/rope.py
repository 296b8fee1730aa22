"""Rotary embeddings as the lines of torch that a user would write."""

from __future__ import annotations

import torch

NUM_POSITIONS = 40960


def rope_table(rotary_dim: int, device: torch.device, theta: float = 1e6) -> torch.Tensor:
    """fp32 ``[NUM_POSITIONS, rotary_dim]``: the cosines of a position, then its sines."""
    frequency = theta ** -(torch.arange(0, rotary_dim, 2, device=device, dtype=torch.float64) / rotary_dim)
    angle = torch.arange(NUM_POSITIONS, device=device, dtype=torch.float64).unsqueeze(-1) * frequency
    return torch.cat((angle.cos(), angle.sin()), dim=-1).float()


def random_positions(count: int, generator: torch.Generator, device: torch.device) -> torch.Tensor:
    """int64 ``[count]``."""
    return torch.randint(0, NUM_POSITIONS, (count,), generator=generator, device=device)


def rotate(x: torch.Tensor, cos_sin: torch.Tensor, positions: torch.Tensor, neox: bool = True) -> torch.Tensor:
    """``x [T, heads, D]`` rotated by ``cos_sin [P, D]``, in fp32, rounded to the dtype of x."""
    cos, sin = cos_sin[positions].unsqueeze(1).chunk(2, dim=-1)
    rows = x.float()
    a, b = rows.chunk(2, dim=-1) if neox else (rows[..., 0::2], rows[..., 1::2])
    a, b = a * cos - b * sin, b * cos + a * sin
    rotated = torch.cat((a, b), dim=-1) if neox else torch.stack((a, b), dim=-1).flatten(-2)
    return rotated.to(x.dtype)
