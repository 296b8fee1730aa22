"""Rows of probabilities, two oracles of the sampling ops, and bodies of tests that run where a backend does.

``exact``: the arithmetic that the library promises, in Python's integers and fractions, a row at a time; results agree
to the bit. ``real``: the specification's sentences in fp64, which know of no fixed point; they also say how close a sum
came to what it is compared with, for there rounding may decide.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from indexer_bodies import TorchOps
from numpy.typing import NDArray
from qk_bodies import all_same, same
from triton_backend import GpuOps, InterpretedOps, TritonOps, to

from fusedcomm import native
from fusedcomm.ops import sampling
from fusedcomm.ops.sampling import dispatch
from fusedcomm.ops.sampling.plan import OPERATORS

F32 = NDArray[np.float32]
Mask = NDArray[np.bool_]

# "triton", by its interpreter, is too slow for all tests: test_triton.py has those for it
BACKENDS = ("torch", "native", "torch-gpu", "native-gpu", "triton-gpu")


class SamplingOps:
    """fusedcomm.ops.sampling on one backend: CPU tensors in and out, wherever it runs."""

    def __init__(self, runner: TritonOps, caller: Callable[..., torch.Tensor]) -> None:
        self._runner = runner
        self._caller = caller
        self.device = runner.device

    def run(self, body: Callable[..., Any], *args: Any) -> Any:
        """Calls a module-level function with the device's name and args, where the backend serves."""
        return self._runner.run(body, *args)

    def __getattr__(self, name: str) -> Callable[..., torch.Tensor]:
        return lambda *args, **options: self.run(self._caller, name, args, options)


@contextmanager
def runners(which: str) -> Iterator[TritonOps]:
    """Where ``"triton"`` or one of BACKENDS serves; skips the test where there is no GPU for it, or no library."""
    backend, _, where = which.partition("-")
    if where == "gpu" and not torch.cuda.is_available():
        pytest.skip("no GPU: torch.cuda.is_available() is False")
    if backend == "native" and (native.load_gpu() if where == "gpu" else native.load()) is None:
        pytest.skip("the native library is not installed")
    if backend == "triton" and importlib.util.find_spec("triton") is None:
        pytest.skip("Triton is not installed")
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setenv("FUSEDCOMM_BACKEND", backend)
        monkeypatch.setattr(dispatch, "_chosen", {})
        runner = GpuOps() if where == "gpu" else InterpretedOps() if backend == "triton" else TorchOps()
        try:
            assert runner.run(serving) == {backend}
            yield runner
        finally:
            if isinstance(runner, InterpretedOps):
                runner.close()


def serving(device: str) -> set[str]:
    """What serves the ops of sampling and verification."""
    return {dispatch.sampling_backend(device, op) for op in OPERATORS}


@contextmanager
def backends(which: str) -> Iterator[SamplingOps]:
    """The ops on ``"triton"`` or one of BACKENDS."""
    with runners(which) as runner:
        yield SamplingOps(runner, call_once if which == "triton" else call)


def call(device: str, name: str, args: tuple[Any, ...], options: dict[str, Any]) -> torch.Tensor:
    """The result of an op, which a call with a poisoned ``out`` has to give as well; the arguments stay as they are."""
    args, options = to((args, options), device)
    before = to((args, options), "cpu")
    op = getattr(sampling, name)
    result = op(*args, **options)
    out = torch.full_like(result, -7 if result.dtype is torch.int32 else torch.nan)
    assert op(*args, **options, out=out) is out
    assert same(out, result)
    assert all_same(to((args, options), "cpu"), before)
    return to(result, "cpu")


def call_once(device: str, name: str, args: tuple[Any, ...], options: dict[str, Any]) -> torch.Tensor:
    """The result of an op into a poisoned ``out``; the arguments stay as they are."""
    (rows, *_), indices = args, options.get("indices")
    count = len(rows) if indices is None else len(indices)
    poison = (
        torch.full((count,), -7, dtype=torch.int32)
        if "sampling" in name
        else torch.full((count, rows.shape[1]), torch.nan)
    )
    args, options, out = to((args, options, poison), device)
    before = to((args, options), "cpu")
    assert getattr(sampling, name)(*args, **options, out=out) is out
    assert all_same(to((args, options), "cpu"), before)
    return to(out, "cpu")


# ---- rows ----

KINDS = ("peaked", "flat", "tied", "equal", "one_hot", "subnormal_tail", "subnormal", "bf16", "geometric", "weights")

