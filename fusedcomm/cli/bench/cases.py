"""Inputs of one case, different on every rank, and the results to expect."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fusedcomm.cli.bench.registry import WrongResultError
from fusedcomm.ops import reference
from fusedcomm.ops.types import AddRMSNormQuant

EPS = 1e-6
GROUP_SIZE = 128


@dataclass(frozen=True)
class Case:
    """Rows ``[tokens, hidden]`` of a dtype."""

    tokens: int
    hidden: int
    dtype: torch.dtype

    @property
    def message_bytes(self) -> int:
        return self.tokens * self.hidden * self.dtype.itemsize


class Inputs:
    """One rank's partial sums, residual and weight, and the results by the reference in torch."""

    def __init__(
        self, case: Case, rank: int, world_size: int, device: torch.device | str = "cpu", seed: int = 0
    ) -> None:
        """``seed``: of another set of rows with the same weight; ranks that pass the same one belong together.

        Every rank makes all ranks' rows; on GPUs that takes the same model of GPU on all of them.
        """
        self.case = case
        self.world_size = world_size
        shape = (case.tokens, case.hidden)
        first = 10_000 * seed
        self.x = _random(shape, case.dtype, first + rank, device)
        self.residual = _random(shape, case.dtype, first + 1000 + rank, device)
        self.weight = 1 + 0.1 * _random((case.hidden,), torch.float32, 2000, device)
        self.weight = self.weight.to(case.dtype)
        # the sum in fp32 and rank order, rounded once
        total, self.magnitude = torch.zeros(shape, device=device), torch.zeros(shape, device=device)
        for r in range(world_size):
            part = _random(shape, case.dtype, first + r, device).float()
            total += part
            self.magnitude += part.abs()
        self.sum = total.to(case.dtype)
        self._result: AddRMSNormQuant | None = None

    @property
    def result(self) -> AddRMSNormQuant:
        """What all-reduce + add + RMSNorm + quantisation should give."""
        if self._result is None:
            self._result = reference.fused_add_rms_norm_quant(
                self.sum, self.residual, self.weight, EPS, group_size=GROUP_SIZE, emit_bf16=True
            )
        return self._result

    def check_sum_equal(self, got: torch.Tensor) -> None:
        if not torch.equal(got, self.sum):
            raise WrongResultError(f"sum: {int((got != self.sum).sum())} of {got.numel()} elements differ")

    def check_sum_close(self, got: torch.Tensor) -> None:
        """For libraries that round to the dtype after each of the W - 1 additions."""
        bound = self.world_size * torch.finfo(self.case.dtype).eps * self.magnitude
        check_close("sum", got, self.sum, bound)

    def check_norm_equal(self, norm: torch.Tensor, residual: torch.Tensor) -> None:
        for name, got in (("residual", residual), ("norm", norm)):
            if not torch.equal(got, getattr(self.result, name)):
                raise WrongResultError(f"{name}: differs from the reference")

    def check_norm_close(self, norm: torch.Tensor, residual: torch.Tensor) -> None:
        """For sums that were rounded in between."""
        bound = self._residual_bound()
        check_close("residual", residual, self.result.residual, bound)
        expected = self.result.norm
        assert expected is not None  # it is asked for where the result is made
        # a row's root mean square is about sqrt(W + 1) and weights are near 1, so norming magnifies no error
        check_close("norm", norm, expected, bound + 0.02 * expected.float().abs())

    def check_result_equal(self, got: AddRMSNormQuant) -> None:
        expected = self.result
        for name in ("residual", "scale"):
            if not torch.equal(getattr(got, name), getattr(expected, name)):
                raise WrongResultError(f"{name}: differs from the reference")
        if not torch.equal(got.fp8.view(torch.uint8), expected.fp8.view(torch.uint8)):
            raise WrongResultError("fp8: differs from the reference")

    def check_result_close(self, fp8: torch.Tensor, scale: torch.Tensor, residual: torch.Tensor) -> None:
        """For sums that were rounded in between: an element of fp8 may be two steps (1/8 each) off."""
        check_close("residual", residual, self.result.residual, self._residual_bound())
        expected = _dequantize(self.result.fp8, self.result.scale)
        check_close("fp8 * scale", _dequantize(fp8, scale), expected, 0.25 * expected.abs() + 0.25)

    def _residual_bound(self) -> torch.Tensor:
        eps = torch.finfo(self.case.dtype).eps
        return (self.world_size + 1) * eps * (self.magnitude + self.residual.float().abs())


def _random(shape: tuple[int, ...], dtype: torch.dtype, seed: int, device: torch.device | str) -> torch.Tensor:
    generator = torch.Generator(device).manual_seed(seed)
    return torch.randn(shape, generator=generator, device=device).to(dtype)


def _dequantize(fp8: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    groups: torch.Tensor = fp8.float().unflatten(-1, (-1, GROUP_SIZE)) * scale.unsqueeze(-1)
    return groups.flatten(-2)


def check_close(name: str, got: torch.Tensor, expected: torch.Tensor, bound: torch.Tensor | float) -> None:
    """Raises WrongResultError unless no element is further off than its bound; NaN, the poison, always is."""
    if got.shape != expected.shape:
        raise WrongResultError(f"{name}: expected shape {tuple(expected.shape)}, got {tuple(got.shape)}")
    error = (got.float() - expected.float()).abs()
    if not bool((error <= bound).all()):
        raise WrongResultError(f"{name}: off by up to {error.max().item():.3g}")
