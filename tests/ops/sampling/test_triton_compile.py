"""The Triton kernels compiled for GPUs that need not be here: how they load a row, what they hold, how they round.

Verification is here too: it reads rows as sampling does.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from launched import TARGETS, Compiled, Launch, Target

BATCH, DRAFTS = 3, 5
VOCAB = 128_256  # tiles of the largest size
F32, I32, I64 = torch.float32, torch.int32, torch.int64


@pytest.fixture(autouse=True, scope="module")
def _fresh_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        yield


def empty(*shape: int, dtype: torch.dtype = F32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype)


def probs(dtype: torch.dtype = F32) -> torch.Tensor:
    return empty(BATCH, VOCAB, dtype=dtype)


def each(dtype: torch.dtype = F32) -> torch.Tensor:
    return empty(BATCH, dtype=dtype)


def of_drafts(count: int, dtype: torch.dtype = F32) -> torch.Tensor:
    return empty(BATCH, count, dtype=dtype)


def of_vocabs(count: int) -> torch.Tensor:
    return empty(BATCH, count, VOCAB)


# what an operator is given, by the name of its function; of all kernels one form
FILTERS: dict[str, Callable[[], tuple[Any, ...]]] = {
    "_top_k_renorm_probs": lambda: (probs(), None, each(I32), 0, probs()),
    "_top_p_renorm_probs": lambda: (probs(), None, each(), 0.0, probs()),
    "_top_k_top_p_renorm_probs": lambda: (probs(), None, each(I32), 0, None, 0.9, probs()),
    "_min_p_renorm_probs": lambda: (probs(torch.bfloat16), each(I64), None, 0.1, probs()),
}
DRAWS: dict[str, Callable[[], tuple[Any, ...]]] = {
    "_sampling_from_probs": lambda: (probs(), each(I32), each(), each(I32)),
    "_top_k_top_p_sampling_from_probs": lambda: (probs(), None, None, 9, each(), 0.0, each(), True, each(I32)),
    "_top_k_top_p_sampling_from_probs, one after the other": lambda: (
        *(probs(), None, each(I64), 0, each(), 0.0, each(), False, each(I32)),
    ),
    "_chain_speculative_sampling": lambda: (
        *(of_vocabs(DRAFTS), of_drafts(DRAFTS, I64), of_vocabs(DRAFTS + 1), of_drafts(DRAFTS), each()),
        *(of_drafts(DRAFTS + 1, I32), each(I32)),
    ),
    "_dflash_chain_verify": lambda: (
        *(of_drafts(DRAFTS, I64), of_vocabs(DRAFTS), of_drafts(DRAFTS), each(), 0.9, 0.8),
        *(each(I32), each(I64), of_drafts(DRAFTS, I64)),
    ),
    "_tree_speculative_sampling": lambda: (
        *(empty(BATCH * DRAFTS, dtype=I32), of_drafts(DRAFTS, I32), each(I32)),
        *(of_drafts(DRAFTS, I64) for _ in range(4)),
        *(of_drafts(DRAFTS), each(), of_vocabs(DRAFTS), of_vocabs(DRAFTS), 0.9, 0.8),
    ),
}
GREEDY = (of_drafts(DRAFTS, I64), of_drafts(DRAFTS, I64), each(I32), each(I64), of_drafts(DRAFTS, I64))
SOFTMAX = (probs(), None, each(), 0.0, probs())


def record(target: Target, function: str, *arguments: Any) -> Launch:
    """What an operator launches on a target; the tensors, on the CPU, stay as they are."""
    from fusedcomm.kernels.sampling import operators, tiles, verify_operators

    found: list[Launch] = []

    def launch(kernel: Any, grid: tuple[int, ...], device: torch.device, *given: Any, **options: Any) -> None:
        found.append(Launch(kernel, grid, given, options))

    module = operators if hasattr(operators, function) else verify_operators
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "launch", launch)
        patch.setattr(tiles, "_lanes", lambda: target.lanes)
        getattr(module, function)(*arguments)
    (only,) = found
    return only


def compiled(target: Target, function: str, arguments: tuple[Any, ...]) -> Compiled:
    return record(target, function.partition(",")[0], *arguments).compile(target)


def check_division(found: Compiled) -> None:
    """That of IEEE, subnormal numbers and all."""
    found.check_arithmetic()
    assert ("div.rn.f32" if found.on_nvidia else "v_div_fixup_f32") in found.asm


@pytest.mark.parametrize("target", TARGETS, ids=str)
@pytest.mark.parametrize("function", FILTERS)
def test_filters(target: Target, function: str) -> None:
    """Rows come and go 16 bytes at a time, and a thread has what it needs in registers."""
    found = compiled(target, function, FILTERS[function]())
    found.check_registers()
    check_division(found)
    accesses = found.accesses()
    assert set(accesses) <= {"load 16", "store 16", "load 8", "load 4"}
    # 16 values a thread of a tile: read for the largest value, for a mass and for the quotients, and in each search
    assert accesses["load 16"] >= (3 * 2 if "min_p" in function else 3 * 4)
    assert accesses["store 16"] == 4
    # the limits, and the index
    assert accesses["load 8"] + accesses["load 4"] <= 2


@pytest.mark.parametrize("target", TARGETS, ids=str)
@pytest.mark.parametrize("function", DRAWS)
def test_draws(target: Target, function: str) -> None:
    """What is not of a row of probabilities is a few numbers, each read once by a thread."""
    found = compiled(target, function, DRAWS[function]())
    found.check_registers()
    found.check_arithmetic()
    accesses = found.accesses()
    assert accesses["load 16"] >= 3 * 4
    assert accesses["load 4"] + accesses["load 8"] <= 12


@pytest.mark.parametrize("target", TARGETS, ids=str)
def test_softmax(target: Target) -> None:
    """exp by the device's instruction, for which there is a tolerance; the rest is that of IEEE."""
    found = compiled(target, "_softmax_temperature", SOFTMAX)
    found.check_registers()
    assert ("div.rn.f32" if found.on_nvidia else "v_div_fixup_f32") in found.asm
    if found.on_nvidia:
        assert set(re.findall(r"\w+\.approx\S*", found.asm)) == {"ex2.approx.f32"}
        assert ".ftz" not in found.asm
    else:
        found.check_arithmetic()
    assert set(found.accesses()) <= {"load 16", "store 16", "load 4"}


@pytest.mark.parametrize("target", TARGETS, ids=str)
def test_greedy(target: Target) -> None:
    found = compiled(target, "_greedy_chain_verify", GREEDY)
    found.check_registers()
    assert found.shared_bytes == 0


@pytest.mark.parametrize("vocab", [1, 19, 50_257])
def test_vocabularies_that_are_not_aligned(vocab: int) -> None:
    """Of one token Triton makes a constant; 50,257 is in no unit of 16 bytes."""
    target, rows = TARGETS[0], empty(BATCH, vocab)
    given = rows, None, each(I64), 0, each(), 0.0, each(), False, each(I32)
    compiled(target, "_top_k_top_p_sampling_from_probs", given).check_arithmetic()
