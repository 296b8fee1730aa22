"""Verification of chains of drafts in Triton: a program has a chain, and looks at all of its drafts at once."""

from __future__ import annotations

import triton
import triton.language as tl

from fusedcomm.kernels.sampling.residual import difference, draw_residual, probability_at, without


@triton.jit
def leading(accepts, i, num_drafts):
    """How many of the drafts are accepted before the first that is not."""
    return tl.min(tl.where(accepts | (i >= num_drafts), num_drafts, i), axis=0)


@triton.jit
def commit(out_ptr, i, num_drafts, drafts, accepted, token):
    """The drafts that were accepted, the token after them, then -1."""
    committed = tl.where(i < accepted, drafts, tl.where(i == accepted, token, -1))
    tl.store(out_ptr + i, committed.to(out_ptr.dtype.element_ty), mask=i <= num_drafts)


@triton.jit(do_not_specialize=["num_drafts"])
def chain_speculative_sampling_kernel(
    draft_probs_ptr,  # [b, num_drafts, vocab]
    draft_ids_ptr,  # [b, num_drafts]
    target_probs_ptr,  # [b, num_drafts + 1, vocab]
    uniforms_ptr,  # [b, num_drafts]
    final_uniforms_ptr,  # [b]
    output_ids_ptr,  # [b, num_drafts + 1]
    accepted_ptr,  # [b]
    num_drafts,
    vocab,
    DRAFTS: tl.constexpr,  # a power of two above num_drafts
    TILE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, DRAFTS)
    is_draft = i < num_drafts
    first = row * num_drafts
    target_ptr, draft_ptr = target_probs_ptr + (first + row) * vocab, draft_probs_ptr + first * vocab
    ids = tl.load(draft_ids_ptr + first + i, mask=is_draft, other=-1).to(tl.int64)
    u = tl.load(uniforms_ptr + first + i, mask=is_draft, other=0.0)
    of_row = i.to(tl.int64) * vocab
    p = probability_at(target_ptr + of_row, ids, vocab, is_draft)
    q = probability_at(draft_ptr + of_row, ids, vocab, is_draft)
    accepted = leading(u * q < p, i, num_drafts)
    at = accepted.to(tl.int64) * vocab
    is_refused = accepted < num_drafts
    uniform = tl.load(final_uniforms_ptr + row)
    token = draw_residual(difference, target_ptr + at, draft_ptr + at, is_refused, vocab, uniform, TILE)
    tl.store(accepted_ptr + row, accepted)
    commit(output_ids_ptr + first + row, i, num_drafts, ids, accepted, token)


@triton.jit(do_not_specialize=["size"])
def dflash_chain_verify_kernel(
    candidates_ptr,  # [bs, size]
    target_probs_ptr,  # [bs, size, vocab]
    uniforms_ptr,  # [bs, size]
    final_uniforms_ptr,  # [bs]
    accept_len_ptr,  # [bs]
    bonus_ptr,  # [bs]
    tokens_ptr,  # [bs, size]
    size,
    vocab,
    threshold_single,
    threshold_acc,
    DRAFTS: tl.constexpr,  # a power of two, size or more
    TILE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, DRAFTS)
    num_drafts = size - 1
    is_draft = i < num_drafts
    first = row * size
    target_ptr = target_probs_ptr + first * vocab
    ids = tl.load(candidates_ptr + first + 1 + i, mask=is_draft, other=-1)
    u = tl.load(uniforms_ptr + first + i, mask=is_draft, other=0.0)
    p = probability_at(target_ptr + i.to(tl.int64) * vocab, ids, vocab, is_draft)
    accepts = (p > 0.0) & ((u < tl.div_rn(p, threshold_acc)) | (p >= threshold_single))
    accepted = leading(accepts, i, num_drafts)
    refused = tl.sum(tl.where(is_draft & (i == accepted), ids, 0), axis=0)
    uniform = tl.load(final_uniforms_ptr + row)
    at = target_ptr + accepted.to(tl.int64) * vocab
    bonus = draw_residual(without, at, refused, accepted < num_drafts, vocab, uniform, TILE).to(tl.int64)
    tl.store(accept_len_ptr + row, accepted)
    tl.store(bonus_ptr + row, bonus)
    commit(tokens_ptr + first, i, num_drafts, ids, accepted, bonus)


@triton.jit(do_not_specialize=["size"])
def greedy_chain_verify_kernel(
    candidates_ptr,  # [bs, size]
    target_predict_ptr,  # [bs, size]
    accept_len_ptr,  # [bs]
    bonus_ptr,  # [bs]
    tokens_ptr,  # [bs, size]
    size,
    DRAFTS: tl.constexpr,  # a power of two, size or more
):
    row = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, DRAFTS)
    num_drafts = size - 1
    is_draft = i < num_drafts
    first = row * size
    ids = tl.load(candidates_ptr + first + 1 + i, mask=is_draft, other=0).to(tl.int64)
    predicted = tl.load(target_predict_ptr + first + i, mask=i < size, other=0).to(tl.int64)
    accepted = leading(ids == predicted, i, num_drafts)
    bonus = tl.load(target_predict_ptr + first + accepted).to(tl.int64)
    tl.store(accept_len_ptr + row, accepted)
    tl.store(bonus_ptr + row, bonus)
    commit(tokens_ptr + first, i, num_drafts, ids, accepted, bonus)
