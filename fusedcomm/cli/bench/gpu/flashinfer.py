"""FlashInfer's all-reduce, bare and with add + RMSNorm, where ``flashinfer-python`` is installed.

Backend "trtllm" by name: "auto" may choose one that uses multicast. One-shot and two-shot are each forced, with and
without programmatic dependent launch; sums are in the rows' dtype, which is FlashInfer's default and faster than fp32.
Everything is written to tensors that exist already. FlashInfer compiles its kernels at first use, for minutes; the
first rank does it while the others wait, or all find them in ``flashinfer-jit-cache`` or in FlashInfer's own cache.
"""

from __future__ import annotations

import importlib
import sys
import threading
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

from fusedcomm.cli.bench.cases import EPS
from fusedcomm.cli.bench.gpu.harness import AbsentError, Case
from fusedcomm.cli.bench.gpu.job import GpuJob
from fusedcomm.cli.bench.gpu.shape import Limits, Shape, poison

WORLD_SIZES = (2, 4, 8, 16)
BACKEND = "trtllm"


class Variant(NamedTuple):
    """How FlashInfer is to do it."""

    one_shot: bool
    pdl: bool

    @property
    def name(self) -> str:
        return f"flashinfer:{'one_shot' if self.one_shot else 'two_shot'}{'+pdl' if self.pdl else ''}"


VARIANTS = tuple(Variant(one_shot, pdl) for one_shot in (True, False) for pdl in (False, True))


class FlashInfer:
    """FlashInfer's module and its workspace, made when the first case asks for them; ``close`` frees it."""

    def __init__(self, job: GpuJob, limits: Limits) -> None:
        self._job, self._limits = job, limits
        self._workspace: Any = None
        self._absent = ""
        self._builder: threading.Thread | None = None
        self._failure = ""

    def start_build(self) -> None:
        """Begins to compile FlashInfer's kernels on the first rank, beside whatever this thread does next."""
        if self._job.rank == 0 and self._importable():
            self._builder = threading.Thread(target=self._build, name="flashinfer build", daemon=True)
            self._builder.start()

    def finish_build(self) -> None:
        """Waits for it, on all ranks, and makes the workspace; a reason against it is kept for the cases."""
        if self._builder is not None:
            self._builder.join()
        self._absent = self._job.first_reason(self._failure or self._why_not())
        if self._absent:
            return
        reason = ""
        try:
            self._make_workspace()
        except Exception as error:  # any of FlashInfer's; its cases are then absent with this reason
            reason = f"{type(error).__name__}: {error}"
        self._absent = self._job.first_reason(reason)

    def workspace(self) -> Any:
        """Raises AbsentError where there is none."""
        if self._absent or self._workspace is None:
            raise AbsentError(self._absent or "not built")
        return self._workspace

    def close(self) -> None:
        if self._workspace is not None:
            self._workspace.destroy()
            self._workspace = None

    def _importable(self) -> bool:
        return not self._why_not()

    def _why_not(self) -> str:
        if self._job.world_size not in WORLD_SIZES:
            return f"FlashInfer serves {', '.join(map(str, WORLD_SIZES))} ranks, got {self._job.world_size}"
        try:
            self._job.nccl  # noqa: B018  # its address exchange goes through a process group of GPUs
            importlib.import_module("flashinfer.comm")
        except AbsentError as error:
            return str(error)
        except ImportError as error:
            return f"flashinfer-python is not installed, or lacks something: {error}"
        except Exception as error:  # it looks for the CUDA runtime and the like when it is imported
            return f"importing FlashInfer: {type(error).__name__}: {error}"
        return ""

    def _build(self) -> None:
        try:
            spec = importlib.import_module("flashinfer.jit.comm").gen_trtllm_comm_module()
            if not spec.is_aot:
                spec.build(verbose=False)
        except Exception as error:  # it reaches the cases as the reason of their absence
            print(f"FlashInfer's build failed: {error}", file=sys.stderr)
            self._failure = f"its build failed: {str(error).strip().splitlines()[-1][:200]}"

    def _make_workspace(self) -> None:
        limits = self._limits
        self._workspace = _library().create_allreduce_fusion_workspace(
            backend=BACKEND,
            world_size=self._job.world_size,
            rank=self._job.rank,
            max_token_num=-(-limits.elements // limits.hidden),
            hidden_dim=limits.hidden,
            dtype=limits.dtype,
            group=self._job.nccl,
        )


def _library() -> Any:
    return importlib.import_module("flashinfer.comm")


class _FlashInferCase:
    def __init__(self, library: FlashInfer, variant: Variant, shape: Shape) -> None:
        ranks = library._job.world_size
        if not variant.one_shot and shape.case.tokens <= ranks:
            raise AbsentError(f"its two-shot form takes more tokens than there are ranks ({ranks})")
        self.workspace = library.workspace()
        self.shape, self.variant, self.last = shape, variant, 0
        self.outs = shape.outputs()
        self.fusion = _library().allreduce_fusion
        self.patterns = _library().AllReduceFusionPattern

    def facts(self) -> Mapping[str, object]:
        return {"algorithm": "one_shot" if self.variant.one_shot else "two_shot", "pdl": self.variant.pdl}


class FlashInferAllReduce(_FlashInferCase):
    """allreduce_fusion with the pattern kAllReduce."""

    def reset(self) -> None:
        poison(*self.outs)

    def call(self, index: int) -> None:
        self.last = index % len(self.outs)
        self.fusion(
            input=self.shape.at(index).x,
            workspace=self.workspace,
            pattern=self.patterns.kAllReduce,
            launch_with_pdl=self.variant.pdl,
            output=self.outs[self.last],
            use_oneshot=self.variant.one_shot,
        )

    def check(self) -> None:
        self.shape.at(self.last).check_sum_close(self.outs[self.last])


class FlashInferNorm(_FlashInferCase):
    """allreduce_fusion with the pattern kARResidualRMSNorm: the norm and the new residual, no quantisation."""

    def __init__(self, library: FlashInfer, variant: Variant, shape: Shape) -> None:
        super().__init__(library, variant, shape)
        self.residuals, self.norms = shape.outputs(), shape.outputs()

    def reset(self) -> None:
        poison(*self.residuals, *self.norms)

    def call(self, index: int) -> None:
        own, self.last = self.shape.at(index), index % len(self.outs)
        self.fusion(
            input=own.x,
            workspace=self.workspace,
            pattern=self.patterns.kARResidualRMSNorm,
            launch_with_pdl=self.variant.pdl,
            output=self.outs[self.last],  # not written in this pattern; without it each call would allocate one
            residual_out=self.residuals[self.last],
            norm_out=self.norms[self.last],
            residual_in=own.residual,
            rms_gamma=own.weight,
            rms_eps=EPS,
            use_oneshot=self.variant.one_shot,
        )

    def check(self) -> None:
        self.shape.at(self.last).check_norm_close(self.norms[self.last], self.residuals[self.last])


def make_case(library: FlashInfer, kind: Any, variant: Variant, shape: Shape) -> Case:
    """A case of FlashInfer; AbsentError where it cannot serve."""
    library.workspace()
    if shape.case.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise AbsentError(f"FlashInfer does not take {shape.case.dtype}")
    made: Case = kind(library, variant, shape)
    return made
