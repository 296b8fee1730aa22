"""Arguments of the QK and MLA ops, and their formulas in fp64."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from cases import make

EPS = 1e-6
NUM_POSITIONS = 50
# What rounding moves a number by, relative to it; fp32, in which all is computed: a sum of D squares, a root, products.
ROUNDING = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 2.0**-21}


class Case(NamedTuple):
    """T, heads, and how much of a head is rotated."""

    rows: int
    heads_q: int
    heads_k: int
    head_dim: int
    rotary_dim: int
    neox: bool = True


CASES = [
    Case(5, 32, 8, 128, 128),
    Case(5, 32, 8, 128, 128, neox=False),
    Case(3, 20, 3, 128, 128),  # two rounds of 8 heads a program, the last of them without heads
    Case(3, 20, 3, 128, 64, neox=False),
    Case(3, 9, 2, 256, 64),  # tiles that are an eighth of a head
    Case(2, 5, 1, 256, 32),  # and smaller ones, which are not taken
    Case(3, 4, 2, 64, 32),
    Case(3, 4, 2, 64, 32, neox=False),
    Case(4, 5, 3, 80, 24),  # halves that are no power of two
    Case(4, 5, 3, 80, 32),  # a rest that is none
    Case(4, 3, 5, 96, 6, neox=False),
    Case(2, 1, 1, 2, 2),
    Case(2, 2, 1, 1024, 1024),
]


def table(num_positions: int, rotary_dim: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Cosines, then sines, of random angles: no structure that a wrong row or column would share."""
    angles = make(77, (num_positions, rotary_dim // 2), torch.float32, "ordinary")
    return torch.cat((angles.cos(), angles.sin()), dim=1).to(dtype)


def random_positions(seed: int, rows: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).integers(0, NUM_POSITIONS, rows))


def arguments(case: Case, dtype: torch.dtype, kind: str = "ordinary", seed: int = 1) -> tuple[Any, ...]:
    """Positional arguments of fused_qk_norm_rope, with weights of both dtypes."""
    rows, heads_q, heads_k, head_dim, rotary_dim, _ = case
    qkv = make(seed, (rows, (heads_q + 2 * heads_k) * head_dim), dtype, kind)
    weights = make(2, (head_dim,), dtype, "ordinary"), make(3, (head_dim,), torch.float32, "ordinary")
    positions = random_positions(seed, rows)
    return qkv, *weights, table(NUM_POSITIONS, rotary_dim), positions, heads_q, heads_k, head_dim, EPS


def options(case: Case) -> dict[str, Any]:
    """The options of fused_qk_norm_rope that go with them."""
    return {"neox": case.neox, "rotary_dim": case.rotary_dim}


# ---- in fp64 ----


def norm_in_fp64(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """RMSNorm over the last dimension."""
    return x.double() / (x.double().square().mean(-1, keepdim=True) + EPS).sqrt() * weight.double()


def rotate_in_fp64(x: torch.Tensor, cos_sin: torch.Tensor, positions: torch.Tensor, neox: bool) -> torch.Tensor:
    """Each pair of ``x [T, heads, D]`` as a complex number times exp(i angle)."""
    half = cos_sin.shape[1] // 2
    result = x.double().clone()
    for t, position in enumerate(positions.tolist()):
        for pair in range(half):
            i, j = (pair, pair + half) if neox else (2 * pair, 2 * pair + 1)
            turn = complex(cos_sin[position, pair], cos_sin[position, half + pair])
            z = torch.complex(x[t, :, i].double(), x[t, :, j].double()) * turn
            result[t, :, i], result[t, :, j] = z.real, z.imag
    return result


def check_rotated(got: torch.Tensor, exact: torch.Tensor, *, normed: bool) -> None:
    """Rounded once, and ``normed``: once before, both of a pair, which are sqrt(2) times the largest result at most."""
    roundings = 1 + (2**0.5 if normed else 0)
    bound = roundings * ROUNDING[got.dtype] * exact.abs().amax(-1, keepdim=True) + 1e-7
    assert ((got.double() - exact).abs() <= bound).all()
