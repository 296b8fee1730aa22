"""The Triton kernels under Triton's interpreter, to the bit: few rows, each other code path once.

It takes a tenth of a second for a row that is filtered. On a GPU all tests of the ops run on Triton too.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
import sampling_bodies as bodies
import torch
from cases import make
from qk_bodies import compiles, same
from sampling_bodies import SamplingOps, rows
from torch._subclasses.fake_tensor import FakeTensorMode
from triton_backend import to

from fusedcomm.ops import sampling

# each finds its threshold in another way: one value by its mantissa, many that are equal, none that is reached, all of
# what is left; in a unit of its own; by masses of one step
KINDS = ("peaked", "flat", "tied", "weights", "subnormal", "steps")
# one tile of one part, one of several parts; two tiles, which take longer
SIZES = [*((kind, vocab) for kind in KINDS for vocab in (3, 700)), *((kind, 8199) for kind in ("flat", "weights"))]
sizes = pytest.mark.parametrize(("kind", "vocab"), SIZES)
TOP_KS, TOP_PS = (0, 1, 2, 40, 699, 700), (0.0, 0.3, 0.9, 0.999, 1.0)


class Limits(NamedTuple):
    """Parameters of a few rows."""

    k: torch.Tensor
    p: torch.Tensor
    u: torch.Tensor

    def row(self, i: int) -> tuple[int, float, float]:
        return int(self.k[i]), float(self.p[i]), float(self.u[i])


def limits(count: int, *seed: int) -> Limits:
    rng = np.random.default_rng(seed)
    return Limits(
        torch.from_numpy(rng.choice(TOP_KS, count)),
        torch.from_numpy(rng.choice(TOP_PS, count).astype(np.float32)),
        torch.from_numpy(rng.random(count, dtype=np.float32)),
    )


def check_filters(ops: SamplingOps, probs: torch.Tensor, given: Limits) -> None:
    got = {
        "top-k": ops.top_k_renorm_probs(probs, given.k),
        "top-p": ops.top_p_renorm_probs(probs, given.p),
        "both": ops.top_k_top_p_renorm_probs(probs, given.k, given.p),
        "min-p": ops.min_p_renorm_probs(probs, given.p),
    }
    for i, x in enumerate(probs.numpy()):
        k, p, _ = given.row(i)
        share = min(max(p, 0.0), 1.0) if p == p else 0.0
        p = min(max(p, 0.0), 1.0) if p == p else 1.0
        want = {
            "top-k": bodies.exact_top_k(x, k),
            "top-p": bodies.exact_top_p(x, p),
            "both": bodies.exact_top_k_top_p(x, k, p),
            "min-p": bodies.exact_min_p(x, share),
        }
        for name, expected in want.items():
            assert same(got[name][i], torch.from_numpy(expected)), (name, i, k, p)


def check_tokens(ops: SamplingOps, probs: torch.Tensor, given: Limits) -> None:
    got = {
        "all": ops.sampling_from_probs(probs, given.u),
        "joint": ops.top_k_top_p_sampling_from_probs(probs, *given, order="joint"),
        "top_k_first": ops.top_k_top_p_sampling_from_probs(probs, *given, order="top_k_first"),
    }
    for i, x in enumerate(probs.numpy()):
        k, p, u = given.row(i)
        p = min(max(p, 0.0), 1.0) if p == p else 1.0
        want = {
            "all": bodies.exact_sample(x, u),
            "joint": bodies.exact_sample(x, u, k, p),
            "top_k_first": bodies.exact_sample(x, u, k, p, joint=False),
        }
        for name, token in want.items():
            assert got[name][i] == token, (name, i, k, p, u)


@sizes
def test_filters(interpreted_ops: SamplingOps, kind: str, vocab: int) -> None:
    count = 2 if vocab > 1000 else 3
    check_filters(interpreted_ops, rows(kind, count, vocab), limits(count, KINDS.index(kind), vocab))


@sizes
def test_tokens(interpreted_ops: SamplingOps, kind: str, vocab: int) -> None:
    count = 1 if kind in ("tied", "steps") or vocab > 1000 else 2  # the filters have shown what these find
    check_tokens(interpreted_ops, rows(kind, count, vocab, seed=2), limits(count, KINDS.index(kind), vocab, 2))


@pytest.mark.parametrize("kind", ["bits", "specials", "small", "huge", "zeros"])
def test_garbage(interpreted_ops: SamplingOps, kind: str) -> None:
    """Calls end, and give what the oracles do; limits and uniforms are anything."""
    probs = make(1, (3, 37), torch.float32, kind)
    k = torch.tensor([3, -(1 << 63), (1 << 33) + 1])
    odd = torch.tensor([torch.nan, -1.0, torch.inf])
    check_filters(interpreted_ops, probs, Limits(k, odd, odd))
    check_tokens(interpreted_ops, probs, Limits(k.roll(1), torch.tensor([0.5, 0.9, 0.1]), odd))


def test_rows_without_mass(interpreted_ops: SamplingOps) -> None:
    probs = torch.tensor([[0.0, -1.0, torch.nan]])
    given = Limits(torch.tensor([1]), torch.tensor([0.5]), torch.tensor([0.9]))
    check_filters(interpreted_ops, probs, given)
    check_tokens(interpreted_ops, probs, given)


def test_one_token(interpreted_ops: SamplingOps) -> None:
    """Of which Triton makes a constant."""
    probs, given = torch.tensor([[0.25], [0.0]]), limits(2)
    check_filters(interpreted_ops, probs, given)
    check_tokens(interpreted_ops, probs, given)


def test_neighbours_are_told_apart(interpreted_ops: SamplingOps) -> None:
    """The largest and the number below it, wherever a search ends; and the smallest that there are beside 0."""
    largest = np.random.default_rng(6).random(12).astype(np.float32)
    probs = torch.from_numpy(np.stack((np.nextafter(largest, np.float32(0)), largest, largest), -1))
    probs[::2, 2] /= 3
    got = interpreted_ops.top_k_renorm_probs(probs, torch.ones(12, dtype=torch.int64))
    assert got.tolist() == [[0.0, 1.0, 0.0], [0.0, 0.5, 0.5]] * 6
    tiny = 2.0**-149
    given = Limits(torch.tensor([1, 2, 3]), torch.tensor([0.4, 0.5, 0.99]), torch.zeros(3))
    check_filters(interpreted_ops, torch.tensor([[1.0, 2 * tiny, tiny, 0.0]]).repeat(3, 1), given)


def test_units(interpreted_ops: SamplingOps) -> None:
    """Which token a small uniform takes of many, each of 2.75 steps of 2^-44, shows how these were rounded."""
    largest = torch.tensor([2.0**-20, 2.0**-20 * (1 - 2.0**-24), 1.0, 2 - 2.0**-23, 2.0])
    probs = torch.full((5, 8199), 2.75 * 2.0**-44)
    probs[:, -1] = largest
    u = torch.tensor([*[2.0**-12] * 2, *[2.0**-31] * 3])
    got = interpreted_ops.sampling_from_probs(probs, u)
    assert got.tolist() == [bodies.exact_sample(x.numpy(), float(v)) for x, v in zip(probs, u, strict=True)]
    assert got.max() < 8198


# (u, token) where masses are 1, 1, 2 of 4 eighths: what falls on a sum belongs to the next
@pytest.mark.parametrize(("u", "token"), [(0.0, 0), (0.25, 1), (0.49999997, 1), (0.5, 3), (1.0, 3), (torch.nan, 0)])
def test_uniforms_on_a_boundary(interpreted_ops: SamplingOps, u: float, token: int) -> None:
    probs = torch.tensor([[0.125, 0.125, 0.0, 0.25]])
    assert interpreted_ops.sampling_from_probs(probs, torch.tensor([u])).tolist() == [token]


@pytest.mark.parametrize(("vocab", "last"), [(2000, 600), (8199, 8195)])
def test_uniforms_on_the_boundary_of_a_tile(interpreted_ops: SamplingOps, vocab: int, last: int) -> None:
    """The first half of the mass is in a tile, or a part of one, that is before that of the token."""
    probs = torch.zeros(2, vocab)
    probs[:, [0, last]] = 0.5
    assert interpreted_ops.sampling_from_probs(probs, torch.tensor([0.5, 0.49999997])).tolist() == [last, 0]


def test_min_p_compares_with_the_exact_product(interpreted_ops: SamplingOps) -> None:
    """Beside what fp32 would round the product to, up or down."""
    share, largest = np.random.default_rng(5).uniform(0.01, 0.9, (2, 20)).astype(np.float32)
    rounded, product = share * largest, share.astype(np.float64) * largest.astype(np.float64)
    assert 3 < (rounded < product).sum() < 17
    neighbours = np.nextafter(rounded, np.float32(0)), rounded, np.nextafter(rounded, np.float32(1))
    probs = np.stack([largest, *neighbours], axis=-1)
    got = interpreted_ops.min_p_renorm_probs(torch.from_numpy(probs), torch.from_numpy(share))
    assert np.array_equal(got.numpy() > 0, probs >= product[:, None])


# ---- softmax ----


@pytest.mark.parametrize("vocab", [3, 700, 8199])
def test_softmax(interpreted_ops: SamplingOps, vocab: int) -> None:
    temperature = torch.tensor([0.0, 0.01, 0.7, 1.0, 100.0, 1e-30])
    logits = torch.from_numpy(np.random.default_rng(vocab).standard_normal((6, vocab)).astype(np.float32)) * 4
    got = interpreted_ops.softmax_temperature(logits, temperature)
    x, t = logits.double(), temperature.double().unsqueeze(-1)
    z = (x - x.amax(-1, keepdim=True)) / torch.where(t > 0, t, 1.0)
    want = torch.where(t > 0, z.softmax(-1), (x == x.amax(-1, keepdim=True)).double())
    # as docs/sampling.md promises: the difference, the quotient and exp are rounded to fp32
    assert ((got.double() - want).abs() <= want * 2.0**-22 * (8 - z) + 2.0**-126).all()


def test_softmax_of_what_is_not_finite(interpreted_ops: SamplingOps) -> None:
    inf, nan = torch.inf, torch.nan
    logits = torch.tensor([[inf, 3e38, inf, nan], [-inf, -inf, nan, -inf], [-3e38, nan, 3e38, 3e38]])
    got = interpreted_ops.softmax_temperature(logits, 1.0)
    assert got.tolist() == [[0.5, 0, 0.5, 0], [0] * 4, [0, 0, 0.5, 0.5]]
    for t in (nan, -1.0, 0.0, 1e-40):
        got = interpreted_ops.softmax_temperature(logits, torch.full((3,), t))
        assert got.tolist() == [[1, 0, 0, 0], [0] * 4, [0, 0, 1, 0]]
    got = interpreted_ops.softmax_temperature(torch.tensor([[-3e38, 3e38, 3e38]]), torch.tensor([inf]))
    assert got.tolist() == [[0, 0.5, 0.5]]


# ---- forms ----


def ops_on(ops: SamplingOps, probs: torch.Tensor, u: torch.Tensor, **options: Any) -> list[torch.Tensor]:
    """Results of all kernels."""
    count = len(u)
    k, p = torch.arange(count) + 2, torch.linspace(0.2, 1, count)
    return [
        ops.top_k_renorm_probs(probs, k, **options),
        ops.top_p_renorm_probs(probs, p, **options),
        ops.top_k_top_p_renorm_probs(probs, k, p, **options),
        ops.min_p_renorm_probs(probs, p, **options),
        ops.sampling_from_probs(probs, u, **options),
        ops.top_k_top_p_sampling_from_probs(probs, k, p, u, order="joint", **options),
        ops.top_k_top_p_sampling_from_probs(probs, k, p, u, **options),
        ops.softmax_temperature(probs, p, **options),
    ]


@pytest.mark.parametrize(("dtype", "index"), [(torch.bfloat16, torch.int32), (torch.float16, torch.int64)])
def test_dtypes_strides_and_indices(interpreted_ops: SamplingOps, dtype: torch.dtype, index: torch.dtype) -> None:
    """Rows that lie apart, named in any order and past the ends."""
    wide = rows("bf16", 3, 80).to(dtype)
    named, u = torch.tensor([2, -1, 1 << 30], dtype=index), bodies.uniforms(3)
    got = ops_on(interpreted_ops, wide[:, 5:66], u, indices=named)
    want = ops_on(interpreted_ops, wide[[2, 0, 2], 5:66].float().contiguous(), u)
    assert all(same(a, b) for a, b in zip(got, want, strict=True))


def test_one_number_for_all_rows(interpreted_ops: SamplingOps) -> None:
    ops, probs, u = interpreted_ops, rows("peaked", 2, 50), bodies.uniforms(2)
    calls: list[tuple[Callable[..., torch.Tensor], tuple[Any, ...], tuple[Any, ...]]] = [
        (ops.top_k_renorm_probs, (5,), ()),
        (ops.top_p_renorm_probs, (0.7,), ()),
        (ops.top_k_top_p_renorm_probs, (9, 0.7), ()),
        (ops.min_p_renorm_probs, (0.1,), ()),
        (ops.softmax_temperature, (0.7,), ()),
        (ops.top_k_top_p_sampling_from_probs, (9, 0.7), (u,)),
    ]
    for op, numbers, rest in calls:
        each = (torch.full((2,), number) for number in numbers)
        assert same(op(probs, *numbers, *rest), op(probs, *each, *rest))


def test_no_rows(interpreted_ops: SamplingOps) -> None:
    got = ops_on(interpreted_ops, torch.empty(0, 9), torch.empty(0))
    assert [t.shape for t in got] == [(0, 9)] * 4 + [(0,)] * 3 + [(0, 9)]


# ---- inside torch ----


def cheap(probs: torch.Tensor, p: torch.Tensor, u: torch.Tensor) -> list[torch.Tensor]:
    """Ops of one pass each: operators are registered all alike."""
    return [
        sampling.min_p_renorm_probs(probs * 1.0, p) + 1,
        sampling.softmax_temperature(probs, 0.7, out=torch.empty_like(probs)),
        sampling.sampling_from_probs(probs, u),
    ]


def cheap_arguments(count: int) -> tuple[torch.Tensor, ...]:
    return rows("peaked", count, 40), torch.linspace(0, 1, count), bodies.uniforms(count)


def compile_cheap(device: str) -> None:
    compiles(device, cheap, cheap_arguments)


def test_compile_without_graph_breaks(interpreted_ops: SamplingOps) -> None:
    interpreted_ops.run(compile_cheap)


def fake_results(device: str) -> list[tuple[Any, ...]]:
    with FakeTensorMode() as mode:
        probs, p, u = map(mode.from_tensor, to(cheap_arguments(5), device))
        fake = [
            *cheap(probs, p, u),
            sampling.top_k_renorm_probs(probs, 5),
            sampling.top_p_renorm_probs(probs, p),
            sampling.top_k_top_p_renorm_probs(probs, 5, p),
            sampling.top_k_top_p_sampling_from_probs(probs, 5, p, u),
        ]
    return [(tuple(t.shape), t.dtype) for t in fake]


def test_fakes_are_like_the_results(interpreted_ops: SamplingOps) -> None:
    row, token = ((5, 40), torch.float32), ((5,), torch.int32)
    assert interpreted_ops.run(fake_results) == [row, row, token, row, row, row, token]


def operators_as_registered(device: str) -> None:
    """By torch's own checks: schema, registration, fakes, tracing."""
    probs, k, p, u = to((rows("peaked", 1, 3), torch.tensor([2]), torch.tensor([0.5]), bodies.uniforms(1)), device)
    named = torch.zeros(1, dtype=torch.int32, device=device)
    out, token = torch.empty_like(probs), torch.empty_like(named)
    samples = {
        "top_k_renorm_probs_out": (probs, None, k, 0, out),
        "top_p_renorm_probs_out": (probs, named, p, 0.0, out),
        "top_k_top_p_renorm_probs_out": (probs, None, None, 2, p, 0.0, out),
        "min_p_renorm_probs_out": (probs, None, None, 0.1, out),
        "softmax_temperature_out": (probs, named, p, 0.0, out),
        "sampling_from_probs_out": (probs, None, u, token),
        "top_k_top_p_sampling_from_probs_out": (probs, named, None, 2, p, 0.0, u, True, token),
    }
    for name, arguments in samples.items():
        torch.library.opcheck(getattr(torch.ops.fusedcomm_triton, name).default, arguments)


def test_operators_are_as_torch_wants_them(interpreted_ops: SamplingOps) -> None:
    interpreted_ops.run(operators_as_registered)
