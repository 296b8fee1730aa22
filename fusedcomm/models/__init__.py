"""Models that decode over a tensor-parallel group."""

from fusedcomm.models.config import BlockFP8Config, Qwen3Config
from fusedcomm.models.errors import CheckpointError
from fusedcomm.models.qwen3 import Qwen3ForCausalLM
from fusedcomm.models.tiny import make_tiny_qwen3

__all__ = ["BlockFP8Config", "CheckpointError", "Qwen3Config", "Qwen3ForCausalLM", "make_tiny_qwen3"]
