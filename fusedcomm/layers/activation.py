"""What travels between the layers of a decoder: rows in the model's dtype, in FP8, or in both."""

from __future__ import annotations

from typing import NamedTuple

import torch

from fusedcomm.ops.types import ScaleLayout


class _Fp8Pair(NamedTuple):
    fp8: torch.Tensor
    scale: torch.Tensor


class _NormFp8Triple(NamedTuple):
    norm: torch.Tensor
    fp8: torch.Tensor
    scale: torch.Tensor


class Fp8Activation(_Fp8Pair):
    """``(fp8 [..., H], scale)``: quantised rows with one scale for each 128 neighbours.

    A pair, as the engines hand it on; ``scale_layout`` says how the scales lie.
    """

    scale_layout: ScaleLayout

    def __new__(
        cls, fp8: torch.Tensor, scale: torch.Tensor, scale_layout: ScaleLayout = ScaleLayout.ROW_MAJOR
    ) -> Fp8Activation:
        self = super().__new__(cls, fp8, scale)
        self.scale_layout = scale_layout
        return self

    def __reduce__(self) -> tuple[type, tuple[object, ...]]:
        return (type(self), (*self, self.scale_layout))


class NormFp8Activation(_NormFp8Triple):
    """``(norm [..., H], fp8 [..., H], scale)``: the rows before and after quantisation.

    For consumers of which some read the model's dtype; ``scale_layout`` says how the scales lie.
    """

    scale_layout: ScaleLayout

    def __new__(
        cls,
        norm: torch.Tensor,
        fp8: torch.Tensor,
        scale: torch.Tensor,
        scale_layout: ScaleLayout = ScaleLayout.ROW_MAJOR,
    ) -> NormFp8Activation:
        self = super().__new__(cls, norm, fp8, scale)
        self.scale_layout = scale_layout
        return self

    def __reduce__(self) -> tuple[type, tuple[object, ...]]:
        return (type(self), (*self, self.scale_layout))

    @property
    def quantized(self) -> Fp8Activation:
        """The pair without the unquantised rows."""
        return Fp8Activation(self.fp8, self.scale, self.scale_layout)


HiddenStates = torch.Tensor | Fp8Activation | NormFp8Activation
"""What a column-parallel linear takes."""


class LayerInput(NamedTuple):
    """What attention or the MLP reads, and the residual stream ``[..., H]`` it was normed from."""

    hidden_states: HiddenStates
    residual: torch.Tensor
