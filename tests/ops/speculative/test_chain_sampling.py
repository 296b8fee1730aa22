"""chain_speculative_sampling, token by token against the specification in plain Python."""

from __future__ import annotations

import numpy as np
import pytest
import speculative_bodies as bodies
import torch
from speculative_bodies import chain_of, distributions, likely_ids, uniforms
from triton_backend import TritonOps

Arguments = tuple[torch.Tensor, ...]

# (b, n, V): no rows, one, many; one draft to sixteen; vocabularies of two, odd ones and those of models
SHAPES = [
    (0, 3, 17),
    (1, 1, 2),
    (64, 1, 2),
    (64, 5, 33),
    (64, 16, 1000),
    (3, 16, 4097),
    (2, 4, 32000),
    (1, 2, 128256),
    (2, 3, 151936),
]


def random_chains(seed: int, batch: int, num_drafts: int, vocab: int, mixed: float = 0.5) -> Arguments:
    """Targets that are the drafts' distributions, by this part, and something else."""
    rng = np.random.default_rng(seed)
    draft = distributions(rng, batch, num_drafts, vocab)
    target = distributions(rng, batch, num_drafts + 1, vocab)
    target[:, :num_drafts] = mixed * draft + (1 - mixed) * target[:, :num_drafts]
    arrays = (
        draft,
        likely_ids(rng, draft),
        target,
        uniforms(rng, batch, num_drafts),
        uniforms(rng, batch),
    )
    return tuple(torch.from_numpy(a) for a in arrays)


def by_the_specification(arguments: Arguments) -> tuple[torch.Tensor, torch.Tensor]:
    draft, ids, target, u, final = (t.numpy() for t in arguments)
    batch, num_drafts = ids.shape
    rows = [chain_of(draft[b], ids[b].tolist(), target[b], u[b], final[b]) for b in range(batch)]
    output_ids = torch.tensor([row for row, _ in rows], dtype=torch.int32).view(batch, num_drafts + 1)
    return output_ids, torch.tensor([accepted for _, accepted in rows], dtype=torch.int32)


def assert_as_specified(ops: TritonOps, arguments: Arguments) -> torch.Tensor:
    """The same bits; returns how many were accepted."""
    got, want = ops.run(bodies.chain, *arguments), by_the_specification(arguments)
    for have, expected in zip(got, want, strict=True):
        assert have.dtype == torch.int32
        assert have.tolist() == expected.tolist()
    return want[1]


@pytest.mark.parametrize("shape", SHAPES)
def test_against_the_specification(ops: TritonOps, shape: tuple[int, int, int]) -> None:
    for seed, mixed in ((1, 0.1), (2, 0.9)):
        assert_as_specified(ops, random_chains(seed, *shape, mixed=mixed))


def test_every_length_is_met(ops: TritonOps) -> None:
    accepted = assert_as_specified(ops, random_chains(3, 200, 5, 20, mixed=0.8))
    assert set(accepted.tolist()) == set(range(6))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_ids_of_either_dtype(ops: TritonOps, dtype: torch.dtype) -> None:
    draft, ids, *rest = random_chains(4, 9, 4, 50)
    assert_as_specified(ops, (draft, ids.to(dtype), *rest))


def test_no_drafts(ops: TritonOps) -> None:
    """The bonus token alone."""
    draft, ids, target, u, final = random_chains(5, 7, 1, 40)
    accepted = assert_as_specified(ops, (draft[:, :0], ids[:, :0], target[:, :1], u[:, :0], final))
    assert not accepted.any()


def test_strided_inputs(ops: TritonOps) -> None:
    """Every second row, draft and probability of something larger."""
    given = random_chains(6, 5, 3, 30)
    apart = []
    for t in given:
        wide = torch.full([2 * n for n in t.shape], 7, dtype=t.dtype)
        view = wide[tuple(slice(0, None, 2) for _ in t.shape)]
        apart.append(view.copy_(t))
    assert_as_specified(ops, given)
    assert bodies_equal(ops, given, tuple(apart))


def bodies_equal(ops: TritonOps, one: Arguments, other: Arguments) -> bool:
    a, b = ops.run(bodies.chain, *one), ops.run(bodies.chain, *other)
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_where_a_uniform_meets_a_ratio(ops: TritonOps) -> None:
    """u * q < p, strictly, with the product rounded to fp32; one step of u on either side of p / q."""
    rng = np.random.default_rng(7)
    batch = 2000
    q = rng.random(batch).astype(np.float32)
    p = (q * rng.random(batch)).astype(np.float32)
    u = (p / q).astype(np.float32)
    for toward in (0.0, None, 1.0):
        moved = u if toward is None else np.nextafter(u, np.float32(toward))
        draft, target = np.zeros((batch, 1, 3), np.float32), np.zeros((batch, 2, 3), np.float32)
        draft[:, 0, 1], draft[:, 0, 2], target[:, 0, 1], target[:, 0, 0] = q, 1 - q, p, 1 - p
        target[:, 1, 2] = 1.0
        ids = np.ones((batch, 1), np.int64)
        arrays = (draft, ids, target, moved[:, None], uniforms(rng, batch))
        accepted = assert_as_specified(ops, tuple(torch.from_numpy(a) for a in arrays))
        if toward is None:  # where the product rounds to p exactly it is refused, where it rounds below it is not
            assert 0 < accepted.sum() < batch


