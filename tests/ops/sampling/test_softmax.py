"""softmax_temperature against fp64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from cases import DTYPES
from qk_bodies import compiles, same
from sampling_bodies import SamplingOps
from torch._subclasses.fake_tensor import FakeTensorMode
from triton_backend import to

from fusedcomm.ops import sampling

TEMPERATURES = (0.0, 0.01, 0.3, 0.7, 1.0, 1.5, 100.0, 1e-30)


def logits_of(count: int, vocab: int, scale: float = 4.0, seed: int = 1) -> torch.Tensor:
    return torch.from_numpy(
        (np.random.default_rng([seed, vocab]).standard_normal((count, vocab)) * scale).astype(np.float32)
    )


def check(logits: torch.Tensor, temperature: torch.Tensor, got: torch.Tensor) -> None:
    x, t = logits.double(), temperature.double().unsqueeze(-1)
    z = (x - x.amax(-1, keepdim=True)) / torch.where(t > 0, t, 1.0)
    want = torch.softmax(z, -1)
    # the difference, the quotient and their product with log2(e) are rounded to fp32, of which exp makes |z| times as
    # much; exp itself and two quotients a few bits more, and the sum of all weighs the |z| of each, up to log(V) = 12.5
    tolerance = want * (2.0**-22 * (8 - z)) + 2.0**-126
    one_hot = torch.nn.functional.one_hot(x.argmax(-1), x.shape[-1]).double()
    want, tolerance = torch.where(t > 0, want, one_hot), torch.where(t > 0, tolerance, 0.0)
    assert ((got.double() - want).abs() <= tolerance).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", [2, 3, 1000, 32_001])
def test_against_fp64(ops: SamplingOps, vocab: int, dtype: torch.dtype) -> None:
    for scale in (0.01, 4.0, 60.0):
        logits = logits_of(16, vocab, scale).to(dtype)
        temperature = torch.tensor(TEMPERATURES * 2)
        got = ops.softmax_temperature(logits, temperature)
        assert got.dtype is torch.float32
        check(logits, temperature, got)


@pytest.mark.parametrize("vocab", [128_256, 151_936, 262_144])
def test_large_vocabularies(ops: SamplingOps, vocab: int) -> None:
    logits, temperature = logits_of(3, vocab), torch.tensor([0.0, 0.6, 1.0])
    check(logits, temperature, ops.softmax_temperature(logits, temperature))


def test_one_temperature_for_all_rows(ops: SamplingOps) -> None:
    logits = logits_of(5, 1000)
    for t in TEMPERATURES:
        assert same(ops.softmax_temperature(logits, t), ops.softmax_temperature(logits, torch.full((5,), t)))
    assert same(ops.softmax_temperature(logits, 1), ops.softmax_temperature(logits, 1.0))


def test_the_order_of_ids_does_not_matter(ops: SamplingOps) -> None:
    logits, temperature = logits_of(8, 4099), torch.tensor(TEMPERATURES)
    order = torch.from_numpy(np.random.default_rng(3).permutation(4099))
    got = ops.softmax_temperature(logits[:, order], temperature)
    assert same(got, ops.softmax_temperature(logits, temperature)[:, order])


def test_the_first_of_equals_wins_at_temperature_0(ops: SamplingOps) -> None:
    logits = torch.tensor([[1.0, 3.0, 3.0, -1.0, 3.0]])
    assert ops.softmax_temperature(logits, 0.0).tolist() == [[0, 1, 0, 0, 0]]
    # a temperature near 0 divides among them
    got = ops.softmax_temperature(logits, 1e-30)
    assert got.tolist() == [[0, *[float(np.float32(1) / np.float32(3))] * 2, 0, float(np.float32(1) / np.float32(3))]]


def test_logits_that_are_not_finite(ops: SamplingOps) -> None:
    inf, nan = torch.inf, torch.nan
    logits = torch.tensor(
        [[0.0, -inf, 0.0, nan], [inf, 3e38, inf, 0.0], [-inf, -inf, nan, -inf], [-3e38, 3e38, 0.0, -inf]]
    )
    for t in (0.0, 0.5, 1.0, 3e38):
        got = ops.softmax_temperature(logits, t)
        assert torch.isfinite(got).all()
        assert (got[2] == 0).all()
        assert (got.sum(-1)[[0, 1, 3]] - 1).abs().max() <= 2.0**-22
        assert got[0, 1] == got[0, 3] == got[3, 3] == 0
    assert ops.softmax_temperature(logits, 1.0)[0].tolist() == [0.5, 0, 0.5, 0]
    assert ops.softmax_temperature(logits, 1.0)[1].tolist() == [0.5, 0, 0.5, 0]
    assert ops.softmax_temperature(logits, 0.0)[1].tolist() == [1, 0, 0, 0]


def test_what_is_no_temperature_is_0(ops: SamplingOps) -> None:
    logits = logits_of(5, 100)
    temperature = torch.tensor([torch.nan, -1.0, -torch.inf, 1e-40, 0.0])
    assert same(ops.softmax_temperature(logits, temperature), ops.softmax_temperature(logits, 0.0))
    # and without end, all that are possible are alike
    logits[:, 7] = -torch.inf
    got = ops.softmax_temperature(logits, torch.full((5,), torch.inf))
    assert (got[:, :7] - 1 / 99).abs().max() <= 2.0**-22 / 99
    assert (got[:, 7] == 0).all()
    far = torch.tensor([[-3e38, 3e38]])
    assert ops.softmax_temperature(far, torch.tensor([torch.inf])).tolist() == [[0, 1]]


def test_indices_and_strides(ops: SamplingOps) -> None:
    wide, named = logits_of(5, 1003), torch.tensor([4, 4, 0, -1, 9, 2, 1, 0], dtype=torch.int32)
    temperature = torch.tensor(TEMPERATURES)
    for view in (wide, wide[:, 1:1000], wide[:, ::3]):
        want = ops.softmax_temperature(view[named.long().clamp(0, 4)].contiguous(), temperature)
        assert same(ops.softmax_temperature(view, temperature, indices=named), want)
    assert ops.softmax_temperature(torch.empty(0, 7), torch.empty(0)).shape == (0, 7)


def scaled(logits: torch.Tensor, temperature: torch.Tensor) -> list[torch.Tensor]:
    return [
        sampling.softmax_temperature(logits * 1.0, temperature),
        sampling.softmax_temperature(logits, 0.7, out=torch.empty_like(logits)) + 1,
        sampling.softmax_temperature(logits, 0.0),
    ]


def arguments(count: int) -> tuple[torch.Tensor, ...]:
    return logits_of(count, 300), torch.tensor(TEMPERATURES)[:count]


def compile_softmax(device: str) -> None:
    compiles(device, scaled, arguments)


def test_compile_without_graph_breaks(ops: SamplingOps) -> None:
    ops.run(compile_softmax)


def fake_softmax(device: str) -> list[tuple[Any, ...]]:
    with FakeTensorMode() as mode:
        fake = scaled(*map(mode.from_tensor, to(arguments(5), device)))
    return [(t.shape, t.dtype, t.stride(), t.device.type) for t in fake]


def test_fakes_are_like_the_results(ops: SamplingOps) -> None:
    assert ops.run(fake_softmax) == [((5, 300), torch.float32, (300, 1), ops.device)] * 3
