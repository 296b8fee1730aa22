"""Inputs for the tests of the ops: what models produce, and what breaks kernels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from hypothesis import strategies as st

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
FP8_DTYPES = (torch.float8_e4m3fn, torch.float8_e4m3fnuz)
GROUP_SIZES = (32, 64, 128, 256)
INT_OF = {torch.bfloat16: torch.int16, torch.float16: torch.int16, torch.float32: torch.int32}

# "ordinary": activations; "bits": any bit pattern, so every exponent, subnormals, infinities, NaN;
# "finite": any finite one; "small": near and in the subnormals; "huge": near the largest number; "zeros": +0 and -0
KINDS = ("ordinary", "bits", "finite", "small", "huge", "zeros", "specials")


def make(seed: int, shape: tuple[int, ...], dtype: torch.dtype, kind: str) -> torch.Tensor:
    """A tensor of one kind of values; the same for the same arguments."""
    if 0 in shape:
        return torch.empty(shape, dtype=dtype)  # NumPy's would have strides of 0
    rng = np.random.default_rng(seed)
    if kind == "ordinary":
        scale = 10.0 ** rng.uniform(-2, 2)
        return torch.from_numpy((rng.standard_normal(shape) * scale).astype(np.float32)).to(dtype)
    if kind in ("bits", "finite"):
        words = np.int16 if INT_OF[dtype] is torch.int16 else np.int32
        bits = rng.integers(np.iinfo(words).min, np.iinfo(words).max, shape, dtype=words, endpoint=True)
        x = torch.from_numpy(bits).view(dtype)
        return x if kind == "bits" else torch.nan_to_num(x, 1.0, 2.0, -2.0)
    largest = torch.finfo(dtype).max
    if kind == "small":
        tiny = torch.finfo(dtype).tiny
        return torch.from_numpy(rng.standard_normal(shape).astype(np.float32)).to(dtype) * tiny
    if kind == "huge":
        return torch.from_numpy(rng.uniform(-largest, largest, shape).astype(np.float32)).to(dtype)
    zeros = torch.from_numpy(np.copysign(np.float32(0), rng.standard_normal(shape).astype(np.float32))).to(dtype)
    if kind == "zeros":
        return zeros
    specials = torch.tensor(
        [0.0, -0.0, float("inf"), -float("inf"), float("nan"), largest, -largest, torch.finfo(dtype).tiny, 1e-10]
    ).to(dtype)
    x = make(seed + 1, shape, dtype, "ordinary")
    at = torch.from_numpy(rng.random(shape) < 0.05)
    return torch.where(at, specials[torch.from_numpy(rng.integers(0, len(specials), shape))], x)


seeds = st.integers(0, 2**32 - 1)
kinds = st.sampled_from(KINDS)
dtypes = st.sampled_from(DTYPES)
# the widths of all instruction sets and their tails, powers of two and their neighbours
hidden_sizes = st.one_of(
    st.integers(1, 300),
    st.sampled_from([511, 512, 513, 1023, 1024, 1025, 2048, 3072, 4096, 5120, 7168, 8191, 16384, 32767, 32768]),
)
epsilons = st.sampled_from([0.0, 1e-6, 1e-5, 1.0])
weight_biases = st.sampled_from([0.0, 1.0, -0.5])


@st.composite
def leading_shapes(draw: st.DrawFn, hidden: int) -> tuple[int, ...]:
    """The dimensions before H; few rows where H is large."""
    rows = draw(st.integers(0, 9 if hidden <= 4096 else 2))
    return draw(st.sampled_from([(), (rows,), (rows, 1), (1, rows, 1)]))


class NormArguments(NamedTuple):
    """Arguments of fused_add_rms_norm."""

    x: torch.Tensor
    residual: torch.Tensor | None
    weight: torch.Tensor
    eps: float
    weight_bias: float


@dataclass(frozen=True)
class NormRecipe:
    """How to make NormArguments; short to print where a test fails."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    weight_dtype: torch.dtype
    seed: int
    x: str
    residual: str | None
    weight: str
    eps: float
    weight_bias: float

    def make(self) -> NormArguments:
        return NormArguments(
            make(self.seed, self.shape, self.dtype, self.x),
            None if self.residual is None else make(self.seed + 2, self.shape, self.dtype, self.residual),
            make(self.seed + 3, self.shape[-1:], self.weight_dtype, self.weight),
            self.eps,
            self.weight_bias,
        )


@st.composite
def norm_recipes(draw: st.DrawFn, hidden: st.SearchStrategy[int] = hidden_sizes) -> NormRecipe:
    """Any shape, dtype and kind of values."""
    size, dtype = draw(hidden), draw(dtypes)
    return NormRecipe(
        shape=(*draw(leading_shapes(size)), size),
        dtype=dtype,
        weight_dtype=draw(st.sampled_from([dtype, torch.float32])),
        seed=draw(seeds),
        x=draw(kinds),
        residual=draw(st.none() | kinds),
        weight=draw(kinds),
        eps=draw(epsilons),
        weight_bias=draw(weight_biases),
    )


@st.composite
def grouped(draw: st.DrawFn) -> tuple[int, int]:
    """(group_size, H): H a multiple of it, with complete and incomplete words of four packed scales."""
    group_size = draw(st.sampled_from(GROUP_SIZES))
    return group_size, group_size * draw(st.integers(1, 9) | st.sampled_from([16, 32768 // group_size]))
