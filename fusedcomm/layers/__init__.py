"""Layers that use the group's collectives: norms, parallel and FP8 linears, embeddings, LayerCommunicator."""

from fusedcomm.layers.activation import Fp8Activation, LayerInput, NormFp8Activation
from fusedcomm.layers.communicator import LayerCommunicator, LayerOutput
from fusedcomm.layers.embedding import ParallelLMHead, VocabParallelEmbedding
from fusedcomm.layers.fp8_linear import BlockFP8Linear
from fusedcomm.layers.linear import (
    ColumnParallelLinear,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    RowParallelLinear,
)
from fusedcomm.layers.norm import GemmaRMSNorm, RMSNorm
from fusedcomm.layers.partial_sum import PartialSum, UnreducedSumError

__all__ = [
    "BlockFP8Linear",
    "ColumnParallelLinear",
    "Fp8Activation",
    "GemmaRMSNorm",
    "LayerCommunicator",
    "LayerInput",
    "LayerOutput",
    "MergedColumnParallelLinear",
    "NormFp8Activation",
    "ParallelLMHead",
    "PartialSum",
    "QKVParallelLinear",
    "RMSNorm",
    "RowParallelLinear",
    "UnreducedSumError",
    "VocabParallelEmbedding",
]
