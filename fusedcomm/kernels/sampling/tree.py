"""Verification of trees of drafts in Triton: a program walks a tree."""

from __future__ import annotations

import triton
import triton.language as tl

from fusedcomm.kernels.sampling.residual import difference, draw_residual, is_inside, probability_at


@triton.jit
def position_of(retrive_index_ptr, node, num_positions):
    """Of a node in predicts; -1 where it has none."""
    position = tl.load(retrive_index_ptr + node)
    return tl.where(is_inside(position, num_positions), position, -1)


@triton.jit(do_not_specialize=["size", "path_size", "num_positions"])
def tree_speculative_sampling_kernel(
    predicts_ptr,  # [num_positions], -1 everywhere
    accept_index_ptr,  # [bs, path_size]
    accept_token_num_ptr,  # [bs]
    candidates_ptr,  # [bs, size]
    retrive_index_ptr,  # [bs, size]
    retrive_next_token_ptr,  # [bs, size]
    retrive_next_sibling_ptr,  # [bs, size]
    uniforms_ptr,  # [bs, size]
    final_uniforms_ptr,  # [bs]
    target_probs_ptr,  # [bs, size, vocab]
    draft_probs_ptr,  # [bs, size, vocab], mutated
    size,
    path_size,
    num_positions,
    vocab,
    threshold_single,
    threshold_acc,
    PATH: tl.constexpr,  # a power of two, path_size or more
    TILE: tl.constexpr,
):
    """The walk visits no more than the D - 1 nodes that a tree has below its root: so it ends on any links."""
    row = tl.program_id(0).to(tl.int64)
    first = row * size
    candidates_ptr += first
    retrive_index_ptr += first
    retrive_next_token_ptr += first
    retrive_next_sibling_ptr += first
    uniforms_ptr += first
    accept_index_ptr += row * path_size
    target_ptr, draft_ptr = target_probs_ptr + first * vocab, draft_probs_ptr + first * vocab

    most = path_size - 1
    accepted = 0
    position = position_of(retrive_index_ptr, 0, num_positions)
    node = tl.load(retrive_next_token_ptr)
    coin = tl.load(uniforms_ptr)
    acc = 0.0
    tl.store(accept_index_ptr, position.to(tl.int32))
    visited = 1
    while (visited < size) & (accepted < most) & is_inside(node, size):
        token = tl.load(candidates_ptr + node)
        p = probability_at(target_ptr, token, vocab, True)
        acc += p
        accepts = (p > 0.0) & ((coin < tl.div_rn(acc, threshold_acc)) | (p >= threshold_single))
        if accepts:
            tl.store(predicts_ptr + position, token.to(tl.int32), mask=position >= 0)
            accepted += 1
            position = position_of(retrive_index_ptr, node, num_positions)
            tl.store(accept_index_ptr + accepted, position.to(tl.int32))
            target_ptr = target_probs_ptr + (first + node) * vocab
            draft_ptr = draft_probs_ptr + (first + node) * vocab
            coin = tl.load(uniforms_ptr + node)
            acc = 0.0
            node = tl.load(retrive_next_token_ptr + node)
        else:
            tl.store(draft_ptr + token, p, mask=is_inside(token, vocab))
            node = tl.load(retrive_next_sibling_ptr + node)
        visited += 1

    tl.store(accept_token_num_ptr + row, accepted)
    i = tl.arange(0, PATH)
    tl.store(accept_index_ptr + i, tl.full([PATH], -1, tl.int32), mask=(i > accepted) & (i < path_size))
    tl.debug_barrier()  # one thread has written what all read
    uniform = tl.load(final_uniforms_ptr + row)
    token = draw_residual(difference, target_ptr, draft_ptr, accepted < most, vocab, uniform, TILE)
    tl.store(predicts_ptr + position, token, mask=position >= 0)
