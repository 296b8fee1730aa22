"""Bad input: the message names the argument, what was expected and what came, and nothing has been written."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from sampling_bodies import rows, uniforms
from torch._subclasses.fake_tensor import FakeTensorMode

from fusedcomm.ops import sampling
from fusedcomm.ops.sampling import dispatch

PROBS = rows("flat", 4, 10)
K, P, U = torch.tensor([1, 2, 3, 4]), torch.full((4,), 0.5), uniforms(4)
OPS: dict[str, dict[str, Any]] = {
    "top_k_renorm_probs": {"probs": PROBS, "top_k": K},
    "top_p_renorm_probs": {"probs": PROBS, "top_p": P},
    "top_k_top_p_renorm_probs": {"probs": PROBS, "top_k": K, "top_p": P},
    "min_p_renorm_probs": {"probs": PROBS, "min_p": P},
    "softmax_temperature": {"logits": PROBS, "temperature": P},
    "sampling_from_probs": {"probs": PROBS, "uniforms": U},
    "top_k_top_p_sampling_from_probs": {"probs": PROBS, "top_k": K, "top_p": P, "uniforms": U},
}
FLOATS = ("top_p", "min_p", "temperature", "uniforms")


def result_like(name: str) -> torch.Tensor:
    return torch.full((4,), -7, dtype=torch.int32) if "sampling" in name else torch.full((4, 10), 7.0)


def refused(name: str, message: str, **changed: Any) -> None:
    """A call with these arguments in place of good ones is refused, and leaves its result alone."""
    out = result_like(name)
    before = out.clone()
    with pytest.raises(ValueError, match=message):
        getattr(sampling, name)(**({"out": out} | OPS[name] | changed))
    assert torch.equal(out, before)


def cases() -> list[tuple[str, str, Any, str]]:
    """(op, argument, value, message)"""
    found: list[tuple[str, str, Any, str]] = []
    for name, arguments in OPS.items():
        source = next(iter(arguments))
        found += [
            (name, source, [0.5, 0.5], f"{source}: expected a torch.Tensor, got list"),
            (
                name,
                source,
                PROBS.double(),
                rf"{source}: expected dtype bfloat16, float16 or float32, got torch\.float64",
            ),
            (name, source, PROBS.to_sparse(), f"{source}: expected a dense tensor, got torch.sparse_coo"),
            (name, source, PROBS[0], rf"{source}: expected shape \[B, V from 1 to 262144\], got \(10,\)"),
            (name, source, PROBS[:, :0], rf"{source}: expected shape \[B, V from 1 to 262144\], got \(4, 0\)"),
            (name, source, torch.empty(1, 262_145, device="meta"), rf"{source}: expected shape .*, got \(1, 262145\)"),
            (name, "indices", [0, 1, 2, 3], r"indices: expected shape \[N\], got list"),
            (name, "indices", torch.zeros(4, 1, dtype=torch.int32), r"indices: expected shape \[N\], got \(4, 1\)"),
            (name, "indices", torch.zeros(4), "indices: expected dtype torch.int32 or torch.int64, got torch.float32"),
            (
                name,
                "indices",
                torch.zeros(4, dtype=torch.int32, device="meta"),
                "indices: expected device cpu, got meta",
            ),
        ]
        for parameter in FLOATS:
            if parameter not in arguments:
                continue
            found += [
                (name, parameter, torch.ones(5), rf"{parameter}: expected shape \(4,\), got \(5,\)"),
                (name, parameter, torch.ones(4, 1), rf"{parameter}: expected shape \(4,\), got \(4, 1\)"),
                (name, parameter, torch.tensor(0.5), rf"{parameter}: expected shape \(4,\), got \(\)"),
                (name, parameter, P.double(), f"{parameter}: expected dtype torch.float32, got torch.float64"),
                (name, parameter, P.to("meta"), f"{parameter}: expected device cpu, got meta"),
            ]
            if parameter == "uniforms":
                found.append((name, parameter, 0.5, "uniforms: expected a torch.Tensor, got float"))
                continue
            expected = "a finite number >= 0" if parameter == "temperature" else "a number from 0 to 1"
            wrong: list[Any] = [
                -0.1,
                torch.nan,
                torch.inf,
                None,
                "0.5",
                True,
                *([] if parameter == "temperature" else [1.01]),
            ]
            found += [
                (name, parameter, w, f"{parameter}: expected {expected} or a torch.Tensor, got {w!r}") for w in wrong
            ]
        if "top_k" in arguments:
            found += [
                (name, "top_k", torch.ones(3, dtype=torch.int32), r"top_k: expected shape \(4,\), got \(3,\)"),
                (name, "top_k", torch.ones(4), "top_k: expected dtype torch.int32 or torch.int64, got torch.float32"),
                (name, "top_k", K.to("meta"), "top_k: expected device cpu, got meta"),
                *(
                    (name, "top_k", w, f"top_k: expected an int or a torch.Tensor, got {w!r}")
                    for w in (1.0, None, True)
                ),
            ]
        dtype = result_like(name).dtype
        found += [
            (name, "out", "out", "out: expected a torch.Tensor, got str"),
            (name, "out", result_like(name)[:3], r"out: expected shape \(4"),
            (name, "out", result_like(name).to(torch.int64), rf"out: expected dtype {dtype}, got torch\.int64"),
            (name, "out", result_like(name).to("meta"), "out: expected device cpu, got meta"),
            (
                name,
                "out",
                torch.cat([result_like(name)] * 2, -1)[..., ::2],
                r"out: expected a contiguous tensor, got strides",
            ),
        ]
    found += [
        ("sampling_from_probs", "generator", 5, "generator: expected a torch.Generator, got int"),
        (
            "sampling_from_probs",
            "generator",
            torch.Generator(),
            "generator: expected None beside uniforms, got a torch.Gen",
        ),
        (
            "top_k_top_p_sampling_from_probs",
            "order",
            "top_p_first",
            "order: expected 'top_k_first' or 'joint', got 'top_p_",
        ),
        ("top_k_top_p_sampling_from_probs", "order", True, "order: expected 'top_k_first' or 'joint', got True"),
    ]
    return found


@pytest.mark.parametrize(("name", "argument", "value", "message"), cases())
def test_refused_with_argument_expected_and_got(name: str, argument: str, value: Any, message: str) -> None:
    refused(name, message, **{argument: value})


@pytest.mark.parametrize("name", OPS)
def test_a_result_apart_from_the_inputs(name: str) -> None:
    source = next(iter(OPS[name]))
    if "sampling" in name:
        memory = PROBS.clone()
        refused(
            name, f"out: expected memory apart from {source}", out=memory.view(torch.int32)[0, :4], **{source: memory}
        )
    else:
        memory = PROBS.clone()
        refused(name, f"out: expected memory apart from {source}", out=memory, **{source: memory})
    named = torch.zeros(40, dtype=torch.int32)
    out = named[:4] if "sampling" in name else named.view(4, 10).view(torch.float32)
    refused(name, "out: expected memory apart from indices", out=out, indices=named[:4])
    for parameter in ("top_k", *FLOATS):
        if parameter in OPS[name]:
            memory = torch.zeros(40, dtype=OPS[name][parameter].dtype)
            out = memory.view(result_like(name).dtype)
            out = out[:4] if "sampling" in name else out[:40].view(4, 10)
            refused(name, f"out: expected memory apart from {parameter}", out=out, **{parameter: memory[:4]})


@pytest.mark.parametrize("name", OPS)
def test_indices_of_no_rows(name: str) -> None:
    source = next(iter(OPS[name]))
    none, named = torch.empty(0, 10), torch.zeros(4, dtype=torch.int64)
    refused(
        name, rf"{source}: expected at least one row for indices, got shape \(0, 10\)", indices=named, **{source: none}
    )


# ---- with FUSEDCOMM_DEBUG=1 ----


@pytest.fixture
def debug(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FUSEDCOMM_DEBUG", "1")
    monkeypatch.setattr(dispatch, "_debug", [])


def with_value(t: torch.Tensor, at: int | tuple[int, int], value: float) -> torch.Tensor:
    t = t.clone()
    t[at] = value
    return t


def value_cases() -> list[tuple[str, str, torch.Tensor, str]]:
    found: list[tuple[str, str, torch.Tensor, str]] = []
    for name, arguments in OPS.items():
        source = next(iter(arguments))
        if source == "probs":
            found += [
                (
                    name,
                    source,
                    with_value(PROBS, (2, 3), v),
                    rf"probs: expected finite numbers >= 0, got {got} at \[2, 3\]",
                )
                for v, got in ((-0.25, "-0.25"), (torch.nan, "nan"), (torch.inf, "inf"))
            ]
            found.append(
                (name, source, PROBS * K.unsqueeze(1).ne(3), r"probs: expected rows .*not all zero, got 0.0 at \[2\]")
            )
        else:
            found += [
                (
                    name,
                    source,
                    with_value(PROBS, (2, 3), v),
                    rf"logits: expected numbers below inf, got {v} at \[2, 3\]",
                )
                for v in (torch.nan, torch.inf)
            ]
            empty = torch.where(K.unsqueeze(1) == 3, -torch.inf, PROBS)
            found.append((name, source, empty, r"logits: expected rows that are not all -inf, got -inf at \[2\]"))
        for value in (-1, 4):
            expected = rf"indices: expected rows of {source} from 0 to 3, got {value} at \[1\]"
            found.append((name, "indices", torch.tensor([0, value, 3, 2]), expected))
        for parameter in FLOATS:
            if parameter in arguments:
                wrong = (-0.5, torch.nan, *((torch.inf,) if parameter == "temperature" else (1.5,)))
                message = rf"{parameter}: expected a .*number .*, got {{}} at \[3\]"
                found += [(name, parameter, with_value(P, 3, v), message.format(v)) for v in wrong]
    return found


@pytest.mark.parametrize(("name", "argument", "value", "message"), value_cases())
def test_values_are_refused_in_debug_mode(
    debug: None, name: str, argument: str, value: torch.Tensor, message: str
) -> None:
    refused(name, message, **{argument: value})


@pytest.mark.parametrize(("name", "argument", "value", "message"), value_cases())
def test_values_are_not_looked_at_otherwise(name: str, argument: str, value: torch.Tensor, message: str) -> None:
    getattr(sampling, name)(**(OPS[name] | {argument: value}))


@pytest.mark.parametrize("name", OPS)
def test_good_values_pass_in_debug_mode(debug: None, name: str) -> None:
    op: Callable[..., torch.Tensor] = getattr(sampling, name)
    got = op(**OPS[name], indices=torch.tensor([3, 3, 0, 1]))
    assert torch.isfinite(got).all()
    ends = {parameter: torch.tensor([0.0, 1.0, 1e-6, 0.5]) for parameter in ("top_p", "min_p", "temperature")}
    op(**{argument: ends.get(argument, value) for argument, value in OPS[name].items()})
    # rows that no index names are not looked at
    source = next(iter(OPS[name]))
    op(**(OPS[name] | {source: with_value(PROBS, (2, 3), torch.nan)}), indices=torch.tensor([3, 3, 0, 1]))


@pytest.mark.parametrize("name", OPS)
def test_debug_mode_looks_at_no_fakes(debug: None, name: str) -> None:
    with FakeTensorMode() as mode:
        getattr(sampling, name)(**{k: mode.from_tensor(t) for k, t in OPS[name].items()})
    torch._dynamo.reset()
    torch.compile(getattr(sampling, name), backend="eager", fullgraph=True)(**OPS[name])
