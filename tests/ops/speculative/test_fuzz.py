"""Garbage: the ops end, say what the specification's loops say, and give ids in range."""

from __future__ import annotations

import numpy as np
import pytest
import speculative_bodies as bodies
import torch
from cases import KINDS, make
from speculative_bodies import MUTATED, Blocks, chain_of, linear, poisoned, walk
from triton_backend import TritonOps

SEEDS = range(6)


def floats(seed: int, kind: str, *shape: int) -> torch.Tensor:
    """Any floats; some rows of zeros, of NaN, or of one value."""
    rng = np.random.default_rng(seed)
    x = make(seed, shape, torch.float32, kind)
    if len(shape) == 3:
        for value in (0.0, torch.nan, 1.0, torch.inf, -1.0):
            x[torch.from_numpy(rng.random(shape[:2]) < 0.05)] = value
    return x


def numbers(seed: int, size: int, *shape: int) -> torch.Tensor:
    """Integers of which most are indices of something of this size, and some are far from it."""
    rng = np.random.default_rng(seed)
    near = rng.integers(-2, size + 2, shape)
    far = rng.integers(-(1 << 63), (1 << 63) - 1, shape)
    return torch.from_numpy(np.where(rng.random(shape) < 0.1, far, near))


@pytest.mark.parametrize("kind", KINDS)
def test_chain(ops: TritonOps, kind: str) -> None:
    for seed in SEEDS:
        b, n, vocab = 40, 1 + seed, (2, 3, 9, 40, 130, 7)[seed]
        given = (
            floats(seed, kind, b, n, vocab),
            numbers(seed, vocab, b, n),
            floats(seed + 50, kind, b, n + 1, vocab),
            floats(seed + 60, kind if seed % 2 else "specials", b, n),
            floats(seed + 70, kind, b),
        )
        got = ops.run(bodies.chain, *given)
        draft, ids, target, u, final = (t.numpy() for t in given)
        for row in range(b):
            tokens, accepted = chain_of(draft[row], ids[row].tolist(), target[row], u[row], final[row])
            assert got.output_ids[row].tolist() == tokens
            assert got.accepted[row] == accepted
            assert all(0 <= token < vocab for token in tokens[: accepted + 1])


@pytest.mark.parametrize("kind", KINDS)
def test_dflash(ops: TritonOps, kind: str) -> None:
    for seed in SEEDS:
        batch, size, vocab = 40, 1 + seed, (2, 3, 9, 40, 130, 7)[seed]
        blocks = Blocks(
            numbers(seed, vocab, batch, size),
            floats(seed + 50, kind, batch, size, vocab),
            floats(seed + 60, kind if seed % 2 else "ordinary", batch, size),
            floats(seed + 70, kind, batch),
        )
        thresholds = (0.5, 0.5) if seed % 3 else (1.0, 1.0)
        got = ops.run(bodies.dflash, blocks, thresholds)
        want = walk(linear(blocks), *thresholds)
        assert got.accept_len.tolist() == want.accept_token_num.tolist()
        assert got.tokens.flatten().tolist() == want.predicts.tolist()
        assert ((got.bonus >= 0) & (got.bonus < vocab)).all()


@pytest.mark.parametrize("kind", KINDS)
def test_tree(ops: TritonOps, kind: str) -> None:
    for seed in SEEDS:
        batch, size, vocab = 40, 2 + seed, (2, 3, 9, 40, 130, 7)[seed]
        rng = np.random.default_rng(seed)
        # of each position there is one: of two writes to one place either may stay
        position = numbers(seed, 1, batch, size)
        own = torch.from_numpy(rng.permutation(batch * size).reshape(batch, size))
        position = torch.where((position >= 0) & (position < batch * size), own, position)
        given = poisoned(
            1 + seed,
            candidates=numbers(seed + 1, vocab, batch, size),
            retrive_index=position,
            retrive_next_token=numbers(seed + 2, size, batch, size),
            retrive_next_sibling=numbers(seed + 3, size, batch, size),
            uniform_samples=floats(seed + 60, kind if seed % 2 else "ordinary", batch, size),
            uniform_samples_for_final_sampling=floats(seed + 70, kind, batch),
            target_probs=floats(seed + 50, kind, batch, size, vocab),
        )
        given = given._replace(draft_probs=floats(seed + 80, kind, batch, size, vocab))
        thresholds = (0.5, 0.5) if seed % 3 else (1.0, 1.0)
        got, want = ops.run(bodies.tree, given, thresholds), walk(given, *thresholds)
        for name in MUTATED:
            have, expected = getattr(got, name).numpy(), getattr(want, name)
            np.testing.assert_array_equal(have.view(np.int32), expected.view(np.int32), name)
        written = got.predicts[got.predicts != -1]
        assert ((written >= 0) & (written < vocab)).all()


@pytest.mark.parametrize("seed", SEEDS)
def test_greedy(ops: TritonOps, seed: int) -> None:
    batch, size = 50, 1 + seed
    got = ops.run(bodies.greedy, numbers(seed, 1, batch, size), numbers(seed + 1, 1, batch, size))
    assert ((got.accept_len >= 0) & (got.accept_len < size)).all()
