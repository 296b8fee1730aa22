"""The Triton kernels of verification under Triton's interpreter, against the specification in plain Python.

On a GPU all tests of the ops run on Triton too.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import speculative_bodies as bodies
import torch
from cases import make
from speculative_bodies import MUTATED, Blocks, Tree, chain_of, distributions, likely_ids, linear, uniforms, walk
from triton_backend import TritonOps, to

# (requests, drafts or nodes, V): a row of one tile and of two, no drafts, a power of two of drafts, one token
SHAPES = [(20, 5, 33), (1, 3, 8199), (4, 1, 2), (3, 9, 700), (2, 8, 1), (0, 3, 9)]
shapes = pytest.mark.parametrize("shape", SHAPES)


def arrays_of(seed: int, batch: int, size: int, vocab: int) -> tuple[Any, ...]:
    """Draft and target probabilities that are often alike, likely ids of the drafts, uniforms."""
    rng = np.random.default_rng(seed)
    target = distributions(rng, batch, size, vocab)
    draft = distributions(rng, batch, size - 1, vocab)
    target[:, :-1] = 0.8 * draft + 0.2 * target[:, :-1]
    return draft, likely_ids(rng, draft), target, uniforms(rng, batch, size), uniforms(rng, batch)


def check_chain(ops: TritonOps, given: tuple[torch.Tensor, ...]) -> list[int]:
    got = ops.run(bodies.chain, *given)
    draft, ids, target, u, final = (t.numpy() for t in given)
    for row in range(len(ids)):
        tokens, accepted = chain_of(draft[row], ids[row].tolist(), target[row], u[row], final[row])
        assert got.output_ids[row].tolist() == tokens
        assert got.accepted[row] == accepted
    return got.accepted.tolist()


@shapes
def test_chain_sampling(interpreted_ops: TritonOps, shape: tuple[int, int, int]) -> None:
    draft, ids, target, u, final = map(torch.from_numpy, arrays_of(1, *shape))
    accepted = check_chain(interpreted_ops, (draft, ids.int(), target, u[:, 1:].contiguous(), final))
    assert shape != SHAPES[0] or set(accepted) == set(range(shape[1]))


def test_ids_out_of_range_and_rows_that_are_not_read(interpreted_ops: TritonOps) -> None:
    draft, ids, target, u, final = map(torch.from_numpy, arrays_of(2, 10, 5, 40))
    ids[::2, 2] = torch.tensor([-1, 40, 1 << 31, -(1 << 63), (1 << 62) + 3])
    target[::2, :2], u[::2] = draft[::2, :2], 0.0
    target[::2, 3:], draft[::2, 3:] = torch.nan, torch.nan
    accepted = check_chain(interpreted_ops, (draft, ids, target, u[:, 1:].contiguous(), final))
    assert 2 in accepted[::2]


def test_refused_though_the_distributions_are_equal(interpreted_ops: TritonOps) -> None:
    """Nothing is left: the token is one of the target's."""
    draft, ids, target, u, final = map(torch.from_numpy, arrays_of(3, 10, 2, 12))
    target[:, 0], ids[:, 0] = draft[:, 0], -1
    assert not any(check_chain(interpreted_ops, (draft, ids, target, u[:, 1:].contiguous(), final)))


def test_where_a_uniform_meets_a_ratio(interpreted_ops: TritonOps) -> None:
    """u * q < p, strictly, with the product rounded to fp32: most of these the exact product would decide otherwise."""
    rng = np.random.default_rng(4)
    q = rng.random(4000).astype(np.float32)
    p = (q * rng.random(4000)).astype(np.float32)
    u = p / q
    exact = u.astype(np.float64) * q.astype(np.float64)
    is_refused_by_rounding, is_accepted = (exact < p) & (u * q == p), u * q < p
    chosen = np.concatenate((np.flatnonzero(is_refused_by_rounding)[:12], np.flatnonzero(is_accepted)[:4]))
    draft, target = np.zeros((16, 1, 3), np.float32), np.zeros((16, 2, 3), np.float32)
    draft[:, 0, 1], target[:, 0, 1], target[:, :, 2] = q[chosen], p[chosen], 0.5
    given = draft, np.ones((16, 1), np.int64), target, u[chosen, None], uniforms(rng, 16)
    accepted = check_chain(interpreted_ops, tuple(map(torch.from_numpy, given)))
    assert accepted == [0] * 12 + [1] * 4


