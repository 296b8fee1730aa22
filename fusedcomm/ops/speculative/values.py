"""What ``FUSEDCOMM_DEBUG=1`` adds: the values of the arguments are looked at, and the host waits for that.

Rows that an op does not read may hold anything, so the reference runs first, into results of its own, to find those
that it reads. Where a graph is captured, and among fake tensors, nothing is looked at (fusedcomm.ops.sampling.values).
"""

from __future__ import annotations

import torch

from fusedcomm.ops.sampling.values import refuse
from fusedcomm.ops.speculative import reference


def check_chain(
    draft_probs: torch.Tensor,
    draft_ids: torch.Tensor,
    target_probs: torch.Tensor,
    uniforms: torch.Tensor,
    final_uniforms: torch.Tensor,
) -> None:
    """Ids, uniforms, and the rows up to the first refusal."""
    batch, num_drafts, vocab = draft_probs.shape
    _check_range(draft_ids, "draft_ids", vocab, "ids")
    _check_uniforms(uniforms=uniforms, final_uniforms=final_uniforms)
    output_ids, accepted = (draft_ids.new_empty(shape) for shape in ((batch, num_drafts + 1), (batch,)))
    reference.chain_speculative_sampling_out(
        draft_probs, draft_ids, target_probs, uniforms, final_uniforms, output_ids, accepted
    )
    read = torch.arange(num_drafts + 1, device=accepted.device) <= accepted.unsqueeze(-1)
    _check_rows(target_probs, "target_probs", read)
    _check_rows(draft_probs, "draft_probs", read[:, :num_drafts])


def check_dflash(
    candidates: torch.Tensor,
    target_probs: torch.Tensor,
    uniforms: torch.Tensor,
    final_uniforms: torch.Tensor,
    *,
    threshold_single: float,
    threshold_acc: float,
) -> None:
    """Drafts, uniforms, and the rows up to the first refusal."""
    batch, size, vocab = target_probs.shape
    column = torch.arange(size, device=candidates.device)
    _check_range(candidates, "candidates", vocab, "ids", column.expand(batch, size) > 0)
    _check_uniforms(uniforms=uniforms, final_uniforms=final_uniforms)
    accept_len, bonus, tokens = (candidates.new_empty(shape) for shape in ((batch,), (batch,), (batch, size)))
    reference.dflash_chain_verify_out(
        candidates, target_probs, uniforms, final_uniforms, threshold_single, threshold_acc, accept_len, bonus, tokens
    )
    _check_rows(target_probs, "target_probs", column <= accept_len.unsqueeze(-1))


def check_tree(
    candidates: torch.Tensor,
    retrive_index: torch.Tensor,
    retrive_next_token: torch.Tensor,
    retrive_next_sibling: torch.Tensor,
    uniform_samples: torch.Tensor,
    uniform_samples_for_final_sampling: torch.Tensor,
    target_probs: torch.Tensor,
    *,
    draft_probs: torch.Tensor,
    num_positions: int,
    path_size: int,
    threshold_single: float,
    threshold_acc: float,
) -> None:
    """Trees that are trees, the tokens of their nodes, positions, uniforms, and the rows along the path."""
    batch, _, vocab = target_probs.shape
    linked = _check_links(retrive_next_token, retrive_next_sibling)
    _check_range(candidates, "candidates", vocab, "ids", linked)
    _check_range(retrive_index, "retrive_index", num_positions, "positions")
    ordered = retrive_index.flatten().sort().values
    refuse(ordered[1:] == ordered[:-1], ordered[1:], "retrive_index", "no position twice")
    _check_uniforms(
        uniform_samples=uniform_samples, uniform_samples_for_final_sampling=uniform_samples_for_final_sampling
    )
    predicts, accept_index, accept_token_num = (
        candidates.new_empty(shape, dtype=torch.int32) for shape in ((num_positions,), (batch, path_size), (batch,))
    )
    reference.tree_speculative_sampling_target_only(
        predicts,
        accept_index,
        accept_token_num,
        candidates,
        retrive_index,
        retrive_next_token,
        retrive_next_sibling,
        uniform_samples,
        uniform_samples_for_final_sampling,
        target_probs,
        draft_probs.clone(),
        threshold_single,
        threshold_acc,
    )
    on_path = (retrive_index.unsqueeze(-1) == accept_index.unsqueeze(1)).any(-1)
    _check_rows(target_probs, "target_probs", on_path)
    last = accept_index.gather(1, accept_token_num.long().unsqueeze(-1))
    subtracted = (retrive_index == last) & (accept_token_num != path_size - 1).unsqueeze(-1)
    _check_probabilities(draft_probs, "draft_probs", subtracted)


# ---- what is looked at ----


def _check_range(indices: torch.Tensor, name: str, size: int, what: str, counts: torch.Tensor | None = None) -> None:
    bad = (indices < 0) | (indices >= size)
    refuse(bad if counts is None else bad & counts, indices, name, f"{what} from 0 to {size - 1}")


def _check_uniforms(**uniforms: torch.Tensor) -> None:
    for name, u in uniforms.items():
        refuse(~((u >= 0) & (u < 1)), u, name, "numbers from 0 to below 1")


def _check_probabilities(probs: torch.Tensor, name: str, read: torch.Tensor) -> None:
    """Of ``probs [b, n, V]`` the rows that ``read [b, n]`` names."""
    refuse(~((probs >= 0) & (probs < torch.inf)) & read.unsqueeze(-1), probs, name, "finite numbers >= 0")


def _check_rows(probs: torch.Tensor, name: str, read: torch.Tensor) -> None:
    _check_probabilities(probs, name, read)
    largest = probs.amax(-1)
    refuse((largest == 0) & read, largest, name, "rows that are not all zero")


def _check_links(next_token: torch.Tensor, next_sibling: torch.Tensor) -> torch.Tensor:
    """Which nodes a link leads to. One at most leads to each, and none to the root: so there is no circle."""
    size = next_token.shape[1]
    times = torch.zeros_like(next_token)
    for name, links in (("retrive_next_token", next_token), ("retrive_next_sibling", next_sibling)):
        refuse((links < -1) | (links >= size), links, name, f"nodes from 0 to {size - 1}, or -1")
        times.scatter_add_(1, links.clamp(min=0), (links >= 0).long())
    most = (torch.arange(size, device=times.device) > 0).long()
    both = "retrive_next_token, retrive_next_sibling"
    refuse(times > most, times, both, "one link at most to a node, and none to the root")
    return times > 0
