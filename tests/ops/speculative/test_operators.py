"""What the backends' operators are given: dense tensors and numbers, whatever the caller gave."""

from __future__ import annotations

from typing import Any

import pytest
import speculative_bodies as bodies
import torch
from speculative_bodies import MUTATED, Tree

from fusedcomm.ops import speculative
from fusedcomm.ops.sampling import dispatch, operators

OPS = (
    "chain_speculative_sampling",
    "dflash_chain_verify",
    "greedy_chain_verify",
    "tree_speculative_sampling_target_only",
)


def strided(t: torch.Tensor) -> torch.Tensor:
    """The same values, each apart from its neighbours."""
    return torch.stack((t, t), -1)[..., 0]


@pytest.fixture
def given(monkeypatch: pytest.MonkeyPatch) -> dict[str, tuple[Any, ...]]:
    """The arguments of each operator that has been called; they do nothing."""
    calls: dict[str, tuple[Any, ...]] = {}

    def recorder(name: str) -> Any:
        return lambda *arguments: calls.__setitem__(name, arguments)

    monkeypatch.setattr(dispatch, "_chosen", {("cpu", op): "torch" for op in OPS})
    monkeypatch.setattr(operators, "_operators", {("torch", op): recorder(op) for op in OPS})
    return calls


def test_operators_are_given_contiguous_tensors(given: dict[str, tuple[Any, ...]]) -> None:
    *fields, draft, ids = bodies.everything_arguments(4)
    tree = Tree(*fields)
    tree = tree._replace(**{name: strided(t) for name, t in tree._asdict().items() if name not in MUTATED})
    assert not tree.target_probs.is_contiguous()
    target, u, final = tree.target_probs, tree.uniform_samples, tree.uniform_samples_for_final_sampling
    sampled = speculative.chain_speculative_sampling(strided(draft), strided(ids), target, strided(u[:, 1:]), final)
    verified = speculative.dflash_chain_verify(tree.candidates, target, u, final, 1, 0.5)
    greedily = speculative.greedy_chain_verify(tree.candidates, strided(target.argmax(-1)))
    speculative.tree_speculative_sampling_target_only(*tree, 0, 1)
    want = {
        "chain_speculative_sampling": (draft, ids, target, u[:, 1:], final, *sampled),
        "dflash_chain_verify": (tree.candidates, target, u, final, 1.0, 0.5, *verified),
        "greedy_chain_verify": (tree.candidates, target.argmax(-1), *greedily),
        "tree_speculative_sampling_target_only": (*tree, 0.0, 1.0),
    }
    assert set(given) == set(want) == set(OPS)
    for name, arguments in want.items():
        for expected, got in zip(arguments, given[name], strict=True):
            assert type(got) is type(expected)
            if isinstance(expected, torch.Tensor):
                assert got.is_contiguous()
                assert torch.equal(got, expected)
            else:
                assert got == expected
    for result in (*sampled, *verified, *greedily):
        assert any(result is got for call in given.values() for got in call)
