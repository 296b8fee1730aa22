"""What comes out of draft-then-verify is distributed as the target: chi-square over the first two tokens.

A model of a few tokens, whose distributions depend on the tokens before, stands for the target. Seeds are fixed, so a
test passes always or never; right code fails a seed with the probability 1e-4.
"""

from __future__ import annotations

import numpy as np
import pytest
import speculative_bodies as bodies
import torch
from numpy.typing import NDArray
from speculative_bodies import Blocks, poisoned, uniforms
from triton_backend import TritonOps

VOCAB, ROWS = 6, 150_000
SIGNIFICANCE = 1e-4

Model = tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.float32]]
"""What the first token is drawn from ``[V]``, the second ``[V, V]`` by the first, the third ``[V, V, V]``."""


def a_model(seed: int) -> Model:
    """With a token of no probability in the first row, and one that is rare."""
    rng = np.random.default_rng(seed)
    logits = [rng.standard_normal((VOCAB,) * n) * 1.5 for n in (1, 2, 3)]
    logits[0][4], logits[0][2] = -np.inf, -5
    first, second, third = (np.exp(x) / np.exp(x).sum(-1, keepdims=True) for x in logits)
    return first.astype(np.float32), second.astype(np.float32), third.astype(np.float32)


def draft_of(model: Model, quality: str) -> Model:
    """A draft model as good as this."""
    if quality == "the target itself":
        return model
    uniform = tuple(np.full_like(p, 1 / VOCAB) for p in model)
    if quality == "uniform":
        return uniform
    if quality == "close":
        return tuple((0.8 * p + 0.2 * u).astype(np.float32) for p, u in zip(model, uniform, strict=True))
    if quality == "certain of what the target never says":
        return tuple(np.eye(VOCAB, dtype=np.float32)[np.full(p.shape[:-1], 4)] for p in model)
    assert quality == "the reverse"
    return tuple(np.ascontiguousarray(p[..., ::-1]) for p in model)


def draw(rng: np.random.Generator, probs: NDArray[np.float32]) -> NDArray[np.int64]:
    """A token from each row ``[N, V]``."""
    sums = probs.astype(np.float64).cumsum(-1)
    return (sums <= rng.random((len(probs), 1)) * sums[:, -1:]).sum(-1)


def assert_distributed(model: Model, first: NDArray[np.int64], second: NDArray[np.int64]) -> None:
    expected = model[0].astype(np.float64)[:, None] * model[1]
    expected = (expected / expected.sum() * len(first)).flatten()
    seen = np.bincount(first * VOCAB + second, minlength=VOCAB * VOCAB)
    possible = expected > 0
    assert not seen[~possible].any()
    statistic = ((seen - expected)[possible] ** 2 / expected[possible]).sum()
    degrees = torch.tensor((possible.sum() - 1) / 2, dtype=torch.float64)
    chance = float(torch.special.gammaincc(degrees, torch.tensor(statistic / 2, dtype=torch.float64)))
    assert chance > SIGNIFICANCE, (statistic, possible.sum())


def second_tokens(
    rng: np.random.Generator, model: Model, tokens: NDArray[np.int64], accepted: NDArray[np.int64]
) -> NDArray[np.int64]:
    """The second token of each row; from the target where the step ended with the first."""
    return np.where(accepted >= 1, tokens[:, 1], draw(rng, model[1][tokens[:, 0]]))


def tensors(*arrays: NDArray[np.generic]) -> list[torch.Tensor]:
    return [torch.from_numpy(np.ascontiguousarray(a)) for a in arrays]


QUALITIES = ["the target itself", "close", "uniform", "the reverse", "certain of what the target never says"]


