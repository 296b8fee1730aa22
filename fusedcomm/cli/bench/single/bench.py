"""Measuring the peers of a workload in turn, and the records of it."""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from fusedcomm.cli.bench.collectives import OURS
from fusedcomm.cli.bench.gpu import harness
from fusedcomm.cli.bench.gpu.harness import Case, Effort, Entry
from fusedcomm.cli.bench.gpu.kernels import count_kernels
from fusedcomm.cli.bench.single.device import Alone, AnyDevice, cache_bytes
from fusedcomm.cli.bench.single.machine import COPY
from fusedcomm.cli.bench.single.spec import Spec
from fusedcomm.cli.bench.single.workload import Place, Plan, Workload

Record = dict[str, Any]
MOST_LISTED = 24
"""Kernels by name in a record."""


@dataclass(frozen=True)
class Counted:
    """A case whose kernels will be counted, when everything has been timed: a profiler may leave something behind."""

    workload: Workload
    peer: str
    case: Case


class Bench:
    """One run: what it measures on, what it has found wrong, what is still to be counted."""

    def __init__(self, spec: Spec, device: AnyDevice) -> None:
        self.spec, self.device = spec, device
        self.ranks = Alone()
        self.cache_bytes = cache_bytes(device.device)
        self.wrong: list[str] = []
        """Results of this library that were not right."""
        self._to_count: list[Counted] = []

    def plan(self, workload: Workload) -> Plan:
        """The workload's own, but for what the command line says."""
        plan = workload.plan(self.cache_bytes)
        sets = self.spec.sets or plan.sets
        is_cold = sets * workload.moved_bytes > self.cache_bytes if self.spec.sets else plan.is_cold
        return Plan(self.spec.calls or plan.calls, sets, is_cold)

    def records(self, workload: Workload) -> Iterator[Record]:
        """Every peer's time, or why it is absent."""
        plan = self.plan(workload)
        effort = Effort(calls=plan.calls, budget_s=self.spec.budget_s, min_rounds=self.spec.min_rounds)
        place = Place(self.device.device, plan)
        peers = [peer for peer in workload.peers(place) if self.spec.wants_peer(workload.op, peer.name)]
        kinds = [(workload.op, peer.name, peer.make) for peer in peers]
        entries = harness.prepare(kinds, self.ranks, self.device, effort)
        harness.measure(entries, self.ranks, self.device, effort)
        for entry in entries:
            if entry.is_wrong and entry.name == OURS:
                self.wrong.append(f"{workload.name}: {entry.absent}")
            yield {**describe(workload), "peer": entry.name, **self._figures(workload, entry, plan)}
            if workload.counts_kernels and entry.case is not None:
                self._to_count.append(Counted(workload, entry.name, entry.case))

    def kernel_records(self) -> Iterator[Record]:
        """What a call of each case launches that was to be counted; nothing on a CPU."""
        if self.device.device.type != "cuda":
            return
        for counted in self._to_count:
            found = count_kernels(functools.partial(counted.case.call, 0), self.device.finish)
            names = dict(found.most_common(MOST_LISTED))
            kernels = {"kernels": sum(found.values()), "kernel_names": names}
            yield {**describe(counted.workload), "peer": counted.peer, **kernels}

    def say(self, text: str) -> None:
        """Progress, on stderr."""
        print(text, file=sys.stderr, flush=True)

    def _figures(self, workload: Workload, entry: Entry, plan: Plan) -> Record:
        if entry.absent:
            return {"absent": entry.absent}
        if entry.timing is None:
            raise RuntimeError("timing: expected one of each case that is not absent")
        seconds = entry.timing.slowest_s
        found: Record = {
            "us": round(seconds * 1e6, 3),
            "gbytes_per_s": round(workload.moved_bytes / seconds / 1e9, 1),
            "calls": entry.timing.calls,
            "rounds": entry.timing.rounds,
            "sets": plan.sets,
            "cache": "cold" if plan.is_cold else "warm",
            **entry.facts,
        }
        if workload.flops and entry.name != COPY:
            found["tflops"] = round(workload.flops / seconds / 1e12, 2)
        return found


def describe(workload: Workload) -> Record:
    """What the records of a workload say of it."""
    sizes = {"moved_bytes": workload.moved_bytes, "flops": workload.flops}
    return {"op": workload.op, "label": workload.label, **workload.sizes, **sizes}
