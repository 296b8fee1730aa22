"""What the figures on GPUs are held against (4 ranks, bf16, hidden sizes 4096 and 7168).

A bar about a peer compares with the fastest form of that peer, and with this library as it is: no forced algorithm.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from fusedcomm.cli.bench.gpu.ops import ALL_REDUCE, FUSED, NORM, OURS
from fusedcomm.cli.bench.targets import Verdict

TOKENS = (1, 4, 16, 32, 64, 128, 512, 2048)
FEW = (1, 4, 16)
FLASHINFER = "flashinfer:"
LIBRARIES = ("nccl", "symm_mem:", FLASHINFER)


@dataclass(frozen=True)
class Bar:
    """Our time for ``op`` over the best of ``peers`` for ``peer_op``: at most ``ratio``."""

    op: str
    peer_op: str
    peers: tuple[str, ...]
    """A name, or the beginning of several."""
    tokens: tuple[int, ...]
    ratio: float
    label: str = ""


BARS = (
    Bar(FUSED, NORM, (FLASHINFER,), (1, 4, 16), 0.70),
    Bar(FUSED, NORM, (FLASHINFER,), (32, 64, 128), 0.75),
    Bar(FUSED, NORM, (FLASHINFER,), (512, 2048), 0.65),
    Bar(FUSED, ALL_REDUCE, (FLASHINFER,), FEW, 1.0, "moonshot"),
    Bar(ALL_REDUCE, ALL_REDUCE, LIBRARIES, (*TOKENS, 4096), 0.85),
    Bar(FUSED, FUSED, ("nccl+eager",), (1,), 1 / 7),
    Bar(FUSED, FUSED, ("nccl+eager",), (2048,), 1 / 2.5),
)
HOST_US = 8.0
LOADED = 1.3
NOT_MEASURED = "not measured"


@dataclass(frozen=True)
class BestPeer:
    """The fastest of some peers at one size."""

    name: str
    us: float


def best_peer(
    records: Iterable[Mapping[str, Any]], op: str, hidden: int, tokens: int, peers: tuple[str, ...]
) -> BestPeer | None:
    """The fastest of the peers that was measured; None if none was."""
    found = [
        BestPeer(r["peer"], r["us"])
        for r in records
        if "us" in r and (r["op"], r["hidden"], r["tokens"]) == (op, hidden, tokens) and _among(r["peer"], peers)
    ]
    return min(found, key=lambda peer: peer.us, default=None)


def judge(records: Iterable[Mapping[str, Any]]) -> list[Verdict]:
    """Every bar at every size where this library was measured; a peer that was not makes it ``not measured``."""
    verdicts = []
    every = [r for r in records if r.get("device") == "cuda" and r.get("benchmark") == "collectives"]
    for ranks in _unique(r["world_size"] for r in every):
        own = [r for r in every if r["world_size"] == ranks]
        for hidden in _unique(r["hidden"] for r in own):
            for bar in BARS:
                for tokens in bar.tokens:
                    verdicts += _judge_bar(own, bar, ranks, hidden, tokens)
        verdicts += _judge_host(own, ranks) + _judge_load(own, ranks)
    decoded = [r for r in records if r.get("benchmark") == "decode" and "us" in r]
    return verdicts + _judge_decode(decoded)


def _judge_bar(records: list[Mapping[str, Any]], bar: Bar, ranks: int, hidden: int, tokens: int) -> list[Verdict]:
    ours = best_peer(records, bar.op, hidden, tokens, (OURS,))
    if ours is None:
        return []
    peers = " or ".join(name.rstrip(":") for name in bar.peers)
    of = "" if bar.op == bar.peer_op else f"'s {bar.peer_op}"
    label = f" ({bar.label})" if bar.label else ""
    what = f"{ranks} ranks, H {hidden}, {tokens} tokens: {bar.op} / {peers}{of}{label}"
    best = best_peer(records, bar.peer_op, hidden, tokens, bar.peers)
    if best is None:
        return [Verdict(what, f"<= {bar.ratio:.2f}", NOT_MEASURED, False)]
    ratio = ours.us / best.us
    measured = f"{ratio:.2f} ({ours.us:.2f} / {best.us:.2f} us, {best.name})"
    return [Verdict(what, f"<= {bar.ratio:.2f}", measured, ratio <= bar.ratio)]


def _judge_host(records: list[Mapping[str, Any]], ranks: int) -> list[Verdict]:
    found = []
    for r in records:
        if "host_us" in r and r["peer"] == OURS:
            what = f"{ranks} ranks, H {r['hidden']}, {r['tokens']} tokens: host cost of an eager {r['op']}"
            found.append(Verdict(what, f"<= {HOST_US:g} us", f"{r['host_us']:.2f} us", r["host_us"] <= HOST_US))
    return found


def _judge_load(records: list[Mapping[str, Any]], ranks: int) -> list[Verdict]:
    found = []
    for r in records:
        if "loaded_us" in r and r["peer"] == OURS:
            what = f"{ranks} ranks, H {r['hidden']}, {r['tokens']} tokens: {r['op']} beside a memory-bound kernel"
            ratio = r["loaded_us"] / r["alone_us"]
            measured = f"{ratio:.2f} ({r['loaded_us']:.2f} / {r['alone_us']:.2f} us)"
            found.append(Verdict(what, f"<= {LOADED:g}", measured, ratio <= LOADED))
    return found


def _judge_decode(records: list[Mapping[str, Any]]) -> list[Verdict]:
    found = []
    for ranks, batch in _unique((r["world_size"], r["batch"]) for r in records):
        times = {r["way"]: r["us"] for r in records if (r["world_size"], r["batch"]) == (ranks, batch)}
        if "fused" not in times or len(times) < 2:
            continue
        fastest = min(times, key=times.__getitem__)
        what = f"{ranks} ranks, batch {batch}: fastest decode step"
        found.append(Verdict(what, "fused", f"{fastest} ({times[fastest]:,.0f} us)", fastest == "fused"))
    return found


def _among(peer: str, names: tuple[str, ...]) -> bool:
    return any(peer == name or (name.endswith(":") and peer.startswith(name)) for name in names)


def _unique(values: Iterable[Any]) -> list[Any]:
    return list(dict.fromkeys(values))
