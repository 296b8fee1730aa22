"""Speculative verification as the specification has it, and bodies of tests that run where a backend does.

It is written down again here in plain Python, a row at a time: masses are Python ints, fp32 is NumPy's. It shares
nothing with the library.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from qk_bodies import compiles
from triton_backend import to

from fusedcomm.ops import speculative

F32 = np.float32

# ---- the specification ----

FRACTION_BITS, UNIFORM_BITS = 44, 31
LARGEST = float.fromhex("0x1.fffffep+126")


def counted(p: Any) -> Any:
    """A probability: 0 where it is NaN or negative."""
    return p if p > 0 else F32(0)


def masses(row: NDArray[np.float32]) -> list[int]:
    """A row in fixed point, in a unit of its own unless its largest is in [2^-20, 2); what is above 0 has a mass."""
    values = np.where(row > 0, np.minimum(row, F32(LARGEST)), F32(0))
    exponent = max(math.frexp(float(values.max()))[1] - 1, -126)
    unit = F32(1 if -20 <= exponent <= 0 else 2.0**-exponent)
    # an fp32 times 2^44 is exact in fp64, and Python rounds halves to even
    return [max(round(y * 2.0**FRACTION_BITS), 1) if y > 0 else 0 for y in (values * unit).tolist()]


def inverse_cdf(row: list[int], u: float) -> int:
    """The smallest i with a cumulative mass > u * total, u rounded down; 0 without any mass."""
    steps = int(min(u, 1 - 2.0**-24) * 2.0**UNIFORM_BITS) if u > 0 else 0
    aim, cumulative = sum(row) * steps, 0
    for i, mass in enumerate(row):
        cumulative += mass
        if cumulative << UNIFORM_BITS > aim:
            return i
    return 0


def residual_sample(target: NDArray[np.float32], draft: NDArray[np.float32] | None, u: float) -> int:
    """From relu(target - draft); from the target where nothing is left."""
    with np.errstate(all="ignore"):
        weights = target if draft is None else target - draft
        row = weights if (weights > 0).any() else target
    return inverse_cdf(masses(row), float(u))


def chain_of(
    draft_probs: NDArray[np.float32],
    ids: Sequence[int],
    target_probs: NDArray[np.float32],
    uniforms: NDArray[np.float32],
    final_uniform: float,
) -> tuple[list[int], int]:
    """output_ids and accepted of one chain."""
    n, vocab = len(ids), target_probs.shape[-1]
    for i, x in enumerate(ids):
        inside = 0 <= x < vocab
        with np.errstate(all="ignore"):
            accepted = inside and uniforms[i] * counted(draft_probs[i, x]) < counted(target_probs[i, x])
        if not accepted:
            token = residual_sample(target_probs[i], draft_probs[i], final_uniform)
            return [*ids[:i], token, *[-1] * (n - i)], i
    return [*ids, residual_sample(target_probs[n], None, final_uniform)], n


class Tree(NamedTuple):
    """Arguments of the tree op, mutated ones included; of many rows as tensors, of one as arrays."""

    predicts: Any
    accept_index: Any
    accept_token_num: Any
    candidates: Any
    retrive_index: Any
    retrive_next_token: Any
    retrive_next_sibling: Any
    uniform_samples: Any
    uniform_samples_for_final_sampling: Any
    target_probs: Any
    draft_probs: Any


MUTATED = ("predicts", "accept_index", "accept_token_num", "draft_probs")


def walk(tree: Tree, threshold_single: float, threshold_acc: float) -> Tree:
    """The tree op, node by node; a new Tree with what it has become."""
    t = Tree(*(field.numpy().copy() for field in tree))
    size, vocab = t.target_probs.shape[1:]
    limit = t.accept_index.shape[1] - 1
    single, threshold = F32(threshold_single), F32(threshold_acc)
    for field in (t.predicts, t.accept_index):
        field[:] = -1

    def position(b: int, node: int) -> int:
        at = int(t.retrive_index[b, node])
        return at if 0 <= at < len(t.predicts) else -1

    def predict(b: int, node: int, token: int) -> None:
        if position(b, node) >= 0:
            t.predicts[position(b, node)] = token

    for b in range(len(t.candidates)):
        t.accept_index[b, 0] = position(b, 0)
        current, count, visited = 0, 0, 0
        coin, acc = t.uniform_samples[b, 0], F32(0)
        node = int(t.retrive_next_token[b, 0])
        while 0 <= node < size and count < limit and visited < size - 1:
            visited += 1
            token = int(t.candidates[b, node])
            inside = 0 <= token < vocab
            p = counted(t.target_probs[b, current, token]) if inside else F32(0)
            with np.errstate(all="ignore"):
                acc = F32(acc + p)
                accept = p > 0 and (coin < acc / threshold or p >= single)
            if accept:
                predict(b, current, token)
                count += 1
                t.accept_index[b, count] = position(b, node)
                current, coin, acc = node, t.uniform_samples[b, node], F32(0)
                node = int(t.retrive_next_token[b, node])
            else:
                if inside:
                    t.draft_probs[b, current, token] = p
                node = int(t.retrive_next_sibling[b, node])
        t.accept_token_num[b] = count
        draft = None if count == limit else t.draft_probs[b, current]
        final = t.uniform_samples_for_final_sampling[b]
        predict(b, current, residual_sample(t.target_probs[b, current], draft, final))
    return t


# ---- arguments ----


def distributions(rng: np.random.Generator, *shape: int, sharpness: float = 2.0) -> NDArray[np.float32]:
    """Random rows that sum to 1, with zeros in some of them as a top-k leaves them."""
    logits = rng.standard_normal(shape) * sharpness
    kept = rng.random(shape) < rng.choice([0.2, 1.0], (*shape[:-1], 1))
    kept[..., 0] |= ~kept.any(-1)
    weights = np.where(kept, np.exp(logits), 0.0)
    return (weights / weights.sum(-1, keepdims=True)).astype(np.float32)


def uniforms(rng: np.random.Generator, *shape: int) -> NDArray[np.float32]:
    """Multiples of 2^-24 in [0, 1), as torch.rand draws them."""
    return (rng.integers(0, 1 << 24, shape) * 2.0**-24).astype(np.float32)


def likely_ids(rng: np.random.Generator, probs: NDArray[np.float32]) -> NDArray[np.int64]:
    """An id for each row ``[..., V]``: the likeliest in half of them, so that some are accepted; any elsewhere."""
    anything = rng.integers(0, probs.shape[-1], probs.shape[:-1])
    return np.where(rng.random(probs.shape[:-1]) < 0.5, probs.argmax(-1), anything)


def random_links(rng: np.random.Generator, size: int) -> tuple[list[int], list[int]]:
    """First children and next siblings of a random tree; some nodes belong to none."""
    next_token, next_sibling = [-1] * size, [-1] * size
    last_child = [-1] * size
    linked = [0]
    straight = rng.random() < 0.5
    for node in range(1, size):
        if rng.random() < 0.05:
            continue
        parent = linked[-1] if straight and rng.random() < 0.7 else linked[rng.integers(len(linked))]
        if last_child[parent] < 0:
            next_token[parent] = node
        else:
            next_sibling[last_child[parent]] = node
        last_child[parent] = node
        linked.append(node)
    return next_token, next_sibling


def random_trees(seed: int, batch: int, size: int, vocab: int, path_size: int | None = None) -> Tree:
    """Trees of a shape of its own for each row, in positions in no order."""
    rng = np.random.default_rng(seed)
    links = [random_links(rng, size) for _ in range(batch)]
    target = distributions(rng, batch, size, vocab)
    parents = np.zeros((batch, size), np.int64)
    for b, (next_token, next_sibling) in enumerate(links):
        for parent, child in enumerate(next_token):
            while child >= 0:
                parents[b, child] = parent
                child = next_sibling[child]
    of_parents = np.take_along_axis(target, parents[..., None], 1)
    arrays = {
        "candidates": likely_ids(rng, of_parents),
        "retrive_index": rng.permutation(batch * size).reshape(batch, size),
        "retrive_next_token": np.array([one for one, _ in links], np.int64).reshape(batch, size),
        "retrive_next_sibling": np.array([one for _, one in links], np.int64).reshape(batch, size),
        "uniform_samples": uniforms(rng, batch, size),
        "uniform_samples_for_final_sampling": uniforms(rng, batch),
        "target_probs": target,
    }
    return poisoned(**{name: torch.from_numpy(a) for name, a in arrays.items()}, path_size=path_size)


def poisoned(path_size: int | None = None, **inputs: torch.Tensor) -> Tree:
    """A Tree of these inputs, with results that hold other numbers and draft probabilities of 0."""
    batch, size = inputs["candidates"].shape
    return Tree(
        predicts=torch.full((batch * size,), 777, dtype=torch.int32),
        accept_index=torch.full((batch, path_size or size), 777, dtype=torch.int32),
        accept_token_num=torch.full((batch,), 777, dtype=torch.int32),
        draft_probs=torch.zeros_like(inputs["target_probs"]),
        **inputs,
    )


class Blocks(NamedTuple):
    """Arguments of dflash_chain_verify."""

    candidates: torch.Tensor
    target_probs: torch.Tensor
    uniforms: torch.Tensor
    final_uniforms: torch.Tensor


def linear(blocks: Blocks) -> Tree:
    """The same as trees without branches."""
    batch, size = blocks.candidates.shape
    following = torch.arange(1, size + 1).expand(batch, size).clone()
    following[:, -1] = -1
    return poisoned(
        candidates=blocks.candidates,
        retrive_index=torch.arange(batch * size).view(batch, size),
        retrive_next_token=following,
        retrive_next_sibling=torch.full((batch, size), -1),
        uniform_samples=blocks.uniforms,
        uniform_samples_for_final_sampling=blocks.final_uniforms,
        target_probs=blocks.target_probs,
    )


# ---- the ops ----


def chain(device: str, *arguments: torch.Tensor) -> speculative.ChainSampling:
    """chain_speculative_sampling into results that held other numbers; without ``out`` it gives the same."""
    moved = to(arguments, device)
    batch, num_drafts = arguments[1].shape
    out = speculative.ChainSampling(
        torch.full((batch, num_drafts + 1), 777, dtype=torch.int32, device=device),
        torch.full((batch,), 777, dtype=torch.int32, device=device),
    )
    assert speculative.chain_speculative_sampling(*moved, out=out) is out
    return _as_new(out, speculative.chain_speculative_sampling(*moved), arguments, moved)


def dflash(device: str, blocks: Blocks, thresholds: tuple[float, float] = (1.0, 1.0)) -> speculative.ChainVerify:
    """dflash_chain_verify, likewise."""
    moved = to(tuple(blocks), device)
    out = _verify_out(blocks.candidates, device)
    assert speculative.dflash_chain_verify(*moved, *thresholds, out=out) is out
    return _as_new(out, speculative.dflash_chain_verify(*moved, *thresholds), tuple(blocks), moved)


def greedy(device: str, candidates: torch.Tensor, target_predict: torch.Tensor) -> speculative.ChainVerify:
    """greedy_chain_verify, likewise."""
    moved = to((candidates, target_predict), device)
    out = _verify_out(candidates, device)
    assert speculative.greedy_chain_verify(*moved, out=out) is out
    return _as_new(out, speculative.greedy_chain_verify(*moved), (candidates, target_predict), moved)


def tree(
    device: str, arguments: Tree, thresholds: tuple[float, float] = (1.0, 1.0), deterministic: bool = True
) -> Tree:
    """The arguments after tree_speculative_sampling_target_only; only those that it may mutate have changed."""
    moved = Tree(*(t.clone() for t in to(arguments, device)))
    speculative.tree_speculative_sampling_target_only(*moved, *thresholds, deterministic=deterministic)
    after = Tree(*to(tuple(moved), "cpu"))
    for name, before, now in zip(Tree._fields, arguments, after, strict=True):
        assert name in MUTATED or _same_bits(before, now), name
    return after


def _verify_out(candidates: torch.Tensor, device: str) -> speculative.ChainVerify:
    batch, size = candidates.shape
    return speculative.ChainVerify(
        torch.full((batch,), 777, dtype=torch.int32, device=device),
        torch.full((batch,), 777, dtype=torch.int64, device=device),
        torch.full((batch, size), 777, dtype=torch.int64, device=device),
    )


def _as_new(out: Any, new: Any, arguments: tuple[torch.Tensor, ...], moved: tuple[torch.Tensor, ...]) -> Any:
    assert type(new) is type(out)
    for written, allocated in zip(out, new, strict=True):
        assert written.dtype == allocated.dtype
        assert torch.equal(written, allocated)
    for before, now in zip(arguments, to(moved, "cpu"), strict=True):
        assert _same_bits(before, now)
    return to(out, "cpu")


def _same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.contiguous().numpy().tobytes() == b.contiguous().numpy().tobytes()


# ---- torch.compile and graphs ----


def everything_arguments(rows: int, seed: int = 1) -> tuple[torch.Tensor, ...]:
    """What ``everything`` takes: chains, and trees of five nodes."""
    given = random_trees(rows + seed, rows, 5, 33)
    rng = np.random.default_rng(rows + seed)
    draft = distributions(rng, rows, 4, 33)
    return *given, torch.from_numpy(draft), torch.from_numpy(likely_ids(rng, draft))


def everything(*arguments: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """All four ops, with what is computed before and after each."""
    given, (draft, ids) = Tree(*arguments[: len(Tree._fields)]), arguments[len(Tree._fields) :]
    u, final = given.uniform_samples * 0.5, given.uniform_samples_for_final_sampling
    target = given.target_probs * 1.0
    sampled = speculative.chain_speculative_sampling(draft, ids, target, u[:, :4], final)
    verified = speculative.dflash_chain_verify(given.candidates, target, u, final, 0.9, 0.8)
    first = [t.clone() for t in verified]
    greedily = speculative.greedy_chain_verify(given.candidates, target.argmax(-1), out=verified)
    speculative.tree_speculative_sampling_target_only(*given._replace(target_probs=target), 0.9, 0.8)
    return *sampled, *first, *greedily, given.predicts + 1


def everything_compiles(device: str) -> None:
    """Without graph breaks, and to the bit as it is eagerly."""
    compiles(device, everything, everything_arguments)


def everything_replays(device: str) -> list[tuple[Any, Any]]:
    """(replayed, eager) results and mutated arguments of a captured graph whose inputs change between replays."""
    given = [t.to(device) for t in everything_arguments(6)]
    everything(*given)  # compiles the kernels
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = everything(*given)
    found = []
    for seed in (2, 3, 4):
        fresh = [t.to(device) for t in everything_arguments(6, seed)]
        for static, new in zip(given, fresh, strict=True):
            static.copy_(new)
        graph.replay()
        want = everything(*fresh)
        torch.cuda.synchronize()
        found.append(([t.cpu() for t in (*results, *given)], [t.cpu() for t in (*want, *fresh)]))
    return found
