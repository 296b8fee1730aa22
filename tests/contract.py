"""Bodies that run on ranks, on CPU and on GPUs alike: the collectives give to the bit what the specification says."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import spec
import torch
import torch.distributed as dist
from cases import KINDS, make
from harness import device
from ranked import (
    bits,
    bits_but_nan,
    check_all_reduce,
    check_norm,
    check_quant,
    gathered,
    init_group,
    input_of,
    inputs_of_all,
    new_group,
    own_input,
    random_shape,
    same_on_all_ranks,
    works,
)

import fusedcomm
from fusedcomm import ScaleLayout, Settings

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
LAYOUTS = list(ScaleLayout)


# ---- shapes, dtypes, kinds of values ----


def sums_of_all_shapes() -> None:
    with new_group() as group:
        shapes = [(1, 1), (1, 127), (3, 129), (17, 1000), (5, 3, 33), (4097,), (0, 64), (0,), (3, 0), (1, 65537)]
        for seed, shape in enumerate(shapes):
            for dtype in DTYPES:
                check_all_reduce(group, seed, shape, dtype)
        assert group.stats()["all_reduce.custom"] == len(shapes) * len(DTYPES)


def norms_of_all_shapes() -> None:
    with new_group() as group:
        shapes = [(1, 1), (1, 7), (5, 1000), (16, 4096), (2, 3, 384), (0, 128), (129,), (1, 32768)]
        for seed, shape in enumerate(shapes):
            for dtype in DTYPES:
                check_norm(group, seed, shape, dtype)
        check_norm(group, 50, (3, 256), torch.bfloat16, residual=False)
        check_norm(group, 51, (3, 256), torch.bfloat16, weight_dtype=torch.float32, weight_bias=1.0, eps=0.0)
        check_norm(group, 52, (3, 256), torch.float16, fused_only=True)


def quants_of_all_shapes() -> None:
    with new_group() as group:
        seed = 0
        for shape in [(1, 128), (5, 1280), (16, 4096), (2, 3, 384), (0, 256), (256,)]:
            for layout in LAYOUTS:
                for dtype in DTYPES:
                    seed += 1
                    check_quant(group, seed, shape, dtype, scale_layout=layout, emit_bf16=bool(seed % 2))
        for group_size in (32, 64, 128, 256):
            check_quant(group, 90, (3, 1280), torch.bfloat16, group_size=group_size, residual=False, fused_only=True)
        check_quant(group, 91, (3, 1280), torch.bfloat16, weight_bias=1.0, emit_bf16=True)
        check_quant(group, 92, (1, 32768), torch.float32, scale_layout=ScaleLayout.UE8M0_PACKED)


def all_kinds_of_values() -> None:
    """Infinities, NaN, -0, subnormals and huge values, on all ranks at once and on one."""
    with new_group() as group:
        for seed, kind in enumerate(KINDS):
            for dtype in DTYPES:
                check_all_reduce(group, seed, (7, 333), dtype, kind)
                check_norm(group, seed, (7, 320), dtype, kind)
                check_quant(group, seed, (7, 320), dtype, kind, group_size=64, emit_bf16=True)
        for special in (float("nan"), float("inf"), -0.0):
            x = torch.full((2, 256), special if group.rank == group.world_size - 1 else -0.0, device=group.device)
            total = group.all_reduce(x)
            spec.assert_same(total, np.full((2, 256), special + 0.0, dtype=np.float32))


def negative_zeros() -> None:
    """From +0: -0 from every rank is +0, by every stage of our own."""
    for settings in (Settings(), Settings(disable_custom_ar=True, deterministic=True)):
        with new_group(settings=settings) as group:
            for dtype in DTYPES:
                total = group.all_reduce(torch.full((3, 100), -0.0, dtype=dtype, device=group.device))
                assert not torch.signbit(total).any()


# ---- the same bits: on all ranks, alone and among others, one-shot and two-shot, by every stage ----


def against_torch_distributed() -> None:
    """As the test above, with the inputs of the others carried by torch.distributed and not made again."""
    with new_group() as group:
        for seed, dtype in enumerate(DTYPES):
            x = own_input(group, seed, (9, 512), dtype)
            residual = make(seed + 9, (9, 512), dtype, "ordinary").to(group.device)  # the same everywhere: then all
            weight = make(seed + 10, (512,), dtype, "ordinary").to(group.device)  # results are the same
            parts = gathered(x)
            assert len({bits(part) for part in parts}) == group.world_size, "inputs must differ by rank"
            total = group.all_reduce(x)
            spec.assert_same(total, spec.rank_order_sum(parts))
            same_on_all_ranks(total)
            want = spec.add_norm(spec.rank_order_sum(parts), residual, weight, 1e-5, dtype)
            result = group.allreduce_rmsnorm_quant(x, residual, weight, 1e-5, emit_bf16=True)
            spec.assert_same(result.norm, want.norm)
            for t in (result.fp8, result.scale, result.residual, result.norm):
                same_on_all_ranks(t)


def one_row_alone_and_among_many() -> None:
    with new_group() as group:
        for dtype in DTYPES:
            x, residual = own_input(group, 1, (700, 512), dtype), own_input(group, 2, (700, 512), dtype)
            weight = make(3, (512,), dtype, "ordinary").to(group.device)
            many = group.allreduce_rmsnorm_quant(x, residual, weight, 1e-6, emit_bf16=True)
            total = group.all_reduce(x)
            for first, last in [(0, 1), (17, 18), (699, 700), (100, 117), (300, 500)]:
                some = group.allreduce_rmsnorm_quant(x[first:last], residual[first:last], weight, 1e-6, emit_bf16=True)
                for few, all_rows in zip(some[:4], many[:4], strict=True):
                    assert bits(few) == bits(all_rows[first:last]), f"rows {first} to {last}, {dtype}"
                assert bits(group.all_reduce(x[first:last])) == bits(total[first:last])
        algorithms = group.stats()
        assert algorithms["algorithm.one_shot"] > 0
        assert algorithms["algorithm.two_shot"] > 0


def around_the_crossing_point() -> None:
    with new_group() as group:
        crossing = group.explain("all_reduce", (1, 1), torch.float32)
        assert crossing.algorithm == "one_shot"
        # find the largest one-shot message from outside, by bisection
        low, high = 1, 1 << 24
        while high - low > 1:
            middle = (low + high) // 2
            small = group.explain("all_reduce", (1, middle), torch.float32).algorithm == "one_shot"
            low, high = (middle, high) if small else (low, middle)
        assert 1 < low < 1 << 23
        for seed, count in enumerate([low - 1, low, low + 1, low + 2, 3 * low]):
            before = group.stats()
            check_all_reduce(group, seed, (count,), torch.float32)
            check_all_reduce(group, seed, (2 * count,), torch.bfloat16)
            after = group.stats()
            algorithm = "algorithm.one_shot" if count <= low else "algorithm.two_shot"
            assert after[algorithm] - before[algorithm] == 2


def larger_than_the_slab() -> None:
    """A slab of 1 MiB: every input below takes several pieces, some of them ragged."""
    with new_group(settings=Settings(buffer_mb=1)) as group:
        check_all_reduce(group, 1, (3 * (1 << 18) + 5,), torch.float32)
        check_all_reduce(group, 2, (700, 1021), torch.bfloat16)
        check_norm(group, 3, (700, 1021), torch.bfloat16)
        check_norm(group, 4, (37, 32768), torch.float32)  # four rows of 128 KiB in a slot of 512 KiB
        check_quant(group, 5, (700, 1024), torch.float16, emit_bf16=True, scale_layout=ScaleLayout.COLUMN_MAJOR)
        check_quant(group, 6, (9, 32768), torch.float32)
        big = own_input(group, 7, (3, 300001), torch.float32)
        everything = group.all_gather(big, dim=0).cpu()
        for rank in range(group.world_size):
            assert torch.equal(everything[3 * rank : 3 * rank + 3], input_of(7, rank, (3, 300001), torch.float32))
        x = own_input(group, 8, (300000,), torch.float32)
        assert torch.equal(group.broadcast(x, src=1).cpu(), input_of(8, 1, (300000,), torch.float32))
        share = 120000
        x = own_input(group, 9, (group.world_size * share,), torch.float32)
        total = spec.rank_order_sum([input_of(9, r, x.shape, torch.float32) for r in range(group.world_size)])
        spec.assert_same(group.reduce_scatter(x), total[group.rank * share : (group.rank + 1) * share])


# how to force each stage of an operation
FORCED: dict[str, dict[str, Settings]] = {
    "all_reduce": {
        "custom": Settings(),
        "process_group": Settings(disable_custom_ar=True, deterministic=True),
    },
    "allreduce_rmsnorm": {
        "fused_norm": Settings(),
        "custom": Settings(disable_fused_ar_norm=True),
        "process_group": Settings(disable=True, deterministic=True),
    },
    "allreduce_rmsnorm_quant": {
        "fused": Settings(),
        "fused_norm": Settings(disable_fused_ar_quant=True),
        "custom": Settings(disable_fused_ar_quant=True, disable_fused_ar_norm=True),
        "process_group": Settings(disable=True, deterministic=True),
    },
}


def every_op_by_every_stage() -> None:
    checks: dict[str, Any] = {
        "all_reduce": check_all_reduce,
        "allreduce_rmsnorm": check_norm,
        "allreduce_rmsnorm_quant": check_quant,
    }
    for op, stages in FORCED.items():
        results: dict[str, list[bytes]] = {}
        for stage, settings in stages.items():
            with new_group(settings=settings) as group:
                assert group.explain(op, (5, 1280), torch.bfloat16).stage == stage
                found = []
                for seed, dtype in enumerate(DTYPES):
                    for kind in ("ordinary", "specials"):
                        for rows in (0, 1, 5, 70):
                            result = checks[op](group, seed, (rows, 1280), dtype, kind)
                            tensors = (result,) if isinstance(result, torch.Tensor) else result[:4]
                            found += [bits_but_nan(t) for t in tensors]
                assert {name for name in group.stats() if name.startswith(op)} == {f"{op}.{stage}"}
                results[stage] = found
        first = next(iter(results.values()))
        assert all(found == first for found in results.values()), op


def process_group_within_reason() -> None:
    """Without DETERMINISTIC stage 4 adds in Gloo's order: near, and the same on all ranks."""
    with new_group(settings=Settings(disable=True)) as group:
        for dtype, roundoff in ((torch.bfloat16, 2.0**-8), (torch.float16, 2.0**-11), (torch.float32, 2.0**-24)):
            x = own_input(group, 1, (9, 512), dtype)
            parts = gathered(x)
            total = group.all_reduce(x)
            weight = torch.ones(512, dtype=dtype, device=group.device)
            exact = torch.stack([part.double() for part in parts]).sum(0)
            magnitude = torch.stack([part.double().abs() for part in parts]).sum(0)
            # each of W - 1 additions rounds to T once; a partial sum is at most the sum of magnitudes
            assert ((total.cpu().double() - exact).abs() <= (group.world_size - 1) * roundoff * magnitude).all()
            same_on_all_ranks(total)
            result = group.allreduce_rmsnorm_quant(x, None, weight, 1e-6, emit_bf16=True)
            assert bits(result.residual) == bits(total)
            assert group.fused_allreduce_rmsnorm(x, None, weight, 1e-6) is None


