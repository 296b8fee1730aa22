"""torch.compile without graph breaks, fake tensors, and replays of a graph."""

from __future__ import annotations

import pytest
import speculative_bodies as bodies
import torch
from qk_bodies import all_same
from torch._subclasses.fake_tensor import FakeTensorMode
from triton_backend import TritonOps


def test_compiles_without_graph_breaks(ops: TritonOps) -> None:
    ops.run(bodies.everything_compiles)


def test_fake_tensors() -> None:
    with FakeTensorMode() as mode:
        given = [mode.from_tensor(t) for t in bodies.everything_arguments(4)]
        results = bodies.everything(*given)
    sampled, verified = [(4, 5), (4,)], [(4,), (4,), (4, 5)]
    assert [tuple(t.shape) for t in results] == [*sampled, *verified, *verified, (20,)]
    assert [t.dtype for t in results[:5]] == [torch.int32] * 3 + [torch.int64] * 2


def test_graph_replay(ops: TritonOps) -> None:
    if ops.device == "cpu":
        pytest.skip("graphs are captured on a GPU")
    for replayed, eager in ops.run(bodies.everything_replays):
        assert all_same(replayed, eager)
