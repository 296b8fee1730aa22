"""choose_plan: every combination of settings, operation, dtype, world size and capability."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch

from fusedcomm import Settings, Stage
from fusedcomm.comm.plan import Facts, Plan, choose_plan

OPS = ("all_reduce", "allreduce_rmsnorm", "allreduce_rmsnorm_quant")
FASTEST_FIRST = (Stage.FUSED, Stage.FUSED_NORM, Stage.CUSTOM, Stage.PROCESS_GROUP)
# which stages make sense for an operation, from the specification's list
STAGES = {
    "all_reduce": {Stage.CUSTOM, Stage.PROCESS_GROUP},
    "allreduce_rmsnorm": {Stage.FUSED_NORM, Stage.CUSTOM, Stage.PROCESS_GROUP},
    "allreduce_rmsnorm_quant": set(FASTEST_FIRST),
}
SWITCH = {
    Stage.FUSED: "disable_fused_ar_quant",
    Stage.FUSED_NORM: "disable_fused_ar_norm",
    Stage.CUSTOM: "disable_custom_ar",
}
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
SLOT = 8 << 20


def facts(op: str = "allreduce_rmsnorm_quant", **changes: object) -> Facts:
    values: dict[str, object] = {
        "op": op,
        "num_tokens": 4,
        "hidden_size": 4096,
        "dtype": torch.bfloat16,
        "world_size": 8,
        "settings": Settings(),
        "slot_bytes": SLOT,
        "one_shot_max_bytes": 64 << 10,
    }
    return Facts(**{**values, **changes})  # type: ignore[arg-type]


def all_settings() -> list[Settings]:
    switches = (
        "disable",
        "disable_custom_ar",
        "disable_fused_ar_norm",
        "disable_fused_ar_quant",
        "deterministic",
        "debug",
    )
    return [
        Settings(backend=backend, **dict(zip(switches, values, strict=True)))
        for values in itertools.product((False, True), repeat=len(switches))
        for backend in (None, "native", "torch")
    ]


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("unavailable", ["", "rank 3 is on another host than rank 0"])
def test_every_combination(op: str, unavailable: str) -> None:
    for settings in all_settings():
        off = settings.disable or settings.backend == "torch" or bool(unavailable)
        expected = [
            stage
            for stage in FASTEST_FIRST
            if stage in STAGES[op] and (stage is Stage.PROCESS_GROUP or not (off or getattr(settings, SWITCH[stage])))
        ]
        for dtype, world_size, tokens in itertools.product(DTYPES, (2, 3, 6, 8, 16), (0, 1, 4096)):
            given = facts(
                op,
                settings=settings,
                custom_unavailable=unavailable,
                dtype=dtype,
                world_size=world_size,
                num_tokens=tokens,
            )
            before = copy.deepcopy(given)
            plan = choose_plan(given)
            # what it is
            assert plan.op == op
            assert list(plan.stages) == expected
            assert plan.stage is expected[0]
            assert plan.stages[-1] is Stage.PROCESS_GROUP
            # a reason for each stage that is not open, and for no other
            assert set(plan.reasons) == STAGES[op] - set(expected)
            for stage, reason in plan.reasons.items():
                check_reason(reason, stage, settings, unavailable)
            # an algorithm exactly where the library's own kernels move the data
            assert (plan.algorithm is None) == (plan.stage is Stage.PROCESS_GROUP)
            # pure
            assert choose_plan(given) == plan
            assert given == before


def check_reason(reason: str, stage: Stage, settings: Settings, unavailable: str) -> None:
    """The reason names something that does keep the stage from serving."""
    true = [unavailable] if unavailable else []
    if settings.disable:
        true.append("FUSEDCOMM_DISABLE=1")
    if settings.backend == "torch":
        true.append("FUSEDCOMM_BACKEND=torch")
    if getattr(settings, SWITCH[stage]):
        true.append(f"FUSEDCOMM_{SWITCH[stage].upper()}=1")
    assert reason in true


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_one_rank_takes_its_fastest_stage_without_an_algorithm(op: str, dtype: torch.dtype) -> None:
    """World size 1 has no buffer: no slot, and no one-shot or two-shot."""
    plan = choose_plan(facts(op, world_size=1, slot_bytes=0, one_shot_max_bytes=0, dtype=dtype))
    assert plan.stage is next(stage for stage in FASTEST_FIRST if stage in STAGES[op])
    assert plan.algorithm is None


def test_a_row_that_does_not_fit_a_slot_leaves_the_staged_path() -> None:
    """Fused kernels need whole rows in a slot; the plain sum walks any size in pieces."""
    plan = choose_plan(facts(hidden_size=4096, dtype=torch.float32, slot_bytes=4096 * 4 - 1))
    assert plan.stages == (Stage.CUSTOM, Stage.PROCESS_GROUP)
    assert "16384 bytes" in plan.reasons[Stage.FUSED]
    assert "16384 bytes" in plan.reasons[Stage.FUSED_NORM]
    assert choose_plan(facts(hidden_size=4096, dtype=torch.float32, slot_bytes=4096 * 4)).stage is Stage.FUSED
    assert choose_plan(facts("all_reduce", hidden_size=1 << 30, slot_bytes=4096)).stage is Stage.CUSTOM


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_crossing_point_counts_bytes(dtype: torch.dtype) -> None:
    elements = (64 << 10) // dtype.itemsize
    at = choose_plan(facts("all_reduce", num_tokens=1, hidden_size=elements, dtype=dtype))
    above = choose_plan(facts("all_reduce", num_tokens=1, hidden_size=elements + 1, dtype=dtype))
    assert (at.algorithm, above.algorithm) == ("one_shot", "two_shot")
    rows = choose_plan(facts("all_reduce", num_tokens=elements // 1024, hidden_size=1024, dtype=dtype))
    assert rows.algorithm == "one_shot"


def test_an_unknown_operation_is_refused() -> None:
    with pytest.raises(ValueError, match=r"op: expected .*all_reduce.*got 'all_to_all'"):
        choose_plan(facts("all_to_all"))


def test_text_lists_every_stage_once_with_its_state() -> None:
    plan = choose_plan(facts(settings=Settings(disable_fused_ar_quant=True)))
    lines = str(plan).splitlines()
    assert len(lines) == 4
    assert lines[0].endswith("FUSEDCOMM_DISABLE_FUSED_AR_QUANT=1")
    assert "fused_norm (one_shot)" in lines[1]
    assert "taken" in lines[1]
    assert "eligible" in lines[2]
    assert "eligible" in lines[3]
    for stage, line in zip(FASTEST_FIRST, lines, strict=True):
        assert f"allreduce_rmsnorm_quant: {stage}" in line


def test_a_plan_does_not_change() -> None:
    plan = choose_plan(facts())
    assert isinstance(plan, Plan)
    with pytest.raises(AttributeError):
        plan.stages = ()  # type: ignore[misc]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("hidden", [8, 64, 4096, 7168, 16384])
def test_the_gpu_kernels_serve_whole_vectors(dtype: torch.dtype, hidden: int) -> None:
    plan = choose_plan(facts(hidden_size=hidden, dtype=dtype, device_type="cuda", slot_bytes=0))
    assert plan.stage is Stage.FUSED
    assert plan.reasons == {}


@pytest.mark.parametrize("hidden", [1, 100, 4097, 16392, 32768])
def test_what_the_fused_gpu_kernels_do_not_take_is_staged(hidden: int) -> None:
    plan = choose_plan(facts(hidden_size=hidden, device_type="cuda", slot_bytes=0))
    assert plan.stages == (Stage.CUSTOM, Stage.PROCESS_GROUP)
    assert set(plan.reasons) == {Stage.FUSED, Stage.FUSED_NORM}
    assert all(f"got {hidden}" in reason for reason in plan.reasons.values())
    assert choose_plan(facts("all_reduce", hidden_size=hidden, device_type="cuda")).stage is Stage.CUSTOM
    # one rank needs no kernel that sums
    alone = choose_plan(facts(hidden_size=hidden, device_type="cuda", world_size=1))
    assert alone.stage is Stage.FUSED


@pytest.mark.parametrize("backend", ["triton", "torch", "aiter"])
def test_a_forced_backend_other_than_native_leaves_the_native_stages(backend: str) -> None:
    plan = choose_plan(facts(settings=Settings(backend=backend), device_type="cuda"))
    assert plan.stages == (Stage.PROCESS_GROUP,)
    assert set(plan.reasons.values()) == {f"FUSEDCOMM_BACKEND={backend}"}
