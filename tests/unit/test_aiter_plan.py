"""Where aiter stands in the plan, and that calls go to whom the plan names."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch

from fusedcomm import Settings, Stage
from fusedcomm.comm.guard import CallGuard
from fusedcomm.comm.local import local_ops
from fusedcomm.comm.plan import Facts, Plan, choose_plan
from fusedcomm.comm.stages import StagedCollectives
from fusedcomm.ops.types import AddRMSNorm, AddRMSNormQuant, ScaleLayout

MI300, MI355 = ("gfx942",) * 8, ("gfx950",) * 8
NO_LIBRARY = "rank 0 has no native GPU library"


def plan(op: str, *, hidden: int = 4096, tokens: int = 4, **changes: Any) -> Plan:
    values: dict[str, Any] = {
        "op": op,
        "num_tokens": tokens,
        "hidden_size": hidden,
        "dtype": torch.bfloat16,
        "world_size": 8,
        "settings": Settings(),
        "one_shot_max_bytes": 64 << 10,
        "device_type": "cuda",
        "archs": MI355,
        "aiter_unavailable": "",
    }
    return choose_plan(Facts(**{**values, **changes}))


def test_it_makes_the_fastest_stage_it_can() -> None:
    for op, stage in (
        ("all_reduce", Stage.CUSTOM),
        ("allreduce_rmsnorm", Stage.FUSED_NORM),
        ("allreduce_rmsnorm_quant", Stage.FUSED),
    ):
        taken = plan(op)
        assert (taken.stage, taken.by_aiter, taken.algorithm) == (stage, True, None)
        assert f"{op}: {stage} (aiter)   <- taken" in str(taken)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"aiter_unavailable": "rank 3: AMD's aiter is not installed"}, "rank 3: AMD's aiter is not installed"),
        ({"hidden": 16384}, "16384"),
        ({"dtype": torch.float32}, "float32"),
        ({"archs": MI300}, "gfx95x only"),
        ({"group_size": 96, "hidden": 6144}, "group_size 96"),
    ],
)
def test_own_kernels_make_what_it_cannot(changes: dict[str, Any], reason: str) -> None:
    taken = plan("allreduce_rmsnorm_quant", **changes)
    assert (taken.stage, taken.by_aiter) == (Stage.FUSED, False)
    assert taken.algorithm is not None
    assert reason in taken.aiter_reason
    assert f"aiter   not taken: {taken.aiter_reason}" in str(taken)


def test_without_own_kernels_it_takes_the_stages_it_can() -> None:
    taken = plan("allreduce_rmsnorm_quant", archs=MI300, custom_unavailable=NO_LIBRARY)
    assert (taken.stage, taken.by_aiter) == (Stage.FUSED_NORM, True)
    assert taken.reasons == {Stage.FUSED: NO_LIBRARY}
    taken = plan("allreduce_rmsnorm", hidden=16384, custom_unavailable=NO_LIBRARY)
    assert (taken.stage, taken.by_aiter) == (Stage.CUSTOM, True)
    taken = plan("all_reduce", dtype=torch.float32, custom_unavailable=NO_LIBRARY)
    assert (taken.stage, taken.by_aiter) == (Stage.PROCESS_GROUP, False)


@pytest.mark.parametrize("switch", ["disable", "disable_custom_ar", "disable_fused_ar_norm", "disable_fused_ar_quant"])
def test_switches_hold_for_it_too(switch: str) -> None:
    settings = Settings(**{switch: True})
    stages = {"disable_custom_ar": Stage.CUSTOM, "disable_fused_ar_norm": Stage.FUSED_NORM}
    taken = plan("allreduce_rmsnorm_quant", settings=settings)
    if switch == "disable":
        assert (taken.stage, taken.by_aiter) == (Stage.PROCESS_GROUP, False)
    else:
        assert stages.get(switch, Stage.FUSED) in taken.reasons


def test_forced_nothing_goes_to_own_kernels() -> None:
    settings = Settings(backend="aiter")
    assert plan("allreduce_rmsnorm_quant", settings=settings).by_aiter
    taken = plan("all_reduce", settings=settings, dtype=torch.float32)
    assert taken.stage is Stage.PROCESS_GROUP
    assert "float32" in taken.reasons[Stage.CUSTOM]


def test_elsewhere_nobody_speaks_of_it() -> None:
    taken = plan("allreduce_rmsnorm", archs=("sm_90",) * 8, aiter_unavailable="aiter serves gfx94x and gfx95x")
    assert not taken.by_aiter
    assert "aiter" not in str(taken)


class Recorder:
    """Stands for the collectives of one server."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def all_reduce(self, x: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        self.calls.append("all_reduce")
        return x if out is None else out.copy_(x)

    def allreduce_rmsnorm(self, x: torch.Tensor, *_: object) -> AddRMSNorm:
        self.calls.append("allreduce_rmsnorm")
        return AddRMSNorm(x, x)

    def allreduce_rmsnorm_quant(self, x: torch.Tensor, *_: object) -> AddRMSNormQuant:
        self.calls.append("allreduce_rmsnorm_quant")
        return AddRMSNormQuant(x, x, x, None, ScaleLayout.ROW_MAJOR)


class Group(StagedCollectives):
    """The stages between two servers, without ranks."""

    def __init__(self, **facts: Any) -> None:
        super().__init__()
        self.device = torch.device("cpu")
        self._guard = CallGuard(lambda data: [data])
        self._custom, self._aiter = Recorder(), Recorder()  # type: ignore[assignment]
        self._settings = Settings()
        self._local = local_ops("torch")
        self._facts = functools.partial(
            Facts, world_size=8, settings=self._settings, device_type="cuda", archs=MI355, aiter_unavailable="", **facts
        )
        self._go_direct()

    def calls(self) -> tuple[list[str], list[str]]:
        """Of aiter and of the own kernels, since the last look."""
        found = (self._aiter.calls, self._custom.calls)  # type: ignore[union-attr]
        self._aiter, self._custom = Recorder(), Recorder()  # type: ignore[assignment]
        return found  # type: ignore[return-value]


def test_calls_go_where_the_plan_says() -> None:
    group = Group()
    weight = torch.ones(512, dtype=torch.bfloat16)
    served = torch.ones(2, 512, dtype=torch.bfloat16)
    other = served.float()
    for x, who in ((served, 0), (other, 1)):
        group.all_reduce(x)
        assert group.calls()[who] == ["all_reduce"]
        group.allreduce_rmsnorm(x, None, weight.to(x.dtype), 1e-6)
        assert group.calls()[who] == ["allreduce_rmsnorm"]
        group.allreduce_rmsnorm_quant(x, None, weight.to(x.dtype), 1e-6)
        assert group.calls()[who] == ["allreduce_rmsnorm_quant"]
    assert group.calls() == ([], [])


def test_staged_calls_go_there_too() -> None:
    group = Group(custom_unavailable=NO_LIBRARY)
    x, weight = torch.ones(2, 256, dtype=torch.bfloat16), torch.ones(256, dtype=torch.bfloat16)
    group.allreduce_rmsnorm(x, None, weight, 1e-6)  # rows too short for its norm: sum there, norm here
    assert group.calls() == (["all_reduce"], [])
    group._facts = functools.partial(group._facts, archs=MI300)
    x, weight = torch.ones(2, 512, dtype=torch.bfloat16), torch.ones(512, dtype=torch.bfloat16)
    result = group.allreduce_rmsnorm_quant(x, None, weight, 1e-6)  # quantises here
    assert group.calls() == (["allreduce_rmsnorm"], [])
    assert result.fp8.dtype is torch.float8_e4m3fn
