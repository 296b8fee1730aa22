"""Collectives on the rank's device against tests/oracle.py: cases, captured graphs of them, and findings.

All ranks make the same cases in the same order. A finding does not end a body: the ranks stay in step, and the report
shows by its pattern of shapes and dtypes what is wrong.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import oracle
import pytest
import torch
from cases import INT_OF
from oracle import Options

from fusedcomm import GroupCoordinator, ScaleLayout
from fusedcomm.groups import custom_setup

OPS = ("all_reduce", "allreduce_rmsnorm", "allreduce_rmsnorm_quant")
MOST_SHOWN = 25


# ---- inputs ----


def random_tensor(seed: int, shape: Sequence[int], dtype: torch.dtype, kind: str, device: torch.device) -> torch.Tensor:
    """As cases.make, made on the device; the same on all devices of one model.

    "ordinary": activations; "bits": any bit pattern; "words": bit patterns that a protocol may reserve, and zeros of
    both signs; "specials": activations among infinities, NaN, the largest and the smallest.
    """
    generator = torch.Generator(device).manual_seed(seed)
    if kind in ("ordinary", "specials"):
        x = torch.randn(*shape, generator=generator, device=device, dtype=torch.float32)
        x = (x * 10.0 ** (seed % 7 - 3)).to(dtype)
        if kind == "ordinary":
            return x
        info = torch.finfo(dtype)
        values = [0.0, -0.0, torch.inf, -torch.inf, torch.nan, info.max, -info.max, info.tiny, 1e-10]
        specials = torch.tensor(values, dtype=torch.float64, device=device).to(dtype)
        which = torch.randint(0, 20 * len(values), tuple(shape), generator=generator, device=device)
        return torch.where(which < len(values), specials[which % len(values)], x)
    word = INT_OF[dtype]
    info = torch.iinfo(word)
    if kind == "bits":
        bits = torch.randint(info.min, info.max, tuple(shape), generator=generator, device=device, dtype=torch.int64)
        return bits.to(word).view(dtype)
    assert kind == "words", kind
    reserved = torch.tensor([-1, info.min, 0, 0x7FFF, 0x80 - 1, 1], dtype=torch.int64, device=device).to(word)
    which = torch.randint(0, len(reserved), tuple(shape), generator=generator, device=device)
    return reserved[which].view(dtype)


# ---- one call ----


@dataclass(frozen=True)
class Case:
    """A call of a collective; short to print."""

    op: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    seed: int = 0
    residual: bool = True
    fp32_weight: bool = False
    kind: str = "ordinary"
    options: Options = oracle.DEFAULTS

    def __str__(self) -> str:
        o = self.options
        text = f"{self.op} {'x'.join(map(str, self.shape))} {str(self.dtype).removeprefix('torch.')} seed={self.seed}"
        if self.kind != "ordinary":
            text += f" {self.kind}"
        if self.op != "all_reduce":
            text += " residual" if self.residual else " no residual"
            text += f"{' fp32 weight' * self.fp32_weight} bias={o.weight_bias} eps={o.eps}"
        if self.op == "allreduce_rmsnorm_quant":
            text += f" g={o.group_size} {o.scale_layout.value}{' emit' * o.emit_bf16}"
        return text


class Prepared:
    """A case with this rank's inputs and what its results must be, on the device."""

    def __init__(self, group: GroupCoordinator, case: Case) -> None:
        self.case = case
        seed, device = case.seed * 64, group.device
        parts = [
            random_tensor(seed + rank, case.shape, case.dtype, case.kind, device) for rank in range(group.world_size)
        ]
        self.x = parts[group.rank]
        self.residual = self.weight = None
        if case.op != "all_reduce":
            if case.residual:
                self.residual = random_tensor(seed + 40 + group.rank, case.shape, case.dtype, "ordinary", device)
            weight_dtype = torch.float32 if case.fp32_weight else case.dtype
            self.weight = random_tensor(case.seed * 7 + 3, case.shape[-1:], weight_dtype, "ordinary", device)
        self.want = oracle.expected(case.op, parts, self.residual, self.weight, case.options)

    def call(self, group: GroupCoordinator, out: torch.Tensor | None = None) -> Any:
        """Makes the call."""
        case = self.case
        if case.op == "all_reduce":
            return group.all_reduce(self.x, out=out)
        if case.op == "allreduce_rmsnorm":
            return group.allreduce_rmsnorm(self.x, self.residual, self.weight, case.options.eps, **case.options.norm)
        return group.allreduce_rmsnorm_quant(self.x, self.residual, self.weight, case.options.eps, **case.options.quant)

    def different(self, results: Any) -> torch.Tensor:
        """How many values of the results are wrong, as a number on the device: nothing waits for it."""
        got = oracle.named(results)
        assert got.keys() == self.want.keys(), f"{self.case}: results {sorted(got)}, expected {sorted(self.want)}"
        return torch.stack([oracle.different(got[name], want) for name, want in self.want.items()]).sum()

    def complaint(self, results: Any) -> str:
        """What is wrong with the results; empty if nothing is. Waits for the device."""
        return oracle.complaint(results, self.want, self.case.options)


