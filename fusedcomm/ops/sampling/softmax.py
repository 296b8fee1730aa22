"""Probabilities from logits."""

from __future__ import annotations

import torch

from fusedcomm.ops.sampling.checks import check_logits, check_temperature, result
from fusedcomm.ops.sampling.operators import sampling_operator


def softmax_temperature(
    logits: torch.Tensor,
    temperature: torch.Tensor | float,
    *,
    indices: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """``softmax(logits / temperature)`` of each row; at temperature 0 the one-hot of the largest, the first of equals.

    ``w = exp((x - max) / t)`` in fp32, divided by the sum of w in fixed point, which is the same however a row is
    split; so the result is the same in every run of a backend. Backends differ by their exp: a result is within
    ``2^-22 * (8 + (max - x) / t)`` of the exact one, relatively, or 2^-126 absolutely. No host synchronisation,
    capturable in a graph; allocates nothing but the result.

    A logit of -inf has the probability 0, and so has NaN; those of +inf share a row. A row without any other is 0.

    Args:
        logits: ``[B, V]``, fp32, bf16 or fp16, V up to 262,144; rows may lie apart, and only a last dimension with a
            stride other than 1 is copied first.
        temperature: a finite number >= 0, or fp32 ``[N]``, one for each row of the result. What is not at least 2^-126
            counts as 0, NaN too.
        indices: int32 or int64 ``[N]``: the row of logits that each row of the result is of; past the ends: the row at
            that end. Without it, N is B.
        out: written and returned; fp32 ``[N, V]``, contiguous, apart from the inputs.

    Returns:
        fp32 ``[N, V]``.

    Raises:
        ValueError: a bad argument, with what was expected; nothing has been written then. With ``FUSEDCOMM_DEBUG=1``
            also for values: logits that are NaN or +inf, rows of -inf, temperatures, indices past the ends.
    """
    source = check_logits(logits, indices)
    t = check_temperature(temperature, source)
    out = result(out, source, temperature=t.rows)
    sampling_operator("softmax_temperature", logits.device.type)(source.rows, source.indices, *t, out)
    return out
