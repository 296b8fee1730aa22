"""Top-k, top-p, both and min-p: to the bit against integers and fractions, and against the specification in fp64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
import sampling_bodies as bodies
import torch
from qk_bodies import compiles, same
from sampling_bodies import EXACT_KINDS, F32, KINDS, Real, SamplingOps, rows
from torch._subclasses.fake_tensor import FakeTensorMode
from triton_backend import to

from fusedcomm.ops import sampling

VOCABS = (2, 3, 17, 1000)
LARGE_VOCABS = (32_000, 50_257, 128_256, 151_936, 262_144)
TOP_KS = (0, 1, 2, 5, 40, -3, 1 << 40)  # and V - 1, V, V + 1
TOP_PS = (0.0, 1e-6, 0.1, 0.5, 0.9, 0.999, 1.0)
MIN_PS = (0.0, 1e-6, 0.02, 0.1, 0.5, 1.0)


class Filter(NamedTuple):
    """An op, its parameters as they are drawn, and the two oracles of a row."""

    name: str
    parameters: tuple[tuple[float, ...], ...]
    exact: Callable[..., F32]
    real: Callable[..., Real]


FILTERS = [
    Filter("top_k_renorm_probs", (TOP_KS,), bodies.exact_top_k, bodies.real_top_k),
    Filter("top_p_renorm_probs", (TOP_PS,), bodies.exact_top_p, bodies.real_top_p),
    Filter("top_k_top_p_renorm_probs", (TOP_KS, TOP_PS), bodies.exact_top_k_top_p, bodies.real_top_k_top_p),
    Filter("min_p_renorm_probs", (MIN_PS,), bodies.exact_min_p, bodies.real_min_p),
]
filters = pytest.mark.parametrize("which", FILTERS, ids=lambda which: which.name)


def parameters_of(which: Filter, count: int, vocab: int, seed: int = 1) -> list[torch.Tensor]:
    """Every value there is in its turn, in an order of its own for each parameter: fp32, or int64 for top-k."""
    rng = np.random.default_rng(seed)
    found = []
    for values in which.parameters:
        choices = [*values, vocab - 1, vocab, vocab + 1] if values is TOP_KS else list(values)
        drawn = rng.permutation(np.resize(np.array(choices), count))
        found.append(torch.from_numpy(drawn if values is TOP_KS else drawn.astype(np.float32)))
    return found


def numbers(parameters: list[torch.Tensor], row: int) -> list[Any]:
    return [t[row].item() for t in parameters]


# ---- values ----


@filters
@pytest.mark.parametrize("kind", EXACT_KINDS)
@pytest.mark.parametrize("vocab", VOCABS)
def test_to_the_bit(ops: SamplingOps, which: Filter, kind: str, vocab: int) -> None:
    probs = rows(kind, 40, vocab)
    parameters = parameters_of(which, 40, vocab)
    got = getattr(ops, which.name)(probs, *parameters)
    assert got.dtype is torch.float32
    for row in range(40):
        want = which.exact(probs[row].numpy(), *numbers(parameters, row))
        assert same(got[row], torch.from_numpy(want)), (row, numbers(parameters, row))


@filters
@pytest.mark.parametrize("vocab", LARGE_VOCABS)
def test_large_vocabularies_to_the_bit(ops: SamplingOps, which: Filter, vocab: int) -> None:
    kinds = KINDS if vocab == 151_936 else ("peaked", "flat", "tied")
    probs = torch.cat([rows(kind, 1, vocab) for kind in kinds])
    parameters = parameters_of(which, len(probs), vocab, seed=vocab)
    got = getattr(ops, which.name)(probs, *parameters)
    for row in range(len(probs)):
        want = which.exact(probs[row].numpy(), *numbers(parameters, row))
        assert same(got[row], torch.from_numpy(want)), (row, numbers(parameters, row))


def check_real(which: Filter, probs: torch.Tensor, got: torch.Tensor, parameters: list[torch.Tensor]) -> int:
    """Returns how many rows were compared: those where rounding decides nothing."""
    compared = 0
    for row in range(len(probs)):
        x = probs[row].double().numpy()
        kept, margin = which.real(x, *numbers(parameters, row))
        if margin <= 0:
            continue
        compared += 1
        want = np.where(kept, x, 0.0) / x[kept].sum()
        assert np.array_equal(got[row].numpy() > 0, want.astype(np.float32) > 0), numbers(parameters, row)
        # two divisions, two divisors, each rounded to fp32
        np.testing.assert_allclose(got[row].numpy(), want, rtol=2.0**-22, atol=2.0**-148)
    return compared


@filters
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("vocab", [2, 19, 1000, 32_000])
def test_against_fp64(ops: SamplingOps, which: Filter, kind: str, vocab: int) -> None:
    probs = rows(kind, 10 if vocab > 1000 else 50, vocab, seed=2)
    parameters = parameters_of(which, len(probs), vocab, seed=2)
    got = getattr(ops, which.name)(probs, *parameters)
    assert check_real(which, probs, got, parameters) > len(probs) * 0.7


@filters
def test_many_rows(ops: SamplingOps, which: Filter) -> None:
    probs = torch.cat([rows(kind, 128, 61) for kind in KINDS[:8]])
    parameters = parameters_of(which, 1024, 61)
    got = getattr(ops, which.name)(probs, *parameters)
    assert check_real(which, probs, got, parameters) > 800
    for row in (0, 511, 1023):
        alone = getattr(ops, which.name)(probs[row : row + 1], *(t[row : row + 1] for t in parameters))
        assert same(alone, got[row : row + 1])


@filters
def test_the_order_of_ids_does_not_matter(ops: SamplingOps, which: Filter) -> None:
    """Sums that depended on it would move thresholds and last bits."""
    for kind in ("peaked", "flat", "tied", "bf16"):
        probs = rows(kind, 20, 4099)
        order = torch.from_numpy(np.random.default_rng(3).permutation(4099))
        parameters = parameters_of(which, 20, 4099)
        op = getattr(ops, which.name)
        assert same(op(probs[:, order], *parameters), op(probs, *parameters)[:, order])


@filters
def test_one_number_for_all_rows(ops: SamplingOps, which: Filter) -> None:
    probs = rows("bf16", 6, 1000)
    for values in zip(*parameters_of(which, 10, 1000), strict=True):
        scalars = [v.item() for v in values]
        got = getattr(ops, which.name)(probs, *scalars)
        want = getattr(ops, which.name)(probs, *(v.expand(6) for v in values))
        assert same(got, want)


def test_top_k_top_p_is_the_two_calls(ops: SamplingOps) -> None:
    for kind in KINDS:
        probs = rows(kind, 70, 333)
        k, p = parameters_of(FILTERS[2], 70, 333)
        assert same(
            ops.top_k_top_p_renorm_probs(probs, k, p), ops.top_p_renorm_probs(ops.top_k_renorm_probs(probs, k), p)
        )


def test_ties_stay_together(ops: SamplingOps) -> None:
    probs = torch.tensor([[0.125, 0.25, 0.125, 0.25, 0.125, 0.125]])
    third, whole = 0.25 / 0.5, probs
    assert ops.top_k_renorm_probs(probs, 1).tolist() == [[0, third, 0, third, 0, 0]]
    assert same(ops.top_k_renorm_probs(probs, 3), whole)
    # a quarter is reached by one of the two largest, a half by both, and more than that by all
    for p, want in ((0.0, [[0, third, 0, third, 0, 0]]), (0.5, [[0, third, 0, third, 0, 0]]), (0.5001, whole.tolist())):
        assert ops.top_p_renorm_probs(probs, p).tolist() == want
    assert same(ops.min_p_renorm_probs(probs, 0.5), whole)
    assert ops.min_p_renorm_probs(probs, 0.5001).tolist() == [[0, third, 0, third, 0, 0]]


def test_top_p_takes_rows_as_they_are(ops: SamplingOps) -> None:
    """0.9 of mass is not 0.9 of what the row has: bf16 rows add up to a little more or less than 1."""
    less = torch.tensor([[0.5, 0.25, 0.125]])
    assert (ops.top_p_renorm_probs(less, 0.9) > 0).tolist() == [[True, True, True]]
    assert (ops.top_p_renorm_probs(less, 0.75) > 0).tolist() == [[True, True, False]]
    more = torch.tensor([[3.0, 0.5, 1.0]])
    assert ops.top_p_renorm_probs(more, 0.9).tolist() == [[1, 0, 0]]


def test_min_p_compares_with_the_exact_product(ops: SamplingOps) -> None:
    """Beside what fp32 would round the product to, up or down."""
    rng = np.random.default_rng(5)
    share, largest = rng.uniform(0.01, 0.9, (2, 200)).astype(np.float32)
    rounded, product = share * largest, share.astype(np.float64) * largest.astype(np.float64)
    assert (rounded < product).sum() > 50
    assert (rounded > product).sum() > 50
    neighbours = np.nextafter(rounded, np.float32(0)), rounded, np.nextafter(rounded, np.float32(1))
    probs = np.stack([largest, *neighbours], axis=-1)
    got = ops.min_p_renorm_probs(torch.from_numpy(probs), torch.from_numpy(share))
    assert np.array_equal(got.numpy() > 0, probs >= product[:, None])


def test_divisors_are_rounded_once(ops: SamplingOps) -> None:
    """A sum that fp64 would round to what is half-way between two numbers of fp32, and fp32 then to the even one."""
    probs = torch.ones(1, 1026)
    probs[0, :2] = torch.tensor([2.0**-14, 2.0**-44])
    assert ops.top_k_renorm_probs(probs, 0)[0, 2] == 2.0**-10 * (1 - 2.0**-23)


@filters
def test_rows_without_mass_stay_zero(ops: SamplingOps, which: Filter) -> None:
    for vocab in (2, 1000):
        got = getattr(ops, which.name)(torch.zeros(10, vocab), *parameters_of(which, 10, vocab))
        assert same(got, torch.zeros(10, vocab))


@filters
def test_what_is_no_probability_counts_as_zero(ops: SamplingOps, which: Filter) -> None:
    probs = rows("flat", 10, 100)
    cleaned, garbage = probs.clone(), probs.clone()
    for column, value in ((3, torch.nan), (50, -0.3), (51, -torch.inf), (99, -0.0)):
        garbage[:, column] = value
        cleaned[:, column] = 0.0
    op, parameters = getattr(ops, which.name), parameters_of(which, 10, 100)
    assert same(op(garbage, *parameters), op(cleaned, *parameters))


# ---- forms ----


@filters
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_other_dtypes(ops: SamplingOps, which: Filter, dtype: torch.dtype) -> None:
    probs = rows("peaked", 10, 1000).to(dtype)
    parameters = parameters_of(which, 10, 1000)
    op = getattr(ops, which.name)
    assert same(op(probs, *parameters), op(probs.float(), *parameters))


@filters
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_indices(ops: SamplingOps, which: Filter, dtype: torch.dtype) -> None:
    """Repeated, left out, in any order; more rows than there are; and past the ends."""
    probs = rows("peaked", 5, 1000)
    named = torch.tensor([4, 0, 0, 2, 4, 4, 1, 0], dtype=dtype)
    parameters = parameters_of(which, 8, 1000)
    op = getattr(ops, which.name)
    assert same(op(probs, *parameters, indices=named), op(probs[named.long()], *parameters))
    past = torch.tensor([-1, 5, 1 << 30, -(1 << 31), 2, 4, 0, 5], dtype=dtype)
    assert same(op(probs, *parameters, indices=past), op(probs[past.long().clamp(0, 4)], *parameters))
    assert op(probs, *(t[:0] for t in parameters), indices=named[:0]).shape == (0, 1000)


@filters
def test_strides(ops: SamplingOps, which: Filter) -> None:
    wide = rows("peaked", 6, 2003)
    parameters = parameters_of(which, 12, 501)
    halves = [t[::2] for t in parameters]
    op = getattr(ops, which.name)
    for view in (wide[:, 2:503], wide[:, 0:1002:2], wide[:1, :501].expand(6, -1), wide.t()[:501, :6].t()):
        assert same(op(view, *halves), op(view.contiguous(), *(t.contiguous() for t in halves)))


@filters
def test_no_rows(ops: SamplingOps, which: Filter) -> None:
    assert getattr(ops, which.name)(torch.empty(0, 7), *parameters_of(which, 0, 7)).shape == (0, 7)


@filters
def test_one_token(ops: SamplingOps, which: Filter) -> None:
    got = getattr(ops, which.name)(torch.tensor([[0.25], [1.0], [0.0]]), *(t[:3] for t in parameters_of(which, 3, 1)))
    assert got.tolist() == [[1.0], [1.0], [0.0]]


def all_filters(probs: torch.Tensor, k: torch.Tensor, p: torch.Tensor, named: torch.Tensor) -> list[torch.Tensor]:
    return [
        sampling.top_k_renorm_probs(probs * 1.0, k),
        sampling.top_p_renorm_probs(probs, p) + 1,
        sampling.top_k_top_p_renorm_probs(probs, k, 0.9, indices=named),
        sampling.top_k_top_p_renorm_probs(probs, 20, p, indices=named),
        sampling.min_p_renorm_probs(probs, p, out=torch.empty_like(probs)),
    ]


def filter_arguments(count: int) -> tuple[torch.Tensor, ...]:
    k, p = parameters_of(FILTERS[2], count, 200)
    return rows("peaked", count, 200), k, p, torch.arange(count) * 7 % count


def compile_filters(device: str) -> None:
    compiles(device, all_filters, filter_arguments)


def test_compile_without_graph_breaks(ops: SamplingOps) -> None:
    ops.run(compile_filters)


def fake_filters(device: str) -> list[tuple[Any, ...]]:
    arguments = to(filter_arguments(5), device)
    real = all_filters(*arguments)
    with FakeTensorMode() as mode:
        fake = all_filters(*map(mode.from_tensor, arguments))
    return [((a.shape, a.dtype, a.stride()), (b.shape, b.dtype, b.stride())) for a, b in zip(real, fake, strict=True)]


def test_fakes_are_like_the_results(ops: SamplingOps) -> None:
    for real, fake in ops.run(fake_filters):
        assert real == fake
