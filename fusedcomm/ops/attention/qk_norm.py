"""RMSNorm of queries and keys, a head at a time."""

from __future__ import annotations

import torch

from fusedcomm.ops.attention.kv import QK
from fusedcomm.ops.attention.qk_checks import (
    check_dims,
    check_head_dim,
    check_num_heads,
    check_outputs,
    check_tensor,
    check_weights,
)
from fusedcomm.ops.attention.qk_operators import qk_operators


def fused_qk_rmsnorm(
    q: torch.Tensor,
    k: torch.Tensor,
    q_weight: torch.Tensor,
    k_weight: torch.Tensor,
    eps: float,
    *,
    weight_bias: float = 0.0,
    out: QK | None = None,
) -> QK:
    """RMSNorm of every head of q and of k (Zhang and Sennrich, 2019; QK-norm as in Qwen3) in one launch on a GPU.

    In fp32 and rounded once to the dtype of q: the bits of ``rms_norm`` over the last dimension. Makes no host
    synchronisation and can be captured in a graph.

    Args:
        q: ``[T, Hq, D]``, bf16, fp16 or fp32, D up to 1024. Views of a packed qkv are taken as they are; only a last
            dimension with a stride other than 1 is copied first.
        k: ``[T, Hk, D]``, of the dtype of q; Hk need not be Hq.
        q_weight, k_weight: ``[D]``, dtype of q or fp32.
        eps: added to the mean of squares; >= 0.
        weight_bias: added to the weights (1 for Gemma).
        out: written and returned; shapes and dtype of q and k, any strides with a last one of 1, apart from q and k.
            Without it, contiguous tensors are allocated.

    Raises:
        ValueError: a bad argument, with what was expected.
    """
    check_dims(q, "q", "T, Hq, D")
    check_head_dim(q.shape[2], "q")
    check_dims(k, "k", "T, Hk, D")
    for t, name in ((q, "q"), (k, "k")):
        check_num_heads(t, name)
    check_tensor(k, "k", (q.shape[0], k.shape[1], q.shape[2]), (q.dtype,), q.device)
    check_weights({"q_weight": q_weight, "k_weight": k_weight}, (q.shape[2],), q, eps, weight_bias)
    if out is not None:
        outputs = {"out.q": (out.q, tuple(q.shape)), "out.k": (out.k, tuple(k.shape))}
        check_outputs(outputs, {"q": q, "k": k}, q)
    else:
        out = QK(q.new_empty(q.shape), k.new_empty(k.shape))
    q, k = unit_stride(q), unit_stride(k)
    weights = q_weight.contiguous(), k_weight.contiguous()
    qk_operators(q.device.type).qk_rmsnorm_out(q, k, *weights, eps, weight_bias, *out)
    return out


def unit_stride(t: torch.Tensor) -> torch.Tensor:
    """t where its last dimension has a stride of 1, else a contiguous copy."""
    return t if t.stride(-1) == 1 else t.contiguous()