@shapes
def test_dflash(interpreted_ops: TritonOps, shape: tuple[int, int, int]) -> None:
    _, ids, target, u, final = map(torch.from_numpy, arrays_of(5, *shape))
    candidates = torch.cat((torch.full((shape[0], 1), -5), ids), 1)
    blocks = Blocks(candidates, target, u, final)
    for thresholds in ((1.0, 1.0), (0.5, 0.7)):
        got, want = interpreted_ops.run(bodies.dflash, blocks, thresholds), walk(linear(blocks), *thresholds)
        assert got.accept_len.tolist() == want.accept_token_num.tolist()
        assert got.tokens.flatten().tolist() == want.predicts.tolist()
        assert got.bonus.tolist() == got.tokens.gather(1, got.accept_len.long().unsqueeze(1)).flatten().tolist()


@pytest.mark.parametrize(("single", "acc"), [(1.0, 0.7), (0.3, 1.0)])
def test_dflash_and_trees_at_their_thresholds(interpreted_ops: TritonOps, single: float, acc: float) -> None:
    """``coin < p / threshold_acc`` strictly, divided in fp32; ``p >= threshold_single`` of fp32 numbers."""
    rng = np.random.default_rng(12)
    p = (rng.random(15) * 0.6).astype(np.float32)
    p[:3], p[3:6] = single, np.nextafter(np.float32(single), np.float32(0))
    target = np.zeros((15, 2, 4), np.float32)
    target[:, 0, 2], target[:, 0, 3], target[:, 1, 1] = p, 1 - p, 1
    coin = p / np.float32(acc)
    coin[::3] = np.nextafter(coin[::3], np.float32(0))
    blocks = Blocks(*map(torch.from_numpy, (np.full((15, 2), 2), target, np.stack((coin, coin), 1), uniforms(rng, 15))))
    want = ((np.arange(15) % 3 == 0) | (p >= np.float32(single))).astype(int).tolist()
    assert interpreted_ops.run(bodies.dflash, blocks, (single, acc)).accept_len.tolist() == want
    assert interpreted_ops.run(bodies.tree, linear(blocks), (single, acc)).accept_token_num.tolist() == want