@pytest.mark.parametrize("quality", QUALITIES)
def test_chain_speculative_sampling(ops: TritonOps, quality: str) -> None:
    rng, model = np.random.default_rng(1), a_model(2)
    draft = draft_of(model, quality)
    x = draw(rng, np.broadcast_to(draft[0], (ROWS, VOCAB)))
    y = draw(rng, draft[1][x])
    draft_probs = np.stack((np.broadcast_to(draft[0], (ROWS, VOCAB)), draft[1][x]), 1)
    target_probs = np.stack((np.broadcast_to(model[0], (ROWS, VOCAB)), model[1][x], model[2][x, y]), 1)
    ids = np.stack((x, y), 1)
    got = ops.run(bodies.chain, *tensors(draft_probs, ids, target_probs, uniforms(rng, ROWS, 2), uniforms(rng, ROWS)))
    tokens, accepted = got.output_ids.long().numpy(), got.accepted.numpy()
    assert (accepted.mean() > 1.99) == (quality == "the target itself")
    assert (accepted.mean() == 0) == (quality == QUALITIES[-1])
    assert_distributed(model, tokens[:, 0], second_tokens(rng, model, tokens, accepted))


@pytest.mark.parametrize("quality", QUALITIES)
def test_dflash_chain_verify(ops: TritonOps, quality: str) -> None:
    """By the target's probabilities alone, wherever the drafts come from."""
    rng, model = np.random.default_rng(3), a_model(4)
    draft = draft_of(model, quality)
    x = draw(rng, np.broadcast_to(draft[0], (ROWS, VOCAB)))
    y = draw(rng, draft[1][x])
    target_probs = np.stack((np.broadcast_to(model[0], (ROWS, VOCAB)), model[1][x], model[2][x, y]), 1)
    candidates = np.stack((np.zeros_like(x), x, y), 1)
    blocks = Blocks(*tensors(candidates, target_probs, uniforms(rng, ROWS, 3), uniforms(rng, ROWS)))
    got = ops.run(bodies.dflash, blocks)
    tokens, accepted = got.tokens.numpy(), got.accept_len.numpy()
    assert_distributed(model, tokens[:, 0], second_tokens(rng, model, tokens, accepted))


def draw_apart(rng: np.random.Generator, probs: NDArray[np.float32], count: int) -> list[NDArray[np.int64]]:
    """Different tokens of each row ``[N, V]``, one drawn after another: Gumbel's top-k (Kool et al., 2019)."""
    noise = rng.gumbel(size=probs.shape) + np.log(probs + 1e-9)
    return list(noise.argsort(-1)[:, ::-1][:, :count].T)


@pytest.mark.parametrize("quality", QUALITIES)
def test_tree(ops: TritonOps, quality: str) -> None:
    """Two or three children a node, no two the same, drawn by the draft model."""
    rng, model = np.random.default_rng(5), a_model(6)
    draft = draft_of(model, quality)
    children = draw_apart(rng, np.broadcast_to(draft[0], (ROWS, VOCAB)), 3)
    grandchildren = [*draw_apart(rng, draft[1][children[0]], 2), *draw_apart(rng, draft[1][children[1]], 2)]
    candidates = np.stack((np.zeros(ROWS, np.int64), *children, *grandchildren), 1)
    # 0 -> 1, 2, 3;  1 -> 4, 5;  2 -> 6, 7
    given = {
        "candidates": candidates,
        "retrive_index": np.arange(ROWS * 8).reshape(ROWS, 8),
        "retrive_next_token": np.tile([1, 4, 6, -1, -1, -1, -1, -1], (ROWS, 1)),
        "retrive_next_sibling": np.tile([-1, 2, 3, -1, 5, -1, 7, -1], (ROWS, 1)),
        "uniform_samples": uniforms(rng, ROWS, 8),
        "uniform_samples_for_final_sampling": uniforms(rng, ROWS),
        "target_probs": np.stack(
            (
                np.broadcast_to(model[0], (ROWS, VOCAB)),
                *(model[1][x] for x in children),
                *(model[2][children[i], y] for i, y in zip((0, 0, 1, 1), grandchildren, strict=True)),
            ),
            1,
        ),
    }
    after = ops.run(bodies.tree, poisoned(3, **{k: tensors(v)[0] for k, v in given.items()}))
    accepted = after.accept_token_num.numpy()
    if quality == "close":
        assert set(accepted.tolist()) == {0, 1, 2}
    path = np.where(after.accept_index.numpy() < 0, 0, after.accept_index.numpy())
    tokens = after.predicts.long().numpy()[path]
    assert_distributed(model, tokens[:, 0], second_tokens(rng, model, tokens, accepted))
