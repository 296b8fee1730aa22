"""The parts of the command line that start ranks of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from fusedcomm.cli.launch import BROKEN_PIPE, run_on_ranks

TESTS = Path(__file__).resolve().parent.parent
COMMAND = [sys.executable, "-m", "fusedcomm.cli.main"]


def run(*arguments: str, timeout: float = 120.0, **environ: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, *arguments], env={**os.environ, **environ}, capture_output=True, text=True, timeout=timeout
    )


@pytest.fixture
def rank_functions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(TESTS))


@pytest.mark.usefixtures("rank_functions")
def test_every_rank_runs(tmp_path: Path) -> None:
    assert run_on_ranks(3, "rank_functions:write_rank", {"folder": str(tmp_path)}) == (0, ())
    assert {f.name: f.read_text() for f in tmp_path.iterdir()} == {str(rank): "3 1" for rank in range(3)}


@pytest.mark.usefixtures("rank_functions")
@pytest.mark.parametrize(
    ("kind", "code", "errors"),
    [
        ("value", 2, ("rank 1: ValueError: model: expected a folder, got a file",)),
        ("other", 1, ("rank 1: RuntimeError: no such luck",)),
        ("kill", 137, ("rank 1: killed by SIGKILL",)),
        ("pipe", BROKEN_PIPE, ()),
    ],
)
def test_first_failure_ends_all(
    kind: str, code: int, errors: tuple[str, ...], capfd: pytest.CaptureFixture[str]
) -> None:
    start = time.monotonic()
    assert run_on_ranks(2, "rank_functions:fail", {"on": 1, "kind": kind}) == (code, errors)
    assert time.monotonic() - start < 60  # and not the 120 s that rank 0 sleeps
    assert "Traceback" not in capfd.readouterr().err


def findings(report: dict[str, Any]) -> dict[str, tuple[str, str]]:
    return {f["name"]: (f["level"], f["text"]) for f in report["findings"] if f["area"] == "self-test"}


def test_doctor_tests_ranks() -> None:
    done = run("doctor", "--ranks", "3", "--json")
    assert done.returncode == 0, done.stdout + done.stderr
    found = findings(json.loads(done.stdout))
    assert found["allreduce_rmsnorm_quant"] == ("ok", "right on 3 ranks in bf16, fp16 and fp32, by fused")
    assert set(found) >= {"all_reduce", "allreduce_rmsnorm", "all_gather", "reduce_scatter", "broadcast", "barrier"}


def test_doctor_names_the_stage_that_a_setting_leaves() -> None:
    done = run("doctor", "--ranks", "2", "--json", FUSEDCOMM_DISABLE="1")
    assert done.returncode == 0, done.stdout + done.stderr
    level, text = findings(json.loads(done.stdout))["all_reduce"]
    assert level == "info"
    assert "by process_group; not custom: FUSEDCOMM_DISABLE=1" in text


def test_doctor_reports_ranks_that_fail() -> None:
    # no rank finds another within a millisecond
    done = run("doctor", "--ranks", "2", "--json", FUSEDCOMM_TIMEOUT_S="0.001")
    assert done.returncode == 1
    level, text = findings(json.loads(done.stdout))["2 ranks"]
    assert level == "fail"
    assert text.startswith("rank ")


@pytest.mark.parametrize("launcher", ["mpiexec", "torchrun"])
def test_bench(launcher: str, tmp_path: Path, mpiexec: str) -> None:
    sizes = ["--device", "cpu", "--tp", "2", "--tokens", "1,3", "--hidden", "256", "--rounds", "1", "--batch-ms", "1"]
    files = ["--json", str(tmp_path / "b" / "r.jsonl"), "--plot", str(tmp_path / "b.png")]
    done = run("bench", "collectives", *sizes, *files, "--vary", "spins=0", "--launcher", launcher)
    assert done.returncode == 0, done.stderr
    records = [json.loads(line) for line in (tmp_path / "b" / "r.jsonl").read_text().splitlines()]
    timed = [r for r in records if "us" in r]
    peers = {(r["op"], r["peer"]) for r in timed}
    assert {("all_reduce", "memcpy"), ("all_reduce", "gloo"), ("allreduce_rmsnorm_quant", "ours:custom")} <= peers
    assert ("all_reduce", "ours[spins=0]") in peers
    assert (("all_reduce", "mpi") in peers) == (launcher == "mpiexec")
    assert all(len(r["rank_us"]) == 2 and r["us"] == max(r["rank_us"]) > 0 for r in timed)
    assert all(r["machine"]["cores"] and r["versions"]["torch"] and r["command"] and r["date"] for r in records)
    assert [r["op"] for r in records].count("set_up") == 1
    assert "set-up of a group" in done.stdout
    assert (tmp_path / "b.png").exists()
