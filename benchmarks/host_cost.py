"""What a fused collective costs the host that queues it, layer by layer: the operator, the communicator, the group.

    ./launch/torchrun 4 benchmarks/host_cost.py

Every rank makes the same calls on rows of its own, in batches of 100 that the device's queue takes without waiting; the
median batch of the slowest rank counts. On CPU ranks a call includes the kernel, so only differences mean something.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

import fusedcomm
from fusedcomm import AddRMSNorm, AddRMSNormQuant, ScaleLayout, platform
from fusedcomm.comm.native_collectives import NativeCollectives

EPS, GROUP_SIZE = 1e-6, 128
BATCHES, CALLS = 25, 100


def microseconds(call: Callable[[], object], finish: Callable[[], None]) -> float:
    """Of one call, the median batch."""
    samples = []
    for _ in range(BATCHES):
        finish()
        start = time.perf_counter()
        for _ in range(CALLS):
            call()
        samples.append((time.perf_counter() - start) / CALLS * 1e6)
    finish()
    return statistics.median(samples)


def layers(group: fusedcomm.GroupCoordinator, tokens: int, hidden: int) -> dict[str, Callable[[], object]]:
    """The calls to time by name; results are written into given tensors unless the name says otherwise."""
    x = torch.randn(tokens, hidden, device=group.device).bfloat16()
    residual, weight = torch.randn_like(x), torch.randn_like(x[0])
    total, norm = torch.empty_like(x), AddRMSNorm(torch.empty_like(x), torch.empty_like(x))
    fp8 = torch.empty_like(x, dtype=platform.fp8_dtype(group.device))
    scale = x.new_empty((tokens, hidden // GROUP_SIZE), dtype=torch.float32)
    quant = AddRMSNormQuant(fp8, scale, torch.empty_like(x), None, ScaleLayout.ROW_MAJOR)
    found: dict[str, Callable[[], object]] = {
        "sum, group": lambda: group.all_reduce(x, out=total),
        "sum, group, allocating": lambda: group.all_reduce(x),
        "norm, group": lambda: group.allreduce_rmsnorm(x, residual, weight, EPS, out=norm),
        "norm, group, allocating": lambda: group.allreduce_rmsnorm(x, residual, weight, EPS),
        "quant, group": lambda: group.allreduce_rmsnorm_quant(
            x, residual, weight, EPS, group_size=GROUP_SIZE, out=quant
        ),
        "quant, group, allocating": lambda: group.allreduce_rmsnorm_quant(
            x, residual, weight, EPS, group_size=GROUP_SIZE
        ),
    }
    custom: Any = group._custom
    if not isinstance(custom, NativeCollectives):
        return found
    options = (0.0, GROUP_SIZE, False, ScaleLayout.ROW_MAJOR)
    sum_op, norm_op = custom._comm_all_reduce_out, custom._comm_allreduce_rmsnorm_out
    quant_op = custom._comm_allreduce_rmsnorm_quant_out
    norm_call, quant_call = custom._prepare(EPS, 0.0), custom._prepare(EPS, *options)
    return {
        "an empty tensor": lambda: torch.empty_like(x),
        "sum, operator": lambda: sum_op(custom._handle, x, total),
        "norm, operator": lambda: norm_op(norm_call, x, residual, weight, *norm),
        "quant, operator": lambda: quant_op(quant_call, x, residual, weight, fp8, scale, quant.residual, None),
        "sum, communicator": lambda: custom.all_reduce(x, total),
        "norm, communicator": lambda: custom.allreduce_rmsnorm(x, residual, weight, EPS, 0.0, norm),
        "quant, communicator": lambda: custom.allreduce_rmsnorm_quant(x, residual, weight, EPS, *options, quant),
        **found,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--tokens", type=int, default=1)
    parser.add_argument("--hidden", type=int, default=4096)
    arguments = parser.parse_args()
    with torch.inference_mode():
        group = fusedcomm.init_distributed()
        finish = torch.cuda.synchronize if group.device.type == "cuda" else group.barrier
        for name, call in layers(group, arguments.tokens, arguments.hidden).items():
            call()
            group.barrier()
            own = microseconds(call, finish)
            slowest = group.all_gather(torch.tensor([own], device=group.device)).max().item()
            if group.is_first_rank:
                print(f"{name:26} {slowest:8.2f} us", flush=True)
        fusedcomm.destroy_distributed()


if __name__ == "__main__":
    main()
