"""Speculative verification: which drafts of a chain or a tree stay, and the token after them."""

from fusedcomm.ops.speculative.chain import chain_speculative_sampling, dflash_chain_verify, greedy_chain_verify
from fusedcomm.ops.speculative.results import ChainSampling, ChainVerify
from fusedcomm.ops.speculative.tree import tree_speculative_sampling_target_only

__all__ = [
    "ChainSampling",
    "ChainVerify",
    "chain_speculative_sampling",
    "dflash_chain_verify",
    "greedy_chain_verify",
    "tree_speculative_sampling_target_only",
]
