"""tree_speculative_sampling_target_only, node by node against the specification in plain Python."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import speculative_bodies as bodies
import torch
from speculative_bodies import MUTATED, Tree, distributions, poisoned, random_trees, uniforms, walk
from triton_backend import TritonOps

# (bs, D, V)
SHAPES = [(0, 5, 9), (1, 1, 2), (64, 2, 2), (64, 9, 33), (64, 16, 500), (3, 16, 4097), (1, 6, 151936), (5, 33, 40)]
THRESHOLDS = [(1.0, 1.0), (0.3, 1.0), (1.0, 0.4), (0.5, 0.7), (0.0, 1.0), (1.0, 0.0)]


def assert_as_specified(ops: TritonOps, given: Tree, thresholds: tuple[float, float] = (1.0, 1.0)) -> Tree:
    """All that is mutated, to the bit; returns it."""
    got, want = ops.run(bodies.tree, given, thresholds), walk(given, *thresholds)
    for name in MUTATED:
        have, expected = getattr(got, name), getattr(want, name)
        assert have.numpy().tobytes() == np.ascontiguousarray(expected).tobytes(), name
    return got


@pytest.mark.parametrize("thresholds", THRESHOLDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_against_the_specification(
    ops: TritonOps, shape: tuple[int, int, int], thresholds: tuple[float, float]
) -> None:
    assert_as_specified(ops, random_trees(1, *shape), thresholds)


@pytest.mark.parametrize(("single", "acc"), [(1.0, 1.0), (0.6, 0.7)])
def test_as_the_engines_define_it(ops: TritonOps, single: float, acc: float) -> None:
    """In fp64, accepting at ``coin <= acc`` and looking at used slots alone: SGLang's semantics of the op of this name.

    The two differ where a uniform meets a sum to within the rounding of 400 differences of fp32 numbers, which is rare.
    """
    given = random_trees(20, 300, 10, 400, path_size=6)
    after = ops.run(bodies.tree, given, (single, acc))
    target, differing = given.target_probs.double(), 0
    for b in range(300):
        node, path, refused = 0, [0], {}
        while len(path) < 6 and node >= 0:
            coin, total, refused = float(given.uniform_samples[b, node]), 0.0, {}
            child = int(given.retrive_next_token[b, node])
            while child >= 0:
                token = int(given.candidates[b, child])
                p = float(target[b, node, token])
                total += p
                if p > 0 and (coin <= total / acc or p >= single):
                    break
                refused[token] = p
                child = int(given.retrive_next_sibling[b, child])
            if child < 0:
                break
            node, refused = child, {}
            path.append(child)
        assert after.accept_token_num[b] == len(path) - 1
        assert after.accept_index[b, : len(path)].tolist() == given.retrive_index[b, path].tolist()
        for parent, child in pairwise(path):
            assert after.predicts[given.retrive_index[b, parent]] == given.candidates[b, child]
        left = target[b, path[-1]].clone()
        for token, p in refused.items():
            assert float(after.draft_probs[b, path[-1], token]) == p
            left[token] = 0.0
        aim = float(given.uniform_samples_for_final_sampling[b]) * left.sum()
        if left.sum() > 0 and after.predicts[given.retrive_index[b, path[-1]]] != (left.cumsum(0) <= aim).sum():
            differing += 1
            assert (left.cumsum(0) - aim).abs().min() < 400 * 2.0**-25
    assert differing < 3


@pytest.mark.parametrize("path_size", [1, 2, 3, 6, 20])
def test_paths_of_any_size(ops: TritonOps, path_size: int) -> None:
    """S from 1, for the root alone, to more than the tree has nodes."""
    given = random_trees(2, 200, 6, 12, path_size=path_size)
    after = assert_as_specified(ops, given, (0.2, 1.0))
    longest = min(path_size, 6) - 1
    assert after.accept_token_num.max() == longest
    # a draft's probabilities are left out once S - 1 are accepted, and at no other end
    given.draft_probs.copy_(torch.from_numpy(distributions(np.random.default_rng(3), 200, 6, 12)))
    assert_as_specified(ops, given, (0.2, 1.0))


def test_what_the_results_mean(ops: TritonOps) -> None:
    """Paths lead down the tree, tokens along them are the candidates, and what was tried is left in draft_probs."""
    given = random_trees(4, 300, 8, 25)
    after = ops.run(bodies.tree, given)
    node_at = {int(at): divmod(i, 8) for i, at in enumerate(given.retrive_index.flatten())}
    second_children = 0
    for b in range(300):
        count = int(after.accept_token_num[b])
        path = [node_at[at] for at in after.accept_index[b, : count + 1].tolist()]
        assert path[0] == (b, 0)
        assert (after.accept_index[b, count + 1 :] == -1).all()
        for (_, parent), (owner, child) in pairwise(path):
            assert owner == b
            tried, tokens = int(given.retrive_next_token[b, parent]), []
            while tried != child:
                tokens.append(int(given.candidates[b, tried]))
                tried = int(given.retrive_next_sibling[b, tried])
            second_children += bool(tokens)
            assert after.predicts[given.retrive_index[b, parent]] == given.candidates[b, child]
            assert set(after.draft_probs[b, parent].nonzero().flatten().tolist()) <= set(tokens)
    used = (after.accept_token_num + 1).sum()
    assert (after.predicts >= 0).sum() == used
    assert second_children > 20


def test_one_uniform_for_all_children(ops: TritonOps) -> None:
    """Children of 0.25, 0.25 and 0.5: the uniform of their parent decides; one that is a sum falls to the next."""
    coins = torch.tensor([0.0, 0.2, 0.25, 0.3, 0.5, 0.75, 1 - 2.0**-24])
    batch = len(coins)
    target = torch.zeros(batch, 4, 6)
    target[:, 0, [1, 2, 3]] = torch.tensor([0.25, 0.25, 0.5])
    target[:, 1:, 5] = 1.0
    given = poisoned(
        candidates=torch.tensor([[0, 1, 2, 3]]).repeat(batch, 1),
        retrive_index=torch.arange(batch * 4).view(batch, 4),
        retrive_next_token=torch.tensor([[1, -1, -1, -1]]).repeat(batch, 1),
        retrive_next_sibling=torch.tensor([[-1, 2, 3, -1]]).repeat(batch, 1),
        uniform_samples=coins.unsqueeze(-1).repeat(1, 4),
        uniform_samples_for_final_sampling=torch.rand(batch, generator=torch.Generator().manual_seed(1)),
        target_probs=target,
    )
    after = assert_as_specified(ops, given)
    assert after.predicts.view(batch, 4)[:, 0].tolist() == [1, 1, 2, 2, 3, 3, 3]


def test_the_same_child_twice(ops: TritonOps) -> None:
    """Its probability counts twice: the running sum is of children, not of tokens."""
    given = random_trees(5, 100, 8, 4)
    given.candidates.fill_(2)
    after = assert_as_specified(ops, given)
    assert after.accept_token_num.max() > 1


def test_every_child_refused_and_nothing_left(ops: TritonOps) -> None:
    """The uniform is above the sum of all there is: the last token comes from the whole target row."""
    target = torch.zeros(50, 3, 8)
    target[:, 0, [2, 6]] = torch.tensor([0.4, 0.6]) * (1 - 2.0**-20)
    given = poisoned(
        candidates=torch.tensor([[0, 6, 2]]).repeat(50, 1),
        retrive_index=torch.arange(150).view(50, 3),
        retrive_next_token=torch.tensor([[1, -1, -1]]).repeat(50, 1),
        retrive_next_sibling=torch.tensor([[-1, 2, -1]]).repeat(50, 1),
        uniform_samples=torch.full((50, 3), 1 - 2.0**-24),
        uniform_samples_for_final_sampling=torch.arange(50) / 50,
        target_probs=target,
    )
    after = assert_as_specified(ops, given)
    assert not after.accept_token_num.any()
    assert after.predicts.view(50, 3)[:, 0].unique().tolist() == [2, 6]


def test_rows_off_the_path_are_not_read(ops: TritonOps) -> None:
    """NaN in them changes nothing, and stays as it is; ids of nobody, and uniforms, likewise."""
    given = random_trees(6, 200, 8, 30)
    want = ops.run(bodies.tree, given)
    position = given.retrive_index
    on_path = (position.unsqueeze(-1) == want.accept_index.unsqueeze(1)).any(-1)
    given.target_probs[~on_path] = torch.nan
    given.draft_probs[~on_path] = torch.nan
    given.uniform_samples[~on_path] = torch.nan
    after = assert_as_specified(ops, given)
    for name in ("predicts", "accept_index", "accept_token_num"):
        assert torch.equal(getattr(after, name), getattr(want, name)), name
    assert torch.equal(after.draft_probs[on_path], want.draft_probs[on_path])


def test_more_positions_than_nodes(ops: TritonOps) -> None:
    """As engines give predicts, with an element to spare: -1 after the call, like every other that is not used."""
    given = random_trees(7, 5, 4, 10)
    given = given._replace(predicts=torch.full((27,), 777, dtype=torch.int32), retrive_index=given.retrive_index + 7)
    after = assert_as_specified(ops, given)
    assert (after.predicts[:7] == -1).all()


@pytest.mark.parametrize("bad", [-1, -2, 32, 33, (1 << 31) - 1, (1 << 40) + 1, -(1 << 63)])
def test_positions_out_of_range(ops: TritonOps, bad: int) -> None:
    """Nothing is written for them, accept_index has -1, and the walk goes on."""
    given = random_trees(8, 4, 8, 10)
    whole = ops.run(bodies.tree, given, (0.0, 1.0))
    given.retrive_index[:, 0] = bad
    given.retrive_index[::2, 1:3] = bad
    after = assert_as_specified(ops, given, (0.0, 1.0))
    assert (after.accept_index[:, 0] == -1).all()
    assert torch.equal(after.accept_token_num, whole.accept_token_num)
    assert after.accept_token_num.any()


@pytest.mark.parametrize("bad", [-1, 30, 1 << 31, -(1 << 31), (1 << 62) + 3, -(1 << 63)])
def test_tokens_out_of_range_are_refused(ops: TritonOps, bad: int) -> None:
    """Even where the thresholds take everything; and nothing is written to draft_probs for them."""
    given = random_trees(9, 60, 8, 30)
    given.candidates[:, 1:4] = bad
    after = assert_as_specified(ops, given, (0.0, 0.0))
    refused = given.retrive_index[:, 1:4].unsqueeze(-1) == after.accept_index.unsqueeze(1)
    assert not refused.any()


MALFORMED = {
    "a node is its own child": (("retrive_next_token", 0, 0),),
    "a node is its own sibling": (("retrive_next_sibling", 1, 1),),
    "two siblings in a circle": (("retrive_next_sibling", 1, 2), ("retrive_next_sibling", 2, 1)),
    "a child that is the root": (("retrive_next_token", 1, 0), ("retrive_next_token", 0, 1)),
    "past the end": (("retrive_next_token", 0, 6), ("retrive_next_sibling", 1, 6)),
    "far past the end": (("retrive_next_token", 0, 1 << 40),),
    "2 to the 32, which is 0 in 32 bits": (("retrive_next_token", 1, 1 << 32), ("retrive_next_token", 0, 1)),
    "far below": (("retrive_next_token", 0, -(1 << 63)), ("retrive_next_sibling", 2, -7)),
}


@pytest.mark.parametrize("links", MALFORMED.values(), ids=MALFORMED.keys())
def test_malformed_trees(ops: TritonOps, links: tuple[tuple[str, int, int], ...]) -> None:
    """They end, and as the walk of at most D - 1 nodes does."""
    for path_size in (3, 6, 12):
        given = random_trees(10, 64, 6, 8, path_size=path_size)
        for name, node, leads_to in links:
            getattr(given, name)[:, node] = leads_to
        for thresholds in ((1.0, 1.0), (0.0, 1.0)):
            assert_as_specified(ops, given, thresholds)


def test_random_links(ops: TritonOps) -> None:
    """Graphs that are no trees at all; a node may come twice."""
    rng = np.random.default_rng(11)
    given = random_trees(12, 500, 7, 6)
    for links in (given.retrive_next_token, given.retrive_next_sibling):
        links.copy_(torch.from_numpy(rng.integers(-1, 8, (500, 7))))
    after = assert_as_specified(ops, given, (0.5, 1.0))
    assert after.accept_token_num.max() == 6


def test_deterministic_changes_nothing(ops: TritonOps) -> None:
    given = random_trees(13, 40, 8, 100)
    results = [ops.run(bodies.tree, given, (1.0, 1.0), flag) for flag in (True, False, True)]
    for name in MUTATED:
        assert torch.equal(getattr(results[0], name), getattr(results[1], name))
        assert torch.equal(getattr(results[0], name), getattr(results[2], name))


def test_strided_inputs(ops: TritonOps) -> None:
    """All that is only read may have any strides."""
    given = random_trees(14, 6, 5, 20)
    apart = {}
    for name, t in given._asdict().items():
        if name not in MUTATED:
            wide = torch.full([2 * n for n in t.shape], 7, dtype=t.dtype)
            apart[name] = wide[tuple(slice(0, None, 2) for _ in t.shape)].copy_(t)
    got, want = ops.run(bodies.tree, given._replace(**apart)), ops.run(bodies.tree, given)
    for name in MUTATED:
        assert torch.equal(getattr(got, name), getattr(want, name)), name


def test_engine_thresholds_and_scale(ops: TritonOps) -> None:
    """As engines call it: wide trees, draft probabilities of zero, and results that hold what was there before."""
    rng = np.random.default_rng(15)
    given = random_trees(16, 8, 32, 2000, path_size=6)
    given = given._replace(uniform_samples=torch.from_numpy(uniforms(rng, 8, 32)))
    after = assert_as_specified(ops, given, (0.9, 0.8))
    again = given._replace(predicts=after.predicts, accept_index=after.accept_index)
    twice = ops.run(bodies.tree, again, (0.9, 0.8))
    assert torch.equal(twice.predicts, after.predicts)
    assert torch.equal(twice.accept_index, after.accept_index)
