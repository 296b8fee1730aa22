"""``fusedcomm generate`` and the demonstration, as a user starts them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from harness.launch import descendants, mpiexec_command, torchrun_command

from fusedcomm.models import make_tiny_qwen3

COMMAND = ["-m", "fusedcomm.cli.main", "generate"]
TIMEOUT_S = 120.0


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_qwen3(tmp_path_factory.mktemp("models") / "tiny", "fp8")


def generate(
    model: Path, *arguments: str, launcher: tuple[str, ...] = (sys.executable,), prompt: str = "Same bits, "
) -> subprocess.CompletedProcess[str]:
    command = [*launcher, *COMMAND, "--model", str(model), "--prompt", prompt, "--max-new-tokens", "12", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S)


@pytest.fixture(scope="module")
def text(model: Path) -> str:
    """What two ranks say."""
    done = generate(model, "--tp", "2")
    assert done.returncode == 0, done.stderr
    assert "loaded tiny" in done.stderr
    assert "tokens/s" in done.stderr
    assert done.stdout.endswith("\n")
    assert len(done.stdout) > 1
    return done.stdout


def test_same_text_without_fusion(model: Path, text: str) -> None:
    assert generate(model, "--tp", "2", "--no-fusion").stdout == text


def test_inside_mpiexec(model: Path, text: str, mpiexec: str) -> None:
    assert generate(model, launcher=tuple(mpiexec_command(2))).stdout == text


def test_inside_torchrun(model: Path, text: str) -> None:
    assert generate(model, "--tp", "2", launcher=tuple(torchrun_command(2))).stdout == text


def test_ranks_that_cannot_divide_the_model(model: Path) -> None:
    done = generate(model, "--tp", "3")
    assert done.returncode == 2
    assert "expected a multiple of the group's 3 ranks" in done.stderr
    assert done.stderr.count("\n") == 1
    assert done.stdout == ""


def start(model: Path) -> subprocess.Popen[bytes]:
    """A generation on two ranks that takes long, once its text has begun."""
    process = subprocess.Popen(
        [
            sys.executable,
            *COMMAND,
            "--model",
            str(model),
            "--prompt",
            "on",
            "--tp=2",
            "--max-new-tokens=4000",
            "--ignore-eos",
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout is not None
    assert process.stdout.read(1)
    return process


def test_closed_pipe_ends_it_quietly(model: Path) -> None:
    process = start(model)
    ranks = descendants([process.pid])
    assert process.stdout is not None
    process.stdout.close()  # what head does when it has enough
    assert process.wait(TIMEOUT_S) == 128 + signal.SIGPIPE
    assert process.stderr is not None
    assert b"Traceback" not in process.stderr.read()
    assert_gone(ranks)


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGKILL])
def test_signals_end_all_ranks_quietly(model: Path, sent: signal.Signals) -> None:
    process = start(model)
    ranks = descendants([process.pid])
    assert len(ranks) >= 3
    process.send_signal(sent)
    _, errors = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == (-sent if sent == signal.SIGKILL else 128 + sent)
    assert b"Traceback" not in errors
    assert_gone(ranks)


def assert_gone(pids: set[int]) -> None:
    deadline = time.monotonic() + 10
    while any(os.path.exists(f"/proc/{pid}") for pid in pids):
        assert time.monotonic() < deadline, "ranks are left over"
        time.sleep(0.05)


def test_demo(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "fusedcomm.cli.demo", "--tp", "2", "--tokens", "4"]
    environ = {**os.environ, "XDG_CACHE_HOME": str(tmp_path)}
    done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=TIMEOUT_S)
    assert done.returncode == 0, done.stderr
    assert "the same tokens with fusion and without" in done.stdout
    assert "allreduce_rmsnorm_quant.fused" in done.stdout
    assert (tmp_path / "fusedcomm" / "demo.png").stat().st_size > 1000
    made = {folder.name: folder.stat().st_mtime_ns for folder in (tmp_path / "fusedcomm" / "demo").iterdir()}
    assert len(made) == 2

    from fusedcomm.cli.demo.checkpoints import ensure_checkpoints

    again = ensure_checkpoints(tmp_path / "fusedcomm")
    assert {path.name: path.stat().st_mtime_ns for path in again.values()} == made  # made once
