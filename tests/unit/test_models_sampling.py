"""Sampling as a pure function of logits and uniforms."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fusedcomm.models.sampling import greedy, sample


def reference(logits: torch.Tensor, temperature: float, top_p: float, u: float) -> int:
    """The definition, token by token."""
    probs = torch.softmax(logits.double() / temperature, 0).tolist()
    mass, threshold = 0.0, 0.0
    for p in sorted(probs, reverse=True):
        mass, threshold = mass + p, p
        if mass >= top_p:
            break
    kept = [p if top_p == 1.0 or p >= threshold else 0.0 for p in probs]
    target, cumulative = u * sum(kept), 0.0
    for i, p in enumerate(kept):
        cumulative += p
        if cumulative > target:
            return i
    return max(i for i, p in enumerate(kept) if p > 0)


@given(
    seed=st.integers(0, 10_000),
    vocab=st.integers(1, 60),
    temperature=st.floats(0.05, 5.0),
    top_p=st.floats(0.01, 1.0),
    u=st.floats(0.0, 1.0, exclude_max=True, width=32),
)
def test_against_the_definition(seed: int, vocab: int, temperature: float, top_p: float, u: float) -> None:
    logits = torch.randn(3, vocab, generator=torch.Generator().manual_seed(seed))
    got = sample(logits, temperature, top_p, torch.full((3,), u))
    assert got.tolist() == [reference(row, temperature, top_p, u) for row in logits]


def test_frequencies_follow_the_probabilities() -> None:
    logits = torch.tensor([[0.0, 1.0, 2.0, -torch.inf]])
    n = 40_000
    uniforms = torch.rand(n, generator=torch.Generator().manual_seed(1))
    counts = sample(logits.expand(n, -1), 0.7, 1.0, uniforms).bincount(minlength=4) / n
    # A frequency of n draws has a standard deviation of at most 0.5 / sqrt(n) = 0.0025; four of them.
    torch.testing.assert_close(counts, torch.softmax(logits[0] / 0.7, 0), rtol=0, atol=0.01)


def test_the_nucleus_keeps_ties_and_at_least_one() -> None:
    logits = torch.log(torch.tensor([[0.3, 0.3, 0.2, 0.2]]))
    almost_one = torch.tensor([1.0 - 2**-24])
    assert sample(logits, 1.0, 0.3, almost_one).item() == 1  # both of the tied best
    assert sample(logits, 1.0, 0.31, almost_one).item() == 1
    assert sample(logits, 1.0, 0.7, almost_one).item() == 3  # both of the tied others
    assert sample(torch.tensor([[0.0, 9.0, 0.0]]), 1.0, 1e-6, almost_one).item() == 1


def test_rows_use_their_own_uniform() -> None:
    logits = torch.zeros(4, 8)
    assert sample(logits, 1.0, 1.0, torch.tensor([0.0, 0.26, 0.5, 0.99])).tolist() == [0, 2, 4, 7]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_greedy_takes_the_first_of_the_best(dtype: torch.dtype) -> None:
    logits = torch.tensor([[0.0, 3.0, 3.0, 1.0], [5.0, 5.0, 5.0, 5.0], [-2.0, -1.0, -3.0, -1.0]], dtype=dtype)
    assert greedy(logits).tolist() == [1, 0, 1]