def fused_or_none() -> None:
    """None exactly where the fused kernel is not eligible, decided before anything is sent: the group goes on."""
    x, w = torch.ones(2, 256, device=device()), torch.ones(256, device=device())
    for settings, norm, quant in [
        (Settings(), True, True),
        (Settings(disable_fused_ar_norm=True), False, True),
        (Settings(disable_fused_ar_quant=True), True, False),
        (Settings(disable_custom_ar=True), True, True),
        (Settings(backend="torch"), False, False),
        (Settings(disable=True), False, False),
    ]:
        with new_group(settings=settings) as group:
            assert (group.fused_allreduce_rmsnorm(x, x, w, 1e-6) is not None) == norm
            assert (group.fused_allreduce_rmsnorm_quant_per_group(x, x, w, 1e-6) is not None) == quant
            assert group.allreduce_rmsnorm(x, x, w, 1e-6) is not None
            group.barrier()


# ---- many calls ----


def a_thousand_calls(seed: int, calls: int) -> None:
    """Operations, shapes, dtypes and two groups in random order; every result is checked."""
    rng = np.random.default_rng(seed)  # the same on every rank
    with new_group() as first, new_group(settings=Settings(buffer_mb=1)) as second:
        for call in range(calls):
            group = (first, second)[int(rng.random() < 0.3)]
            dtype = DTYPES[int(rng.integers(0, 3))]
            kind = ["ordinary", "ordinary", "finite", "specials"][int(rng.integers(0, 4))]
            most = 40000 if rng.random() < 0.05 else 600
            match int(rng.integers(0, 8)):
                case 0 | 1:
                    check_all_reduce(group, call, random_shape(rng, 1, most), dtype, kind)
                case 2 | 3:
                    shape = random_shape(rng, 1, min(most, 8192))
                    check_norm(group, call, shape, dtype, kind, residual=rng.random() < 0.7)
                case 4 | 5:
                    group_size = int(rng.choice([32, 64, 128, 256]))
                    check_quant(
                        group,
                        call,
                        random_shape(rng, group_size, min(max(most, 512), 4096)),
                        dtype,
                        kind,
                        residual=rng.random() < 0.7,
                        group_size=group_size,
                        emit_bf16=rng.random() < 0.5,
                        scale_layout=LAYOUTS[int(rng.integers(0, 3))],
                    )
                case 6:
                    x = own_input(group, call, random_shape(rng), dtype)
                    everything = group.all_gather(x).cpu()
                    expected = torch.cat([input_of(call, r, x.shape, dtype) for r in range(group.world_size)], -1)
                    assert torch.equal(everything, expected)
                case 7:
                    src = int(rng.integers(0, group.world_size))
                    shape = random_shape(rng)
                    x = group.broadcast(own_input(group, call, shape, dtype), src)
                    assert torch.equal(x.cpu(), input_of(call, src, shape, dtype))
                    group.barrier()


