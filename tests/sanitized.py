"""What launch/sanitize-gpu runs under compute-sanitizer: ``python tests/sanitized.py local | collectives``.

Small shapes of every kernel: each access is instrumented. Results are checked too.
"""

from __future__ import annotations

import itertools
import sys

import oracle
import torch
import torch.distributed as dist
from harness import device
from ranked import new_group
from trials import OPS, Case, Findings, algorithm, random_tensor, run_case

from fusedcomm import ScaleLayout, Settings, ops
from fusedcomm.ops.dispatch import local_backend

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def local() -> None:
    """The local ops, at widths with and without tails."""
    assert local_backend("cuda") == "native"
    findings = Findings()
    where = torch.device("cuda:0")
    for seed, (hidden, dtype) in enumerate(itertools.product((33, 96, 1000, 1280, 4096, 7168), DTYPES)):
        x, residual = (random_tensor(seed + n, (5, hidden), dtype, "ordinary", where) for n in (0, 1))
        weight = random_tensor(seed + 2, (hidden,), dtype, "ordinary", where)
        norm = oracle.add_norm(x, residual, weight, oracle.DEFAULTS)
        got = ops.fused_add_rms_norm(x, residual, weight, 1e-6)
        findings.check(f"fused_add_rms_norm {hidden} {dtype}", oracle.complaint(got, norm))
        alone = {"out": oracle.add_norm(x, None, weight, oracle.DEFAULTS)["norm"]}
        findings.check(f"rms_norm {hidden} {dtype}", oracle.complaint(ops.rms_norm(x, weight, 1e-6), alone))
        if hidden % 128:
            continue
        for layout in ScaleLayout:
            options = oracle.Options(emit_bf16=True, scale_layout=layout)
            want = {**norm, **oracle.quantised(norm["norm"], options)}
            full = ops.fused_add_rms_norm_quant(x, residual, weight, 1e-6, **options.quant)
            findings.check(f"fused_add_rms_norm_quant {hidden} {dtype}", oracle.complaint(full, want, options))
            quant = ops.per_group_quant_fp8(x, scale_layout=layout)
            findings.check(f"per_group_quant_fp8 {hidden}", oracle.complaint(quant, oracle.quantised(x, options)))
    torch.cuda.synchronize()
    findings.settle()


def collectives() -> None:
    """The collectives of two ranks that share a GPU, by both algorithms, with a slab smaller than some messages."""
    torch.cuda.set_device(device())
    dist.init_process_group("gloo")
    findings = Findings()
    for forced in ("one_shot", "two_shot"):
        with algorithm(forced), new_group(settings=Settings(buffer_mb=1, timeout_s=100)) as group:
            assert group.explain("all_reduce", (4, 128), torch.float32).stage == "custom"
            for seed, (op, dtype) in enumerate(itertools.product(OPS, DTYPES)):
                for shape in ((1, 128), (3, 1280), (17, 4096)):
                    run_case(group, findings, Case(op, shape, dtype, seed, residual=bool(seed % 2)))
            run_case(group, findings, Case("all_reduce", (1001,), torch.bfloat16))
            run_case(group, findings, Case("allreduce_rmsnorm_quant", (130, 7168), torch.bfloat16))
            torch.cuda.synchronize()
            group.check()
    findings.settle()
    dist.destroy_process_group()


if __name__ == "__main__":
    {"local": local, "collectives": collectives}[sys.argv[1]]()
    print(f"{sys.argv[1]}: every result is right")
