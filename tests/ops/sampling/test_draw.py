"""Tokens by inverse CDF: equal to two oracles' where uniforms are given, distributed as they should be where not."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import sampling_bodies as bodies
import torch
from qk_bodies import compiles, replays, same
from sampling_bodies import KINDS, SamplingOps, backends, rows, uniforms
from torch._subclasses.fake_tensor import FakeTensorMode
from triton_backend import to

from fusedcomm.ops import sampling

TOP_KS = (0, 1, 2, 40, -1, 1 << 33)
TOP_PS = (0.0, 1e-6, 0.5, 0.9, 1.0)
ORDERS = ("top_k_first", "joint")


def limits(count: int, seed: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """Top-k int64 and top-p fp32 of every row, in all combinations if there are enough rows."""
    rng = np.random.default_rng(seed)
    pairs = rng.permutation(np.resize(np.arange(len(TOP_KS) * len(TOP_PS)), count))
    k = torch.tensor(TOP_KS)[torch.from_numpy(pairs % len(TOP_KS))]
    return k, torch.tensor(TOP_PS)[torch.from_numpy(pairs // len(TOP_KS))]


# ---- given uniforms ----


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("vocab", [2, 3, 17, 1000])
def test_to_the_index(ops: SamplingOps, kind: str, vocab: int) -> None:
    probs, u, (k, p) = rows(kind, 60, vocab), uniforms(60), limits(60)
    got = ops.sampling_from_probs(probs, u)
    assert got.dtype is torch.int32
    assert got.tolist() == [bodies.exact_sample(x.numpy(), float(v)) for x, v in zip(probs, u, strict=True)]
    for order in ORDERS:
        got = ops.top_k_top_p_sampling_from_probs(probs, k, p, u, order=order)
        joint = order == "joint"
        for row, values in enumerate(zip(u.tolist(), k.tolist(), p.tolist(), strict=True)):
            want = bodies.exact_sample(probs[row].numpy(), *values, joint=joint)
            assert got[row] == want, (row, values)


@pytest.mark.parametrize("vocab", [32_000, 50_257, 128_256, 151_936, 262_144])
def test_large_vocabularies_to_the_index(ops: SamplingOps, vocab: int) -> None:
    kinds = KINDS if vocab == 151_936 else ("peaked", "flat")
    probs, u = torch.cat([rows(kind, 1, vocab) for kind in kinds]), uniforms(len(kinds) + 3)[3:]
    k, p = torch.tensor([50, 0, 1000, 0, 5] * 2)[: len(kinds)], torch.tensor([0.9, 0.95] * 5)[: len(kinds)]
    got = ops.sampling_from_probs(probs, u)
    assert got.tolist() == [bodies.exact_sample(x.numpy(), float(v)) for x, v in zip(probs, u, strict=True)]
    for order in ORDERS:
        got = ops.top_k_top_p_sampling_from_probs(probs, k, p, u, order=order)
        for row, values in enumerate(zip(u.tolist(), k.tolist(), p.tolist(), strict=True)):
            assert got[row] == bodies.exact_sample(probs[row].numpy(), *values, joint=order == "joint")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("vocab", [2, 61, 32_000])
def test_against_fp64(ops: SamplingOps, kind: str, vocab: int) -> None:
    """The smallest i with cumulative mass > u * kept mass, wherever rounding decides nothing."""
    count = 12 if vocab > 1000 else 100
    probs, u, (k, p) = rows(kind, count, vocab, seed=4), uniforms(count, seed=4), limits(count, seed=4)
    for order in ("all", *ORDERS):
        if order == "all":
            got = ops.sampling_from_probs(probs, u)
        else:
            got = ops.top_k_top_p_sampling_from_probs(probs, k, p, u, order=order)
        compared = 0
        for row in range(count):
            x = probs[row].double().numpy()
            real = bodies.Real(np.ones(vocab, bool), math.inf)
            if order != "all":
                find = bodies.real_joint if order == "joint" else bodies.real_top_k_top_p
                real = find(x, int(k[row]), float(p[row]))
            want, margin = bodies.real_sample(x, real.kept, float(u[row]))
            if min(margin, real.margin) > 0:
                compared += 1
                assert got[row] == want
        assert compared > 0.7 * count


def test_a_uniform_on_a_boundary_belongs_to_the_next_token(ops: SamplingOps) -> None:
    probs = torch.tensor([[0.25, 0.0, 0.25, 0.5]]).expand(5, -1)
    u = torch.tensor([0.0, 0.25 - 2.0**-26, 0.25, 0.5 - 2.0**-25, 0.5])
    assert ops.sampling_from_probs(probs, u).tolist() == [0, 0, 2, 2, 3]
    # u is a share of what is kept: of the last two
    got = ops.top_k_top_p_sampling_from_probs(probs[:, 1:], 1, 1.0, torch.tensor([0.0, 0.25, 0.5, 0.75, 0.99]))
    assert got.tolist() == [2] * 5
    got = ops.top_k_top_p_sampling_from_probs(probs, 0, 0.75, torch.tensor([0.0, 0.25, 0.5, 0.75, 0.2]))
    assert got.tolist() == [0, 2, 3, 3, 0]


def boundaries(x: bodies.F32, k: int, p: float, joint: bool) -> list[float]:
    """The uniforms of fp32 around each place where the token changes."""
    row = bodies.row_of(x)
    kept = bodies.keep_top_k(row, k)
    kept = kept & bodies.keep_top_p(row if joint else bodies.row_of(bodies.divided(row, kept)), p)
    masses = row.q[kept].cumsum()
    u = (masses[:-1] / masses[-1]).astype(np.float32)
    return [*np.nextafter(u, np.float32(0)), *u, *np.nextafter(u, np.float32(1))]


@pytest.mark.parametrize("kind", ["peaked", "flat", "bf16", "weights"])
@pytest.mark.parametrize(("k", "p", "order"), [(0, 1.0, "joint"), (9, 0.9, "joint"), (9, 0.9, "top_k_first")])
def test_beside_every_boundary(ops: SamplingOps, kind: str, k: int, p: float, order: str) -> None:
    """Where masses that had been renormalised, or summed in fp32, would give another token."""
    probs, joint = rows(kind, 40, 17), order == "joint"
    # the absolute mass is next to nothing for weights
    p = p if kind != "weights" or not joint else 1.0
    named, u = zip(*((row, v) for row, x in enumerate(probs) for v in boundaries(x.numpy(), k, p, joint)), strict=True)
    indices, given = torch.tensor(named), torch.tensor(np.array(u))
    got = ops.top_k_top_p_sampling_from_probs(probs, k, p, given, order=order, indices=indices)
    want = [
        bodies.exact_sample(probs[row].numpy(), float(v), k, p, joint=joint) for row, v in zip(named, u, strict=True)
    ]
    assert got.tolist() == want
    if k == 0:
        assert ops.sampling_from_probs(probs, given, indices=indices).tolist() == want


def test_the_ends_are_possible_tokens(ops: SamplingOps) -> None:
    """At u = 0 the first probability above 0, however small; at the largest u the last that is worth 2^-24 of all."""
    probs = torch.tensor([[0.0, 1e-30, 0.5, 0.5, 1e-3, 0.0], [0.0, 0.0, 0.0, 1e-40, 0.0, 0.0]])
    assert ops.sampling_from_probs(probs, torch.zeros(2)).tolist() == [1, 3]
    assert ops.sampling_from_probs(probs, torch.full((2,), 1 - 2.0**-24)).tolist() == [4, 3]


def test_small_uniforms_count_to_31_bits(ops: SamplingOps) -> None:
    probs = torch.tensor([[2.0**-31, 2.0**-31, 1.0]]).expand(5, -1)
    total = 1 + 2.0**-30
    u = torch.tensor([0.0, 0.9 * 2.0**-31, 2.0**-31, 1.9 * 2.0**-31, 2.0**-30])
    want = [
        int(np.argmax(np.cumsum([2.0**-31, 2.0**-31, 1.0]) > math.floor(v * 2**31) / 2**31 * total)) for v in u.tolist()
    ]
    assert ops.sampling_from_probs(probs, u).tolist() == want == [0, 0, 1, 1, 2]


def test_masses_are_in_steps_of_2_44(ops: SamplingOps) -> None:
    """Rounded half to even, and at least one for what is above 0; beside 2^-20 there is a uniform for every step."""
    values = [0.0, 2.0**-60, 0.25, 0.5, 1.49, 1.5, 2.5, 2.51, 3.5, 4.5, 7.6, 0.0]
    steps = [0, 1, 1, 1, 1, 2, 2, 3, 4, 4, 8, 0]
    small, total = sum(steps), sum(steps) + 2**24
    probs = (torch.tensor([*values, 2.0**24]).double() * 2.0**-44).float().expand(small + 1, -1)
    u = [-(-target * 2**31 // total) for target in range(small + 1)]
    assert [n * total // 2**31 for n in u] == list(range(small + 1))
    want = [token for token, n in enumerate(steps) for _ in range(n)]
    got = ops.sampling_from_probs(probs, torch.tensor([n * 2.0**-31 for n in u]))
    assert got.tolist() == [*want, len(values)]


@pytest.mark.parametrize(
    ("largest", "unit", "vocab"),
    [
        (2.0**-20, 1.0, 1001),
        (2.0**-20 * (1 - 2.0**-24), 2.0**21, 1001),
        (1.0, 1.0, 262_144),
        (2 - 2.0**-23, 1.0, 262_144),
        (2.0, 0.5, 262_144),
    ],
)
def test_units(ops: SamplingOps, largest: float, unit: float, vocab: int) -> None:
    """Where the last token begins shows how the many before it, each of 2.75 steps of 2^-44, were rounded."""
    small, last = round(2.75 * unit), round(largest * unit * 2**44)
    before = small * (vocab - 1)
    total = before + last
    first = -(-before * 2**31 // total)
    u = torch.tensor([(first + n) * 2.0**-31 for n in (-8, -1, 0, 8)])
    targets = [(first + n) * total // 2**31 for n in (-8, -1, 0, 8)]
    probs = torch.full((1, vocab), 2.75 * 2.0**-44)
    probs[0, -1] = largest
    got = ops.sampling_from_probs(probs, u, indices=torch.zeros(4, dtype=torch.int32))
    assert got.tolist() == [min(target // small, vocab - 1) for target in targets]
    assert got[1] < vocab - 1 == got[2]


def test_what_is_no_uniform(ops: SamplingOps) -> None:
    """Nothing or less is 0, and 1 or more the largest there is."""
    probs = torch.tensor([[0.0, 1 - 2.0**-23, 2.0**-24, 2.0**-24, 0.0]]).expand(8, -1)
    u = torch.tensor([torch.nan, -1.0, -torch.inf, 1.0, 7.0, torch.inf, 1 - 2.0**-23, 1 - 2.0**-24])
    assert ops.sampling_from_probs(probs, u).tolist() == [1, 1, 1, 3, 3, 3, 2, 3]


@pytest.mark.parametrize("order", ORDERS)
def test_one_limit_for_all_rows(ops: SamplingOps, order: str) -> None:
    probs, u = rows("peaked", 9, 1000), uniforms(9)
    for k in TOP_KS:
        for p in TOP_PS:
            got = ops.top_k_top_p_sampling_from_probs(probs, k, p, u, order=order)
            want = ops.top_k_top_p_sampling_from_probs(probs, torch.full((9,), k), torch.full((9,), p), u, order=order)
            assert same(got, want)


def test_orders_differ(ops: SamplingOps) -> None:
    """Of 0.4, 0.3, 0.2, 0.1: half of the two largest is the first of them; half of all takes both."""
    probs = torch.tensor([[0.4, 0.3, 0.2, 0.1]])
    last = torch.tensor([1 - 2.0**-24])
    assert ops.top_k_top_p_sampling_from_probs(probs, 2, 0.5, last, order="top_k_first").tolist() == [0]
    assert ops.top_k_top_p_sampling_from_probs(probs, 2, 0.5, last, order="joint").tolist() == [1]
    assert ops.top_k_top_p_sampling_from_probs(probs, 2, 0.5, last).tolist() == [0]


def test_the_tokens_that_the_filter_keeps(ops: SamplingOps) -> None:
    for kind in KINDS:
        probs, u, (k, p) = rows(kind, 60, 500), uniforms(60), limits(60)
        filtered = ops.top_k_top_p_renorm_probs(probs, k, p)
        tokens = ops.top_k_top_p_sampling_from_probs(probs, k, p, u)
        assert (filtered.gather(1, tokens.long().unsqueeze(1)) > 0).all()


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_indices(ops: SamplingOps, dtype: torch.dtype) -> None:
    probs, u, (k, p) = rows("peaked", 5, 1000), uniforms(9), limits(9)
    named = torch.tensor([4, 0, 0, 2, 9, -3, 1, 0, -(1 << 31)], dtype=dtype)
    taken = probs[named.long().clamp(0, 4)]
    assert same(ops.sampling_from_probs(probs, u, indices=named), ops.sampling_from_probs(taken, u))
    for order in ORDERS:
        got = ops.top_k_top_p_sampling_from_probs(probs, k, p, u, order=order, indices=named)
        assert same(got, ops.top_k_top_p_sampling_from_probs(taken, k, p, u, order=order))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_other_dtypes_and_strides(ops: SamplingOps, dtype: torch.dtype) -> None:
    wide, u = rows("bf16", 40, 803).to(dtype), uniforms(80)
    for view in (wide, wide[:, 3:700], wide[:, ::2], wide.t()[:, :40].t()):
        for other in (u[:40], u[::2]):
            got = ops.sampling_from_probs(view, other)
            assert same(got, ops.sampling_from_probs(view.float().contiguous(), other.contiguous()))


def test_no_rows_and_rows_without_mass(ops: SamplingOps) -> None:
    assert ops.sampling_from_probs(torch.empty(0, 9), torch.empty(0)).shape == (0,)
    assert ops.sampling_from_probs(torch.zeros(3, 9), uniforms(3)).tolist() == [0, 0, 0]
    assert ops.top_k_top_p_sampling_from_probs(torch.full((3, 9), torch.nan), 3, 0.5, uniforms(3)).tolist() == [0, 0, 0]


# ---- drawn ----

NUM_DRAWS = 1 << 20
VOCAB = 24


def draw_counts(device: str, name: str, args: tuple[Any, ...], options: dict[str, Any], seed: int) -> list[int]:
    """How often each token of ``args[0] [1, VOCAB]`` is drawn in NUM_DRAWS, without uniforms."""
    args = to(args, device)
    generator = torch.Generator(device).manual_seed(seed)
    named = torch.zeros(1 << 16, dtype=torch.int32, device=device)
    counts = torch.zeros(VOCAB, dtype=torch.int64, device=device)
    for _ in range(NUM_DRAWS >> 16):
        tokens = getattr(sampling, name)(*args, generator=generator, indices=named, **options)
        counts += tokens.bincount(minlength=VOCAB)
    return counts.tolist()


def chi_square_limit(degrees: int) -> float:
    """What chi-square passes once in a million (Wilson and Hilferty, 1931)."""
    return degrees * (1 - 2 / (9 * degrees) + 4.7534 * math.sqrt(2 / (9 * degrees))) ** 3


@pytest.mark.parametrize(
    ("name", "limits", "options"),
    [
        ("sampling_from_probs", (), {}),
        ("top_k_top_p_sampling_from_probs", (12, 0.8), {"order": "top_k_first"}),
        ("top_k_top_p_sampling_from_probs", (12, 0.8), {"order": "joint"}),
    ],
)
def test_chi_square(ops: SamplingOps, name: str, limits: tuple[Any, ...], options: dict[str, str]) -> None:
    logits = np.random.default_rng(7).standard_normal((1, VOCAB))
    probs = torch.from_numpy(bodies.softmax(logits).astype(np.float32))
    x = probs[0].double().numpy()
    kept = np.ones(VOCAB, bool)
    if limits:
        find = bodies.real_joint if options["order"] == "joint" else bodies.real_top_k_top_p
        kept = find(x, *limits).kept
        assert 5 < kept.sum() <= 12
    expected = np.where(kept, x, 0) / x[kept].sum() * NUM_DRAWS
    counts = np.array(ops.run(draw_counts, name, (probs, *limits), options, 11))
    assert counts.sum() == NUM_DRAWS
    assert (counts[~kept] == 0).all()
    chi_square = ((counts - expected)[kept] ** 2 / expected[kept]).sum()
    assert chi_square < chi_square_limit(int(kept.sum()) - 1)


def draws(device: str, probs: torch.Tensor, how: str) -> list[torch.Tensor]:
    """Three calls in a row, twice from one seed and once from another."""
    found = []
    for seed in (5, 5, 6):
        generator = None
        if how == "own":
            generator = torch.Generator(device).manual_seed(seed)
        else:
            torch.manual_seed(seed)
        calls = [sampling.sampling_from_probs(probs.to(device), generator=generator) for _ in range(2)]
        calls.append(sampling.top_k_top_p_sampling_from_probs(probs.to(device), 0, 1.0, generator=generator))
        found.append(torch.stack(calls).cpu())
    return found


@pytest.mark.parametrize("how", ["own", "default"])
def test_a_seed_reproduces_a_run(ops: SamplingOps, how: str) -> None:
    first, again, other = ops.run(draws, rows("flat", 64, 5000), how)
    assert same(first, again)
    # one of 5000 in 64 places: they all differ as good as surely
    assert not same(first, other)
    assert not same(first[0], first[1])
    assert not same(first[0], first[2])


def draw_or_be_given(device: str, probs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    u = torch.rand(len(probs), generator=torch.Generator(device).manual_seed(3), device=device)
    drawn = sampling.sampling_from_probs(probs.to(device), generator=torch.Generator(device).manual_seed(3))
    return drawn.cpu(), sampling.sampling_from_probs(probs.to(device), u).cpu()


def test_uniforms_are_drawn_by_torch_rand(ops: SamplingOps) -> None:
    assert same(*ops.run(draw_or_be_given, rows("flat", 64, 5000)))


def test_a_refused_call_draws_nothing() -> None:
    torch.manual_seed(1)
    state = torch.get_rng_state()
    with pytest.raises(ValueError, match="order"):
        sampling.top_k_top_p_sampling_from_probs(rows("flat", 2, 5), 1, 0.5, order="first")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="out"):
        sampling.sampling_from_probs(rows("flat", 2, 5), out=torch.empty(3, dtype=torch.int32))
    assert torch.equal(torch.get_rng_state(), state)


# ---- inside torch ----


def all_draws(probs: torch.Tensor, u: torch.Tensor, k: torch.Tensor, p: torch.Tensor, named: torch.Tensor) -> Any:
    out = torch.empty(len(u), dtype=torch.int32, device=u.device)
    return [
        sampling.sampling_from_probs(probs * 1.0, u),
        sampling.sampling_from_probs(probs, u, indices=named, out=out) + 1,
        sampling.top_k_top_p_sampling_from_probs(probs, k, p, u),
        sampling.top_k_top_p_sampling_from_probs(probs, 20, 0.9, u, order="joint"),
    ]


def draw_arguments(count: int) -> tuple[torch.Tensor, ...]:
    return rows("peaked", count, 200), uniforms(count), *limits(count), torch.arange(count) * 7 % count


def compile_draws(device: str) -> None:
    compiles(device, all_draws, draw_arguments)


def test_compile_without_graph_breaks(ops: SamplingOps) -> None:
    ops.run(compile_draws)


def compile_drawing(device: str, probs: torch.Tensor) -> None:
    torch._dynamo.reset()
    probs = probs.to(device)
    compiled = torch.compile(sampling.sampling_from_probs, backend="aot_eager", fullgraph=True)
    torch.manual_seed(4)
    got = compiled(probs)
    torch.manual_seed(4)
    assert same(got, sampling.sampling_from_probs(probs))


def test_compile_that_draws(ops: SamplingOps) -> None:
    ops.run(compile_drawing, rows("flat", 64, 5000))


def fake_draws(device: str) -> list[tuple[Any, ...]]:
    arguments = to(draw_arguments(5), device)
    with FakeTensorMode() as mode:
        fake = [
            *all_draws(*map(mode.from_tensor, arguments)),
            sampling.sampling_from_probs(mode.from_tensor(arguments[0])),
        ]
    return [(t.shape, t.dtype, t.device.type) for t in fake]


def test_fakes_are_like_the_results(ops: SamplingOps) -> None:
    assert ops.run(fake_draws) == [((5,), torch.int32, ops.device)] * 5


# ---- graphs ----


@pytest.fixture(scope="module", params=[name for name in bodies.BACKENDS if name.endswith("-gpu")])
def gpu_ops(request: pytest.FixtureRequest) -> Any:
    with backends(request.param) as found:
        yield found


def replayed(device: str, probs: torch.Tensor, k: torch.Tensor, p: torch.Tensor) -> None:
    """Replays mixed with eager calls draw what eager calls alone draw from that seed."""
    probs, k, p = to((probs, k, p), device)
    eager: list[Callable[..., torch.Tensor]] = [
        lambda **options: sampling.sampling_from_probs(probs, **options),
        lambda **options: sampling.top_k_top_p_sampling_from_probs(probs, k, p, **options),
    ]
    for own in (False, True):
        for op in eager:
            generator = torch.Generator(device) if own else torch.cuda.default_generators[torch.cuda.current_device()]
            options = {"generator": generator} if own else {}
            op(**options)
            graph = torch.cuda.CUDAGraph()
            if own:
                graph.register_generator_state(generator)
            with torch.cuda.graph(graph):
                result = op(**options)
            generator.manual_seed(8)
            want = [op(**options).clone() for _ in range(4)]
            generator.manual_seed(8)
            got = []
            for replay in (True, True, False, True):
                if replay:
                    graph.replay()
                got.append(result.clone() if replay else op(**options))
            assert all(same(a, b) for a, b in zip(got, want, strict=True))
            assert not same(got[0], got[1])


def test_replays_draw_what_eager_calls_would(gpu_ops: SamplingOps) -> None:
    gpu_ops.run(replayed, rows("flat", 64, 5000), *limits(64))


def replayed_on_uniforms(device: str) -> None:
    def make(count: int, seed: int) -> tuple[torch.Tensor, ...]:
        probs, _, k, p, named = draw_arguments(count)
        return probs.roll(seed, 1), uniforms(count, seed), k, p.roll(seed), named.roll(seed)

    replays(device, all_draws, make)


def test_replays_read_what_is_there_then(gpu_ops: SamplingOps) -> None:
    gpu_ops.run(replayed_on_uniforms)