# ---- forms of calling ----


def out_forms() -> None:
    with new_group() as group:
        for dtype in DTYPES:
            for shape in ((5, 1000), (300, 1024), (0, 8)):
                out = torch.full(shape, torch.nan, dtype=dtype, device=group.device)
                got = check_all_reduce(group, 1, shape, dtype, call=lambda x, out=out: group.all_reduce(x, out=out))
                assert got is out
                x = own_input(group, 1, shape, dtype)
                assert group.all_reduce(x, out=x) is x  # in place
                assert torch.equal(x, out)
                # inside a larger tensor
                spread = torch.full((2 * shape[0], shape[1]), 7.0, dtype=dtype, device=group.device)
                group.all_reduce(own_input(group, 1, shape, dtype), out=spread[: shape[0]])
                assert torch.equal(spread[: shape[0]], out)
                assert (spread[shape[0] :] == 7.0).all()


def poisoned(result: Any) -> Any:
    """Tensors of the strides of a result, of bytes that no result has."""

    def fill(t: Any) -> Any:
        if not isinstance(t, torch.Tensor):
            return t
        elements = 1 + sum((n - 1) * stride for n, stride in zip(t.shape, t.stride(), strict=True)) if t.numel() else 0
        memory = torch.full((max(elements, 1) * t.element_size(),), 0xA5, dtype=torch.uint8, device=t.device)
        return memory.view(t.dtype).as_strided(t.shape, t.stride())

    return type(result)(*(fill(t) for t in result))


