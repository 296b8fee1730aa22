"""The entry of a rank process of ``fusedcomm bench collectives``; rank 0 writes the records."""

from __future__ import annotations

import dataclasses
import fnmatch
import json
import signal
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

import torch

from fusedcomm.cli.bench import machine
from fusedcomm.cli.bench.cases import GROUP_SIZE, Case, Inputs
from fusedcomm.cli.bench.collectives import COLLECTIVES, OPS, our_peers
from fusedcomm.cli.bench.harness import Effort, Timing, measure
from fusedcomm.cli.bench.job import Job, check_tuning
from fusedcomm.cli.bench.registry import Peer

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True)
class Spec:
    """What to measure; travels to the ranks as JSON."""

    output: str
    command: str
    ops: list[str] = field(default_factory=lambda: list(OPS))
    tokens: list[int] = field(default_factory=lambda: [1, 4, 16, 64, 256])
    hidden: int = 4096
    dtype: str = "bf16"
    peers: list[str] = field(default_factory=lambda: ["*"])
    """Shell patterns of names; ``op/name`` or ``name``."""
    tunings: list[dict[str, int]] = field(default_factory=list)
    rounds: int = Effort.rounds
    batch_ms: float = Effort.batch_s * 1e3
    set_up: bool = True

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self))

    def check(self) -> None:
        """Refuses what the ranks could not measure, before any is started.

        Raises:
            ValueError: an operation, size, peer or tuning field that is not there.
        """
        if unknown := [op for op in self.ops if op not in OPS]:
            raise ValueError(f"--ops: expected {' or '.join(OPS)}, got {unknown[0]}")
        if self.hidden % GROUP_SIZE:
            raise ValueError(f"--hidden: expected a multiple of {GROUP_SIZE}, got {self.hidden}")
        if self.rounds < 1 or not self.batch_ms > 0:
            raise ValueError(f"--rounds, --batch-ms: expected numbers > 0, got {self.rounds} and {self.batch_ms:g}")
        if not self.chosen_peers(with_mpi=True):
            raise ValueError(f"--peers: expected names of peers, got {','.join(self.peers)}")
        for tuning in self.tunings:
            check_tuning(tuning)

    def chosen_peers(self, *, with_mpi: bool) -> list[Peer]:
        """The peers to measure, by operation, those of other libraries first."""
        ours = our_peers(self.ops, self.tunings)
        everything = [p for op in self.ops for p in [*COLLECTIVES.peers(op), *(p for p in ours if p.op == op)]]
        chosen = [p for p in everything if any(_matches(p, pattern) for pattern in self.peers)]
        return [p for p in chosen if with_mpi or not p.needs_mpi]


def _matches(peer: Peer, pattern: str) -> bool:
    # "[...]" in a name stands for itself
    literal = pattern.replace("[", "[[]")
    return fnmatch.fnmatchcase(peer.name, literal) or fnmatch.fnmatchcase(f"{peer.op}/{peer.name}", literal)


def run(spec: Spec, output: IO[str] | None) -> None:
    """Measures what ``spec`` says, on every rank; rank 0 has ``output`` and writes a JSON line a figure.

    Raises:
        WrongResultError: a peer computed something wrong.
    """
    job = Job()
    try:
        about = {
            "benchmark": "collectives",
            "world_size": job.world_size,
            "hidden": spec.hidden,
            "dtype": spec.dtype,
            "command": spec.command,
            "date": machine.describe_date(),
            "machine": machine.describe_machine(),
            "versions": machine.describe_versions(),
        }
        for record in _records(spec, job):
            if output is not None and job.rank == 0:
                print(json.dumps({**record, **about}), file=output, flush=True)
    finally:
        job.close()


def _records(spec: Spec, job: Job) -> Iterator[dict[str, object]]:
    if spec.set_up:
        yield {"op": "set_up", "peer": "ours", "seconds": job.set_up_seconds(), "slab_bytes": job.slab_bytes()}
    peers = spec.chosen_peers(with_mpi=job.mpi is not None)
    effort = Effort(spec.rounds, spec.batch_ms / 1e3)
    for tokens in spec.tokens:
        _say(job, f"{job.world_size} ranks, {tokens} tokens: {len(peers)} peers")
        inputs = Inputs(Case(tokens, spec.hidden, DTYPES[spec.dtype]), job.rank, job.world_size)
        runners = [peer.prepare(job, inputs) for peer in peers]
        for peer, timing in zip(peers, measure(runners, job, effort), strict=True):
            size = inputs.case.message_bytes
            yield {"op": peer.op, "peer": peer.name, "tokens": tokens, "message_bytes": size, **_figures(timing)}


def _figures(timing: Timing) -> dict[str, object]:
    return {
        "us": round(timing.slowest_s * 1e6, 3),
        "rank_us": [round(s * 1e6, 3) for s in timing.rank_medians_s],
        "calls": timing.calls,
        "rounds": timing.rounds,
    }


def _say(job: Job, text: str) -> None:
    if job.rank == 0:
        print(text, file=sys.stderr, flush=True)


def main() -> None:
    """``python -m fusedcomm.cli.bench.worker SPEC`` under mpiexec or torchrun."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends all ranks, and none tells where it was
    spec = Spec(**json.loads(sys.argv[1]))
    with Path(spec.output).open("a", encoding="utf-8") as output:
        run(spec, output)


if __name__ == "__main__":
    main()
