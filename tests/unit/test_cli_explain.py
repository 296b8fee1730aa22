"""``fusedcomm explain``: its plan and its errors."""

from __future__ import annotations

import pytest
import torch

from fusedcomm import native
from fusedcomm.cli.explain import explain, parse_dtype, parse_shape
from fusedcomm.cli.main import main
from fusedcomm.comm.plan import OPS, Stage

FUSED = "allreduce_rmsnorm_quant"


def run(*arguments: str) -> int:
    return main(["explain", *arguments])


def test_plan_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--op", FUSED, "--shape", "16,4096", "--dtype", "bf16", "--tp", "8") == 0
    out = capsys.readouterr().out
    assert f"{FUSED}: fused (" in out
    assert "<- taken" in out


def test_settings_count(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FUSEDCOMM_DISABLE_FUSED_AR_QUANT", "1")
    assert run("--op", FUSED, "--shape", "16x4096", "--tp", "8") == 0
    out = capsys.readouterr().out
    assert f"{FUSED}: fused   not taken: FUSEDCOMM_DISABLE_FUSED_AR_QUANT=1" in out
    assert f"{FUSED}: fused_norm (" in out


def test_same_as_a_group_says() -> None:
    import fusedcomm

    with fusedcomm.GroupCoordinator() as group:
        for op in OPS:
            assert explain(op, (3, 256), torch.bfloat16, 1) == group.explain(op, (3, 256), torch.bfloat16)


def test_more_ranks_than_the_kernels_serve() -> None:
    plan = explain("all_reduce", (1, 8), torch.float32, 17)
    assert plan.stage is Stage.PROCESS_GROUP
    assert "17" in plan.reasons[Stage.CUSTOM]


def test_without_the_native_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "load", lambda: None)
    plan = explain(FUSED, (1, 128), torch.bfloat16, 2)
    assert plan.stage is Stage.PROCESS_GROUP
    assert "native" in plan.reasons[Stage.FUSED]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--op", FUSED, "--shape", "16,4000", "--tp", "8"], "group_size: expected a divisor of H = 4000, got 128"),
        (["--op", FUSED, "--shape", "16,4096", "--tp", "8", "--group-size", "100"], "group_size"),
        (["--op", FUSED, "--shape", "16,65536", "--tp", "8"], "65536"),
        (["--op", "all_reduce", "--shape", "16,4096", "--tp", "0"], "--tp: expected at least 1, got 0"),
        (["--op", "all_reduce", "--shape", "16,4096", "--tp", "2", "--dtype", "bf17"], "--dtype: expected bf16"),
        (["--op", "all_reduce", "--shape", "16,4096", "--tp", "2", "--dtype", "int8"], "got torch.int8"),
    ],
)
def test_bad_input(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*arguments) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.startswith("fusedcomm explain: ")
    assert err.count("\n") == 1


@pytest.mark.parametrize("arguments", [["--op", "reduce"], ["--shape", "16,a"], ["--shape", ""], ["--tp", "x"]])
def test_bad_arguments(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    good = {"--op": "all_reduce", "--shape": "1,8", "--tp": "2"}
    given = {**good, arguments[0]: arguments[1]}
    with pytest.raises(SystemExit) as exit_:
        run(*(part for pair in given.items() for part in pair))
    assert exit_.value.code == 2
    assert arguments[0] in capsys.readouterr().err


def test_malformed_setting(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FUSEDCOMM_DISABLE", "yes")
    assert run("--op", "all_reduce", "--shape", "1,8", "--tp", "2") == 2
    assert "FUSEDCOMM_DISABLE: expected 0 or 1, got 'yes'" in capsys.readouterr().err


def test_parsing() -> None:
    assert parse_shape("16,4096") == parse_shape("16x4096") == parse_shape("[16, 4096]") == (16, 4096)
    assert parse_shape("7") == (7,)
    assert parse_dtype("bf16") == parse_dtype("bfloat16") == parse_dtype("torch.bfloat16") == torch.bfloat16
