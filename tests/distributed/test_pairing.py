"""Calls that must not be paired with another rank's next call, and memory that must not be shared."""

import pytest
import torch
from harness import RankPool

from fusedcomm import CallMismatchError, GroupCoordinator


def nothing_on_one_rank() -> None:
    group = GroupCoordinator()
    rows = 0 if group.rank == 1 else 4
    with pytest.raises(CallMismatchError, match="different calls"):
        group.all_reduce(torch.ones(rows, 256))
    group.close()


def nothing_on_all() -> None:
    with GroupCoordinator() as group:
        for shape in ((0, 256), (4, 0), (0,)):
            x = torch.ones(shape, dtype=torch.bfloat16)
            assert group.all_reduce(x).shape == x.shape
            assert group.all_gather(x, dim=0).shape[0] == shape[0] * group.world_size
            group.broadcast(x)
        empty = torch.ones(0, 256, dtype=torch.bfloat16)
        result = group.allreduce_rmsnorm_quant(empty, None, torch.ones(256, dtype=torch.bfloat16), 1e-6)
        assert result.fp8.shape == (0, 256)
        assert result.scale.shape == (0, 2)
        assert group.all_reduce(torch.ones(3))[0] == group.world_size


def overlapping_out() -> None:
    with GroupCoordinator() as group:
        base = torch.arange(2001.0)
        for out in (base[1:], base[:-1]):
            x = base[:-1] if out.data_ptr() != base.data_ptr() else base[1:]
            with pytest.raises(ValueError, match="out: expected x itself, or memory apart from it"):
                group.all_reduce(x, out=out)
        assert torch.equal(group.all_reduce(base, out=base), torch.arange(2001.0) * group.world_size)


def test_no_rows_on_one_rank_is_a_different_call(ranks: RankPool) -> None:
    ranks(2).run(nothing_on_one_rank)


def test_no_rows_anywhere(ranks: RankPool) -> None:
    ranks(3).run(nothing_on_all)


def test_out_that_overlaps_x(ranks: RankPool) -> None:
    ranks(2).run(overlapping_out)
