"""Every operation at many sizes, to the bit: dtypes, options, both algorithms, slabs smaller than the message."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from harness import device
from oracle import Options
from ranked import bits_but_nan, new_group, same_on_all_ranks
from trials import OPS, Case, Findings, Prepared, algorithm, random_tensor, run_case, varied

from fusedcomm import ScaleLayout, Settings

ROWS = (0, 1, 3, 17, 130, 600)
# 96: no whole number of groups of 64; 100: no 16-byte rows in bf16, so nothing fused; 16384: the longest
HIDDEN = (64, 96, 100, 512, 1536, 4096, 5120, 7168, 8192, 16384)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def sizes(rows: tuple[int, ...], hidden: tuple[int, ...], forced: str | None, buffer_mb: int | None) -> int:
    """All operations at all sizes and dtypes; the options go round."""
    findings = Findings()
    settings = None if buffer_mb is None else Settings(buffer_mb=buffer_mb)
    with algorithm(forced), new_group(settings=settings) as group:
        before = group.stats()
        for seed, (h, t, dtype, op) in enumerate(itertools.product(hidden, rows, DTYPES, OPS)):
            if op == "allreduce_rmsnorm_quant" and h % 32:
                continue
            run_case(group, findings, varied(seed, op, (t, h), dtype))
        after = group.stats()
    findings.settle(f"with {forced or 'the default algorithm'}, buffer_mb={buffer_mb}")
    if forced is not None and buffer_mb is None:
        other = {"one_shot": "two_shot", "two_shot": "one_shot"}[forced]
        ran = {name: after[f"algorithm.{name}"] - before.get(f"algorithm.{name}", 0) for name in (forced, other)}
        assert ran[forced] > ran[other], f"{forced} was asked for, and these ran: {ran}"
    return findings.checks


@pytest.mark.smoke
@pytest.mark.parametrize("forced", [None, "one_shot", "two_shot"])
def test_small_sizes(world: Any, forced: str | None) -> None:
    rows, hidden = ((1, 17), (512, 7168)) if world.light else ((0, 1, 3, 17), (64, 96, 512, 4096, 7168))
    world.run(sizes, rows, hidden, forced, None)


@pytest.mark.worlds("main")
@pytest.mark.parametrize("forced", [None, "one_shot", "two_shot"])
def test_all_sizes(world: Any, forced: str | None) -> None:
    rows, hidden = ((1, 130), HIDDEN) if world.light else (ROWS, HIDDEN)
    world.run(sizes, rows, hidden, forced, None)


@pytest.mark.worlds("main+shared")
@pytest.mark.parametrize("forced", ["one_shot", "two_shot"])
def test_messages_larger_than_the_slab(world: Any, forced: str) -> None:
    rows, hidden = ((600,), (4096,)) if world.light else ((1, 130, 600, 2100), (512, 7168, 16384))
    world.run(sizes, rows, hidden, forced, 1)


def many_rows(rows: tuple[int, ...]) -> None:
    """Prefill: thousands of rows, pieces of a message among them."""
    findings = Findings()
    with new_group() as group:
        for seed, (t, op) in enumerate(itertools.product(rows, OPS)):
            run_case(group, findings, varied(seed, op, (t, 4096), torch.bfloat16))
            run_case(group, findings, varied(seed, op, (t, 7168), torch.bfloat16))
    findings.settle()


@pytest.mark.worlds("main")
def test_many_rows(world: Any) -> None:
    world.run(many_rows, (2048, 4097, 8192) if not world.light else (2048,))


def every_option(rows: tuple[int, ...]) -> None:
    """The whole product of options at one size: none leans on another."""
    findings = Findings()
    with new_group() as group:
        seed = 0
        for t, residual, fp32_weight, bias in itertools.product(rows, (True, False), (True, False), (0.0, 1.0)):
            base = {"residual": residual, "fp32_weight": fp32_weight}
            for dtype in DTYPES:
                seed += 1
                norm = Case("allreduce_rmsnorm", (t, 768), dtype, seed, **base, options=Options(weight_bias=bias))
                run_case(group, findings, norm)
            for group_size, layout, emit in itertools.product((32, 64, 128, 256), ScaleLayout, (True, False)):
                seed += 1
                options = Options(1e-5, bias, group_size, emit, layout)
                dtype = DTYPES[seed % 3]
                # 1280 / 256: an incomplete word of packed scales
                run_case(
                    group,
                    findings,
                    Case("allreduce_rmsnorm_quant", (t, 1280), dtype, seed, **base, options=options),
                )
    findings.settle()


@pytest.mark.worlds("main")
def test_every_option(world: Any) -> None:
    world.run(every_option, (5,) if world.light else (1, 5, 66))


def odd_sizes() -> None:
    """The bare sum takes any number of elements; what the fused kernels do not take goes by another stage."""
    findings = Findings()
    with new_group() as group:
        for seed, count in enumerate([1, 2, 3, 7, 8, 9, 127, 1023, 1025, 2047, 4099, 65537, 1 << 20, (1 << 20) + 1]):
            for dtype in DTYPES:
                run_case(group, findings, Case("all_reduce", (count,), dtype, seed))
        for seed, hidden in enumerate([1, 7, 63, 65, 100, 1000, 1001, 4100, 16385, 16392, 20000, 32768]):
            for dtype in DTYPES:
                run_case(group, findings, varied(seed, "allreduce_rmsnorm", (3, hidden), dtype))
        for seed, hidden in enumerate([32, 64, 160, 16384 + 32, 32768]):
            case = Case("allreduce_rmsnorm_quant", (3, hidden), DTYPES[seed % 3], seed, options=Options(group_size=32))
            run_case(group, findings, case)
        for shape in [(0,), (0, 128), (3, 0, 128), (2, 3, 128), (1, 1, 1, 256)]:
            run_case(group, findings, Case("all_reduce", shape, torch.bfloat16))
            if shape != (0,):
                run_case(group, findings, varied(1, "allreduce_rmsnorm_quant", shape, torch.bfloat16))
    findings.settle()


@pytest.mark.worlds("main+shared")
def test_odd_sizes(world: Any) -> None:
    world.run(odd_sizes)


def every_kind_of_value(forced: str) -> None:
    """Any bit pattern on the wire, those that the protocol reserves among them."""
    findings = Findings()
    with algorithm(forced), new_group() as group:
        for seed, kind in enumerate(["bits", "words", "specials"]):
            for op, dtype, rows in itertools.product(OPS, DTYPES, (1, 40)):
                run_case(group, findings, varied(seed + 7 * rows, op, (rows, 1024), dtype, kind))
        for word in (-1, 0x7FFF7FFF, -0x80000000, 0x80008000 - (1 << 32), 0):
            x = torch.full((5, 512), word, dtype=torch.int32, device=group.device).view(torch.bfloat16)
            total = group.all_reduce(x)
            zero = word in (-0x80000000, 0x80008000 - (1 << 32), 0)
            complaint = "" if bool((total == 0).all() if zero else total.isnan()[x.isnan()].all()) else "wrong sum"
            findings.check(f"every word {word & 0xFFFFFFFF:#x}", complaint)
            if zero:
                findings.check(f"sign of {word & 0xFFFFFFFF:#x}", "-0" if bool(total.signbit().any()) else "")
    findings.settle(f"with {forced}")


@pytest.mark.worlds("main+shared")
@pytest.mark.parametrize("forced", ["one_shot", "two_shot"])
def test_every_kind_of_value(world: Any, forced: str) -> None:
    world.run(every_kind_of_value, forced)


def same_rows_everywhere(forced: str) -> None:
    """A row has the same bits alone, among few and among many, and on all ranks."""
    rows = 600
    findings = Findings()
    with algorithm(forced), new_group() as group:
        for dtype in DTYPES:
            many = Prepared(group, Case("allreduce_rmsnorm_quant", (rows, 2048), dtype, 3, residual=False))
            results = many.call(group)
            for t in results[:3]:
                same_on_all_ranks(t)
            for first, last in [(0, 1), (17, 18), (599, 600), (100, 117), (300, 500)]:
                some = group.allreduce_rmsnorm_quant(many.x[first:last], None, many.weight, 1e-6)
                for few, everything in zip(some[:3], results[:3], strict=True):
                    same = bits_but_nan(few) == bits_but_nan(everything[first:last])
                    findings.check(f"{dtype} rows {first} to {last}", "" if same else "other bits than among 600")
    findings.settle(f"with {forced}")


@pytest.mark.worlds("main+shared")
@pytest.mark.parametrize("forced", ["one_shot", "two_shot"])
def test_a_row_alone_and_among_many(world: Any, forced: str) -> None:
    world.run(same_rows_everywhere, forced)


def awkward_tensors() -> None:
    """Views that begin anywhere, inputs that are not contiguous, and outputs inside larger tensors."""
    findings = Findings()
    with new_group() as group:
        for dtype in DTYPES:
            base = Prepared(group, Case("all_reduce", (9, 1024), dtype, 5))
            total = base.want["out"]
            x = base.x
            for offset in (1, 2, 3, 5, 8):
                # the storage begins `offset` elements in: 2 to 32 bytes
                room = random_tensor(1, (x.numel() + 16,), dtype, "ordinary", group.device)
                view = room[offset : offset + x.numel()].view(x.shape)
                view.copy_(x)
                what = f"{dtype}, {offset} elements in"
                findings.check(f"sum, {what}", base.complaint(group.all_reduce(view)))
                out = room[offset : offset + x.numel()].view(x.shape)
                findings.check(f"in place, {what}", base.complaint(group.all_reduce(out, out=out)))
            for name, view in {
                "transposed": x.t().contiguous().t(),
                "every other column": torch.stack([x, x], -1).flatten(-2)[:, ::2],
                "columns of a wide tensor": torch.cat([x, x], -1)[:, 1024:],
                "a dimension of one": x.unsqueeze(1).expand(9, 1, 1024).squeeze(1),
            }.items():
                findings.check(f"{name} {dtype}", base.complaint(group.all_reduce(view)))
            norm = Prepared(
                group, Case("allreduce_rmsnorm_quant", (9, 1024), dtype, 6, options=Options(emit_bf16=True))
            )
            for name, weight in {
                "strided weight": torch.stack([norm.weight, norm.weight], -1).flatten()[::2],
                "misaligned weight": torch.cat([norm.weight[:1], norm.weight])[1:],
            }.items():
                results = group.allreduce_rmsnorm_quant(
                    norm.x.t().contiguous().t(), norm.residual.t().contiguous().t(), weight, 1e-6, emit_bf16=True
                )
                findings.check(f"{name} {dtype}", norm.complaint(results))
            room = torch.cat([norm.residual.flatten()[:3], norm.residual.flatten()])[3:].view(9, 1024)
            results = group.allreduce_rmsnorm_quant(norm.x, room, norm.weight, 1e-6, emit_bf16=True)
            findings.check(f"misaligned residual {dtype}", norm.complaint(results))
            for shape in ((5, 1000), (300, 1024), (0, 8), (7, 333)):
                case = Prepared(group, Case("all_reduce", shape, dtype, 8))
                room = torch.full((2 * shape[0] + 1, shape[1]), 7.0, dtype=dtype, device=group.device)
                out = room[1 : 1 + shape[0]]
                assert case.call(group, out) is out
                findings.check(f"out= {shape} {dtype}", case.complaint(out))
                beside = torch.cat([room[:1], room[1 + shape[0] :]])
                findings.check(f"beside out= {shape} {dtype}", "" if bool((beside == 7).all()) else "overwritten")
            findings.check(f"x {dtype}", "" if bool((x == base.x).all()) else "changed")
            assert total.device == device()
    findings.settle()


@pytest.mark.worlds("main+shared")
def test_awkward_tensors(world: Any) -> None:
    world.run(awkward_tensors)
