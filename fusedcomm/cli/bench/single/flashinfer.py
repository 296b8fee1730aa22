"""FlashInfer (``flashinfer-python`` 0.6.12), where it is installed: its modules, compiled ahead.

It compiles its kernels at first use, each for about a minute. So a process of its own begins with that when a benchmark
starts (``python -m fusedcomm.cli.bench.single.flashinfer``); a case that needs a module waits for it.
"""

from __future__ import annotations

import importlib
import sys
import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch

from fusedcomm.cli.bench.gpu.harness import AbsentError

FLASHINFER = "flashinfer"
MODULE = "fusedcomm.cli.bench.single.flashinfer"


def library(module: str) -> Any:
    """``flashinfer.<module>``; AbsentError where it cannot be imported."""
    try:
        return importlib.import_module(f"flashinfer.{module}")
    except ImportError as error:
        raise AbsentError(f"flashinfer-python is not installed, or lacks something: {error}") from error
    except Exception as error:  # it looks for the CUDA runtime and the like when it is imported
        raise AbsentError(f"importing FlashInfer: {type(error).__name__}: {error}") from error


def _specs() -> dict[str, Callable[[], Any]]:
    """What the benchmarks need, by name: functions that describe a module to FlashInfer's compiler."""

    def mla() -> Any:
        backend = library("utils").determine_mla_backend(torch.device("cuda"))
        bf16 = torch.bfloat16
        return library("jit").gen_batch_mla_module(backend, bf16, bf16, bf16, torch.int32, 512, 64, False)

    return {
        "norm": lambda: library("jit.norm").gen_norm_module(),
        "rope": lambda: library("jit.rope").gen_rope_module(),
        "mla": mla,
        "sampling": lambda: library("jit.sampling").gen_sampling_module(),
    }


def build(names: Sequence[str]) -> list[str]:
    """Compiles these modules side by side into FlashInfer's cache; the failures, which their cases will meet again."""
    failures = []

    def one(name: str) -> None:
        try:
            spec = _specs()[name]()
            if not spec.is_aot:
                spec.build(verbose=False)
        except Exception as error:  # of nvcc, ninja, FlashInfer
            failures.append(f"{name}: {str(error).strip().splitlines()[-1][:200]}")

    threads = [threading.Thread(target=one, args=(name,)) for name in names]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return failures


def main() -> None:
    """``python -m fusedcomm.cli.bench.single.flashinfer NAME…``."""
    try:
        library("jit")
    except AbsentError:
        return  # its cases say so
    if failures := build(sys.argv[1:]):
        sys.exit(f"FlashInfer's build failed: {'; '.join(failures)}")


if __name__ == "__main__":
    main()
