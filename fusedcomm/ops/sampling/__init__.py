"""Filters of probabilities and the choice of tokens, on the device and the same on every rank.

All ops take rows of probabilities ``[B, V]``, make no host synchronisation, and need no group. Sums are taken in fixed
point, so that a result is a function of its inputs to the bit: fusedcomm.ops.sampling.fixed_point has the arithmetic,
and what counts as a probability.

``explain`` says what an op runs on. Only AMD's aiter, where ``FUSEDCOMM_BACKEND=aiter`` asks for it, gives other bits
and cannot be captured: see fusedcomm.ops.sampling.aiter.
"""

from fusedcomm.ops.sampling.dispatch import explain
from fusedcomm.ops.sampling.draw import sampling_from_probs, top_k_top_p_sampling_from_probs
from fusedcomm.ops.sampling.renorm import (
    min_p_renorm_probs,
    top_k_renorm_probs,
    top_k_top_p_renorm_probs,
    top_p_renorm_probs,
)
from fusedcomm.ops.sampling.softmax import softmax_temperature

__all__ = [
    "explain",
    "min_p_renorm_probs",
    "sampling_from_probs",
    "softmax_temperature",
    "top_k_renorm_probs",
    "top_k_top_p_renorm_probs",
    "top_k_top_p_sampling_from_probs",
    "top_p_renorm_probs",
]
