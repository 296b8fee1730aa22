"""The kernels of sampling and verification, thread by thread on an emulated GPU, and faults that it has to find."""

from __future__ import annotations

import itertools
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import pytest
import sampling_bodies
import speculative_bodies
import torch
from emulated import EmulatedGpu, FoundError, Schedule
from emulator_build import Fault, built, reason_to_skip
from qk_bodies import same
from torch.utils._pytree import tree_map_only

from fusedcomm.ops.sampling import reference as sampling
from fusedcomm.ops.speculative import reference as speculative

SKIPPED = reason_to_skip()
pytestmark = pytest.mark.skipif(SKIPPED is not None, reason=str(SKIPPED))

Generator = np.random.Generator
KINDS = (*sampling_bodies.EXACT_KINDS, "garbage", "sparse")
SHARES = (0.0, 1.0, 1e-6, 0.1, 0.5, 0.9, 0.99, 0.999999)
ANY_SHARES = (0.0, 1.0, 1e-6, 0.3, 0.5, 0.9, 2.0, -1.0, 1e-40, np.nan)
THRESHOLDS = ((1.0, 1.0), (0.9, 0.8), (0.0, 1.0), (1.0, 0.0), (0.3, 0.5))


class Case(NamedTuple):
    gpu: EmulatedGpu
    rng: Generator


# Clusters of 1 to 8 blocks, and more, and as the rule of the launch has it (0); without clusters a row has a block of
# 1024 threads
CASES = [("sm_90", blocks) for blocks in (*range(9), 12, 16)] + [
    (name, seed) for name in ("sm_80", "gfx942") for seed in (0, 1)
]


@pytest.fixture(params=CASES, ids=lambda case: f"{case[0]}-{case[1]}")
def case(request: pytest.FixtureRequest) -> Case:
    name, blocks = request.param
    gpu, rng = EmulatedGpu(built(name)), np.random.default_rng(blocks)
    threads = int(rng.choice([64, 96, 128])) if blocks > 0 else 0
    gpu.schedule = Schedule(int(rng.integers(1 << 30)), int(rng.choice([0, 20, 100])), blocks, threads)
    return Case(gpu, rng)


def check(gpu: EmulatedGpu, reference: ModuleType, name: str, *arguments: Any) -> None:
    """The bits of all arguments, results among them, are as the reference leaves them."""
    want = tree_map_only(torch.Tensor, torch.clone, arguments)
    getattr(reference, name)(*want)
    getattr(gpu, name)(*arguments)
    for i, (a, b) in enumerate(zip(arguments, want, strict=True)):
        assert not isinstance(a, torch.Tensor) or same(a, b), f"{name}, argument {i}, {gpu.schedule}"


# ---- filters and the choice of tokens ----


def random_bits(rng: Generator, *shape: int) -> torch.Tensor:
    return torch.from_numpy(rng.integers(-(1 << 31), 1 << 31, shape).astype(np.int32)).view(torch.float32)


def placed(rng: Generator, rows: torch.Tensor) -> torch.Tensor:
    """The rows themselves, or some elements past where vectors start, and apart."""
    if rng.random() < 0.5:
        return rows
    before, after = rng.integers(0, 8, 2).tolist()
    count, vocab = rows.shape
    room = torch.zeros(count, before + vocab + after, dtype=rows.dtype)
    room[:, before : before + vocab] = rows
    return room[:, before : before + vocab]


def random_rows(rng: Generator, count: int, vocab: int) -> torch.Tensor:
    kind = rng.choice(KINDS)
    if kind == "garbage":
        rows = random_bits(rng, count, vocab)
    else:
        seed = int(rng.integers(1000))
        rows = sampling_bodies.rows("peaked" if kind == "sparse" else kind, count, vocab, seed)
        if kind == "sparse":
            rows[torch.from_numpy(rng.random((count, vocab)) < 0.95)] = 0.0
    return placed(rng, rows.to((torch.float32, torch.float32, torch.bfloat16, torch.float16)[rng.integers(4)]))


def random_indices(rng: Generator, count: int) -> torch.Tensor | None:
    """None, or of some rows in any order, past the ends as well."""
    if rng.random() < 0.6:
        return None
    found = torch.from_numpy(rng.integers(-2, count + 2, rng.integers(1, 4)))
    return found if rng.random() < 0.5 else found.int()


