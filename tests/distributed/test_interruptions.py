"""A rank that leaves the group in an unusual way, and inputs that carry gradients."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
from harness import run_ranks

import fusedcomm
from fusedcomm import GroupBrokenError, GroupCoordinator, PeerDiedError


def interrupted_just_after_a_call() -> None:
    group = fusedcomm.init_distributed(timeout=20)
    if group.rank == 1:
        assert group._custom is not None
        barrier = group._custom._comm_barrier

        def then_interrupted(handle: int) -> bool:
            while not barrier(handle):
                pass
            raise KeyboardInterrupt

        group._custom._comm_barrier = then_interrupted
        with pytest.raises(KeyboardInterrupt):
            group.barrier()
        with pytest.raises(GroupBrokenError, match="KeyboardInterrupt"):
            group.barrier()
        time.sleep(2)  # alive, and the group open
    else:
        group.barrier()
        start = time.monotonic()
        with pytest.raises(PeerDiedError, match="rank 1, which has given up on the group"):
            group.barrier()
        assert time.monotonic() - start < 5


def test_peers_learn_of_an_interruption_just_after_a_call() -> None:
    run_ranks(2, interrupted_just_after_a_call, launcher="spawn")


def sums_of_what_needs_gradients(group: GroupCoordinator) -> list[Any]:
    x = torch.randn(4, 256, generator=torch.Generator().manual_seed(group.rank))
    weight = torch.nn.Parameter(torch.ones(256))
    results = []
    for value in (x, x.clone().requires_grad_()):
        norm = group.allreduce_rmsnorm(value, value, weight, 1e-6)
        quant = group.allreduce_rmsnorm_quant(value, value, weight, 1e-6)
        moved = (group.all_reduce(value), group.all_gather(value), group.reduce_scatter(value), group.broadcast(value))
        results.append([t.detach() for t in (*norm, quant.fp8.float(), quant.scale, quant.residual, *moved)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    return results


def on_every_stage() -> None:
    sums_of_what_needs_gradients(fusedcomm.init_distributed())


@pytest.mark.parametrize("settings", [{}, {"FUSEDCOMM_DISABLE": "1"}], ids=["kernels", "process_group"])
def test_inputs_that_require_gradients(settings: dict[str, str]) -> None:
    run_ranks(2, on_every_stage, launcher="spawn", env=settings)


def test_inputs_that_require_gradients_on_one_rank() -> None:
    with GroupCoordinator() as group:
        sums_of_what_needs_gradients(group)
