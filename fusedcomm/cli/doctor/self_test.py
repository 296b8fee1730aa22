"""Every collective on real ranks, against plain torch."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch

from fusedcomm.cli.doctor.check import Finding, Level
from fusedcomm.cli.launch import run_on_ranks
from fusedcomm.comm.plan import OPS, Plan, Stage
from fusedcomm.env import PREFIX
from fusedcomm.groups.coordinator import GroupCoordinator
from fusedcomm.ops import reference
from fusedcomm.platform import fp8_dtype

AREA = "self-test"
ROWS, HIDDEN, GROUP_SIZE, EPS = 5, 1024, 128, 1e-6
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


class SelfTestError(RuntimeError):
    """A collective gave something else than torch."""


def check_ranks(ranks: int, device: str) -> list[Finding]:
    """Starts ``ranks`` processes and runs every collective on them; ``device`` is "cpu" or "cuda"."""
    area = AREA if device == "cpu" else f"{AREA} on GPUs"
    with tempfile.TemporaryDirectory(prefix="fusedcomm-doctor-") as folder:
        report = Path(folder) / "report.json"
        outcome = run_on_ranks(
            ranks, "fusedcomm.cli.doctor.self_test:run_on_rank", {"report": str(report), "device": device}
        )
        rows = json.loads(report.read_text()) if report.exists() else []
    findings = [Finding(area, name, Level(level), text) for name, level, text in rows]
    if outcome.code:
        text = "; ".join(outcome.errors) or f"ended with exit code {outcome.code}"
        findings.append(Finding(area, f"{ranks} ranks", Level.FAIL, text))
    return findings


def run_on_rank(report: str, device: str) -> None:
    """The self-test of one rank; rank 0 writes the report when all ranks found their results right.

    Raises:
        SelfTestError: a result is wrong on this rank.
    """
    import fusedcomm

    group = fusedcomm.init_distributed(device=device)
    try:
        rows = [*_test_sums(group), *_test_moves(group)]
        group.barrier()
        if group.is_first_rank:
            Path(report).write_text(json.dumps(rows))
    finally:
        fusedcomm.destroy_distributed()


def _test_sums(group: GroupCoordinator) -> Iterator[tuple[str, str, str]]:
    """``(name, level, text)`` of each collective that sums."""
    for op in OPS:
        plan = group.explain(op, (ROWS, HIDDEN), DTYPES[0], group_size=GROUP_SIZE)
        for dtype in DTYPES:
            _test_sum(group, op, dtype, exact=plan.stage is not Stage.PROCESS_GROUP)
        yield op, _level(plan, group.device).value, _describe(group, plan)


def _level(plan: Plan, device: torch.device) -> Level:
    """A stage that somebody turned off is no fault; one that cannot serve is (on GPUs it may be how they are wired)."""
    if not plan.reasons:
        return Level.OK
    wanted = all(reason.startswith(PREFIX) for reason in plan.reasons.values())
    return Level.INFO if wanted else Level.FAIL if device.type == "cpu" else Level.WARN


def _describe(group: GroupCoordinator, plan: Plan) -> str:
    reasons = "".join(f"; not {stage}: {reason}" for stage, reason in plan.reasons.items())
    return f"right on {group.world_size} ranks in bf16, fp16 and fp32, by {plan.stage}{reasons}"


def _test_sum(group: GroupCoordinator, op: str, dtype: torch.dtype, *, exact: bool) -> None:
    x, residual = _inputs(group.rank, dtype)
    weight = torch.linspace(0.5, 1.5, HIDDEN).to(dtype)
    own_x, own_residual, own_weight = (t.to(group.device) for t in (x, residual, weight))
    total = torch.zeros(ROWS, HIDDEN)
    for rank in range(group.world_size):
        total += _inputs(rank, dtype)[0].float()
    total = total.to(dtype)
    if op == "all_reduce":
        _compare(op, group.all_reduce(own_x), total, exact=exact)
    elif op == "allreduce_rmsnorm":
        got = group.allreduce_rmsnorm(own_x, own_residual, own_weight, EPS)
        expected = reference.fused_add_rms_norm(total, residual, weight, EPS)
        _compare(f"{op}: norm", got.norm, expected.norm, exact=exact)
        _compare(f"{op}: residual", got.residual, expected.residual, exact=exact)
    else:
        quantized = group.allreduce_rmsnorm_quant(own_x, own_residual, own_weight, EPS, group_size=GROUP_SIZE)
        reference_ = reference.fused_add_rms_norm_quant(
            total, residual, weight, EPS, group_size=GROUP_SIZE, fp8_dtype=fp8_dtype(group.device)
        )
        _compare(f"{op}: residual", quantized.residual, reference_.residual, exact=exact)
        values = [(q.fp8.float().unflatten(-1, (-1, GROUP_SIZE)) * q.scale[..., None]) for q in (quantized, reference_)]
        _compare(f"{op}: fp8 * scale", values[0], values[1], exact=exact)


def _test_moves(group: GroupCoordinator) -> Iterator[tuple[str, str, str]]:
    """The same for the collectives that move data as it is."""
    rank, size = group.rank, group.world_size
    device = group.device
    rows = torch.arange(3, dtype=torch.int64, device=device) + 10 * rank
    everyones = torch.cat([torch.arange(3) + 10 * r for r in range(size)])
    _compare("all_gather", group.all_gather(rows, dim=0), everyones, exact=True)
    parts = torch.full((size, HIDDEN), float(rank + 1), device=device)
    _compare("reduce_scatter", group.reduce_scatter(parts), torch.full((1, HIDDEN), size * (size + 1) / 2), exact=True)
    last = torch.full((HIDDEN,), rank, device=device)
    _compare("broadcast", group.broadcast(last, src=size - 1), torch.full((HIDDEN,), size - 1), exact=True)
    group.barrier()
    for name in ("all_gather", "reduce_scatter", "broadcast", "barrier"):
        yield name, Level.OK.value, f"right on {size} ranks"


def _inputs(rank: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Partial sums and residual of a rank."""
    generator = torch.Generator().manual_seed(rank)
    x, residual = torch.randn(2, ROWS, HIDDEN, generator=generator).to(dtype)
    return x, residual


def _compare(name: str, got: torch.Tensor, expected: torch.Tensor, *, exact: bool) -> None:
    """``exact``: to the bit. Otherwise torch's sum was rounded in between: a few per cent of the typical 1."""
    got, expected = got.cpu(), expected.cpu()
    same = torch.equal(got, expected) if exact else torch.allclose(got.float(), expected.float(), rtol=0.15, atol=0.15)
    if not same:
        worst = (got.float() - expected.float()).abs().max().item()
        raise SelfTestError(f"{name}: differs from torch by up to {worst:.3g}")
