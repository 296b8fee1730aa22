"""Verification of chains: each draft follows the one before it, and all after the first refusal is dropped."""

from __future__ import annotations

import torch

from fusedcomm.ops.attention.qk_checks import check_tensor
from fusedcomm.ops.sampling.values import sees_values
from fusedcomm.ops.speculative import checks, values
from fusedcomm.ops.speculative.operators import speculative_operator
from fusedcomm.ops.speculative.results import ChainSampling, ChainVerify


def chain_speculative_sampling(
    draft_probs: torch.Tensor,
    draft_ids: torch.Tensor,
    target_probs: torch.Tensor,
    uniforms: torch.Tensor,
    final_uniforms: torch.Tensor,
    *,
    out: ChainSampling | None = None,
) -> ChainSampling:
    """Accepts drafts so that what comes out is distributed as the target (Leviathan et al., Chen et al., 2023).

    Draft i is accepted if all before it were and ``uniforms[i] * draft_probs[i, x_i] < target_probs[i, x_i]``, the
    product rounded to fp32. At the first refusal, of draft i, one token is sampled from ``relu(target_probs[i] -
    draft_probs[i])`` (fusedcomm.ops.speculative.residual has the definition); if all n are accepted, from row n of the
    target. What comes after the first refusal is not looked at: it may be anything.

    A pure function of its arguments, with the same bits on every backend and rank. No host synchronisation, capturable
    in a graph. Inputs that are not contiguous are copied.

    Args:
        draft_probs: fp32 ``[b, n, V]``: what each draft was drawn from.
        draft_ids: int32 or int64 ``[b, n]``. One outside of ``[0, V)`` has the probability 0, so it is refused.
        target_probs: fp32 ``[b, n + 1, V]``.
        uniforms: fp32 ``[b, n]``, in ``[0, 1)``.
        final_uniforms: fp32 ``[b]``, in ``[0, 1)``, independent of the others.
        out: written and returned; contiguous, apart from the inputs.

    Raises:
        ValueError: a bad argument, with what was expected; nothing has been written then. With ``FUSEDCOMM_DEBUG=1``
            also for values: ids out of range, uniforms outside of [0, 1), and of the rows that are read, probabilities
            that are negative or not finite and rows of zeros.
    """
    checks.check_probs(draft_probs, "draft_probs", "b, n", 0)
    batch, num_drafts, vocab = draft_probs.shape
    device = draft_probs.device
    check_tensor(draft_ids, "draft_ids", (batch, num_drafts), checks.INTEGERS, device)
    check_tensor(target_probs, "target_probs", (batch, num_drafts + 1, vocab), (torch.float32,), device)
    check_tensor(uniforms, "uniforms", (batch, num_drafts), (torch.float32,), device)
    check_tensor(final_uniforms, "final_uniforms", (batch,), (torch.float32,), device)
    read = {
        "draft_probs": draft_probs,
        "draft_ids": draft_ids,
        "target_probs": target_probs,
        "uniforms": uniforms,
        "final_uniforms": final_uniforms,
    }
    shapes = {"output_ids": (batch, num_drafts + 1), "accepted": (batch,)}
    if out is None:
        out = ChainSampling(*(draft_ids.new_empty(shape, dtype=torch.int32) for shape in shapes.values()))
    else:
        checks.check_result(out, ChainSampling)
        written = {f"out.{name}": (getattr(out, name), shape, torch.int32) for name, shape in shapes.items()}
        checks.check_written(written, read)
    arguments = [t.contiguous() for t in read.values()]
    if sees_values(target_probs):
        values.check_chain(*arguments)
    speculative_operator("chain_speculative_sampling", device.type)(*arguments, *out)
    return out


