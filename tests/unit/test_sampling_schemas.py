"""The compiled library's sampling operators as torch sees them: declarations, fakes, what is mutated, torch.compile.

They run on the CPU here; the declarations, and how arguments are taken, are those of GPUs as well.
"""

from __future__ import annotations

from typing import Any

import pytest
import sampling_bodies
import speculative_bodies
import torch
from qk_bodies import all_same, compiles

from fusedcomm import native
from fusedcomm.ops import sampling
from fusedcomm.ops.sampling import dispatch, operators
from fusedcomm.ops.sampling.plan import OPERATORS

pytestmark = pytest.mark.skipif(native.load() is None, reason="the native library is not installed")


@pytest.fixture(autouse=True)
def native_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "_chosen", {("cpu", op): "native" for op in OPERATORS})


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> dict[str, tuple[Any, ...]]:
    """The arguments of the last call of each operator."""
    received: dict[str, tuple[Any, ...]] = {}

    def recorder(name: str) -> Any:
        operator = getattr(torch.ops.fusedcomm, name).default

        def record(*arguments: Any) -> None:
            received[name] = arguments
            operator(*arguments)

        return record

    recorders = {("native", op): recorder(name) for op, name in OPERATORS.items()}
    monkeypatch.setattr(operators, "_operators", recorders)
    return received


def everything(probs: torch.Tensor, k: torch.Tensor, p: torch.Tensor, u: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """All ops of sampling, with parameters in tensors and in numbers."""
    x, rows = probs * 1.0, torch.arange(probs.shape[0] - 1, -1, -1)
    return (
        sampling.top_k_renorm_probs(x, k),
        sampling.top_k_renorm_probs(x, 7, indices=rows),
        sampling.top_p_renorm_probs(x, p),
        sampling.top_p_renorm_probs(x, 0.8),
        sampling.top_k_top_p_renorm_probs(x, k, 0.7) + 1,
        sampling.min_p_renorm_probs(x, p),
        sampling.softmax_temperature(x, p, indices=rows),
        sampling.softmax_temperature(x, 0.5),
        sampling.sampling_from_probs(x, u),
        sampling.top_k_top_p_sampling_from_probs(x, k, p, u) * 2,
        sampling.top_k_top_p_sampling_from_probs(x, 9, 0.9, u, order="joint", indices=rows),
    )


def arguments_of(rows: int, seed: int = 1) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    k = torch.randint(0, 40, (rows,), generator=generator)
    p, u = torch.rand(2, rows, generator=generator)
    return sampling_bodies.rows("peaked", rows, 61, seed), k, p, u


def in_torch(monkeypatch: pytest.MonkeyPatch, function: Any, arguments: tuple[torch.Tensor, ...]) -> Any:
    with monkeypatch.context() as patched:
        patched.setattr(dispatch, "_chosen", {("cpu", op): "torch" for op in OPERATORS})
        return function(*arguments)


def test_calls_fit_the_declarations(calls: dict[str, tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch) -> None:
    given = arguments_of(5)
    want = in_torch(monkeypatch, everything, given)
    assert not calls
    got = everything(*given)
    assert all_same((got[:6], got[8:]), (want[:6], want[8:]))
    # of two exponentials: fusedcomm.ops.sampling.softmax has the bound
    torch.testing.assert_close(got[6:8], want[6:8], rtol=2.0**-16, atol=2.0**-126)
    verified = [t.clone() for t in speculative_bodies.everything_arguments(5)]
    fresh = tuple(t.clone() for t in verified)
    want = in_torch(monkeypatch, speculative_bodies.everything, fresh)
    assert all_same(speculative_bodies.everything(*verified), want)
    assert all_same(verified, fresh)
    assert set(calls) == set(native.SAMPLING_OPERATORS)


def test_they_compile_without_graph_breaks() -> None:
    compiles("cpu", everything, arguments_of)
    compiles("cpu", speculative_bodies.everything, speculative_bodies.everything_arguments)


def test_they_are_registered_as_torch_wants_it(calls: dict[str, tuple[Any, ...]]) -> None:
    """Exactly what the schema says is mutated, fakes, autograd: torch's own checks."""
    everything(*arguments_of(3))
    speculative_bodies.everything(*speculative_bodies.everything_arguments(3))
    for name, arguments in list(calls.items()):
        torch.library.opcheck(getattr(torch.ops.fusedcomm, name).default, arguments)
