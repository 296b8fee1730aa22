"""Every check of the local ops: the message names the argument, what was expected and what came."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fusedcomm import ScaleLayout, ops

X = torch.ones(4, 256, dtype=torch.bfloat16)
W = torch.ones(256, dtype=torch.bfloat16)
FUNCTIONS = {
    "rms_norm": lambda x=X, residual=None, weight=W, eps=1e-6, **o: ops.rms_norm(x, weight, eps, **o),
    "fused_add_rms_norm": lambda x=X, residual=X, weight=W, eps=1e-6, **o: ops.fused_add_rms_norm(
        x, residual, weight, eps, **o
    ),
    "fused_add_rms_norm_quant": lambda x=X, residual=X, weight=W, eps=1e-6, **o: ops.fused_add_rms_norm_quant(
        x, residual, weight, eps, **o
    ),
    "per_group_quant_fp8": lambda x=X, **o: ops.per_group_quant_fp8(x, **o),
}
NORMS = ["rms_norm", "fused_add_rms_norm", "fused_add_rms_norm_quant"]
ADDS = NORMS[1:]
QUANTS = ["fused_add_rms_norm_quant", "per_group_quant_fp8"]
ALL = list(FUNCTIONS)

CASES: list[tuple[list[str], dict[str, Any], str]] = [
    (ALL, {"x": X.double()}, r"x: expected dtype bfloat16, float16 or float32, got torch\.float64"),
    (ALL, {"x": X.long()}, r"x: expected dtype bfloat16, float16 or float32, got torch\.int64"),
    (ALL, {"x": torch.tensor(1.0)}, r"x: expected at least one dimension, got a scalar"),
    (ALL, {"x": [1.0, 2.0]}, r"x: expected a torch\.Tensor, got list"),
    (NORMS, {"x": torch.ones(3, 0)}, r"x: expected a last dimension between 1 and 32768, got 0"),
    (NORMS, {"x": torch.ones(1, 32769)}, r"x: expected a last dimension between 1 and 32768, got 32769"),
    (ADDS, {"residual": X[:3]}, r"residual: expected shape \(4, 256\) like x, got \(3, 256\)"),
    (ADDS, {"residual": X.view(2, 2, 256)}, r"residual: expected shape \(4, 256\) like x, got \(2, 2, 256\)"),
    (ADDS, {"residual": X.float()}, r"residual: expected dtype torch\.bfloat16 like x, got torch\.float32"),
    (ADDS, {"residual": X.to("meta")}, r"residual: expected device cpu like x, got meta"),
    (ADDS, {"residual": 0}, r"residual: expected a torch\.Tensor, got int"),
    (NORMS, {"weight": W[:255]}, r"weight: expected shape \(256,\), got \(255,\)"),
    (NORMS, {"weight": W.view(1, 256)}, r"weight: expected shape \(256,\), got \(1, 256\)"),
    (NORMS, {"weight": W.half()}, r"weight: expected dtype torch\.bfloat16 or torch\.float32, got torch\.float16"),
    (NORMS, {"weight": W.to("meta")}, r"weight: expected device cpu, got meta"),
    (NORMS, {"weight": None}, r"weight: expected shape \(256,\), got NoneType"),
    (NORMS, {"eps": -1e-6}, r"eps: expected a finite number >= 0, got -1e-06"),
    (NORMS, {"eps": float("nan")}, r"eps: expected a finite number >= 0, got nan"),
    (NORMS, {"eps": float("inf")}, r"eps: expected a finite number >= 0, got inf"),
    (NORMS, {"weight_bias": float("nan")}, r"weight_bias: expected a finite number, got nan"),
    (QUANTS, {"group_size": 100}, r"group_size: expected one of \(32, 64, 128, 256\), got 100"),
    (QUANTS, {"group_size": 0}, r"group_size: expected one of \(32, 64, 128, 256\), got 0"),
    (QUANTS, {"group_size": -32}, r"group_size: expected one of \(32, 64, 128, 256\), got -32"),
    (QUANTS, {"fp8_dtype": torch.float8_e5m2}, r"fp8_dtype: expected one of .*, got torch\.float8_e5m2"),
    (QUANTS, {"scale_layout": "column_major"}, r"scale_layout: expected a ScaleLayout, got 'column_major'"),
    (QUANTS, {"scale_layout": None}, r"scale_layout: expected a ScaleLayout, got None"),
]


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [(name, arguments, message) for names, arguments, message in CASES for name in names],
)
def test_refused_with_argument_expected_and_got(name: str, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FUNCTIONS[name](**arguments)


@pytest.mark.parametrize("name", QUANTS)
@pytest.mark.parametrize("hidden", [255, 192, 320])
def test_hidden_size_not_divisible_by_the_group(name: str, hidden: int) -> None:
    x = torch.ones(2, hidden)
    arguments = {"x": x, "residual": x, "weight": torch.ones(hidden)} if name != "per_group_quant_fp8" else {"x": x}
    with pytest.raises(ValueError, match=rf"group_size: expected a divisor of H = {hidden}, got 128"):
        FUNCTIONS[name](**arguments)


@pytest.mark.parametrize("layout", list(ScaleLayout))
def test_rows_without_a_group(layout: ScaleLayout) -> None:
    with pytest.raises(ValueError, match=r"x: expected a last dimension of at least 128, got 0"):
        ops.per_group_quant_fp8(torch.ones(3, 0), scale_layout=layout)
