"""What the figures on one H200, and on a CPU, are held against."""

from __future__ import annotations

from fusedcomm.cli.bench.sampling import chain, draws, filters, softmax, tree
from fusedcomm.cli.bench.sampling.draws import EXPONENTIAL
from fusedcomm.cli.bench.sampling.rows import BATCHES, CPU_BATCHES, CPU_VOCABS, LOOP, TORCH, TWO_CALLS, VOCABS, Size
from fusedcomm.cli.bench.single.bars import BandwidthBar, Bar, LatencyBar, MedianBar, WorstBar
from fusedcomm.cli.bench.single.flashinfer import FLASHINFER


def _labels(vocabs: tuple[int, ...], batches: tuple[int, ...]) -> tuple[str, ...]:
    return tuple(Size(vocab, batch).label for vocab in vocabs for batch in batches)


ALL, FEW, MANY = (_labels(VOCABS, batches) for batches in (BATCHES, (1, 4), (64, 256)))
RENORM = (filters.TOP_P_OP, filters.TOP_K_OP, filters.BOTH_OP, filters.MIN_P_OP)
SORTED = (filters.TOP_P_OP, filters.BOTH_OP, draws.JOINT_OP, draws.TOP_K_FIRST_OP)
"""What torch needs a sort for."""
IN_TORCH = (*RENORM, softmax.OP, draws.PLAIN_OP, draws.JOINT_OP, draws.TOP_K_FIRST_OP, chain.OP, tree.OP)
IN_FLASHINFER = tuple(op for op in IN_TORCH if op not in (filters.MIN_P_OP, tree.OP))
HALVED = (filters.TOP_P_OP, filters.TOP_K_OP, filters.BOTH_OP, draws.JOINT_OP, draws.TOP_K_FIRST_OP, chain.OP)
"""The ops that are to take half of FlashInfer's time."""

BARS: tuple[Bar, ...] = (
    *(WorstBar(op, ALL, (TORCH, EXPONENTIAL), 1.0) for op in IN_TORCH),
    *(WorstBar(op, ALL, (FLASHINFER,), 1.0) for op in IN_FLASHINFER),
    *(MedianBar(op, ALL, (FLASHINFER,), 0.5) for op in HALVED),
    WorstBar(filters.BOTH_OP, ALL, (TWO_CALLS,), 0.6),
    WorstBar(filters.BOTH_OP, ALL, (FLASHINFER,), 0.4),
    WorstBar(draws.JOINT_OP, ALL, (FLASHINFER,), 0.5),
    WorstBar(chain.OP, _labels(VOCABS, (16,)), (LOOP,), 0.01),
    WorstBar(chain.OP, ALL, (FLASHINFER,), 0.4),
    *(LatencyBar(op, FEW, 12.0) for op in RENORM),
    *(BandwidthBar(op, MANY, 1 / 3) for op in RENORM),
    *(WorstBar(op, _labels(CPU_VOCABS, CPU_BATCHES), (TORCH,), 1 / 3, on="cpu") for op in SORTED),
)
