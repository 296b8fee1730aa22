"""Speculative verification in plain torch: the CPU path where nothing faster is, and the yardstick of the kernels.

The functions are operators: arguments have been checked, all tensors are contiguous, results are written to tensors of
the caller. Rows are worked on together and nothing depends on data on the host (no ``.item()``, no boolean indexing),
so torch.compile and graph capture take it. Where a row must not write, it writes what is there already.

A probability counts as 0 where it is NaN, negative, or that of an id outside of ``[0, V)``.
"""

from __future__ import annotations

import torch

from fusedcomm.ops.speculative.residual import sample_residual


def chain_speculative_sampling_out(
    draft_probs: torch.Tensor,
    draft_ids: torch.Tensor,
    target_probs: torch.Tensor,
    uniforms: torch.Tensor,
    final_uniforms: torch.Tensor,
    output_ids: torch.Tensor,
    accepted: torch.Tensor,
) -> None:
    batch, num_drafts = draft_ids.shape
    p = _probabilities(target_probs[:, :num_drafts], draft_ids)
    q = _probabilities(draft_probs, draft_ids)
    count = _leading(uniforms * q < p)
    target = target_probs[torch.arange(batch, device=count.device), count]
    if num_drafts == 0:
        draft = torch.zeros_like(target)
    else:
        draft = draft_probs[torch.arange(batch, device=count.device), count.clamp(max=num_drafts - 1)]
        draft = torch.where((count == num_drafts).unsqueeze(-1), 0.0, draft)
    accepted.copy_(count)
    _commit(draft_ids, count, sample_residual(target, draft, final_uniforms), output_ids)


def dflash_chain_verify_out(
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
    batch, size = candidates.shape
    vocab = target_probs.shape[-1]
    single, acc = (_scalar(threshold, target_probs) for threshold in (threshold_single, threshold_acc))
    drafts = candidates[:, 1:]
    p = _probabilities(target_probs[:, : size - 1], drafts)
    count = _leading((p > 0) & ((uniforms[:, :-1] < p / acc) | (p >= single)))
    target = target_probs[torch.arange(batch, device=count.device), count]
    # what was refused at the end, if anything was: -1 is no id
    refused = torch.nn.functional.pad(drafts, (0, 1), value=-1).gather(1, count.unsqueeze(-1))
    ids = torch.arange(vocab, device=count.device)
    draft = torch.where(ids == refused, target, 0.0)
    accept_len.copy_(count)
    bonus.copy_(sample_residual(target, draft, final_uniforms))
    _commit(drafts, count, bonus, tokens)


def greedy_chain_verify_out(
    candidates: torch.Tensor,
    target_predict: torch.Tensor,
    accept_len: torch.Tensor,
    bonus: torch.Tensor,
    tokens: torch.Tensor,
) -> None:
    count = _leading(candidates[:, 1:] == target_predict[:, :-1])
    accept_len.copy_(count)
    bonus.copy_(target_predict.gather(1, count.unsqueeze(-1)).squeeze(-1))
    _commit(candidates[:, 1:], count, bonus, tokens)


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
    threshold_single: float,
    threshold_acc: float,
) -> None:
    """The walk visits a node a step, and no more than the D - 1 that a tree has: so it ends whatever the links are."""
    batch, size, vocab = target_probs.shape
    most = accept_index.shape[1] - 1
    single, threshold = (_scalar(value, target_probs) for value in (threshold_single, threshold_acc))
    row = torch.arange(batch, device=candidates.device)
    predicted = predicts.new_full((predicts.shape[0] + 1,), -1)  # the last one takes what has no position
    position = torch.where(_inside(retrive_index, predicts.shape[0]), retrive_index, -1)

    accept_index.fill_(-1)
    accept_index[:, 0] = position[:, 0]
    current, count = torch.zeros_like(row), torch.zeros_like(row)
    node = retrive_next_token[:, 0]
    coin = uniform_samples[:, 0]
    acc = torch.zeros_like(coin)
    for _ in range(size - 1):
        walking = _inside(node, size) & (count < most)
        at = torch.where(walking, node, 0)
        token = candidates[row, at]
        known = walking & _inside(token, vocab)
        entry = (row, current, torch.where(known, token, 0))
        p = torch.where(known, _counted(target_probs[entry]), 0.0)
        acc = acc + p
        accept = walking & (p > 0) & ((coin < acc / threshold) | (p >= single))
        draft_probs[entry] = torch.where(known & ~accept, p, draft_probs[entry])
        predicted[torch.where(accept, position[row, current], -1)] = token.to(torch.int32)
        count = count + accept
        column = torch.where(accept, count, 0)
        accept_index[row, column] = torch.where(accept, position[row, at].to(torch.int32), accept_index[:, 0])
        current = torch.where(accept, at, current)
        coin = torch.where(accept, uniform_samples[row, at], coin)
        acc = torch.where(accept, 0.0, acc)
        following = torch.where(accept, retrive_next_token[row, at], retrive_next_sibling[row, at])
        node = torch.where(walking, following, -1)

    accept_token_num.copy_(count)
    target = target_probs[row, current]
    draft = torch.where((count == most).unsqueeze(-1), 0.0, draft_probs[row, current])
    sample = sample_residual(target, draft, uniform_samples_for_final_sampling)
    predicted[position[row, current]] = sample.to(torch.int32)
    predicts.copy_(predicted[:-1])


# ---- what they share ----


def _inside(index: torch.Tensor, size: int) -> torch.Tensor:
    return (index >= 0) & (index < size)


def _counted(p: torch.Tensor) -> torch.Tensor:
    return torch.where(p > 0, p, 0.0)


def _probabilities(probs: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """What ``probs [b, n, V]`` give ``ids [b, n]``."""
    known = _inside(ids, probs.shape[-1])
    at = torch.where(known, ids, 0).long()
    return torch.where(known, _counted(probs.gather(2, at.unsqueeze(-1)).squeeze(-1)), 0.0)


def _leading(accept: torch.Tensor) -> torch.Tensor:
    """How many of ``[b, n]`` are true before the first that is not: int64 ``[b]``."""
    return accept.long().cumprod(1).sum(1)


def _scalar(value: float, like: torch.Tensor) -> torch.Tensor:
    """The number rounded to fp32. By a Python number torch would divide in another way on a GPU."""
    return torch.full((), value, dtype=torch.float32, device=like.device)


def _commit(drafts: torch.Tensor, count: torch.Tensor, token: torch.Tensor, out: torch.Tensor) -> None:
    """The first ``count [b]`` of ``drafts [b, n]``, then ``token [b]``, then -1, to ``out [b, n + 1]``."""
    column = torch.arange(out.shape[1], device=out.device)
    count = count.unsqueeze(-1)
    padded = torch.nn.functional.pad(drafts, (0, 1)).to(out.dtype)
    after = torch.where(column == count, token.unsqueeze(-1).to(out.dtype), -1)
    out.copy_(torch.where(column < count, padded, after))
