"""Verification of trees of drafts by the target's probabilities alone."""

from __future__ import annotations

import torch

from fusedcomm.ops.attention.qk_checks import check_tensor
from fusedcomm.ops.sampling.values import sees_values
from fusedcomm.ops.speculative import checks, values
from fusedcomm.ops.speculative.operators import speculative_operator


def tree_speculative_sampling_target_only(
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
    threshold_single: float = 1.0,
    threshold_acc: float = 1.0,
    deterministic: bool = True,
) -> None:
    """Walks a tree of drafts for each request and accepts a path of it: the engines' op, its arguments as theirs.

    The children of a node are tried in order, with one uniform for all of them: ``p = target_probs[node, token]``,
    ``acc += p`` from 0 in fp32, and a child is accepted if ``p > 0`` and either ``uniform_samples[node] < acc /
    threshold_acc``, rounded to fp32, or ``p >= threshold_single``. A child that is refused leaves ``draft_probs[node,
    token] = p``. Where no child is accepted, or S - 1 nodes have been, a last token is sampled from
    ``relu(target_probs[node] - draft_probs[node])`` (fusedcomm.ops.speculative.residual has the definition), without
    draft_probs if S - 1 were accepted. With both thresholds 1 and siblings that differ, what comes out is distributed
    as the target, whatever the tree is.

    Mutates predicts, accept_index and accept_token_num, in which all elements are written, and single elements of
    draft_probs. A pure function of its arguments, with the same bits on every backend and rank. No host
    synchronisation, capturable in a graph. Inputs that are not contiguous are copied.

    Args:
        predicts: int32 ``[N]``, N at least bs * D, contiguous, written: at the position of each node of the path, the
            token that follows it; -1 elsewhere.
        accept_index: int32 ``[bs, S]``, S >= 1, contiguous, written: the positions of the path from the root on, then
            -1. So S - 1 drafts at most are accepted.
        accept_token_num: int32 ``[bs]``, contiguous, written: how many drafts were accepted; neither the root nor the
            last token counts.
        candidates: int64 ``[bs, D]``: the token of each node; node 0 is the root, whose token is not looked at. One
            outside of ``[0, V)`` has the probability 0, so it is refused.
        retrive_index: int64 ``[bs, D]``: the position of each node in predicts, no two the same (of two that are, one
            token stays). One outside of ``[0, N)`` is -1 in accept_index, and its token is not written.
        retrive_next_token: int64 ``[bs, D]``: the first child of each node; -1, or whatever is no node, for none.
        retrive_next_sibling: int64 ``[bs, D]``: the next sibling of each node, likewise. Whatever the links are, the
            walk ends after D - 1 nodes, which is as many as a tree has.
        uniform_samples: fp32 ``[bs, D]``, in ``[0, 1)``: that of a node is for its children.
        uniform_samples_for_final_sampling: fp32 ``[bs]``, in ``[0, 1)``, independent of the others.
        target_probs: fp32 ``[bs, D, V]``: what follows each node. Rows off the path may hold anything.
        draft_probs: fp32 ``[bs, D, V]``, contiguous, zeros from the caller, mutated. Rows off the path may hold
            anything.
        threshold_single: from 0 to 1; a draft of this probability is accepted whatever the uniform is.
        threshold_acc: from 0 to 1; sums are divided by it, so below 1 more is accepted than the target would.
        deterministic: there for the engines' sake; the bits are the same either way.

    Raises:
        ValueError: a bad argument, with what was expected; nothing has been written then. With ``FUSEDCOMM_DEBUG=1``
            also for values: of what is read, probabilities that are negative or not finite and rows of zeros; ids,
            positions and links out of range, positions that are there twice, links that make no tree, uniforms outside
            of [0, 1).
    """
    checks.check_probs(target_probs, "target_probs", "bs, D >= 1", 1)
    batch, size, _ = target_probs.shape
    device = target_probs.device
    read = {
        "candidates": candidates,
        "retrive_index": retrive_index,
        "retrive_next_token": retrive_next_token,
        "retrive_next_sibling": retrive_next_sibling,
    }
    for name, t in read.items():
        check_tensor(t, name, (batch, size), (torch.int64,), device)
    final_uniforms = uniform_samples_for_final_sampling
    check_tensor(uniform_samples, "uniform_samples", (batch, size), (torch.float32,), device)
    check_tensor(final_uniforms, "uniform_samples_for_final_sampling", (batch,), (torch.float32,), device)
    read |= {
        "uniform_samples": uniform_samples,
        "uniform_samples_for_final_sampling": final_uniforms,
        "target_probs": target_probs,
    }
    checks.check_thresholds(threshold_single, threshold_acc)
    if not isinstance(deterministic, bool):
        raise ValueError(f"deterministic: expected a bool, got {deterministic!r}")
    _check_mutated(predicts, accept_index, accept_token_num, draft_probs, read)
    arguments, thresholds = [t.contiguous() for t in read.values()], (float(threshold_single), float(threshold_acc))
    if sees_values(target_probs):
        values.check_tree(
            *arguments,
            draft_probs=draft_probs,
            num_positions=predicts.shape[0],
            path_size=accept_index.shape[1],
            threshold_single=thresholds[0],
            threshold_acc=thresholds[1],
        )
    operator = speculative_operator("tree_speculative_sampling_target_only", device.type)
    operator(predicts, accept_index, accept_token_num, *arguments, draft_probs, *thresholds)


def _check_mutated(
    predicts: torch.Tensor,
    accept_index: torch.Tensor,
    accept_token_num: torch.Tensor,
    draft_probs: torch.Tensor,
    read: dict[str, torch.Tensor],
) -> None:
    batch, size, vocab = read["target_probs"].shape
    checks.check_dims(predicts, "predicts", "N")
    if predicts.shape[0] < batch * size:
        raise ValueError(f"predicts: expected at least bs * D = {batch * size} elements, got {predicts.shape[0]}")
    checks.check_dims(accept_index, "accept_index", "bs, S")
    if accept_index.shape[1] < 1:
        raise ValueError(f"accept_index: expected shape [bs, S >= 1], got {tuple(accept_index.shape)}")
    written = {
        "predicts": (predicts, (predicts.shape[0],), torch.int32),
        "accept_index": (accept_index, (batch, accept_index.shape[1]), torch.int32),
        "accept_token_num": (accept_token_num, (batch,), torch.int32),
        "draft_probs": (draft_probs, (batch, size, vocab), torch.float32),
    }
    checks.check_written(written, read)