@pytest.mark.parametrize("dtypes", [(torch.int64, torch.int32), (torch.int32, torch.int64)])
@pytest.mark.parametrize("shape", [(40, 5), (3, 1), (0, 4)])
def test_greedy(interpreted_ops: TritonOps, shape: tuple[int, int], dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    rng = np.random.default_rng(6)
    predicted = rng.integers(-(1 << 31), 1 << 31, shape)
    candidates = np.where(rng.random(shape) < 0.7, np.roll(predicted, 1, 1), rng.integers(0, 9, shape))
    got = interpreted_ops.run(
        bodies.greedy, torch.from_numpy(candidates).to(dtypes[0]), torch.from_numpy(predicted).to(dtypes[1])
    )
    right = (candidates[:, 1:] == predicted[:, :-1]).cumprod(1).sum(1)
    assert got.accept_len.tolist() == right.tolist()
    for row, count in enumerate(right.tolist()):
        bonus = int(predicted[row, count])
        assert got.bonus[row] == bonus
        rest = [-1] * (shape[1] - 1 - count)
        assert got.tokens[row].tolist() == [*candidates[row, 1 : count + 1].tolist(), bonus, *rest]


def test_greedy_tells_ids_apart_by_all_of_their_bits(interpreted_ops: TritonOps) -> None:
    wide = torch.tensor([[0, 7 + (1 << 32), 3]])
    got = interpreted_ops.run(bodies.greedy, wide, torch.tensor([[7, 3, 9]], dtype=torch.int32))
    assert got.tokens.tolist() == [[7, -1, -1]]


# ---- trees ----


def check_tree(ops: TritonOps, given: Tree, thresholds: tuple[float, float]) -> Tree:
    """All that is mutated, to the bit; returns it."""
    got, want = ops.run(bodies.tree, given, thresholds), walk(given, *thresholds)
    for name in MUTATED:
        assert getattr(got, name).numpy().tobytes() == np.ascontiguousarray(getattr(want, name)).tobytes(), name
    return got


@shapes
def test_trees(interpreted_ops: TritonOps, shape: tuple[int, int, int]) -> None:
    for thresholds in ((1.0, 1.0), (0.3, 0.6)):
        check_tree(interpreted_ops, bodies.random_trees(7, *shape), thresholds)


@pytest.mark.parametrize("path_size", [1, 2, 6, 20])
def test_paths_of_any_size(interpreted_ops: TritonOps, path_size: int) -> None:
    """And a draft that is left out once S - 1 nodes are accepted."""
    given = bodies.random_trees(8, 20, 6, 12, path_size=path_size)
    given.draft_probs.copy_(torch.from_numpy(distributions(np.random.default_rng(3), 20, 6, 12)))
    after = check_tree(interpreted_ops, given, (0.02, 1.0))
    assert after.accept_token_num.max() == min(path_size, 6) - 1


def test_random_links_positions_and_ids(interpreted_ops: TritonOps) -> None:
    """Walks end on links that make no tree; what is no position, node or id is never read or written."""
    rng = np.random.default_rng(9)
    given = bodies.random_trees(10, 40, 7, 6)
    for links in (given.retrive_next_token, given.retrive_next_sibling):
        links.copy_(torch.from_numpy(rng.integers(-2, 9, (40, 7))))
        links[torch.from_numpy(rng.random((40, 7)) < 0.05)] = 1 << 32
    for indices in (given.retrive_index, given.candidates):
        indices[torch.from_numpy(rng.random((40, 7)) < 0.1)] = 1 << 40
        indices[torch.from_numpy(rng.random((40, 7)) < 0.1)] = -(1 << 63)
    after = check_tree(interpreted_ops, given, (0.5, 1.0))
    assert after.accept_token_num.max() > 2


@pytest.mark.parametrize("kind", ["bits", "specials", "zeros"])
def test_garbage(interpreted_ops: TritonOps, kind: str) -> None:
    given = bodies.random_trees(11, 12, 5, 9)
    fields = ("uniform_samples", "uniform_samples_for_final_sampling", "target_probs", "draft_probs")
    odd = {name: make(i, tuple(getattr(given, name).shape), torch.float32, kind) for i, name in enumerate(fields)}
    check_tree(interpreted_ops, given._replace(**odd), (0.5, 0.5))
    draft, target = odd["draft_probs"][:, :4].contiguous(), odd["target_probs"]
    ids, u = given.candidates[:, 1:].contiguous(), odd["uniform_samples"][:, 1:].contiguous()
    check_chain(interpreted_ops, (draft, ids, target, u, odd["uniform_samples_for_final_sampling"]))


# ---- inside torch ----


def test_compile_without_graph_breaks(interpreted_ops: TritonOps) -> None:
    interpreted_ops.run(bodies.everything_compiles)


def operators_as_registered(device: str) -> None:
    """By torch's own checks: schema, registration, fakes, tracing."""
    *fields, draft, ids = to(bodies.everything_arguments(2), device)
    tree = Tree(*fields)
    u, final = tree.uniform_samples, tree.uniform_samples_for_final_sampling
    count, bonus = torch.empty(2, dtype=torch.int32, device=device), torch.empty_like(ids[:, 0])
    tokens = torch.empty_like(tree.candidates)
    samples = {
        "chain_speculative_sampling_out": (draft, ids, tree.target_probs, u[:, 1:], final, tokens.int(), count),
        "dflash_chain_verify_out": (tree.candidates, tree.target_probs, u, final, 0.9, 0.8, count, bonus, tokens),
        "greedy_chain_verify_out": (tree.candidates, tree.candidates.roll(1, 1), count, bonus, tokens),
        "tree_speculative_sampling_target_only": (*tree, 0.9, 0.8),
    }
    for name, arguments in samples.items():
        given = [t.contiguous() if isinstance(t, torch.Tensor) else t for t in arguments]
        torch.library.opcheck(getattr(torch.ops.fusedcomm_triton, name).default, given)


def test_operators_are_as_torch_wants_them(interpreted_ops: TritonOps) -> None:
    interpreted_ops.run(operators_as_registered)