def spoil(results: Any) -> None:
    """Overwrites results with what no result is, on the current stream."""
    for t in oracle.named(results).values():
        if t.element_size() == 1:
            t.view(torch.uint8).fill_(0xA5)
        else:
            t.fill_(torch.nan if t.is_floating_point() else -7)


def poison_allocator(want: dict[str, torch.Tensor]) -> None:
    """Leaves junk where the allocator will place results of these sizes."""
    blocks = [torch.full_like(t, 77 if t.element_size() == 1 else -7) for t in want.values()]
    del blocks


class Findings:
    """Collects what is wrong with many checks; settle() raises once, with the first of them and how many there are."""

    def __init__(self) -> None:
        self.checks = 0
        self.texts: list[str] = []

    def check(self, what: object, complaint: str) -> None:
        """Counts one check, and notes its complaint unless that is empty."""
        self.checks += 1
        if complaint:
            self.texts.append(f"{what}: {complaint}")

    def settle(self, context: str = "") -> None:
        """Raises AssertionError if anything was found."""
        if self.texts:
            shown = self.texts[:MOST_SHOWN]
            more = len(self.texts) - len(shown)
            head = f"{len(self.texts)} of {self.checks} checks found something wrong {context}".rstrip()
            raise AssertionError("\n  ".join([head, *shown, *([f"… and {more} more"] if more else [])]))


@contextlib.contextmanager
def naming(what: object) -> Iterator[None]:
    """An error inside says which case it was."""
    try:
        yield
    except Exception as error:
        error.args = (f"{error} [in: {what}]", *error.args[1:])
        raise


def run_case(group: GroupCoordinator, findings: Findings, case: Case) -> Any:
    """Prepares a case, calls it with junk where its results will lie, and checks them."""
    with naming(case):
        prepared = Prepared(group, case)
        poison_allocator(prepared.want)
        results = prepared.call(group)
        findings.check(case, prepared.complaint(results))
        return results


def varied(seed: int, op: str, shape: tuple[int, ...], dtype: torch.dtype, kind: str = "ordinary") -> Case:
    """A case whose options follow from the seed, so that a row of seeds goes through all of them."""
    rng = np.random.default_rng(seed)
    sizes = [g for g in (32, 64, 128, 256) if shape[-1] % g == 0]
    return Case(
        op,
        shape,
        dtype,
        seed,
        residual=bool(rng.random() < 0.75),
        fp32_weight=bool(rng.random() < 0.3),
        kind=kind,
        options=Options(
            eps=float(rng.choice([1e-6, 1e-5, 0.0])),
            weight_bias=float(rng.choice([0.0, 0.0, 1.0])),
            group_size=int(rng.choice(sizes or [128])),
            emit_bf16=bool(rng.random() < 0.5),
            scale_layout=list(ScaleLayout)[int(rng.integers(0, 3))],
        ),
    )


