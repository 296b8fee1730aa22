"""The Triton kernels of verification behind the signatures of fusedcomm.ops.speculative.reference.

They are torch operators (``torch.ops.fusedcomm_triton``): see fusedcomm.kernels.registration.
"""

from __future__ import annotations

import torch

from fusedcomm.kernels.launching import launch
from fusedcomm.kernels.registration import register
from fusedcomm.kernels.sampling.chain import (
    chain_speculative_sampling_kernel,
    dflash_chain_verify_kernel,
    greedy_chain_verify_kernel,
)
from fusedcomm.kernels.sampling.tiles import power_of_two, tile_options
from fusedcomm.kernels.sampling.tree import tree_speculative_sampling_kernel


def _chain_speculative_sampling(
    draft_probs: torch.Tensor,
    draft_ids: torch.Tensor,
    target_probs: torch.Tensor,
    uniforms: torch.Tensor,
    final_uniforms: torch.Tensor,
    output_ids: torch.Tensor,
    accepted: torch.Tensor,
) -> None:
    batch, num_drafts, vocab = draft_probs.shape
    inputs = (draft_probs, draft_ids, target_probs, uniforms, final_uniforms)
    arguments = (*inputs, output_ids, accepted, num_drafts, vocab)
    options = {"DRAFTS": power_of_two(num_drafts + 1)} | tile_options(vocab)
    launch(chain_speculative_sampling_kernel, (batch,), target_probs.device, *arguments, **options)


def _dflash_chain_verify(
    candidates: torch.Tensor,
    target_probs: torch.Tensor,
    uniforms: torch.Tensor,
    final_uniforms: torch.Tensor,
    threshold_single: float,
    threshold_acc: float,
    accept_len: torch.Tensor,
    bonus: torch.Tensor,
    tokens: torch.Tensor,
) -> None:
    batch, size, vocab = target_probs.shape
    inputs = (candidates, target_probs, uniforms, final_uniforms)
    arguments = (*inputs, accept_len, bonus, tokens, size, vocab, threshold_single, threshold_acc)
    options = {"DRAFTS": power_of_two(size)} | tile_options(vocab)
    launch(dflash_chain_verify_kernel, (batch,), target_probs.device, *arguments, **options)


def _greedy_chain_verify(
    candidates: torch.Tensor,
    target_predict: torch.Tensor,
    accept_len: torch.Tensor,
    bonus: torch.Tensor,
    tokens: torch.Tensor,
) -> None:
    batch, size = candidates.shape
    arguments = (candidates, target_predict, accept_len, bonus, tokens, size)
    options = {"DRAFTS": power_of_two(size), "num_warps": 1, "enable_fp_fusion": False}
    launch(greedy_chain_verify_kernel, (batch,), candidates.device, *arguments, **options)


def _tree_speculative_sampling(
    predicts: torch.Tensor,
    accept_index: torch.Tensor,
    accept_token_num: torch.Tensor,
    candidates: torch.Tensor,
    retrive_index: torch.Tensor,
    retrive_next_token: torch.Tensor,
    retrive_next_sibling: torch.Tensor,
    uniform_samples: torch.Tensor,
    uniform_samples_for_final_sampling: torch.Tensor,
    target_probs: torch.Tensor,
    draft_probs: torch.Tensor,
    threshold_single: float,
    threshold_acc: float,
) -> None:
    batch, size, vocab = target_probs.shape
    path_size, num_positions = accept_index.shape[1], predicts.shape[0]
    predicts.fill_(-1)  # positions of all requests may lie anywhere in it
    arguments = (
        *(predicts, accept_index, accept_token_num),
        *(candidates, retrive_index, retrive_next_token, retrive_next_sibling),
        *(uniform_samples, uniform_samples_for_final_sampling, target_probs, draft_probs),
        *(size, path_size, num_positions, vocab, threshold_single, threshold_acc),
    )
    options = {"PATH": power_of_two(path_size)} | tile_options(vocab)
    launch(tree_speculative_sampling_kernel, (batch,), target_probs.device, *arguments, **options)


# ---- registration ----

chain_speculative_sampling_out = register(
    _chain_speculative_sampling,
    "chain_speculative_sampling_out(Tensor draft_probs, Tensor draft_ids, Tensor target_probs, Tensor uniforms, "
    "Tensor final_uniforms, Tensor(a!) output_ids, Tensor(b!) accepted) -> ()",
)
dflash_chain_verify_out = register(
    _dflash_chain_verify,
    "dflash_chain_verify_out(Tensor candidates, Tensor target_probs, Tensor uniforms, Tensor final_uniforms, "
    "float threshold_single, float threshold_acc, Tensor(a!) accept_len, Tensor(b!) bonus, Tensor(c!) tokens) -> ()",
)
greedy_chain_verify_out = register(
    _greedy_chain_verify,
    "greedy_chain_verify_out(Tensor candidates, Tensor target_predict, Tensor(a!) accept_len, Tensor(b!) bonus, "
    "Tensor(c!) tokens) -> ()",
)
tree_speculative_sampling_target_only = register(
    _tree_speculative_sampling,
    "tree_speculative_sampling_target_only(Tensor(a!) predicts, Tensor(b!) accept_index, "
    "Tensor(c!) accept_token_num, Tensor candidates, Tensor retrive_index, Tensor retrive_next_token, "
    "Tensor retrive_next_sibling, Tensor uniform_samples, Tensor uniform_samples_for_final_sampling, "
    "Tensor target_probs, Tensor(d!) draft_probs, float threshold_single, float threshold_acc) -> ()",
)