def check_fused_out(call: Any, other_x: torch.Tensor, x: torch.Tensor, residual: torch.Tensor | None) -> None:
    """``call(x, residual, out)`` gives into out the bits that it gives without, again and again, in place too."""
    want, other = call(x, residual, None), call(other_x, residual, None)
    out = poisoned(want)
    for given, expected in ((x, want), (other_x, other), (x, want)):
        assert call(given, residual, out) is out
        assert [bits(t) for t in out if isinstance(t, torch.Tensor)] == [
            bits(t) for t in expected if isinstance(t, torch.Tensor)
        ]
    places: list[dict[str, bool]] = [{"norm_is_x": True}, {"residual_is_x": True}]
    if residual is not None:
        places += [{"residual_stays": True}, {"residual_stays": True, "norm_is_x": True}]
        places += [{"norm_is_residual": True, "residual_is_x": True}, {"norm_is_residual": True}]
    for place in places:
        if want.norm is None and any(name.startswith("norm") for name in place):
            continue
        own_x, own_residual = x.clone(), None if residual is None else residual.clone()
        out = poisoned(want)
        if "norm_is_x" in place:
            out = out._replace(norm=own_x)
        if "norm_is_residual" in place:
            out = out._replace(norm=own_residual)
        if "residual_is_x" in place:
            out = out._replace(residual=own_x)
        if "residual_stays" in place:
            out = out._replace(residual=own_residual)
        got = call(own_x, own_residual, out)
        for name, t in want._asdict().items():
            if isinstance(t, torch.Tensor):
                assert getattr(got, name) is getattr(out, name)
                assert bits(getattr(got, name)) == bits(t), f"{name} with {place}"


