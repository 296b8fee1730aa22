"""Garbage in: calls end, ids are in range, probabilities are finite; and all of it as the oracles have it."""

from __future__ import annotations

import numpy as np
import pytest
import sampling_bodies as bodies
import torch
from cases import make
from qk_bodies import same
from sampling_bodies import SamplingOps

KINDS = ("bits", "finite", "small", "huge", "zeros", "specials", "lines")


def garbage(seed: int, count: int, vocab: int) -> torch.Tensor:
    """Rows of every kind of values: fp32 of random bits, infinities, NaN, zeros; and rows of one of them alone."""
    rng = np.random.default_rng(seed)
    parts = [
        make(int(rng.integers(1 << 31)), (1, vocab), torch.float32, kind) for kind in rng.choice(KINDS[:-1], count)
    ]
    values = torch.cat(parts)
    lines = torch.tensor([torch.nan, torch.inf, -torch.inf, -1.0, 0.0, -0.0, 2.0**-149, 3.4e38, 1.0])
    filled = torch.from_numpy(rng.choice(lines.numpy(), (count, 1))).expand(-1, vocab)
    return torch.where(torch.from_numpy(rng.random((count, 1)) < 0.2), filled, values)


def garbage_limits(seed: int, count: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Top-k, a share and uniforms of any bits."""
    rng = np.random.default_rng(seed)
    k = torch.from_numpy(
        np.where(rng.random(count) < 0.5, rng.integers(-3, 60, count), rng.integers(-(1 << 63), 1 << 62, count))
    )
    share, u = (make(seed + i, (count,), torch.float32, "bits") for i in (1, 2))
    tame = torch.from_numpy(rng.random((2, count), dtype=np.float32))
    ends = torch.tensor([torch.nan, torch.inf, -torch.inf, -1.0, -0.0, 2.0**-149, 1.0, 2.0])
    which = torch.from_numpy(rng.integers(0, 4, (2, count)))
    odd = ends[torch.from_numpy(rng.integers(0, len(ends), (2, count)))]
    share, u = torch.where(which == 0, torch.stack([share, u]), torch.where(which == 1, odd, tame))
    return k, share, u


def as_limit(share: float) -> float:
    """What a top-p counts as that is no number from 0 to 1: NaN is no limit."""
    return 1.0 if np.isnan(share) else min(max(share, 0.0), 1.0)


@pytest.mark.parametrize("vocab", [1, 2, 37, 1000])
@pytest.mark.parametrize("seed", range(4))
def test_probabilities(ops: SamplingOps, seed: int, vocab: int) -> None:
    count = 50
    probs, (k, share, u) = garbage(seed, count, vocab), garbage_limits(seed, count)
    filtered = {
        "top_k": ops.top_k_renorm_probs(probs, k),
        "top_p": ops.top_p_renorm_probs(probs, share),
        "both": ops.top_k_top_p_renorm_probs(probs, k, share),
        "min_p": ops.min_p_renorm_probs(probs, share),
    }
    tokens = {
        "all": ops.sampling_from_probs(probs, u),
        "top_k_first": ops.top_k_top_p_sampling_from_probs(probs, k, share, u),
        "joint": ops.top_k_top_p_sampling_from_probs(probs, k, share, u, order="joint"),
    }
    for row in range(count):
        x, limit, p, v = probs[row].numpy(), int(k[row]), float(share[row]), float(u[row])
        min_p = 0.0 if np.isnan(p) else min(max(p, 0.0), 1.0)
        p = as_limit(p)
        want = {
            "top_k": bodies.exact_top_k(x, limit),
            "top_p": bodies.exact_top_p(x, p),
            "both": bodies.exact_top_k_top_p(x, limit, p),
            "min_p": bodies.exact_min_p(x, min_p),
        }
        for name, got in filtered.items():
            assert torch.isfinite(got[row]).all(), name
            assert same(got[row], torch.from_numpy(want[name])), (name, row)
        chosen = {
            "all": bodies.exact_sample(x, v),
            "top_k_first": bodies.exact_sample(x, v, limit, p, joint=False),
            "joint": bodies.exact_sample(x, v, limit, p),
        }
        for name, ids in tokens.items():
            assert 0 <= ids[row] < vocab
            assert ids[row] == chosen[name], (name, row)


@pytest.mark.parametrize("vocab", [1, 37, 1000])
@pytest.mark.parametrize("seed", range(4))
def test_logits(ops: SamplingOps, seed: int, vocab: int) -> None:
    logits = garbage(seed, 50, vocab)
    _, temperature, u = garbage_limits(seed, 50)
    got = ops.softmax_temperature(logits, temperature)
    assert torch.isfinite(got).all()
    mass = got.double().sum(-1)
    # V quotients and their divisor, each rounded to fp32
    assert (((mass - 1).abs() < 2.0**-22) | (mass == 0)).all()
    possible = (logits > -torch.inf).any(-1)
    assert torch.equal(mass > 0, possible)
    tokens = ops.sampling_from_probs(got, u)
    assert ((tokens >= 0) & (tokens < vocab)).all()


@pytest.mark.parametrize("seed", range(2))
def test_indices(ops: SamplingOps, seed: int) -> None:
    """Any bits: rows past the ends are not read, and there is poison beside those there are."""
    memory = torch.full((9, 300), torch.nan)
    memory[3:6, 100:200] = garbage(seed, 3, 100)
    probs, named = memory[3:6, 100:200], make(seed, (40,), torch.float32, "bits").view(torch.int32)
    k, share, u = garbage_limits(seed, 40)
    taken = probs[named.long().clamp(0, 2)]
    assert same(ops.sampling_from_probs(probs, u, indices=named), ops.sampling_from_probs(taken, u))
    assert same(
        ops.top_k_top_p_renorm_probs(probs, k, share, indices=named), ops.top_k_top_p_renorm_probs(taken, k, share)
    )
