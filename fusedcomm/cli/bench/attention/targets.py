"""What the figures on one H200 are held against."""

from __future__ import annotations

from fusedcomm.cli.bench.attention import indexer, qk_norm_rope, sparse_mla
from fusedcomm.cli.bench.attention.indexer_cache import LAYOUTS
from fusedcomm.cli.bench.single.bars import BandwidthBar, Bar, ComputeBar, LatencyBar, PeerBar
from fusedcomm.cli.bench.single.flashinfer import FLASHINFER

SEPARATE = ("separate", "separate+eager", FLASHINFER)
"""The ways that norm and rotate in kernels of their own; a bar about them is about the fastest."""

_16K = tuple(f"16384/{layout}" for layout in LAYOUTS)
BARS: tuple[Bar, ...] = (
    PeerBar(qk_norm_rope.OP, tuple(map(str, qk_norm_rope.TOKENS)), SEPARATE, 0.5),
    BandwidthBar(qk_norm_rope.OP, ("8192",), 0.80),
    BandwidthBar(indexer.WRITE, _16K, 0.80),
    BandwidthBar(indexer.GATHER, _16K, 0.80),
    BandwidthBar(sparse_mla.OP, tuple(size.label for size in sparse_mla.GATHERING), 0.70),
    ComputeBar(sparse_mla.OP, tuple(size.label for size in sparse_mla.COMPUTING), 350.0),
    LatencyBar(sparse_mla.OP, tuple(size.label for size in sparse_mla.SMALL), 12.0),
)
