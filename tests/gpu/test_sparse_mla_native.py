"""The compiled kernel of sparse MLA decode, on a Hopper GPU, against the formula in fp64."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import sparse_mla_bodies as bodies
import torch
from sparse_mla_bodies import Problem, assert_close, in_fp64, keys_of, problem

pytest.importorskip("triton", reason="Triton is not installed")

from fusedcomm.kernels.attention.sparse_mla_splits import Plan

pytestmark = pytest.mark.needs_cuda
layouts = pytest.mark.parametrize("token_bytes", [584, 656])
all_heads = pytest.mark.parametrize("num_heads", [16, 32, 128])


@pytest.fixture(autouse=True)
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Plan]]:
    """How the calls that the kernel took were spread: a test in which Triton served would show nothing."""
    from fusedcomm.kernels.attention import sparse_mla_hopper

    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("the kernel is for sm_90")
    monkeypatch.setattr(sparse_mla_hopper, "is_wanted", lambda: True)
    taken: list[Plan] = []
    decode = sparse_mla_hopper.decode

    def counted(*arguments: Any) -> None:
        taken.append(arguments[5])
        decode(*arguments)

    monkeypatch.setattr(sparse_mla_hopper, "decode", counted)
    yield taken
    assert taken, "Triton served"


def spread(monkeypatch: pytest.MonkeyPatch, how: Plan) -> None:
    """Whatever would be chosen, calls are spread like this."""
    from fusedcomm.kernels.attention import sparse_mla_hopper

    monkeypatch.setattr(sparse_mla_hopper, "plan", lambda *sizes: how)


def may_merge(token_bytes: int, block_heads: int, num_splits: int) -> bool:
    """As this GPU says; any runs clusters of eight blocks."""
    from fusedcomm.kernels.attention import sparse_mla_hopper

    if num_splits == 1 or block_heads == 64:
        return False
    clusters = sparse_mla_hopper._active_clusters(torch.cuda.current_device(), bodies.HEAD_DIM[token_bytes])
    assert num_splits > 8 or clusters[block_heads][num_splits] > 0
    return clusters[block_heads][num_splits] > 0


def check(p: Problem, num_splits: int | None = None) -> torch.Tensor:
    got = bodies.decode("cuda", p, num_splits)
    assert_close(got, in_fp64(p))
    return got


@pytest.mark.parametrize("num_splits", [1, 3])
@pytest.mark.parametrize("num_heads", [1, 8, 16, 20, 32, 48, 64, 128])
@layouts
def test_lengths(token_bytes: int, num_heads: int, num_splits: int) -> None:
    """Of no tile, a part of one, one and several; a row without a key is zeros; NaN in what is skipped stays there."""
    lens = [0, 1, 31, 63, 64, 65, 128, 129, 200]
    main = keys_of(lens, 200, 64, token_bytes)
    p = problem(num_heads, main, keys_of([0, 0, 1, 70, 0, 33, 64, 0, 65], 70, 4, token_bytes, padding=1, seed=5))
    assert (check(p, num_splits)[0] == 0).all()


@all_heads
@layouts
def test_ragged_lists_and_odd_blocks(token_bytes: int, num_heads: int) -> None:
    main = keys_of([70, 5, 130], 130, 3, token_bytes, padding=2).ragged()
    check(problem(num_heads, main, keys_of([0, 20, 9], 20, 5, token_bytes, seed=6), sink=False))


@pytest.mark.parametrize("block_heads", [16, 32, 64])
@pytest.mark.parametrize("num_heads", [16, 40, 128])
@layouts
def test_splits_agree(
    token_bytes: int, num_heads: int, block_heads: int, monkeypatch: pytest.MonkeyPatch, calls: list[Plan]
) -> None:
    """Merged in the launch and behind it: rows with keys in all splits, in some and in none."""
    main = keys_of([2048, 700, 64, 0], 2048, 64, token_bytes)
    p = problem(num_heads, main, keys_of([128, 128, 1, 0], 128, 256, token_bytes, seed=4))
    want = in_fp64(p)
    for splits in range(1, 17):
        for merged in (False, True) if may_merge(token_bytes, block_heads, splits) else (False,):
            spread(monkeypatch, Plan(block_heads, splits, merged))
            got = bodies.decode("cuda", p)
            assert_close(got, want)
            assert (got[3] == 0).all()
            assert calls[-1] == Plan(block_heads, splits, merged)


@pytest.mark.parametrize("block_heads", [16, 32])
@layouts
def test_merged_splits_of_lengths_and_ragged_lists(
    token_bytes: int, block_heads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    main = keys_of([0, 1, 63, 64, 65, 129, 200], 200, 64, token_bytes)
    extra = keys_of([0, 70, 0, 33, 64, 0, 65], 70, 4, token_bytes, padding=1, seed=5)
    for splits in (2, 5, 8):
        spread(monkeypatch, Plan(block_heads, splits, True))
        for num_heads in (1, 20, 64):
            check(problem(num_heads, main, extra))
            check(problem(num_heads, main.ragged(), extra.ragged(), sink=False))


@layouts
def test_merged_splits_of_many_rows(token_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """More clusters than run at a time; the result of each call is the same to the bit."""
    lens = np.random.default_rng(6).integers(0, 500, 300).tolist()
    p = problem(64, keys_of(lens, 500, 64, token_bytes))
    spread(monkeypatch, Plan(16, 4, True))
    first = check(p)
    for _ in range(5):
        assert torch.equal(bodies.decode("cuda", p).view(torch.int16), first.view(torch.int16))


@pytest.mark.parametrize("num_heads", [16, 64, 128])
@layouts
def test_what_is_chosen_for_a_few_rows(token_bytes: int, num_heads: int, calls: list[Plan]) -> None:
    """Of a window and a list; clusters merge the splits in one launch."""
    for rows in (1, 2, 4):
        main, extra = keys_of([512] * rows, 512, 64, token_bytes), keys_of([128] * rows, 128, 256, token_bytes, seed=4)
        check(problem(num_heads, main, extra))
        assert calls[-1].merged
        assert calls[-1].num_splits > 1


@all_heads
@layouts
def test_many_rows(token_bytes: int, num_heads: int) -> None:
    lens = np.random.default_rng(5).integers(0, 300, 257).tolist()
    p = problem(
        num_heads, keys_of(lens, 300, 64, token_bytes), keys_of([n // 3 for n in lens], 100, 4, token_bytes, seed=9)
    )
    check(p)


@pytest.mark.parametrize("merged", [False, True])
@all_heads
@layouts
def test_graph_replays(token_bytes: int, num_heads: int, merged: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    spread(monkeypatch, Plan(16 if merged else min(num_heads, 64), 2, merged))
    main = keys_of([150] * 3, 150, 64, token_bytes)
    lens = [[150, 0, 7], [64, 65, 150], [0, 0, 0], [150, 150, 1]]
    p = problem(num_heads, main)
    for got, own in zip(bodies.graph_replays("cuda", p, lens, 2), lens, strict=True):
        assert_close(got, in_fp64(problem(num_heads, replace(main, lens=torch.tensor(own, dtype=torch.int32)))))