def fused_out_forms() -> None:
    """By every stage, with residuals and sums that differ by rank."""
    shapes = ((5, 1280), (1, 256), (2, 3, 384), (256,), (130, 1024), (0, 256))
    for stage, settings in FORCED["allreduce_rmsnorm"].items():
        with new_group(settings=settings) as group:
            for seed, shape in enumerate(shapes):
                dtype = DTYPES[seed % 3]
                x, other = own_input(group, seed, shape, dtype), own_input(group, seed + 50, shape, dtype)
                residual = own_input(group, seed + 100, shape, dtype)
                weight = make(seed, shape[-1:], dtype, "ordinary").to(group.device)
                for own_residual in (residual, None):

                    def norm(x: Any, r: Any, out: Any, weight: Any = weight, group: Any = group) -> Any:
                        return group.allreduce_rmsnorm(x, r, weight, 1e-6, weight_bias=1.0, out=out)

                    check_fused_out(norm, other, x, own_residual)
            if group.world_size > 1:
                assert {name for name in group.stats() if name.startswith("allr")} == {f"allreduce_rmsnorm.{stage}"}
    for stage, settings in FORCED["allreduce_rmsnorm_quant"].items():
        with new_group(settings=settings) as group:
            for seed, shape in enumerate(shapes):
                dtype, layout, emit = DTYPES[seed % 3], LAYOUTS[seed // 2 % 3], bool(seed % 2)
                x, other = own_input(group, seed, shape, dtype), own_input(group, seed + 50, shape, dtype)
                residual = own_input(group, seed + 100, shape, dtype)
                weight = make(seed, shape[-1:], dtype, "ordinary").to(group.device)
                for own_layout, own_emit in ((layout, emit), (ScaleLayout.UE8M0_PACKED, not emit)):
                    options = {"group_size": 64, "scale_layout": own_layout, "emit_bf16": own_emit}

                    def quant(x: Any, r: Any, out: Any, w: Any = weight, g: Any = group, o: Any = options) -> Any:
                        return g.allreduce_rmsnorm_quant(x, r, w, 1e-6, **o, out=out)

                    check_fused_out(quant, other, x, residual)
            if group.world_size > 1:
                names = {name for name in group.stats() if name.startswith("allr")}
                assert names == {f"allreduce_rmsnorm_quant.{stage}"}


def fused_out_or_none() -> None:
    """Where the fused kernel is not eligible, out is left alone; the functions of the package pass it on."""
    with new_group(settings=Settings(disable=True)) as group:
        x, w = own_input(group, 1, (4, 256), torch.bfloat16), torch.ones(256, device=group.device)
        full = group.allreduce_rmsnorm_quant(x, x, w, 1e-6)
        pair = group.allreduce_rmsnorm(x, x, w, 1e-6)
        for call, result in (
            (group.fused_allreduce_rmsnorm, pair),
            (group.fused_allreduce_rmsnorm_quant_per_group, full),
        ):
            out = poisoned(result)
            assert call(x, x, w, 1e-6, out=out) is None
            assert all(bits(t).strip(b"\xa5") == b"" for t in out if isinstance(t, torch.Tensor))
        for function, result in (
            (fusedcomm.allreduce_rmsnorm, pair),
            (fusedcomm.allreduce_rmsnorm_quant, full),
        ):
            out = poisoned(result)
            assert function(x, x, w, 1e-6, out=out, group=group) is out
            assert bits(out.residual) == bits(result.residual)
    with new_group() as group:
        for call, result in (
            (group.fused_allreduce_rmsnorm, group.allreduce_rmsnorm(x, x, w, 1e-6)),
            (group.fused_allreduce_rmsnorm_quant_per_group, group.allreduce_rmsnorm_quant(x, x, w, 1e-6)),
        ):
            out = poisoned(result)
            assert call(x, x, w, 1e-6, out=out) is out
            assert bits(out.residual) == bits(result.residual)


def strided_inputs() -> None:
    """Made contiguous; the result is contiguous and the input is left alone."""
    for settings in (Settings(), Settings(disable=True, deterministic=True)):
        with new_group(settings=settings) as group:
            base = [t.to(group.device) for t in inputs_of_all(group, 1, (64, 48), torch.float32)]
            views = [
                lambda t: t.t(),
                lambda t: t[::2],
                lambda t: t[:, 16:],
                lambda t: t[3].expand(5, 48),
                lambda t: t.view(8, 8, 48).transpose(0, 1),
            ]
            for view in views:
                parts = [view(t) for t in base]
                x = parts[group.rank]
                spec.assert_same(group.all_reduce(x), spec.rank_order_sum([p.contiguous() for p in parts]))
                weight = torch.ones(2 * x.shape[-1], device=group.device)[::2]
                want = spec.add_norm(spec.rank_order_sum(parts), x.contiguous(), weight, 1e-6, torch.float32)
                got = group.allreduce_rmsnorm(x, x, weight, 1e-6)
                spec.assert_same(got.norm, want.norm)
                spec.assert_same(got.residual, want.residual)
                assert torch.equal(base[group.rank].cpu(), input_of(1, group.rank, (64, 48), torch.float32))


def module_functions() -> None:
    group = init_group()
    assert fusedcomm.get_tp_group() is group
    x, w = own_input(group, 1, (4, 256), torch.bfloat16), torch.ones(256, dtype=torch.bfloat16, device=group.device)
    want = group.allreduce_rmsnorm_quant(x, x, w, 1e-6, emit_bf16=True)
    assert bits(fusedcomm.tensor_model_parallel_all_reduce(x)) == bits(group.all_reduce(x))
    for pair in (
        fusedcomm.allreduce_rmsnorm(x, x, w, 1e-6),
        fusedcomm.allreduce_rmsnorm(x, x, w, 1e-6, group=group),
        fusedcomm.tensor_model_parallel_fused_allreduce_rmsnorm(x, x, w, 1e-6),
    ):
        assert (bits(pair.norm), bits(pair.residual)) == (bits(want.norm), bits(want.residual))
        norm, residual = pair  # engines unpack it
        assert norm is pair.norm
        assert residual is pair.residual
    for function in (
        fusedcomm.allreduce_rmsnorm_quant,
        fusedcomm.tensor_model_parallel_fused_allreduce_rmsnorm_quant_per_group,
    ):
        got = function(x, x, w, 1e-6, emit_bf16=True)
        assert [bits(t) for t in got[:4]] == [bits(t) for t in want[:4]]
        assert function(x, x, w, 1e-6).norm is None
        packed = function(x, x, w, 1e-6, group_size=64, scale_layout=ScaleLayout.UE8M0_PACKED, weight_bias=1.0)
        assert packed.scale.dtype is torch.int32
    with new_group(settings=Settings(disable=True)) as other:
        fusedcomm.allreduce_rmsnorm_quant(x, x, w, 1e-6, group=other)
        assert other.stats() == {"allreduce_rmsnorm_quant.process_group": 1}


def counters() -> None:
    x, w = torch.ones(2, 256, device=device()), torch.ones(256, device=device())
    with new_group() as group:
        for _ in range(3):
            group.all_reduce(x)
        group.allreduce_rmsnorm(x, x, w, 1e-6)
        group.fused_allreduce_rmsnorm_quant_per_group(x, x, w, 1e-6)
        expected = {"all_reduce.custom": 3, "allreduce_rmsnorm.fused_norm": 1, "allreduce_rmsnorm_quant.fused": 1}
        stats = group.stats()
        assert {name: n for name, n in stats.items() if not name.startswith("algorithm.")} == expected
        assert stats["algorithm.one_shot"] + stats["algorithm.two_shot"] == 5
        stats["all_reduce.custom"] = 0  # a copy
        assert group.stats()["all_reduce.custom"] == 3
        group.reset_stats()
        assert not [n for name, n in group.stats().items() if n and not name.startswith("algorithm.")]


def explanations() -> None:
    with new_group(settings=Settings(disable_fused_ar_quant=True)) as group:
        plan = group.explain("allreduce_rmsnorm_quant", (16, 4096), torch.bfloat16, group_size=128)
        assert plan.stage == "fused_norm"
        assert "FUSEDCOMM_DISABLE_FUSED_AR_QUANT=1" in str(plan)
        texts = [None] * group.world_size
        dist.all_gather_object(texts, str(plan))
        assert len(set(texts)) == 1
        for bad in ({"op": "sum"}, {"shape": ()}, {"unknown": 1}):
            arguments = {"op": "all_reduce", "shape": (1, 8), "dtype": torch.float32, **bad}
            with pytest.raises(ValueError, match=r"expected .*got"):
                group.explain(**arguments)
        works(group)
