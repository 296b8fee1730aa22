"""Calls that go straight to the kernels of a GPU, pretended: rows that these refuse go by the plan."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch

from fusedcomm import GroupBrokenError, Settings
from fusedcomm.comm.guard import CallGuard
from fusedcomm.comm.local import local_ops
from fusedcomm.comm.plan import FUSED_HIDDEN_ON_GPU, Facts
from fusedcomm.comm.stages import StagedCollectives
from fusedcomm.ops.types import AddRMSNorm, AddRMSNormQuant, ScaleLayout


class Kernels:
    """One rank's; refuses rows as csrc/gpu/communicator.cu does."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.error: BaseException | None = None

    def all_reduce(self, x: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        self.calls.append("sum")
        return x.clone() if out is None else out.copy_(x)

    def allreduce_rmsnorm(self, x: torch.Tensor, *arguments: Any) -> Any:
        return self.answer("norm", x, arguments[-1], AddRMSNorm(x, x))

    def allreduce_rmsnorm_quant(self, x: torch.Tensor, *arguments: Any) -> Any:
        return self.answer("quant", x, arguments[-1], AddRMSNormQuant(x, x, x, None, ScaleLayout.ROW_MAJOR))

    def answer(self, name: str, x: torch.Tensor, out: Any, result: Any) -> Any:
        self.calls.append(name)
        if self.error is not None:
            raise self.error
        if x.shape[-1] not in FUSED_HIDDEN_ON_GPU:
            raise RuntimeError("x: expected H a multiple of 8, up to 16384, and a row that fits the slab")
        return result if out is None else out

    def give_up(self, error: BaseException) -> None:
        self.calls.append("gave up")


class Group(StagedCollectives):
    """On the CPU; takes itself for one of eight ranks with GPUs."""

    def __init__(self) -> None:
        super().__init__()
        self.device = torch.device("cuda")
        self._guard = CallGuard(lambda data: [data])
        self.kernels = self._custom = Kernels()  # type: ignore[assignment]
        self._settings, self._local = Settings(), local_ops("torch")
        self._facts = functools.partial(Facts, world_size=8, settings=self._settings, device_type="cuda")
        self._go_direct()
        self.device = torch.device("cpu")

    def calls(self) -> list[str]:
        """Since the last look."""
        found = list(self.kernels.calls)
        self.kernels.calls.clear()
        return found


def rows(hidden: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.ones(2, hidden), torch.ones(hidden)


def test_what_is_too_long_is_refused_once_and_then_seen_before() -> None:
    group = Group()
    short, long = rows(256), rows(16384 + 256)
    assert group.allreduce_rmsnorm(short[0], None, short[1], 1e-6).norm is short[0]
    assert group.calls() == ["norm"]
    for attempt in (["norm", "sum"], ["sum"]):
        assert group.allreduce_rmsnorm(long[0], None, long[1], 1e-6).norm is not long[0]
        assert group.calls() == attempt
    group.allreduce_rmsnorm_quant(long[0], None, long[1], 1e-6)
    group.allreduce_rmsnorm_quant(short[0], None, short[1], 1e-6)
    assert group.calls() == ["sum", "quant"]
    expected = {"allreduce_rmsnorm.fused_norm": 1, "allreduce_rmsnorm.custom": 2}
    assert group._stats == {**expected, "allreduce_rmsnorm_quant.custom": 1, "allreduce_rmsnorm_quant.fused": 1}


@pytest.mark.parametrize("fused", [False, True])
def test_out_of_what_is_too_long(fused: bool) -> None:
    group, (x, weight) = Group(), rows(16384 + 256)
    want = AddRMSNorm(torch.empty_like(x), torch.full_like(x, 7.0))
    got = (group.fused_allreduce_rmsnorm if fused else group.allreduce_rmsnorm)(x, None, weight, 1e-6, out=want)
    assert got is (None if fused else want)
    assert bool((want.residual == (7.0 if fused else 1.0)).all())
    assert group.calls() == (["norm"] if fused else ["norm", "sum"])


@pytest.mark.parametrize("error", [GroupBrokenError("rank 1 is gone"), KeyboardInterrupt(), RuntimeError("launch")])
def test_what_breaks_is_raised(error: BaseException) -> None:
    group = Group()
    group.kernels.error = error
    x, weight = rows(16384 + 256 if not isinstance(error, RuntimeError) or "gone" in str(error) else 256)
    with pytest.raises(type(error)):
        group.allreduce_rmsnorm(x, None, weight, 1e-6)
    is_broken = "launch" not in str(error)
    assert group.calls() == (["norm", "gave up"] if is_broken else ["norm"])
    assert group._guard.usable != is_broken


def test_a_bad_argument_of_what_is_too_long_is_named() -> None:
    group, (x, weight) = Group(), rows(16384 + 256)
    with pytest.raises(ValueError, match="weight: expected shape"):
        group.allreduce_rmsnorm(x, None, weight[1:], 1e-6)
    with pytest.raises(ValueError, match=r"out\.norm: expected shape"):
        group.allreduce_rmsnorm(x, None, weight, 1e-6, out=AddRMSNorm(weight, x))
    assert group._direct_hidden is None