# of 2^-44 and less, so that the rounding of each shows; fp64 knows better
EXACT_KINDS = (*KINDS, "steps")


def rows(kind: str, count: int, vocab: int, seed: int = 1) -> torch.Tensor:
    """fp32 ``[count, vocab]``; all but "subnormal", "weights" and "steps" add up to about 1."""
    rng = np.random.default_rng([seed, count, vocab, EXACT_KINDS.index(kind)])
    shape = (count, vocab)
    if kind in ("peaked", "flat", "bf16"):
        x = softmax(rng.standard_normal(shape) * {"peaked": 6.0, "flat": 0.1, "bf16": 2.0}[kind])
    elif kind == "tied":
        x = rng.integers(1, 6, shape).astype(np.float64)
        x /= x.sum(-1, keepdims=True)
    elif kind == "equal":
        x = np.full(shape, 1 / vocab)
    elif kind in ("one_hot", "subnormal_tail"):
        x = np.zeros(shape)
        if kind == "subnormal_tail":
            x = rng.integers(0, 1 << 23, shape) * 2.0**-149
        x[np.arange(count), rng.integers(0, vocab, count)] = 1.0
    elif kind == "subnormal":
        x = rng.integers(0, 1 << 23, shape) * 2.0**-149
        x[:, 0] += 2.0**-149
    elif kind == "geometric":
        x = rng.permuted(np.maximum(0.8 ** np.arange(vocab), 1e-30) * np.ones(shape), axis=-1)
        x /= x.sum(-1, keepdims=True)
    elif kind == "steps":
        x = rng.integers(0, 1 << 6, shape) * 2.0**-46
        x[np.arange(count), rng.integers(0, vocab, count)] = 2.0**-20
    else:  # weights of any size, from 2^-100 to 2^100
        x = rng.random(shape) * 2.0 ** rng.integers(-100, 100, (count, 1)) + 2.0**-120
    found = torch.from_numpy(x.astype(np.float32))
    return found.bfloat16().float() if kind == "bf16" else found


def softmax(logits: NDArray[np.float64]) -> NDArray[np.float64]:
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    return np.asarray(weights / weights.sum(-1, keepdims=True))


def uniforms(count: int, seed: int = 1) -> torch.Tensor:
    """fp32 in [0, 1), the ends among them."""
    u = np.random.default_rng(seed).random(count, dtype=np.float32)
    u[: min(count, 3)] = [0.0, 1 - 2.0**-24, 2.0**-40][: min(count, 3)]
    return torch.from_numpy(u)


# ---- to the bit ----


class Row(NamedTuple):
    """A row in its unit: values, masses in steps of 2^-44, and the unit."""

    y: F32
    q: NDArray[np.int64]
    unit: Fraction


def row_of(x: F32) -> Row:
    with np.errstate(invalid="ignore"):
        x = np.minimum(np.where(x > 0, x, np.float32(0)), np.float32(float.fromhex("0x1.fffffep+126")))
    largest = float(x.max())
    exponent = max(math.frexp(largest)[1] - 1, -126) if largest else -126
    power = 0 if 2.0**-20 <= largest < 2 else -exponent
    y = x * np.float32(2.0**power)
    q = np.maximum(np.rint(y.astype(np.float64) * 2.0**44).astype(np.int64), y > 0)
    return Row(y, q, Fraction(2) ** power)


def total(q: NDArray[np.int64]) -> int:
    """Checked against Python's integers where that is cheap."""
    found = int(q.sum())
    assert len(q) > 1000 or found == sum(q.tolist())
    assert 0 <= found < 1 << 63
    return found


def keep_top_k(row: Row, k: int) -> Mask:
    if not 0 < k < len(row.y):
        return np.ones(len(row.y), bool)
    return np.asarray(row.y >= np.sort(row.y)[-k])


def keep_top_p(row: Row, p: float) -> Mask:
    """By groups of equal values, from the largest down."""
    share = Fraction(float(np.float32(p)))
    if share >= 1:
        return np.ones(len(row.y), bool)
    values, group = np.unique(row.y, return_inverse=True)
    masses = np.zeros(len(values), np.int64)
    np.add.at(masses, group, row.q)
    mass = 0
    for value, added in zip(values[::-1], masses[::-1].tolist(), strict=True):
        mass += added
        # the largest stay whatever p is
        if mass > 0 and mass >= share * row.unit * 2**44:
            return np.asarray(row.y >= value)
    return np.ones(len(row.y), bool)