def random_case(rng: np.random.Generator, seed: int, most: int) -> Case:
    """Any op, dtype and shape of up to ``most`` elements; small ones mostly, as in decoding."""
    op = OPS[int(rng.integers(0, 3))]
    dtype = (torch.bfloat16, torch.bfloat16, torch.float16, torch.float32)[int(rng.integers(0, 4))]
    hidden = int(rng.choice([64, 128, 256, 512, 768, 1024, 1536, 2048, 4096, 5120, 7168, 8192, 16384]))
    if op == "all_reduce" and rng.random() < 0.3:
        hidden = int(rng.integers(1, 9000))
    elif op == "allreduce_rmsnorm" and rng.random() < 0.2:
        hidden = 8 * int(rng.integers(8, 1000))
    if op == "allreduce_rmsnorm_quant":
        hidden = max(hidden // 128, 1) * 128
    rows = int(rng.choice([0, 1, 1, 2, 3, 4, 7, 8, 16, 17, 32, 64, 65, 128, 130, 256, 600]))
    rows = min(rows, max(most // hidden, 1))
    shape = (rows, hidden) if rng.random() < 0.85 else (hidden,) if rng.random() < 0.5 else (1, rows, hidden)
    return varied(seed, op, shape, dtype)


# ---- graphs ----


class Graph:
    """Some prepared calls captured as one device graph; on CPU, where there are none, a recording of them."""

    def __init__(self, group: GroupCoordinator, calls: Sequence[Prepared]) -> None:
        self._group, self.calls = group, list(calls)
        self._cuda_graph: torch.cuda.CUDAGraph | None = None
        if group.device.type == "cuda":
            stream = torch.cuda.Stream(group.device)
            stream.wait_stream(torch.cuda.current_stream(group.device))
            with torch.cuda.stream(stream):
                for prepared in self.calls:  # a warm-up does the real work
                    prepared.call(group)
            torch.cuda.current_stream(group.device).wait_stream(stream)
            self._cuda_graph = torch.cuda.CUDAGraph()
            with group.graph_capture() as capture, torch.cuda.graph(self._cuda_graph, stream=capture.stream):
                self.results = [prepared.call(group) for prepared in self.calls]
        else:
            with group.graph_capture():
                self.results = [prepared.call(group) for prepared in self.calls]

    def replay(self) -> None:
        """Runs the calls again, into the same results, which are spoilt before."""
        for results in self.results:
            spoil(results)
        if self._cuda_graph is not None:
            self._cuda_graph.replay()
            return
        for prepared, results in zip(self.calls, self.results, strict=True):
            again = oracle.named(prepared.call(self._group))
            for name, t in oracle.named(results).items():
                t.copy_(again[name])

    def different(self) -> torch.Tensor:
        """How many values are wrong, as a number on the device."""
        counts = [prepared.different(r) for prepared, r in zip(self.calls, self.results, strict=True)]
        return torch.stack(counts).sum()

    def complaint(self) -> str:
        """What is wrong with the results of the last replay; empty if nothing is."""
        found = []
        for prepared, results in zip(self.calls, self.results, strict=True):
            text = prepared.complaint(results)
            if text:
                found.append(f"{prepared.case}: {text}")
        return "; ".join(found)

    def __str__(self) -> str:
        return f"graph of {' | '.join(str(prepared.case) for prepared in self.calls)}"


# ---- algorithms ----


@contextlib.contextmanager
def algorithm(name: str | None) -> Iterator[None]:
    """Groups made inside take one_shot or two_shot for every message that fits; None leaves the choice to them."""
    if name is None:
        yield
        return
    one_shot_max = {"one_shot": 1 << 40, "two_shot": 0}[name]

    def forcing(chooser: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *arguments: dataclasses.replace(chooser(*arguments), one_shot_max_bytes=one_shot_max)

    with pytest.MonkeyPatch.context() as monkeypatch:
        for chooser in ("choose_tuning", "choose_gpu_tuning"):
            monkeypatch.setattr(custom_setup, chooser, forcing(getattr(custom_setup, chooser)))
        yield
