"""dflash_chain_verify against the specification and the tree op, and greedy_chain_verify against a loop."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import speculative_bodies as bodies
import torch
from speculative_bodies import Blocks, distributions, likely_ids, linear, uniforms, walk
from triton_backend import TritonOps

# (bs, D, V)
SHAPES = [(0, 4, 9), (1, 1, 2), (64, 2, 2), (64, 7, 33), (64, 16, 1000), (3, 16, 4097), (1, 8, 151936)]
THRESHOLDS = [(1.0, 1.0), (0.3, 1.0), (1.0, 0.4), (0.5, 0.7), (0.0, 1.0), (1.0, 0.0)]


def random_blocks(seed: int, batch: int, size: int, vocab: int) -> Blocks:
    """Candidates that are likely after the one before; the current token, which is not looked at, is no id."""
    rng = np.random.default_rng(seed)
    target = distributions(rng, batch, size, vocab)
    candidates = np.concatenate((np.full((batch, 1), -5), likely_ids(rng, target)[:, :-1]), 1)
    arrays = candidates, target, uniforms(rng, batch, size), uniforms(rng, batch)
    return Blocks(*(torch.from_numpy(a) for a in arrays))


def of_the_tree(after: bodies.Tree) -> tuple[list[int], list[int], list[list[int]]]:
    """accept_len, bonus and tokens as a tree without branches gives them."""
    accepted = after.accept_token_num.tolist()
    rows = torch.as_tensor(after.predicts).view(after.candidates.shape).tolist()
    return accepted, [row[count] for row, count in zip(rows, accepted, strict=True)], rows


def assert_verified(got: Any, want: tuple[list[int], list[int], list[list[int]]]) -> None:
    assert [t.dtype for t in got] == [torch.int32, torch.int64, torch.int64]
    assert tuple(t.tolist() for t in got) == want


@pytest.mark.parametrize("thresholds", THRESHOLDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_dflash(ops: TritonOps, shape: tuple[int, int, int], thresholds: tuple[float, float]) -> None:
    """What the specification's walk makes of a tree without branches, and what the tree op does."""
    blocks = random_blocks(1, *shape)
    got = ops.run(bodies.dflash, blocks, thresholds)
    assert_verified(got, of_the_tree(walk(linear(blocks), *thresholds)))
    assert_verified(got, of_the_tree(ops.run(bodies.tree, linear(blocks), thresholds)))


def test_dflash_meets_every_length(ops: TritonOps) -> None:
    blocks = random_blocks(2, 600, 6, 20)
    got = ops.run(bodies.dflash, blocks, (0.7, 0.7))
    assert set(got.accept_len.tolist()) == set(range(6))
    for b, count in enumerate(got.accept_len.tolist()):
        assert got.tokens[b].tolist() == [
            *blocks.candidates[b, 1 : count + 1].tolist(),
            int(got.bonus[b]),
            *[-1] * (5 - count),
        ]
        if count < 5:  # the refused token is left out
            assert got.bonus[b] != blocks.candidates[b, count + 1]


def test_dflash_is_the_chain_of_certain_drafts(ops: TritonOps) -> None:
    """Drafts with the probability 1 make chain_speculative_sampling the same op."""
    blocks = random_blocks(3, 200, 5, 30)
    blocks.target_probs[blocks.target_probs == 1] = 0.75  # 1 is accepted by its threshold, and has nothing beside it
    ids = blocks.candidates[:, 1:]
    certain = torch.nn.functional.one_hot(ids, 30).float()
    drawn = ops.run(bodies.chain, certain, ids, blocks.target_probs, blocks.uniforms[:, :-1], blocks.final_uniforms)
    got = ops.run(bodies.dflash, blocks)
    assert drawn.accepted.tolist() == got.accept_len.tolist()
    assert drawn.output_ids.tolist() == got.tokens.tolist()


@pytest.mark.parametrize(("single", "acc"), [(1.0, 0.7), (0.3, 1.0), (0.55, 0.9)])
def test_dflash_at_its_thresholds(ops: TritonOps, single: float, acc: float) -> None:
    """``coin < p / threshold_acc`` strictly, divided and rounded in fp32; ``p >= threshold_single`` of fp32 numbers."""
    rng = np.random.default_rng(4)
    p = (rng.random(3000) * 0.6).astype(np.float32)
    p[:100], p[100:200] = single, np.nextafter(np.float32(single), np.float32(0))
    target = np.zeros((3000, 2, 4), np.float32)
    target[:, 0, 2], target[:, 0, 3], target[:, 1, 1] = p, 1 - p, 1
    quotient = p / np.float32(acc)
    at_once = p >= np.float32(single)
    assert at_once[:100].all()
    assert not at_once[100:200].any()
    for coin, want in (
        (np.nextafter(quotient, np.float32(0)), np.full(3000, True)),
        (quotient, at_once),
        (np.nextafter(quotient, np.float32(2)), at_once),
    ):
        arrays = np.full((3000, 2), 2), target, np.stack((coin, coin), 1), uniforms(rng, 3000)
        got = ops.run(bodies.dflash, Blocks(*(torch.from_numpy(a) for a in arrays)), (single, acc))
        assert got.accept_len.tolist() == want.astype(int).tolist()


