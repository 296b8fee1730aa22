"""What the verification ops refuse: the argument, what was expected, what came; and before anything is written."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from qk_bodies import same

from fusedcomm.ops.sampling import dispatch
from fusedcomm.ops.speculative import (
    ChainSampling,
    ChainVerify,
    chain_speculative_sampling,
    dflash_chain_verify,
    greedy_chain_verify,
    tree_speculative_sampling_target_only,
)

I32, I64 = torch.int32, torch.int64
B, N, D, V = 3, 2, 4, 8


def probs(*shape: int) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(sum(shape))).softmax(-1)


def full(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    return torch.full(shape, 777, dtype=dtype)


def chain() -> dict[str, Any]:
    return {
        "draft_probs": probs(B, N, V),
        "draft_ids": torch.tensor([[1, 7], [0, 2], [3, 3]]),
        "target_probs": probs(B, N + 1, V),
        "uniforms": torch.full((B, N), 0.9),
        "final_uniforms": torch.full((B,), 0.5),
        "out": ChainSampling(full((B, N + 1), I32), full((B,), I32)),
    }


def verified() -> ChainVerify:
    return ChainVerify(full((B,), I32), full((B,), I64), full((B, D), I64))


def dflash() -> dict[str, Any]:
    return {
        "candidates": torch.tensor([[-9, 1, 2, 3], [99, 4, 5, 6], [0, 7, 7, 7]]),
        "target_probs": probs(B, D, V),
        "uniforms": torch.full((B, D), 0.1),
        "final_uniforms": torch.full((B,), 0.5),
        "threshold_single": 1.0,
        "threshold_acc": 1.0,
        "out": verified(),
    }


def greedy() -> dict[str, Any]:
    return {
        "candidates": torch.zeros(B, D, dtype=I64),
        "target_predict": torch.zeros(B, D, dtype=I64),
        "out": verified(),
    }


def tree() -> dict[str, Any]:
    """0 -> 1, 2; 1 -> 3."""
    return {
        "predicts": full((B * D,), I32),
        "accept_index": full((B, 3), I32),
        "accept_token_num": full((B,), I32),
        "candidates": torch.tensor([[-9, 1, 2, 3]] * B),
        "retrive_index": torch.arange(B * D).view(B, D),
        "retrive_next_token": torch.tensor([[1, 3, -1, -1]] * B),
        "retrive_next_sibling": torch.tensor([[-1, 2, -1, -1]] * B),
        "uniform_samples": torch.full((B, D), 0.2),
        "uniform_samples_for_final_sampling": torch.full((B,), 0.5),
        "target_probs": probs(B, D, V),
        "draft_probs": torch.zeros(B, D, V),
        "threshold_single": 1.0,
        "threshold_acc": 1.0,
        "deterministic": True,
    }


OPS: dict[str, tuple[Callable[..., Any], Callable[[], dict[str, Any]]]] = {
    "chain": (chain_speculative_sampling, chain),
    "dflash": (dflash_chain_verify, dflash),
    "greedy": (greedy_chain_verify, greedy),
    "tree": (tree_speculative_sampling_target_only, tree),
}
WRITTEN = ("predicts", "accept_index", "accept_token_num", "out")


def assert_refused(op: str, given: dict[str, Any], message: str) -> None:
    function, _ = OPS[op]
    before = {name: t.clone() for name, t in given.items() if isinstance(t, torch.Tensor)}
    with pytest.raises(ValueError, match="^" + message):
        function(**given)
    for name, value in given.items():
        if name in WRITTEN:
            for t in value if isinstance(value, tuple) else (value,):
                if isinstance(t, torch.Tensor) and t.device.type == "cpu":
                    assert (t == 777).all(), name
        elif name in before and value.device.type == "cpu" and value.layout is torch.strided:
            assert same(value, before[name]), name


PROBS = {
    "chain": ("draft_probs", r"\[b, n, V from 1 to 262144\]"),
    "dflash": ("target_probs", r"\[bs, D >= 1, V from 1 to 262144\]"),
    "tree": ("target_probs", r"\[bs, D >= 1, V from 1 to 262144\]"),
}


@pytest.mark.parametrize("op", PROBS)
def test_probabilities(op: str) -> None:
    name, shape = PROBS[op]
    for bad, message in (
        (None, r"expected a torch\.Tensor, got NoneType"),
        (probs(B, D, V).int(), r"expected dtype bfloat16, float16 or float32, got torch\.int32"),
        (probs(B, D, V).bfloat16(), r"expected dtype torch\.float32, got torch\.bfloat16"),
        (probs(B, D, V).to_sparse(), r"expected a dense tensor, got torch\.sparse_coo"),
        (probs(D, V), rf"expected shape {shape}, got \(4, 8\)"),
        (torch.zeros(B, D, 0), rf"expected shape {shape}, got \(3, 4, 0\)"),
        (torch.zeros(1, 1, 1).expand(B, D, 262145), rf"expected shape {shape}, got \(3, 4, 262145\)"),
    ):
        assert_refused(op, OPS[op][1]() | {name: bad}, f"{name}: {message}")
    if op != "chain":
        assert_refused(
            op, OPS[op][1]() | {name: torch.zeros(B, 0, V)}, rf"{name}: expected shape {shape}, got \(3, 0, 8\)"
        )


# (op, argument, shape, a dtype that is not its own)
ARGUMENTS = [
    ("chain", "draft_ids", (B, N), torch.int16),
    ("chain", "target_probs", (B, N + 1, V), torch.float64),
    ("chain", "uniforms", (B, N), torch.float64),
    ("chain", "final_uniforms", (B,), torch.float16),
    ("dflash", "candidates", (B, D), I32),
    ("dflash", "uniforms", (B, D), torch.float64),
    ("dflash", "final_uniforms", (B,), I64),
    ("greedy", "target_predict", (B, D), torch.float32),
    ("tree", "accept_token_num", (B,), I64),
    ("tree", "candidates", (B, D), I32),
    ("tree", "retrive_index", (B, D), I32),
    ("tree", "retrive_next_token", (B, D), I32),
    ("tree", "retrive_next_sibling", (B, D), I32),
    ("tree", "uniform_samples", (B, D), torch.float64),
    ("tree", "uniform_samples_for_final_sampling", (B,), torch.float64),
    ("tree", "draft_probs", (B, D, V), torch.float64),
]


@pytest.mark.parametrize(("op", "name", "shape", "other"), ARGUMENTS)
def test_arguments_that_do_not_fit(op: str, name: str, shape: tuple[int, ...], other: torch.dtype) -> None:
    make = OPS[op][1]
    good = make()[name]
    text = r"\(" + ", ".join(map(str, shape)) + (r",\)" if len(shape) == 1 else r"\)")
    assert_refused(op, make() | {name: [1]}, rf"{name}: expected a torch\.Tensor, got list")
    for bad in (good[1:], good.unsqueeze(0), torch.cat((good, good), -1)):
        assert_refused(op, make() | {name: bad}, rf"{name}: expected shape {text}, got \(")
    assert_refused(op, make() | {name: good.to(other)}, rf"{name}: expected dtype torch\..*, got {other}")
    assert_refused(op, make() | {name: good.to("meta")}, rf"{name}: expected device cpu, got meta")


# (op, argument or field of out, shape, dtype)
RESULTS = [
    ("chain", "output_ids", (B, N + 1), I32),
    ("chain", "accepted", (B,), I32),
    ("dflash", "accept_len", (B,), I32),
    ("dflash", "bonus", (B,), I64),
    ("dflash", "tokens", (B, D), I64),
    ("greedy", "accept_len", (B,), I32),
    ("greedy", "bonus", (B,), I64),
    ("greedy", "tokens", (B, D), I64),
]


@pytest.mark.parametrize(("op", "name", "shape", "dtype"), RESULTS)
def test_results_of_the_caller(op: str, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    make = OPS[op][1]
    out = make()["out"]
    wide = full((*shape[:-1], shape[-1] * 2), dtype)
    for bad, message in (
        (None, r"expected a torch\.Tensor, got NoneType"),
        (full((1, *shape), dtype), r"expected shape \("),
        (full(shape, torch.int16), rf"expected dtype {dtype}, got torch\.int16"),
        (wide[..., ::2], r"expected a contiguous tensor, got strides"),
        (torch.empty(shape, dtype=dtype, device="meta"), "expected device cpu, got meta"),
    ):
        assert_refused(op, make() | {"out": out._replace(**{name: bad})}, rf"out\.{name}: {message}")
    assert_refused(op, make() | {"out": tuple(out)}, rf"out: expected a {type(out).__name__}, got tuple")


def test_results_that_share_memory() -> None:
    given, memory = chain(), full((B * (N + 1),), I32)
    out = ChainSampling(memory.view(B, N + 1), memory[-B:])
    assert_refused("chain", given | {"out": out}, r"out\.accepted: expected memory apart from out\.output_ids")
    given = dflash()
    out = given["out"]._replace(tokens=given["candidates"])
    with pytest.raises(ValueError, match=r"^out\.tokens: expected memory apart from candidates"):
        dflash_chain_verify(**given | {"out": out})
    given = tree()
    given["draft_probs"] = given["target_probs"]
    assert_refused("tree", given, r"draft_probs: expected memory apart from target_probs")
    given = tree()
    given["accept_token_num"] = given["predicts"][4:7]
    assert_refused("tree", given, r"accept_token_num: expected memory apart from predicts")


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"predicts": 3}, r"predicts: expected shape \[N\], got int"),
        ({"predicts": full((B, D), I32)}, r"predicts: expected shape \[N\], got \(3, 4\)"),
        ({"predicts": full((B * D - 1,), I32)}, r"predicts: expected at least bs \* D = 12 elements, got 11"),
        ({"predicts": full((B * D,), I64)}, r"predicts: expected dtype torch\.int32, got torch\.int64"),
        ({"predicts": full((2 * B * D,), I32)[::2]}, r"predicts: expected a contiguous tensor, got strides \(2,\)"),
        ({"predicts": full((B * D,), I32).to("meta")}, r"predicts: expected device cpu, got meta"),
        ({"accept_index": None}, r"accept_index: expected shape \[bs, S\], got NoneType"),
        ({"accept_index": full((3,), I32)}, r"accept_index: expected shape \[bs, S\], got \(3,\)"),
        ({"accept_index": full((B, 0), I32)}, r"accept_index: expected shape \[bs, S >= 1\], got \(3, 0\)"),
        ({"accept_index": full((B + 1, 3), I32)}, r"accept_index: expected shape \(3, 3\), got \(4, 3\)"),
        ({"accept_index": full((B, 3), I64)}, r"accept_index: expected dtype torch\.int32, got torch\.int64"),
        ({"accept_index": full((B, 6), I32)[:, ::2]}, r"accept_index: expected a contiguous tensor"),
        ({"draft_probs": torch.zeros(B, V, D).transpose(1, 2)}, r"draft_probs: expected a contiguous tensor"),
        ({"deterministic": 1}, r"deterministic: expected a bool, got 1"),
    ],
)
def test_what_the_tree_op_mutates(bad: dict[str, Any], message: str) -> None:
    assert_refused("tree", tree() | bad, message)


@pytest.mark.parametrize("op", ["dflash", "tree"])
@pytest.mark.parametrize("name", ["threshold_single", "threshold_acc"])
@pytest.mark.parametrize("bad", [-0.1, 1.1, float("nan"), float("inf"), True, None, "1", torch.tensor(0.5)])
def test_thresholds(op: str, name: str, bad: Any) -> None:
    assert_refused(op, OPS[op][1]() | {name: bad}, rf"{name}: expected a number from 0 to 1, got ")


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ([1], r"candidates: expected shape \[bs, D >= 1\], got list"),
        (torch.zeros(4), r"candidates: expected shape \[bs, D >= 1\], got \(4,\)"),
        (torch.zeros(B, 0, dtype=I64), r"candidates: expected shape \[bs, D >= 1\], got \(3, 0\)"),
        (torch.zeros(B, D), r"candidates: expected dtype torch\.int32 or torch\.int64, got torch\.float32"),
    ],
)
def test_candidates_of_greedy(bad: Any, message: str) -> None:
    assert_refused("greedy", greedy() | {"candidates": bad}, message)


# ---- FUSEDCOMM_DEBUG=1 ----


@pytest.fixture
def debug(monkeypatch: pytest.MonkeyPatch) -> None:
    """As FUSEDCOMM_DEBUG=1, which is read once."""
    monkeypatch.setenv("FUSEDCOMM_DEBUG", "1")
    monkeypatch.setattr(dispatch, "_debug", [])


def put(name: str, at: tuple[int, ...], value: float) -> Callable[[dict[str, Any]], None]:
    def change(given: dict[str, Any]) -> None:
        given[name][at] = value

    return change


BAD_VALUES = [
    ("chain", put("draft_ids", (1, 1), 8), r"draft_ids: expected ids from 0 to 7, got 8 at \[1, 1\]"),
    ("chain", put("draft_ids", (2, 0), -1), r"draft_ids: expected ids from 0 to 7, got -1 at \[2, 0\]"),
    ("chain", put("uniforms", (0, 1), 1.0), r"uniforms: expected numbers from 0 to below 1, got 1\.0 at \[0, 1\]"),
    ("chain", put("final_uniforms", (1,), torch.nan), r"final_uniforms: expected numbers .*, got nan at \[1\]"),
    ("chain", put("target_probs", (1, 0, 5), -0.5), r"target_probs: .* numbers >= 0, got -0\.5 at \[1, 0, 5\]"),
    ("chain", put("draft_probs", (1, 0, 5), torch.nan), r"draft_probs: .* numbers >= 0, got nan at \[1, 0, 5\]"),
    (
        "chain",
        put("draft_probs", (2, 0), 0.0),
        r"draft_probs: expected rows that are not all zero, got 0\.0 at \[2, 0\]",
    ),
    ("chain", put("target_probs", (2, 0), 0.0), r"target_probs: expected rows that are not all zero, got 0\.0 at"),
    ("dflash", put("candidates", (1, 3), 8), r"candidates: expected ids from 0 to 7, got 8 at \[1, 3\]"),
    ("dflash", put("uniforms", (0, 1), -0.25), r"uniforms: expected numbers .*, got -0\.25 at \[0, 1\]"),
    ("dflash", put("final_uniforms", (0,), 2.0), r"final_uniforms: expected numbers .*, got 2\.0 at \[0\]"),
    ("dflash", put("target_probs", (0, 0, 0), torch.inf), r"target_probs: .* got inf at \[0, 0, 0\]"),
    ("dflash", put("target_probs", (0, 0), 0.0), r"target_probs: expected rows that are not all zero"),
    ("tree", put("candidates", (1, 2), 8), r"candidates: expected ids from 0 to 7, got 8 at \[1, 2\]"),
    ("tree", put("retrive_index", (1, 2), 12), r"retrive_index: expected positions from 0 to 11, got 12 at \[1, 2\]"),
    ("tree", put("retrive_index", (1, 2), 3), r"retrive_index: expected no position twice, got 3 at "),
    ("tree", put("retrive_next_token", (1, 3), 4), r"retrive_next_token: expected nodes .*, or -1, got 4 at \[1, 3\]"),
    ("tree", put("retrive_next_sibling", (0, 3), -2), r"retrive_next_sibling: expected nodes .*, got -2 at \[0, 3\]"),
    ("tree", put("retrive_next_sibling", (2, 2), 1), r"retrive_next_token, retrive_next_sibling: expected one link"),
    ("tree", put("retrive_next_token", (2, 3), 0), r"retrive_next_token, retrive_next_sibling: .*, got 1 at \[2, 0\]"),
    ("tree", put("uniform_samples", (0, 3), 1.5), r"uniform_samples: expected numbers .*, got 1\.5 at \[0, 3\]"),
    (
        "tree",
        put("uniform_samples_for_final_sampling", (2,), -1.0),
        r"uniform_samples_for_final_sampling: expected numbers .*, got -1\.0 at \[2\]",
    ),
    ("tree", put("target_probs", (1, 0, 7), torch.nan), r"target_probs: .* got nan at \[1, 0, 7\]"),
    ("tree", put("draft_probs", (1, 0, 7), -1.0), r"draft_probs: .* got -1\.0 at \[1, 0, 7\]"),
]


@pytest.mark.parametrize(("op", "change", "message"), BAD_VALUES)
def test_bad_values(
    monkeypatch: pytest.MonkeyPatch, op: str, change: Callable[[dict[str, Any]], None], message: str
) -> None:
    """An error with FUSEDCOMM_DEBUG=1, and only then."""
    function, make = OPS[op]
    for setting in ("0", "1"):
        monkeypatch.setenv("FUSEDCOMM_DEBUG", setting)
        monkeypatch.setattr(dispatch, "_debug", [])
        given = make()
        if op == "tree":
            given["uniform_samples"].fill_(0.999)  # all children of the root are refused
        change(given)
        if setting == "1":
            assert_refused(op, given, message)
        else:
            function(**given)


@pytest.mark.usefixtures("debug")
@pytest.mark.parametrize("op", OPS)
def test_good_values(op: str) -> None:
    """Of all that is not read nothing is refused."""
    function, make = OPS[op]
    function(**make())


@pytest.mark.usefixtures("debug")
def test_values_that_are_not_read() -> None:
    given = chain()
    given["uniforms"].fill_(0.999)
    given["target_probs"][:, 0] = given["draft_probs"][:, 0]
    given["target_probs"][0, 0, 1] *= 0.5  # row 0 refuses its first draft
    chain_speculative_sampling(**given)
    assert given["out"].accepted[0] == 0
    given["target_probs"][0, 1:], given["draft_probs"][0, 1:] = torch.nan, torch.nan
    chain_speculative_sampling(**given)

    given = dflash()
    given["uniforms"].fill_(0.999)
    given["target_probs"][:, 1:] = torch.nan
    dflash_chain_verify(**given)
    assert not given["out"].accept_len.any()

    given = tree()
    given["target_probs"][:, 2:], given["draft_probs"][:, 2:] = torch.nan, torch.nan
    given["uniform_samples"].fill_(0.0)  # 0, 1 and 3 are the path, which is as long as it may be
    given["target_probs"][:, 3] = 1 / V
    given["draft_probs"][:, 3] = torch.nan
    tree_speculative_sampling_target_only(**given)
    assert given["accept_index"].tolist() == [[0, 1, 3], [4, 5, 7], [8, 9, 11]]

    given = tree()
    given["retrive_next_sibling"][:, 1] = -1  # nothing leads to node 2
    given["candidates"][:, 2] = -1
    tree_speculative_sampling_target_only(**given)


@pytest.mark.usefixtures("debug")
def test_debug_leaves_torch_compile_alone() -> None:
    torch._dynamo.reset()
    given = dflash()
    given["final_uniforms"].fill_(5.0)
    compiled = torch.compile(dflash_chain_verify, backend="eager", fullgraph=True)
    got = compiled(*(given[name] for name in ("candidates", "target_probs", "uniforms", "final_uniforms")))
    assert ((got.bonus >= 0) & (got.bonus < V)).all()