def dflash_chain_verify(
    candidates: torch.Tensor,
    target_probs: torch.Tensor,
    uniforms: torch.Tensor,
    final_uniforms: torch.Tensor,
    threshold_single: float = 1.0,
    threshold_acc: float = 1.0,
    *,
    out: ChainVerify | None = None,
) -> ChainVerify:
    """Accepts a block of drafts by the target's probabilities alone: tree_speculative_sampling_target_only of a chain.

    With ``p = target_probs[i, candidates[i + 1]]``, candidate i + 1 is accepted if all before it were, ``p > 0``, and
    either ``uniforms[i] < p / threshold_acc``, rounded to fp32, or ``p >= threshold_single``. At the first refusal the
    bonus is sampled from row i without the token that was refused (fusedcomm.ops.speculative.residual has the
    definition); if all are accepted, from the last row. With both thresholds 1 what comes out is distributed as the
    target, wherever the drafts come from. What comes after the first refusal is not looked at: it may be anything.

    A pure function of its arguments, with the same bits on every backend and rank. No host synchronisation, capturable
    in a graph. Inputs that are not contiguous are copied.

    Args:
        candidates: int64 ``[bs, D]``: the current token, which is not looked at, and D - 1 drafts. One outside of
            ``[0, V)`` has the probability 0, so it is refused.
        target_probs: fp32 ``[bs, D, V]``: row i is what follows candidate i.
        uniforms: fp32 ``[bs, D]``, in ``[0, 1)``; the last column is not looked at.
        final_uniforms: fp32 ``[bs]``, in ``[0, 1)``, independent of the others.
        threshold_single: from 0 to 1; a draft of this probability is accepted whatever the uniform is.
        threshold_acc: from 0 to 1; probabilities are divided by it, so below 1 more is accepted than the target would.
        out: written and returned; contiguous, apart from the inputs.

    Raises:
        ValueError: a bad argument, with what was expected; nothing has been written then. With ``FUSEDCOMM_DEBUG=1``
            also for values, as chain_speculative_sampling.
    """
    checks.check_probs(target_probs, "target_probs", "bs, D >= 1", 1)
    batch, size, _ = target_probs.shape
    device = target_probs.device
    check_tensor(candidates, "candidates", (batch, size), (torch.int64,), device)
    check_tensor(uniforms, "uniforms", (batch, size), (torch.float32,), device)
    check_tensor(final_uniforms, "final_uniforms", (batch,), (torch.float32,), device)
    checks.check_thresholds(threshold_single, threshold_acc)
    read = {
        "candidates": candidates,
        "target_probs": target_probs,
        "uniforms": uniforms,
        "final_uniforms": final_uniforms,
    }
    out = _verify_out(out, read)
    arguments, thresholds = [t.contiguous() for t in read.values()], (float(threshold_single), float(threshold_acc))
    if sees_values(target_probs):
        values.check_dflash(*arguments, threshold_single=thresholds[0], threshold_acc=thresholds[1])
    speculative_operator("dflash_chain_verify", device.type)(*arguments, *thresholds, *out)
    return out


def greedy_chain_verify(
    candidates: torch.Tensor, target_predict: torch.Tensor, *, out: ChainVerify | None = None
) -> ChainVerify:
    """Accepts the drafts that the target would have chosen too, up to the first that it would not.

    ``accept_len`` is the length of the longest prefix in which ``candidates[:, 1:]`` and ``target_predict[:, :-1]`` are
    equal, the bonus is ``target_predict[b, accept_len]``. Ids are compared as they are, whatever they are. No host
    synchronisation, capturable in a graph. Inputs that are not contiguous are copied.

    Args:
        candidates: int32 or int64 ``[bs, D]``: the current token, which is not looked at, and D - 1 drafts.
        target_predict: int32 or int64 ``[bs, D]``: what the target puts after each candidate.
        out: written and returned; contiguous, apart from the inputs.

    Raises:
        ValueError: a bad argument, with what was expected; nothing has been written then.
    """
    checks.check_candidates(candidates)
    device = candidates.device
    check_tensor(target_predict, "target_predict", tuple(candidates.shape), checks.INTEGERS, device)
    read = {"candidates": candidates, "target_predict": target_predict}
    out = _verify_out(out, read)
    arguments = [t.contiguous() for t in read.values()]
    speculative_operator("greedy_chain_verify", device.type)(*arguments, *out)
    return out


def _verify_out(out: ChainVerify | None, read: dict[str, torch.Tensor]) -> ChainVerify:
    """New results, or those of the caller after checks."""
    candidates = read["candidates"]
    batch, size = candidates.shape
    extents = {
        "accept_len": ((batch,), torch.int32),
        "bonus": ((batch,), torch.int64),
        "tokens": ((batch, size), torch.int64),
    }
    if out is None:
        return ChainVerify(*(candidates.new_empty(shape, dtype=dtype) for shape, dtype in extents.values()))
    checks.check_result(out, ChainVerify)
    written = {f"out.{name}": (getattr(out, name), *extent) for name, extent in extents.items()}
    checks.check_written(written, read)
    return out
