"""The tables of the README, from the records of a run on GPUs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from fusedcomm.cli.bench.gpu.ops import ALL_REDUCE, FUSED, NORM, OURS
from fusedcomm.cli.bench.gpu.targets import FLASHINFER, best_peer

Record = Mapping[str, Any]

ROWS: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("NCCL all-reduce", ALL_REDUCE, ("nccl",)),
    ("torch symmetric memory all-reduce, best", ALL_REDUCE, ("symm_mem:",)),
    ("FlashInfer all-reduce, best", ALL_REDUCE, (FLASHINFER,)),
    ("**fusedcomm all-reduce**", ALL_REDUCE, (OURS,)),
    ("NCCL + eager add, norm, quant", FUSED, ("nccl+eager",)),
    ("the same compiled", FUSED, ("nccl+compile",)),
    ("FlashInfer all-reduce + add + RMSNorm, best (no quant)", NORM, (FLASHINFER,)),
    ("**fusedcomm all-reduce + add + RMSNorm**", NORM, (OURS,)),
    ("**fusedcomm, with FP8 quantisation**", FUSED, (OURS,)),
)
RATIOS: tuple[tuple[str, str, str, tuple[str, ...]], ...] = (
    ("with quantisation / FlashInfer without", FUSED, NORM, (FLASHINFER,)),
    ("all-reduce / best other", ALL_REDUCE, ALL_REDUCE, ("nccl", "symm_mem:", FLASHINFER)),
)


def collectives_tables(records: Iterable[Record]) -> str:
    """A table for each number of ranks and row length: µs a call by tokens, and what they are compared with."""
    own = [r for r in records if r.get("device") == "cuda" and r.get("benchmark") == "collectives"]
    tables = []
    for ranks, hidden in _unique((r["world_size"], r["hidden"]) for r in own if "us" in r):
        here = [r for r in own if (r["world_size"], r["hidden"]) == (ranks, hidden)]
        tokens = sorted({r["tokens"] for r in here if "us" in r})
        lines = _head(f"{ranks} ranks, H = {hidden}", [f"{count:,}" for count in tokens])
        for title, op, peers in ROWS:
            best = [best_peer(here, op, hidden, count, peers) for count in tokens]
            lines.append(_line(title, [f"{b.us:.1f}" if b else "" for b in best]))
        for title, op, peer_op, peers in RATIOS:
            cells = []
            for count in tokens:
                ours = best_peer(here, op, hidden, count, (OURS,))
                peer = best_peer(here, peer_op, hidden, count, peers)
                cells.append(f"{ours.us / peer.us:.2f}" if ours and peer else "")
            lines.append(_line(title, cells))
        tables.append("\n".join(lines))
    return "\n\n".join(tables)


def decode_tables(records: Iterable[Record]) -> str:
    """A table for each number of ranks: step time, kernels and communication's share by way and batch size."""
    own = [r for r in records if r.get("benchmark") == "decode" and "us" in r]
    tables = []
    for ranks in _unique(r["world_size"] for r in own):
        here = [r for r in own if r["world_size"] == ranks]
        batches = _unique(r["batch"] for r in here)
        lines = _head(f"decode step, {ranks} ranks", [f"batch {batch}" for batch in batches])
        found = {(r["way"], r["batch"]): r for r in here}
        for way in _unique(r["way"] for r in here):
            cells = []
            for batch in batches:
                r = found.get((way, batch))
                cells.append(
                    f"{r['us'] / 1e3:.2f} ms, {r['kernels_per_layer']:.0f} kernels a layer, "
                    f"{r['communication_share']:.0%} communication"
                    if r
                    else ""
                )
            lines.append(_line(way, cells))
        tables.append("\n".join(lines))
    return "\n\n".join(tables)


def _head(title: str, columns: Sequence[str]) -> list[str]:
    return [_line(title, columns), "|---" * (len(columns) + 1) + "|"]


def _line(title: str, cells: Sequence[str]) -> str:
    return f"| {title} | {' | '.join(cells)} |"


def _unique(values: Iterable[Any]) -> list[Any]:
    return list(dict.fromkeys(values))
