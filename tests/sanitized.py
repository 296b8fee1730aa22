"""What launch/sanitize-gpu runs under compute-sanitizer: ``python tests/sanitized.py local | sampling | collectives``.

Small shapes of every kernel: each access is instrumented. Results are checked too.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable
from typing import Any

import oracle
import torch
import torch.distributed as dist
from cases import make
from harness import device
from qk_bodies import same as same_bits
from ranked import new_group
from sampling_bodies import rows, uniforms
from speculative_bodies import random_trees
from trials import OPS, Case, Findings, algorithm, random_tensor, run_case
from triton_backend import to

from fusedcomm import ScaleLayout, Settings, ops
from fusedcomm.ops import sampling as sampling_ops
from fusedcomm.ops import speculative
from fusedcomm.ops.dispatch import local_backend
from fusedcomm.ops.sampling.dispatch import sampling_backend

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


def joint_sampling(probs: torch.Tensor, k: int, p: float, uniforms: torch.Tensor) -> torch.Tensor:
    return sampling_ops.top_k_top_p_sampling_from_probs(probs, k, p, uniforms, order="joint")


def sampling() -> None:
    """Sampling and verification of rows that one block has and of rows that several share, as the CPU has them."""
    assert sampling_backend("cuda") == sampling_backend("cpu") == "native"
    findings = Findings()

    def compare(op: Callable[..., Any], *arguments: Any) -> None:
        given = to(arguments, "cuda")
        want, got = op(*arguments), op(*given)
        if want is None:  # it mutates its arguments
            want, got = arguments, given
        same = (same_bits(w, g) for w, g in zip(listed(want), listed(to(got, "cpu")), strict=True))
        findings.check(f"{op.__name__} {tuple(arguments[0].shape)}", "" if all(same) else "other results")

    for seed, (vocab, count) in enumerate(((2, 3), (37, 2), (2049, 2), (5001, 200), (20004, 3), (100_003, 1))):
        u = uniforms(count)
        for dtype, kind in itertools.product(DTYPES, ("peaked", "bits")):
            probs = rows(kind, count, vocab) if kind == "peaked" else make(seed, (count, vocab), torch.float32, kind)
            probs = probs.to(dtype)
            compare(sampling_ops.top_k_renorm_probs, probs, 7)
            compare(sampling_ops.top_p_renorm_probs, probs, 0.9)
            compare(sampling_ops.top_k_top_p_renorm_probs, probs, 30, 0.8)
            compare(sampling_ops.min_p_renorm_probs, probs, 0.1)
            compare(sampling_ops.softmax_temperature, probs, 0.0)
            compare(sampling_ops.sampling_from_probs, probs, u)
            compare(sampling_ops.top_k_top_p_sampling_from_probs, probs, 30, 0.8, u)
            compare(joint_sampling, probs, 30, 0.8, u)
            sampling_ops.softmax_temperature(probs.cuda(), 0.8)  # whose bits depend on its backend's exp
        tree = random_trees(seed, count, 5, vocab)
        candidates, target, u, final = tree.candidates, tree.target_probs, tree.uniform_samples, u
        compare(speculative.chain_speculative_sampling, target[:, 1:], candidates[:, 1:], target, u[:, 1:], final)
        compare(speculative.dflash_chain_verify, candidates, target, u, final)
        compare(speculative.greedy_chain_verify, candidates, target.argmax(-1))
        compare(speculative.tree_speculative_sampling_target_only, *tree)
    torch.cuda.synchronize()
    findings.settle()


def listed(results: Any) -> list[torch.Tensor]:
    return [results] if isinstance(results, torch.Tensor) else list(results)


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
    {"local": local, "sampling": sampling, "collectives": collectives}[sys.argv[1]]()
    print(f"{sys.argv[1]}: every result is right")
