"""``fusedcomm generate`` in this process alone."""

from __future__ import annotations

from pathlib import Path

import pytest

import fusedcomm
from fusedcomm.cli.main import main
from fusedcomm.models import make_tiny_qwen3


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_qwen3(tmp_path_factory.mktemp("models") / "tiny")


def generate(model: Path, capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    options = ["--model", str(model), "--prompt", "Same bits, ", "--max-new-tokens", "8"]
    code = main(["generate", *options, *arguments])
    return code, *capsys.readouterr()


def test_text_and_report(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = generate(model, capsys)
    assert code == 0
    assert len(out) == 9  # bytes that print, and a newline
    assert "loaded tiny in" in err
    assert "8 tokens in" in err
    assert generate(model, capsys, "--no-fusion", "--tp", "1")[1] == out
    with pytest.raises(fusedcomm.FusedCommError):
        fusedcomm.get_tp_group()  # nothing is left open


def test_sampling_follows_its_seed(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--temperature", "1.5", "--top-p", "0.9"]
    first, again, other = (generate(model, capsys, *options, "--seed", seed)[1] for seed in ("1", "1", "2"))
    assert first == again != other


def test_no_tokens(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert generate(model, capsys, "--max-new-tokens", "0")[:2] == (0, "\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "/nowhere", "--tp", "2"], "--model: expected a checkpoint folder with tokenizer.json"),
        (["--tp", "0"], "--tp: expected at least 1, got 0"),
        (["--top-p", "0"], "top_p: expected a number in (0, 1], got 0.0"),
        (["--temperature", "-1"], "temperature: expected a finite number >= 0, got -1.0"),
        (["--max-new-tokens", "100000"], "max_new_tokens: expected 0 to"),
        (["--prompt", ""], "input_ids: expected int64 [B >= 1, S >= 1]"),
    ],
)
def test_bad_input(model: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str) -> None:
    code, out, err = generate(model, capsys, *arguments)
    assert code == 2
    assert out == ""
    assert err.splitlines()[-1].startswith(f"fusedcomm generate: {message}")


def test_broken_tokenizer(model: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{")
    code, _, err = generate(model, capsys, "--model", str(tmp_path))
    assert code == 2
    assert "--model: expected a tokenizer in" in err


def test_ranks_other_than_the_launchers(
    model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    code, _, err = generate(model, capsys, "--tp", "4")
    assert code == 2
    assert "--tp: expected 2, the ranks that torchrun started, got 4" in err