def random_limit(rng: Generator, count: int, vocab: int) -> tuple[torch.Tensor | None, int]:
    if rng.random() < 0.5:
        limit = int(rng.choice([1, 2, 50, 200, 700, 1024, 1025, 3000, vocab // 2, vocab - 1]))
        return None, limit if 0 < limit < vocab else 0  # as the ops pass on what is no limit
    found = torch.from_numpy(rng.integers(-1, min(vocab, 3000) + 2, count))
    return (found if rng.random() < 0.5 else found.int()), 0


def random_share(rng: Generator, count: int) -> tuple[torch.Tensor | None, float]:
    if rng.random() < 0.5:
        return None, float(np.float32(rng.choice([*SHARES, rng.random()])))
    return torch.from_numpy(rng.choice(np.array(ANY_SHARES, np.float32), count)), 0.0


def poisoned_rows(rng: Generator, count: int, vocab: int) -> torch.Tensor:
    """Results, not always where vectors start."""
    start = int(rng.integers(4))
    return torch.full((start + count * vocab,), torch.nan)[start:].view(count, vocab)


def filter_and_sample(gpu: EmulatedGpu, rng: Generator, count: int, vocab: int) -> None:
    """Every op but the softmax on random rows, with parameters of all rows or one for each."""
    probs, indices = random_rows(rng, count, vocab), random_indices(rng, count)
    count = count if indices is None else len(indices)
    limit, share = random_limit(rng, count, vocab), random_share(rng, count)
    uniforms = sampling_bodies.uniforms(count, int(rng.integers(1000)))
    filters: dict[str, tuple[Any, ...]] = {
        "top_k_renorm_probs_out": limit,
        "top_p_renorm_probs_out": share,
        "top_k_top_p_renorm_probs_out": (*limit, *share),
        "min_p_renorm_probs_out": share,
    }
    for name, parameters in filters.items():
        check(gpu, sampling, name, probs, indices, *parameters, poisoned_rows(rng, count, vocab))
    draws: dict[str, list[tuple[Any, ...]]] = {
        "sampling_from_probs_out": [(uniforms,)],
        "top_k_top_p_sampling_from_probs_out": [(*limit, *share, uniforms, joint) for joint in (False, True)],
    }
    for name, calls in draws.items():
        for parameters in calls:
            check(gpu, sampling, name, probs, indices, *parameters, torch.full((count,), -7, dtype=torch.int32))


def test_filters_and_samplers(case: Case) -> None:
    gpu, rng = case
    for vocabs in ((1, 3, 31, 100, 257), (1000, 2049, 4096)):
        filter_and_sample(gpu, rng, int(rng.integers(1, 4)), int(rng.choice(vocabs)))


@pytest.mark.parametrize("vocab", [12_002, 20_000])
def test_rounds_before_candidates_are_listed(case: Case, vocab: int) -> None:
    """Long rows of which much is left after a round, or after several."""
    filter_and_sample(*case, 1, vocab)


def test_joint_thresholds_in_one_bin(case: Case) -> None:
    """Both searches go on, each without a list of candidates."""
    gpu, rng = case
    for kind, (k, p) in itertools.product(("tied", "equal"), ((1, 0.0), (1, 1e-6), (2, 0.9))):
        probs = sampling_bodies.rows(kind, 2, int(rng.choice([3, 17, 61, 300])), int(rng.integers(1000)))
        u, out = sampling_bodies.uniforms(2, int(rng.integers(1000))), torch.full((2,), -7, dtype=torch.int32)
        check(gpu, sampling, "top_k_top_p_sampling_from_probs_out", probs, None, None, k, None, p, u, True, out)


def test_slices_as_long_as_masses_add_up() -> None:
    """What 40,000 values at a power of two miss to the upper end of their bin would not fit into 32 bits."""
    gpu = EmulatedGpu(built("sm_90"))
    gpu.schedule = Schedule(seed=1, accesses_between_switches=100, blocks=1, threads=128)
    probs = 2.0**-16 * torch.cat([torch.ones(40_000), torch.linspace(0.3, 0.5, 8_000)]).unsqueeze(0)
    check(gpu, sampling, "top_p_renorm_probs_out", probs, None, None, 0.64, torch.full_like(probs, torch.nan))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_softmax(case: Case, dtype: torch.dtype) -> None:
    gpu, rng = case
    vocab = int(rng.choice([1, 100, 2049, 4100]))
    scale = rng.choice([0.01, 4.0, 60.0])
    logits = torch.from_numpy((rng.standard_normal((2, vocab)) * scale).astype(np.float32))
    logits = placed(rng, logits.to(dtype))
    temperature = torch.from_numpy(rng.choice(np.array([0.0, 0.3, 1.0, 50.0], np.float32), 2))
    out = poisoned_rows(rng, 2, vocab)
    gpu.softmax_temperature_out(logits, None, temperature, 0.0, out)
    x, t = logits.double(), temperature.double().unsqueeze(-1)
    z = (x - x.amax(-1, keepdim=True)) / torch.where(t > 0, t, 1.0)
    one_hot = torch.nn.functional.one_hot(x.argmax(-1), vocab).double()
    want = torch.where(t > 0, torch.softmax(z, -1), one_hot)
    # as in test_softmax.py: what fp32 makes of the difference and the quotient, |z| times, and of exp and two quotients
    tolerance = torch.where(t > 0, want * (2.0**-22 * (8 - z)) + 2.0**-126, 0.0)
    assert ((out.double() - want).abs() <= tolerance).all(), gpu.schedule


def test_layouts() -> None:
    """Every row is kept, in blocks that find room; few long rows are shared by 16."""
    gpu = EmulatedGpu(built("sm_90"))
    vocabs = (1, 2, 1000, 4096, 32_768, 50_257, 98_304, 128_256, 151_936, 262_144)
    for rows, vocab, needs in itertools.product(
        (1, 7, 8, 9, 16, 33, 64, 256, 1024), vocabs, ((300, 600), (36_000, 48_000))
    ):
        blocks, threads, shared = gpu.layout(rows, vocab, *needs)
        elements = -(-vocab // blocks)
        assert blocks in (1, 2, 4, 8, 16)
        assert threads in range(64, 513, 32)
        assert 4 * elements + needs[blocks == 16] <= shared <= 227 << 10
        assert elements <= 1 << 15
        assert blocks < 16 or (rows <= 8 and vocab >= 98_304)
    assert [gpu.layout(rows, 128_256, 300, 600)[0] for rows in (1, 8, 9, 1024)] == [16, 16, 8, 8]


# ---- verification ----


def with_garbage(rng: Generator, values: torch.Tensor, vocab: int) -> torch.Tensor:
    """In a quarter of the tensors a fifth of the values are any bits, or indices of nothing."""
    if rng.random() < 0.75:
        return values
    if values.is_floating_point():
        other = random_bits(rng, *values.shape)
    else:
        wild = [-1, -5, 0, 1, 2, 3, vocab, vocab + 1, 1 << 30, *([1 << 40] if values.dtype is torch.int64 else [])]
        other = torch.from_numpy(rng.choice(np.array(wild), values.shape)).to(values.dtype)
    return torch.where(torch.from_numpy(rng.random(values.shape) < 0.2), other, values)


def integers(rng: Generator, values: Any) -> torch.Tensor:
    found = torch.as_tensor(values)
    return found if rng.random() < 0.5 else found.int()


def poisoned_verified(batch: int, size: int) -> list[torch.Tensor]:
    wide = [torch.full(shape, 777, dtype=torch.int64) for shape in ((batch,), (batch, size))]
    return [torch.full((batch,), 777, dtype=torch.int32), *wide]


class Drafts:
    """Random sizes and values of one call."""

    def __init__(self, rng: Generator, vocab: int) -> None:
        self.rng, self.vocab = rng, vocab
        self.batch, self.size = int(rng.integers(1, 4)), int(rng.choice([1, 2, 3, 5, 8, 16, 33, 70]))
        self.thresholds = THRESHOLDS[rng.integers(len(THRESHOLDS))]
        self.target = speculative_bodies.distributions(rng, self.batch, self.size, vocab)
        likely = speculative_bodies.likely_ids(rng, self.target)
        self.candidates = np.concatenate([rng.integers(0, vocab, (self.batch, 1)), likely[:, :-1]], 1)

    def garbled(self, values: Any) -> torch.Tensor:
        return with_garbage(self.rng, torch.as_tensor(values), self.vocab)

    def uniforms(self, *shape: int) -> torch.Tensor:
        return self.garbled(speculative_bodies.uniforms(self.rng, *shape))


VOCABS = pytest.mark.parametrize("vocab", [3, 100, 1028])


@VOCABS
def test_chain(case: Case, vocab: int) -> None:
    d = Drafts(case.rng, vocab)
    target = d.target[:, :-1]
    share = d.rng.choice([0.0, 0.5, 1.0])  # at 0 the drafts are the target's own: all are accepted
    draft = (share * speculative_bodies.distributions(d.rng, *target.shape) + (1 - share) * target).astype(np.float32)
    ids = d.garbled(integers(d.rng, speculative_bodies.likely_ids(d.rng, draft)))
    uniforms, final = d.uniforms(d.batch, d.size - 1), d.uniforms(d.batch)
    out = [torch.full(shape, 777, dtype=torch.int32) for shape in ((d.batch, d.size), (d.batch,))]
    given = (d.garbled(draft), ids, d.garbled(d.target), uniforms, final)
    check(case.gpu, speculative, "chain_speculative_sampling_out", *given, *out)


@VOCABS
def test_dflash(case: Case, vocab: int) -> None:
    d = Drafts(case.rng, vocab)
    given = (d.garbled(d.candidates), d.garbled(d.target), d.uniforms(d.batch, d.size), d.uniforms(d.batch))
    check(case.gpu, speculative, "dflash_chain_verify_out", *given, *d.thresholds, *poisoned_verified(d.batch, d.size))


@VOCABS
def test_greedy(case: Case, vocab: int) -> None:
    d = Drafts(case.rng, vocab)
    predicted = np.roll(d.candidates, -1, 1) + (d.rng.random(d.candidates.shape) < 0.1)
    given = (d.garbled(integers(d.rng, d.candidates)), d.garbled(integers(d.rng, predicted)))
    check(case.gpu, speculative, "greedy_chain_verify_out", *given, *poisoned_verified(d.batch, d.size))


@VOCABS
def test_tree(case: Case, vocab: int) -> None:
    for _ in range(6):  # a circle of links, in which a walk has to end, is rare
        d = Drafts(case.rng, vocab)
        path_size = int(d.rng.choice([1, 3, d.size, d.size + 2]))
        tree = speculative_bodies.random_trees(int(d.rng.integers(1000)), d.batch, d.size, vocab, path_size)
        # positions stay apart: two nodes of one would write to the same place in no order
        garbled = {name: d.garbled(value) for name, value in tree._asdict().items() if name in GARBLED}
        check(case.gpu, speculative, "tree_speculative_sampling_target_only", *tree._replace(**garbled), *d.thresholds)


GARBLED = (
    "candidates",
    "retrive_next_token",
    "retrive_next_sibling",
    "uniform_samples",
    "uniform_samples_for_final_sampling",
    "target_probs",
    "draft_probs",
)


# ---- the emulator itself ----

FAULTS = {
    "race": Fault("row.h", "  clear(memory);\n  __syncthreads();\n", "  clear(memory);\n"),
    "deadlock": Fault("team.h", "signal_.expect(team.size() * kSlots", "signal_.expect((team.size() + 1) * kSlots"),
    "wrong": Fault("select.h", "value(int(aim_) - 1)", "value(int(aim_) - 2)"),
}


@pytest.mark.parametrize("found", FAULTS)
def test_faults_are_found(found: str) -> None:
    gpu = EmulatedGpu(built("sm_90", FAULTS[found]))
    expected, message = (AssertionError, "argument 4") if found == "wrong" else (FoundError, found)
    gpu.schedule = Schedule(seed=1, accesses_between_switches=7, blocks=2, threads=256)
    probs = sampling_bodies.rows("flat", 1, 1000)  # a bin has several, so that there are candidates
    with pytest.raises(expected, match=message):
        check(gpu, sampling, "top_k_renorm_probs_out", probs, None, None, 50, torch.full_like(probs, torch.nan))
