"""``fusedcomm doctor`` without ranks: exit codes, settings, the two packages called aiter."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from fusedcomm import native
from fusedcomm.cli.doctor import machine
from fusedcomm.cli.doctor.aiter_package import check_aiter
from fusedcomm.cli.doctor.check import Level
from fusedcomm.cli.doctor.settings import check_settings
from fusedcomm.cli.main import main


def doctor(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, dict[str, Any]]:
    code = main(["doctor", "--json", *(arguments or ["--ranks", "0"])])
    return code, json.loads(capsys.readouterr().out)


def levels(report: dict[str, Any]) -> dict[str, str]:
    return {f["name"]: f["level"] for f in report["findings"]}


def text(report: dict[str, Any], name: str) -> str:
    return next(f["text"] for f in report["findings"] if f["name"] == name)


def test_all_is_well(capsys: pytest.CaptureFixture[str]) -> None:
    code, report = doctor(capsys)
    assert code == 0, report
    assert report["well"] is True
    found = levels(report)
    assert found["torch"] == found["cpu"] == found["library"] == "ok"
    assert {s["variable"] for s in report["settings"]} >= {"FUSEDCOMM_DISABLE", "FUSEDCOMM_BUFFER_MB"}
    assert {s["source"] for s in report["settings"]} == {"default"}


def test_readable_report(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--ranks", "0"]) == 0
    out = capsys.readouterr().out
    assert "all is well" in out
    assert "FUSEDCOMM_TIMEOUT_S" in out
    assert "not run: --ranks 0" in out


def test_malformed_setting_is_reported(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FUSEDCOMM_DISABLE", "yes")
    monkeypatch.setenv("FUSEDCOMM_TIMEOUT_S", "soon")
    monkeypatch.setenv("FUSEDCOMM_DEBUG", "1")
    code, report = doctor(capsys, "--ranks", "2")
    assert code == 1
    assert report["well"] is False
    assert text(report, "FUSEDCOMM_DISABLE") == "expected 0 or 1, got 'yes'"
    assert levels(report)["FUSEDCOMM_TIMEOUT_S"] == "fail"
    assert text(report, "ranks").startswith("not run")  # they would all refuse to start
    debug = next(s for s in report["settings"] if s["variable"] == "FUSEDCOMM_DEBUG")
    assert (debug["value"], debug["source"]) == (True, "environment")


def test_backend_that_cannot_serve(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FUSEDCOMM_BACKEND", "triton")
    code, report = doctor(capsys)
    assert code == 1
    assert "'triton'" in text(report, "FUSEDCOMM_BACKEND")


def test_unknown_settings_are_named() -> None:
    _, findings = check_settings({"FUSEDCOMM_DISABLE_CUSTOM": "1", "FUSEDCOMM_XYZ": "1", "FUSEDCOMM_PYTHON": "p"})
    assert [(f.name, f.level) for f in findings] == [
        ("FUSEDCOMM_DISABLE_CUSTOM", Level.WARN),
        ("FUSEDCOMM_XYZ", Level.WARN),
    ]
    assert "FUSEDCOMM_DISABLE_CUSTOM_AR" in findings[0].text


def test_without_the_native_library(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "library_path", lambda: None)
    monkeypatch.setattr(native, "load", lambda: None)
    code, report = doctor(capsys)
    assert code == 1
    assert levels(report)["library"] == "fail"


def test_library_that_cannot_be_loaded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def fail() -> None:
        raise OSError("undefined symbol: aoti_torch")

    monkeypatch.setattr(native, "library_path", lambda: tmp_path)
    monkeypatch.setattr(native, "load", fail)
    [finding] = machine.check_native()
    assert finding.level is Level.FAIL
    assert "undefined symbol" in finding.text


def test_no_shared_memory_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "_try_memfd", lambda size: "Operation not permitted")
    monkeypatch.setattr(machine, "_try_dev_shm", lambda size: "No space left on device")
    found = {f.name: f for f in machine.check_shared_memory(machine.Settings())}
    assert found["/dev/shm"].level is Level.WARN
    assert found["summary"].level is Level.FAIL


def test_memory_that_is_too_small(monkeypatch: pytest.MonkeyPatch) -> None:
    assert machine._try_memfd(4096) == ""
    assert machine._try_dev_shm(4096) == ""
    assert machine._try_dev_shm(1 << 62) != ""


def test_bad_number_of_ranks(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--ranks", "-1"]) == 2
    assert "--ranks: expected at least 0, got -1" in capsys.readouterr().err


def make_package(folder: Path, monkeypatch: pytest.MonkeyPatch, *files: str) -> None:
    """A package called aiter that cannot be imported."""
    package = folder / "aiter"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    for name in files:
        (package / name).parent.mkdir(exist_ok=True)
        (package / name).write_text("")
    monkeypatch.syspath_prepend(str(folder))
    assert "aiter" not in sys.modules


def test_impostor_is_told_apart_and_not_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_package(tmp_path, monkeypatch)
    [finding] = check_aiter()
    assert finding.level is Level.WARN
    assert "not AMD's" in finding.text
    assert str(tmp_path) in finding.text
    assert "aiter" not in sys.modules


def test_impostor_that_is_one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "aiter.py").write_text("raise RuntimeError('imported')")
    monkeypatch.syspath_prepend(str(tmp_path))
    [finding] = check_aiter()
    assert "not AMD's" in finding.text


def test_aiter_of_amd_is_recognised_without_importing_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_package(tmp_path, monkeypatch, "jit/core.py", "dist/parallel_state.py")
    [finding] = check_aiter()
    assert finding.level is Level.INFO
    assert "AMD's" in finding.text
    assert "unknown version" in finding.text
    metadata = tmp_path / "amd_aiter-0.1.20.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: amd-aiter\nVersion: 0.1.20\n")
    [finding] = check_aiter()
    assert "0.1.20" in finding.text
    assert "aiter" not in sys.modules


def test_no_aiter() -> None:
    [finding] = check_aiter()
    assert finding.level is Level.INFO
    assert "not installed" in finding.text
