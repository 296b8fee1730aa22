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

pytestmark = pytest.mark.needs_cuda
layouts = pytest.mark.parametrize("token_bytes", [584, 656])
forms = pytest.mark.parametrize("num_heads", [16, 32, 128])  # of 16, 32 and 64 heads a block


@pytest.fixture(autouse=True)
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """The numbers of splits of the calls that the kernel took: a test in which Triton served would show nothing."""
    from fusedcomm.kernels.attention import sparse_mla_hopper

    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("the kernel is for sm_90")
    monkeypatch.setattr(sparse_mla_hopper, "is_wanted", lambda: True)
    taken: list[int] = []
    decode = sparse_mla_hopper.decode

    def counted(*arguments: Any) -> None:
        taken.append(arguments[5])
        decode(*arguments)

    monkeypatch.setattr(sparse_mla_hopper, "decode", counted)
    yield taken
    assert taken, "Triton served"


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


@forms
@layouts
def test_ragged_lists_and_odd_blocks(token_bytes: int, num_heads: int) -> None:
    main = keys_of([70, 5, 130], 130, 3, token_bytes, padding=2).ragged()
    check(problem(num_heads, main, keys_of([0, 20, 9], 20, 5, token_bytes, seed=6), sink=False))


@forms
@layouts
def test_splits_agree(token_bytes: int, num_heads: int) -> None:
    main, extra = keys_of([2048, 700, 64], 2048, 64, token_bytes), keys_of([128] * 3, 128, 256, token_bytes, seed=4)
    p = problem(num_heads, main, extra)
    want = in_fp64(p)
    for splits in range(1, 17):
        assert_close(bodies.decode("cuda", p, splits), want)


@forms
@layouts
def test_many_rows(token_bytes: int, num_heads: int) -> None:
    lens = np.random.default_rng(5).integers(0, 300, 257).tolist()
    p = problem(
        num_heads, keys_of(lens, 300, 64, token_bytes), keys_of([n // 3 for n in lens], 100, 4, token_bytes, seed=9)
    )
    check(p)


@forms
@layouts
def test_graph_replays(token_bytes: int, num_heads: int) -> None:
    main = keys_of([150] * 3, 150, 64, token_bytes)
    lens = [[150, 0, 7], [64, 65, 150], [0, 0, 0], [150, 150, 1]]
    p = problem(num_heads, main)
    for got, own in zip(bodies.graph_replays("cuda", p, lens, 2), lens, strict=True):
        assert_close(got, in_fp64(problem(num_heads, replace(main, lens=torch.tensor(own, dtype=torch.int32)))))
