"""torch.compile as the benchmarks use it: each shape by itself, without dynamic sizes, in the default mode."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar, cast

MOST_SHAPES = 256
"""Shapes that one function may be compiled for; torch's default of 8 would fall back to eager without a word."""

F = TypeVar("F", bound=Callable[..., Any])


def compiled(function: F) -> F:
    """``function`` through torch.compile; the same one for the same function."""
    return cast(F, _compiled(function))


@functools.cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    import torch
    import torch._dynamo
    import torch._inductor.config

    torch._dynamo.config.recompile_limit = MOST_SHAPES
    # few small kernels a shape: starting a pool of compiler processes takes longer than they do
    torch._inductor.config.compile_threads = 1
    return torch.compile(function, dynamic=False, fullgraph=True)
