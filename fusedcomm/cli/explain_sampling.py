"""``fusedcomm explain`` for the ops of sampling and of speculative verification."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from fusedcomm.ops.sampling.plan import SamplingPlan

PROBS_OPS = (
    "top_k_renorm_probs",
    "top_p_renorm_probs",
    "top_k_top_p_renorm_probs",
    "min_p_renorm_probs",
    "sampling_from_probs",
    "top_k_top_p_sampling_from_probs",
)
SAMPLING_OPS = (
    *PROBS_OPS,
    "softmax_temperature",
    "chain_speculative_sampling",
    "dflash_chain_verify",
    "greedy_chain_verify",
    "tree_speculative_sampling_target_only",
)


def default_dtype(op: str) -> str:
    """Of the tensor whose shape is given."""
    return "int64" if op == "greedy_chain_verify" else "fp32"


def explain_sampling(op: str, shape: tuple[int, ...], dtype: torch.dtype, *, device: str | None = None) -> SamplingPlan:
    """What serves an op whose first tensor has this shape and dtype.

    Raises:
        ValueError: a shape or a dtype that the op would refuse, a device that is not here, a malformed setting, or one
            that asks for what cannot serve.
    """
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    from fusedcomm.groups.device import choose_device
    from fusedcomm.ops import sampling

    with FakeTensorMode():  # of any size, and without values that FUSEDCOMM_DEBUG=1 would look at
        _checks()[op](torch.empty(shape, dtype=dtype))
    return sampling.explain(op, choose_device(device, 0).type)


def _checks() -> dict[str, Callable[[torch.Tensor], object]]:
    """What each op has to say of its first tensor."""
    from fusedcomm.ops.sampling import checks
    from fusedcomm.ops.speculative.checks import check_candidates, check_probs

    def check_target_probs(x: torch.Tensor) -> None:
        check_probs(x, "target_probs", "bs, D >= 1", 1)

    return {
        **dict.fromkeys(PROBS_OPS, lambda x: checks.check_probs(x, None)),
        "softmax_temperature": lambda x: checks.check_logits(x, None),
        "chain_speculative_sampling": lambda x: check_probs(x, "draft_probs", "b, n", 0),
        "dflash_chain_verify": check_target_probs,
        "greedy_chain_verify": check_candidates,
        "tree_speculative_sampling_target_only": check_target_probs,
    }
