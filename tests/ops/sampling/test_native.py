"""The compiled library's operators on CPUs: what they declare, any number of threads, and arguments that do not fit."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import sampling_bodies as bodies
import speculative_bodies
import torch
from qk_bodies import all_same
from torch._subclasses.fake_tensor import FakeTensorMode

from fusedcomm import native
from fusedcomm.ops.sampling import reference as sampling_reference
from fusedcomm.ops.speculative import reference as speculative_reference

pytestmark = pytest.mark.skipif(native.load() is None, reason="the native library is not installed")

ROWS, VOCAB = 40, 5003  # rows for several threads, and a part of a vector at the end


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    """torch.set_num_threads until the test ends."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def sampling_arguments() -> dict[str, tuple[torch.Tensor, ...]]:
    """The arguments of each operator of sampling, its result last and poisoned; as Python calls it."""
    probs, u = bodies.rows("peaked", ROWS, VOCAB), bodies.uniforms(ROWS)
    k, p = torch.arange(0, 100 * ROWS, 100), torch.linspace(0, 1, ROWS)
    named = torch.arange(ROWS - 1, -1, -1, dtype=torch.int32)
    filtered, tokens = torch.full((ROWS, VOCAB), torch.nan), torch.full((ROWS,), -7, dtype=torch.int32)
    arguments: dict[str, Any] = {
        "top_k_renorm_probs_out": (probs, None, k, 0, filtered),
        "top_p_renorm_probs_out": (probs, named, p, 0.0, filtered),
        "top_k_top_p_renorm_probs_out": (probs, None, k, 0, None, 0.9, filtered),
        "min_p_renorm_probs_out": (probs, None, None, 0.1, filtered),
        "softmax_temperature_out": (probs.log(), named, p, 0.0, filtered),
        "sampling_from_probs_out": (probs, None, u, tokens),
        "top_k_top_p_sampling_from_probs_out": (probs, named, None, 300, p, 0.0, u, True, tokens),
    }
    return {name: (*given[:-1], given[-1].clone()) for name, given in arguments.items()}


def speculative_arguments() -> dict[str, tuple[Any, ...]]:
    """The same for the verification of drafts; results come last but for the tree, which has them first and mutates."""
    *fields, draft, ids = speculative_bodies.everything_arguments(ROWS)
    tree = speculative_bodies.Tree(*fields)
    u, final = tree.uniform_samples, tree.uniform_samples_for_final_sampling
    batch, size = tree.candidates.shape
    counts = torch.full((batch,), -7, dtype=torch.int32)
    verified = (counts, torch.full((batch,), -7), torch.full((batch, size), -7))
    sampled = (torch.full((batch, size), -7, dtype=torch.int32), counts)
    arguments: dict[str, tuple[Any, ...]] = {
        "chain_speculative_sampling_out": (draft, ids, tree.target_probs, u[:, 1:].contiguous(), final, *sampled),
        "dflash_chain_verify_out": (tree.candidates, tree.target_probs, u, final, 0.9, 0.8, *verified),
        "greedy_chain_verify_out": (tree.candidates, tree.target_probs.argmax(-1).int(), *verified),
        "tree_speculative_sampling_target_only": (*tree, 0.9, 0.8),
    }
    return {
        name: tuple(t.clone() if isinstance(t, torch.Tensor) else t for t in given) for name, given in arguments.items()
    }


def tensors(given: tuple[Any, ...]) -> list[torch.Tensor]:
    return [t for t in given if isinstance(t, torch.Tensor)]


def operator(name: str) -> Any:
    return getattr(torch.ops.fusedcomm, name).default


NAMES = native.SAMPLING_OPERATORS


def arguments_of(name: str) -> tuple[Any, ...]:
    every = sampling_arguments() | speculative_arguments()
    assert set(every) == set(NAMES)
    return every[name]


@pytest.mark.parametrize("name", NAMES)
def test_they_are_as_torch_wants_them(name: str) -> None:
    """The schema says what is mutated, and there is a fake."""
    torch.library.opcheck(operator(name), arguments_of(name), test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("name", NAMES)
def test_any_number_of_threads_gives_the_same(name: str, threads: Callable[[int], None]) -> None:
    """softmax too, whose exp is the library's own; all others give what torch gives."""
    found = []
    for count in (1, 2, 5):
        threads(count)
        given = arguments_of(name)
        operator(name)(*given)
        found.append(tensors(given))
    assert all_same(found[0], found[1])
    assert all_same(found[0], found[2])
    if name != "softmax_temperature_out":
        reference = sampling_reference if hasattr(sampling_reference, name) else speculative_reference
        given = arguments_of(name)
        getattr(reference, name)(*given)
        assert all_same(found[0], tensors(given))


def misfits(t: torch.Tensor) -> dict[str, torch.Tensor]:
    """Tensors like t that an operator must not take for it."""
    found = {
        "more elements": torch.cat([t, t]),
        "a dtype": t.to(torch.float64 if t.is_floating_point() else torch.int16),
    }
    if t.numel() > 1:
        found["strides"] = torch.stack([t, t], -1)[..., 0]
    return found


def may_be_longer(name: str, position: int) -> bool:
    """There are as many rows of probabilities, and positions of a tree, as the caller likes."""
    return position == 0 and (hasattr(sampling_reference, name) or name.startswith("tree"))


@pytest.mark.parametrize("name", NAMES)
def test_what_does_not_fit_is_refused(name: str) -> None:
    """Python has checked it before: here nothing may be read or written past an end, whoever calls."""
    tried = 0
    for position, t in enumerate(arguments_of(name)):
        if not isinstance(t, torch.Tensor):
            continue
        for how, wrong in misfits(t).items():
            if how == "more elements" and may_be_longer(name, position):
                continue
            given = list(arguments_of(name))
            given[position] = wrong
            before = [t.clone() for t in tensors(tuple(given))]
            with pytest.raises(RuntimeError, match="expected"):
                operator(name)(*given)
            assert all_same(tensors(tuple(given)), before), (position, how)
            tried += 1
    assert tried >= 5


def test_fakes_write_nothing() -> None:
    with FakeTensorMode() as mode:
        for name in NAMES:
            given = [mode.from_tensor(t) if isinstance(t, torch.Tensor) else t for t in arguments_of(name)]
            assert operator(name)(*given) is None
