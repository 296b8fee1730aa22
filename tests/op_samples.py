"""The native operators as torch sees them: arguments for each, and the checks, for tensors of any device."""

from __future__ import annotations

from typing import Any

import torch
from cases import FP8_DTYPES, make

from fusedcomm import ScaleLayout, ops, platform

LAYOUTS = list(ScaleLayout)
FLAGS = {
    ScaleLayout.ROW_MAJOR: (False, False),
    ScaleLayout.COLUMN_MAJOR: (True, False),
    ScaleLayout.UE8M0_PACKED: (False, True),
}


def samples(dtype: torch.dtype, device: torch.device | str = "cpu") -> list[tuple[str, tuple[Any, ...]]]:
    """(operator, arguments) for every operator without a communicator."""
    x, residual = make(1, (3, 256), dtype, "ordinary").to(device), make(2, (3, 256), dtype, "ordinary").to(device)
    weight, out, other = make(3, (256,), dtype, "ordinary").to(device), torch.empty_like(x), torch.empty_like(x)
    found: list[tuple[str, tuple[Any, ...]]] = [
        ("rms_norm", (x, weight, 1e-6, 0.0)),
        ("rms_norm_out", (x, weight, 1e-6, 0.0, out)),
        ("fused_add_rms_norm", (x, residual, weight, 1e-6, 1.0)),
        ("fused_add_rms_norm", (x, None, weight.float(), 1e-6, 1.0)),
        ("fused_add_rms_norm_out", (x, residual, weight, 1e-6, 1.0, out, other)),
        ("fused_add_rms_norm_out", (x, None, weight, 1e-6, 1.0, out, other)),
    ]
    for layout in LAYOUTS:
        # a GPU has the one format that its instructions have
        formats = FP8_DTYPES if x.device.type == "cpu" else (platform.fp8_dtype(x.device),)
        for fp8 in formats:
            fnuz = fp8 is torch.float8_e4m3fnuz
            quant = ops.per_group_quant_fp8(x, scale_layout=layout, fp8_dtype=fp8)
            found += [
                ("per_group_quant_fp8", (x, 128, *FLAGS[layout], fnuz)),
                ("per_group_quant_fp8_out", (x, 64 if quant.scale.shape[-1] == 4 else 128, quant.fp8, quant.scale)),
                ("fused_add_rms_norm_quant", (x, residual, weight, 1e-6, 0.0, 128, *FLAGS[layout], fnuz)),
                ("fused_add_rms_norm_quant", (x, None, weight, 1e-6, 0.0, 128, *FLAGS[layout], fnuz)),
                (
                    "fused_add_rms_norm_quant_out",
                    (x, residual, weight, 1e-6, 0.0, 128, quant.fp8, quant.scale, out, other),
                ),
                ("fused_add_rms_norm_quant_out", (x, None, weight, 1e-6, 0.0, 128, quant.fp8, quant.scale, out, None)),
            ]
    return found


def check_registration(dtype: torch.dtype, device: torch.device | str = "cpu") -> None:
    """Registration, fakes, tracing with dynamic shapes; and the schema, which torch cannot check on FP8 tensors."""
    without_schema = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    for name, arguments in samples(dtype, device):
        utils = without_schema if "quant" in name else ("test_schema", *without_schema)
        torch.library.opcheck(getattr(torch.ops.fusedcomm, name).default, arguments, test_utils=utils)


def check_mutation(dtype: torch.dtype, device: torch.device | str = "cpu") -> None:
    """What opcheck's test_schema does, for FP8 tensors too."""
    for name, arguments in samples(dtype, device):
        operator = getattr(torch.ops.fusedcomm, name).default
        given = [t.clone() if isinstance(t, torch.Tensor) else t for t in arguments]
        results = operator(*given)
        results = [] if results is None else [results] if isinstance(results, torch.Tensor) else list(results)
        for declared, before, after in zip(operator._schema.arguments, arguments, given, strict=True):
            if not isinstance(before, torch.Tensor):
                continue
            assert after.data_ptr() not in [t.data_ptr() for t in results], f"{name}: a result aliases {declared.name}"
            written = declared.alias_info is not None and declared.alias_info.is_write
            assert written or equal(before, after), f"{name}: {declared.name} is mutated"


def block(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, layout: ScaleLayout) -> tuple[Any, ...]:
    """All local ops with what surrounds them in a model."""
    norm, residual = ops.fused_add_rms_norm(x * 2, residual, weight, 1e-6)
    again = ops.rms_norm(norm + 1, weight, 1e-6, weight_bias=1.0)
    quant = ops.per_group_quant_fp8(again, scale_layout=layout)
    full = ops.fused_add_rms_norm_quant(again, residual, weight, 1e-6, emit_bf16=True, scale_layout=layout)
    return norm, residual, again, quant.fp8, quant.scale, *full[:4]


def equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[a.element_size()]
    return a.stride() == b.stride() and torch.equal(a.contiguous().view(bits), b.contiguous().view(bits))