def keep_min_p(row: Row, min_p: float) -> Mask:
    # a product of two fp32 numbers is exact in fp64
    threshold = np.float64(np.float32(min_p)) * np.float64(row.y.max())
    return np.asarray(row.y.astype(np.float64) >= threshold)


def divided(row: Row, kept: Mask) -> F32:
    mass = total(row.q[kept])
    if mass == 0:
        return np.zeros_like(row.y)
    divisor = np.int64(mass).astype(np.float32) * np.float32(2.0**-44)
    return np.asarray(np.where(kept, row.y, np.float32(0)) / divisor)


def exact_top_k(x: F32, k: int) -> F32:
    row = row_of(x)
    return divided(row, keep_top_k(row, k))


def exact_top_p(x: F32, p: float) -> F32:
    row = row_of(x)
    return divided(row, keep_top_p(row, p))


def exact_top_k_top_p(x: F32, k: int, p: float) -> F32:
    return exact_top_p(exact_top_k(x, k), p)


def exact_min_p(x: F32, min_p: float) -> F32:
    row = row_of(x)
    return divided(row, keep_min_p(row, min_p))


def exact_sample(x: F32, u: float, k: int = 0, p: float = 1.0, *, joint: bool = True) -> int:
    row = row_of(x)
    kept = keep_top_k(row, k)
    kept = kept & keep_top_p(row if joint else row_of(divided(row, kept)), p)
    masses = np.where(kept, row.q, 0)
    mass = total(masses)
    if mass == 0:
        return 0
    u = min(u, 1 - 2.0**-24) if u > 0 else 0.0
    steps = math.floor(Fraction(u) * 2**31)
    return int(np.argmax(masses.cumsum() > mass * steps // 2**31))


# ---- in fp64 ----


class Real(NamedTuple):
    """What the specification keeps of a row; above 0: by how much no comparison of a sum can go the other way."""

    kept: Mask
    margin: float


def mass_error(x: NDArray[np.float64]) -> float:
    """How far a sum may be off: 2^-44 for each value, in the unit of the row."""
    largest = max(float(x.max()), 2.0**-126)
    return len(x) * 2.0**-44 * (1.0 if 2.0**-20 <= largest < 2 else largest)


def real_top_k(x: NDArray[np.float64], k: int) -> Real:
    k = k if 0 < k < len(x) else len(x)
    return Real(np.asarray(x >= np.sort(x)[::-1][k - 1]), math.inf)


def real_top_p(x: NDArray[np.float64], p: float) -> Real:
    """The smallest set of largest probabilities whose mass reaches p, ties at the threshold kept."""
    if p >= 1:
        return Real(np.ones(len(x), bool), math.inf)
    ranked = np.sort(x)[::-1]
    mass = ranked.cumsum()
    # only the sum at the last of several equals is compared in effect, for all of them stay or go
    last = np.append(ranked[1:] != ranked[:-1], True)
    margin = float(np.abs(mass[last] - p).min()) if p > 0 else math.inf
    reached = mass >= p
    at = int(reached.argmax()) if reached.any() else len(x) - 1
    return Real(np.asarray(x >= ranked[at]), margin - mass_error(x))


def real_min_p(x: NDArray[np.float64], min_p: float) -> Real:
    return Real(np.asarray(x >= np.float64(np.float32(min_p)) * x.max()), math.inf)


def real_top_k_top_p(x: NDArray[np.float64], k: int, p: float) -> Real:
    by_k = real_top_k(x, k).kept
    survivors = np.where(by_k, x, 0.0)
    survivors /= survivors.sum()
    by_p = real_top_p(survivors, p)
    # survivors are rounded to fp32, and so is what they are divided by
    return Real(by_k & by_p.kept, by_p.margin - 2.0**-22)


def real_joint(x: NDArray[np.float64], k: int, p: float) -> Real:
    by_p = real_top_p(x, p)
    return Real(real_top_k(x, k).kept & by_p.kept, by_p.margin)


def real_sample(x: NDArray[np.float64], kept: Mask, u: float) -> tuple[int, float]:
    """The smallest i with cumulative mass > u * kept mass, and a margin as of Real."""
    mass = np.where(kept, x, 0.0).cumsum()
    target = u * mass[-1]
    distance = np.abs(mass - target)[kept]
    # u = 0 is met exactly
    margin = math.inf if u == 0 else float(distance.min() - 2 * mass_error(x))
    return int(np.argmax(mass > target)), margin
