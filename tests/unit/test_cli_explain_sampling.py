"""``fusedcomm explain`` for the ops of sampling and verification: what it prints, and its errors."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest
import torch

from fusedcomm import native
from fusedcomm.cli.explain_sampling import SAMPLING_OPS, default_dtype, explain_sampling
from fusedcomm.cli.main import main
from fusedcomm.ops import sampling
from fusedcomm.ops.sampling import dispatch
from fusedcomm.ops.sampling.plan import OPERATORS

OP = "top_p_renorm_probs"
SHAPES = {
    "chain_speculative_sampling": "4,3,128256",
    "dflash_chain_verify": "4,3,128256",
    "tree_speculative_sampling_target_only": "4x3x128256",
    "greedy_chain_verify": "4,3",
}


def run(*arguments: str) -> int:
    return main(["explain", *arguments])


def test_every_op() -> None:
    assert set(SAMPLING_OPS) == set(OPERATORS)
    assert len(SAMPLING_OPS) == len(OPERATORS)


@pytest.mark.parametrize("op", SAMPLING_OPS)
def test_what_serves_is_printed(op: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Without ranks; of as many bytes as one likes; and without values, which FUSEDCOMM_DEBUG=1 would look at."""
    monkeypatch.setattr(dispatch, "_debug", [True])
    assert run("--op", op, "--shape", SHAPES.get(op, "1024,262144"), "--device", "cpu") == 0
    out = capsys.readouterr().out
    assert out == f"{sampling.explain(op, 'cpu')}\n"
    taken = "torch" if native.load() is None else "native"
    assert f"{op}: {taken}   <- taken\n" in out
    assert f"{op}: aiter   not taken: aiter serves gfx94x and gfx95x, not the CPU\n" in out


@pytest.mark.skipif(native.load() is None, reason="the native library is not installed")
def test_the_example_of_the_docs(capsys: pytest.CaptureFixture[str]) -> None:
    text = (Path(__file__).parents[2] / "docs/sampling.md").read_text()
    command, _, printed = text.partition("    $ fusedcomm ")[2].partition("\n\n")[0].partition("\n")
    assert main(shlex.split(command)) == 0
    assert capsys.readouterr().out.splitlines() == [line.removeprefix("    ") for line in printed.splitlines()]


def test_settings_count(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FUSEDCOMM_BACKEND", "torch")
    assert run("--op", OP, "--shape", "4,128256", "--device", "cpu") == 0
    out = capsys.readouterr().out
    assert f"{OP}: native   not taken: FUSEDCOMM_BACKEND=torch\n" in out
    assert f"{OP}: torch   <- taken\n" in out


def test_it_says_what_a_call_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    for backend in ("torch", *(["native"] if native.load() is not None else [])):
        monkeypatch.setenv("FUSEDCOMM_BACKEND", backend)
        monkeypatch.setattr(dispatch, "_chosen", {})
        assert explain_sampling(OP, (4, 7), torch.bfloat16, device="cpu").backend == backend
        sampling.top_p_renorm_probs(torch.ones(4, 7), 0.5)
        assert dispatch._chosen == {("cpu", OP): backend}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--op", OP, "--shape", "128256"], "probs: expected shape [B, V from 1 to 262144], got (128256,)"),
        (["--op", OP, "--shape", "1,262145"], "probs: expected shape [B, V from 1 to 262144], got (1, 262145)"),
        (["--op", OP, "--shape", "1,8", "--dtype", "int8"], "probs: expected dtype bfloat16, float16 or float32"),
        (["--op", OP, "--shape", "1,8", "--dtype", "bf17"], "--dtype: expected bf16"),
        (
            ["--op", "softmax_temperature", "--shape", "1,0"],
            "logits: expected shape [B, V from 1 to 262144], got (1, 0)",
        ),
        (["--op", "chain_speculative_sampling", "--shape", "4,9"], "draft_probs: expected shape [b, n, V from 1 to"),
        (
            ["--op", "dflash_chain_verify", "--shape", "4,2,9", "--dtype", "bf16"],
            "target_probs: expected dtype torch.float32, got torch.bfloat16",
        ),
        (
            ["--op", "tree_speculative_sampling_target_only", "--shape", "4,0,9"],
            "target_probs: expected shape [bs, D >= 1, V from 1 to 262144], got (4, 0, 9)",
        ),
        (["--op", "greedy_chain_verify", "--shape", "4"], "candidates: expected shape [bs, D >= 1], got (4,)"),
        (["--op", "greedy_chain_verify", "--shape", "4,2", "--dtype", "fp32"], "candidates: expected dtype"),
        (["--op", "all_reduce", "--shape", "1,8"], "--tp: expected the number of ranks that make all_reduce, got none"),
    ],
)
def test_bad_input(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*arguments, "--device", "cpu") == 2
    err = capsys.readouterr().err
    assert err.startswith(f"fusedcomm explain: {message}")
    assert err.count("\n") == 1


def test_a_backend_that_cannot_serve(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FUSEDCOMM_BACKEND", "aiter")
    assert run("--op", OP, "--shape", "1,8", "--device", "cpu") == 2
    usable = "torch" if native.load() is None else "torch or native"
    assert f"FUSEDCOMM_BACKEND: expected {usable} for {OP} on cpu here, got 'aiter'" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_device_that_is_not_here(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--op", OP, "--shape", "1,8", "--device", "cuda") == 2
    assert "device: expected cpu (torch sees no GPU here), got cuda" in capsys.readouterr().err


def test_defaults() -> None:
    """A dtype that the op takes."""
    assert {default_dtype(op) for op in SAMPLING_OPS} == {"fp32", "int64"}
    assert default_dtype("greedy_chain_verify") == "int64"