def test_dflash_never_accepts_what_has_no_probability(ops: TritonOps) -> None:
    """Not at thresholds of 0, not by a uniform of 0, and no id out of range."""
    blocks = random_blocks(5, 90, 4, 30)
    blocks.uniforms.zero_()
    blocks.candidates[::3, 2] = torch.tensor([-1, 30, 1 << 40] * 10)
    blocks.target_probs[1::3, 1].scatter_(1, blocks.candidates[1::3, 2:3], 0.0)
    blocks.target_probs[1::3, 1, 0] += 1e-3
    for thresholds in ((0.0, 0.0), (0.0, 1.0), (1.0, 0.0)):
        got = ops.run(bodies.dflash, blocks, thresholds)
        assert_verified(got, of_the_tree(walk(linear(blocks), *thresholds)))
        assert set(got.accept_len[::3].tolist()) <= {0, 1}
        assert set(got.accept_len[2::3].tolist()) & {2, 3}


def test_dflash_does_not_read_on(ops: TritonOps) -> None:
    blocks = random_blocks(6, 200, 6, 30)
    want = ops.run(bodies.dflash, blocks)
    blocks.uniforms[:, -1] = torch.nan
    blocks.candidates[:, 0] = 1 << 50
    for b, count in enumerate(want.accept_len.tolist()):
        blocks.target_probs[b, count + 1 :] = torch.nan
        blocks.uniforms[b, count + 1 :] = torch.nan
        blocks.candidates[b, count + 2 :] = 99
    got = ops.run(bodies.dflash, blocks)
    assert_verified(got, tuple(t.tolist() for t in want))


# ---- greedy ----


def greedily(candidates: list[int], predicted: list[int]) -> tuple[int, int, list[int]]:
    """The longest prefix, token by token."""
    count = 0
    while count < len(candidates) - 1 and candidates[count + 1] == predicted[count]:
        count += 1
    bonus = predicted[count]
    return count, bonus, [*candidates[1 : count + 1], bonus, *[-1] * (len(candidates) - 1 - count)]


@pytest.mark.parametrize("dtypes", [(torch.int64, torch.int64), (torch.int32, torch.int64), (torch.int64, torch.int32)])
@pytest.mark.parametrize("shape", [(0, 4), (1, 1), (64, 1), (64, 2), (64, 8), (257, 16), (1024, 5)])
def test_greedy(ops: TritonOps, shape: tuple[int, int], dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    """Tokens from all of the int32 range; each draft is right in nine of ten, whatever became of those before."""
    rng = np.random.default_rng(sum(shape))
    batch, size = shape
    predicted = rng.integers(-(1 << 31), 1 << 31, shape)
    candidates = rng.integers(-(1 << 31), 1 << 31, shape)
    right = rng.random((batch, size - 1)) < 0.9
    candidates[:, 1:] = np.where(right, predicted[:, :-1], candidates[:, 1:])
    got = ops.run(bodies.greedy, torch.from_numpy(candidates).to(dtypes[0]), torch.from_numpy(predicted).to(dtypes[1]))
    rows = [greedily(a, b) for a, b in zip(candidates.tolist(), predicted.tolist(), strict=True)]
    assert_verified(got, tuple(list(column) for column in zip(*rows, strict=True)) if rows else ([], [], []))
    assert batch < 64 or got.accept_len.unique().numel() == size


def test_greedy_tells_ids_apart_by_all_of_their_bits(ops: TritonOps) -> None:
    candidates = torch.tensor([[0, 7 + (1 << 32), 3], [0, 7, 3]])
    got = ops.run(bodies.greedy, candidates, torch.tensor([[7, 3, 9], [7, 3 + (1 << 40), 9]]))
    assert_verified(got, ([0, 1], [7, 3 + (1 << 40)], [[7, -1, -1], [7, 3 + (1 << 40), -1]]))
    narrow = ops.run(bodies.greedy, candidates, torch.tensor([[7, 3, 9], [7, 3, 9]], dtype=torch.int32))
    assert narrow.accept_len.tolist() == [0, 2]
    wide = ops.run(bodies.greedy, torch.tensor([[0, 7]], dtype=torch.int32), torch.tensor([[7 + (1 << 40), 1]]))
    assert_verified(wide, ([0], [7 + (1 << 40)], [[7 + (1 << 40), -1]]))


def test_greedy_takes_strided_inputs(ops: TritonOps) -> None:
    wide = torch.arange(40).view(4, 10)
    got = ops.run(bodies.greedy, wide[:, ::2], (wide + 2)[:, ::2].flip(1).flip(1))
    assert got.accept_len.tolist() == [4] * 4