@pytest.mark.parametrize("vocab", [2, 3, 8, 1024])
def test_where_the_final_uniform_meets_a_sum(ops: TritonOps, vocab: int) -> None:
    """The smallest i with a sum > u: a uniform that is a sum itself falls to the next id, which has a probability."""
    batch, eighths = 4096, 1 << 12
    rng = np.random.default_rng(8)
    parts = rng.multinomial(eighths, np.ones(vocab) / vocab, batch)
    sums = parts.cumsum(-1)
    final = np.arange(batch) % eighths
    want = (sums > final[:, None]).argmax(-1)
    target = np.zeros((batch, 2, vocab), np.float32)
    target[:, 0] = parts / eighths
    draft, ids = np.zeros((batch, 1, vocab), np.float32), np.full((batch, 1), -1)
    arrays = (draft, ids, target, np.zeros((batch, 1), np.float32), (final / eighths).astype(np.float32))
    got = ops.run(bodies.chain, *(torch.from_numpy(a) for a in arrays))
    assert got.output_ids[:, 0].tolist() == want.tolist()
    assert (parts[np.arange(batch), want] > 0).all()


def test_the_largest_uniform(ops: TritonOps) -> None:
    """1 - 2^-24 takes the last id that has a probability, not one after it."""
    target = torch.zeros(1, 2, 1000)
    target[0, 1, [3, 500, 700]] = torch.tensor([0.25, 0.5, 0.25])
    target[0, 0, 5] = 1.0
    draft = torch.zeros(1, 1, 1000)
    draft[0, 0, 5] = 1.0
    got = ops.run(bodies.chain, draft, torch.tensor([[5]]), target, torch.tensor([[0.5]]), torch.tensor([1 - 2.0**-24]))
    assert got.output_ids.tolist() == [[5, 700]]


def test_rows_that_are_not_read(ops: TritonOps) -> None:
    """NaN, and ids of nobody, after the first refusal; and NaN in the draft's last row where all are accepted."""
    draft, ids, target, u, final = random_chains(9, 100, 6, 40, mixed=0.8)
    want, accepted = by_the_specification((draft, ids, target, u, final))
    for b, count in enumerate(accepted.tolist()):
        draft[b, count + 1 :], target[b, count + 1 :], u[b, count + 1 :] = torch.nan, torch.nan, torch.nan
        ids[b, count + 1 :] = torch.tensor([-1, 40, 1 << 60, -(1 << 60), 3])[: max(5 - count, 0)]
        if count == 6:
            x = int(ids[b, 5])
            keep = draft[b, 5, x].clone()
            draft[b, 5] = torch.nan
            draft[b, 5, x] = keep
    assert (accepted == 6).any()
    got = ops.run(bodies.chain, draft, ids, target, u, final)
    assert got.output_ids.tolist() == want.tolist()
    assert got.accepted.tolist() == accepted.tolist()


@pytest.mark.parametrize("bad", [-1, 40, 41, 1 << 31, -(1 << 31), (1 << 62) + 3, -(1 << 63)])
def test_ids_out_of_range_are_refused(ops: TritonOps, bad: int) -> None:
    """Whatever their uniforms are; the token in their place is sampled from the whole difference."""
    draft, ids, target, u, final = random_chains(10, 50, 4, 40, mixed=1.0)
    ids[::2, 2] = bad
    u.zero_()
    accepted = assert_as_specified(ops, (draft, ids, target, u, final))
    assert set(accepted[::2].tolist()) <= {0, 1, 2}
    assert (accepted[1::2] > 2).any()


def test_refused_though_the_distributions_are_equal(ops: TritonOps) -> None:
    """No mass is left: the token comes from the target row."""
    draft, ids, target, u, final = random_chains(11, 64, 2, 12, mixed=1.0)
    target[:, 0] = draft[:, 0]
    ids[:, 0] = -1
    accepted = assert_as_specified(ops, (draft, ids, target, u, final))
    assert not accepted.any()
    got = ops.run(bodies.chain, draft, ids, target, u, final).output_ids[:, 0].long()
    assert (target[torch.arange(64), 0, got] > 0).all()
    assert len(set(got.tolist())) > 5


def test_rows_of_very_small_numbers(ops: TritonOps) -> None:
    """They count for what they are to each other, down to subnormals; a row of nothing gives 0."""
    target = torch.zeros(5, 2, 9)
    target[0, 0, 6], target[0, 0, 2] = 3e-20, 1e-20
    target[1, 0, 4:8] = 1e-30
    target[3, 0] = torch.nan
    target[3, 0, 5] = 1e-40
    target[4, 0] = -1.0
    draft, ids = torch.zeros(5, 1, 9), torch.zeros(5, 1, dtype=torch.int64)
    arguments = (draft, ids, target, torch.full((5, 1), 0.5), torch.full((5,), 0.5))
    assert_as_specified(ops, arguments)
    assert ops.run(bodies.chain, *arguments).output_ids[:, 0].tolist() == [6, 6, 0, 5, 0]


def test_against_fp64(ops: TritonOps) -> None:
    """Without fixed point, sums in fp64: another token only where a sum is as near to u as differences are rounded."""
    draft, ids, target, u, final = random_chains(12, 300, 3, 500, mixed=0.7)
    got = ops.run(bodies.chain, draft, ids, target, u, final)
    differing = 0
    for b in range(300):
        count = 0
        while count < 3 and u[b, count] < target[b, count, ids[b, count]].double() / draft[b, count, ids[b, count]]:
            count += 1
        assert got.accepted[b] == count
        weights = target[b, count].double()
        if count < 3:
            weights = (weights - draft[b, count].double()).clamp(min=0)
        sums = weights.cumsum(0)
        aim = float(final[b]) * sums[-1]
        want = int((sums > aim).nonzero()[0])
        if got.output_ids[b, count] != want:
            differing += 1
            # each of 500 differences of fp32 numbers is rounded by up to 2^-25
            assert (sums - aim).abs().min() < 500 * 2.0**-25
    assert differing < 3
