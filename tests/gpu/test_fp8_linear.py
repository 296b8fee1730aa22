"""The block-scaled FP8 linear on Hopper: what lies behind the last row changes nothing, and nothing is copied."""

from __future__ import annotations

import pytest
import torch

from fusedcomm import ScaleLayout
from fusedcomm.cli.bench.gpu.kernels import count_kernels
from fusedcomm.layers import BlockFP8Linear, RMSNorm, fp8_matmul_gpu
from fusedcomm.layers.activation import Fp8Activation

pytestmark = pytest.mark.needs_cuda

K, N = 512, 256
TOKENS = (1, 2, 3, 5, 7)


@pytest.fixture(scope="module")
def device() -> torch.device:
    device = torch.device("cuda", 0)
    if not fp8_matmul_gpu.has_block_scaled_mm(device):
        pytest.skip("no block-scaled product: needs Hopper and CUDA 12.9")
    return device


@pytest.fixture(scope="module")
def linear(device: torch.device) -> BlockFP8Linear:
    torch.manual_seed(0)
    linear = BlockFP8Linear(K, N, device=device)
    linear.weight.copy_(torch.randn(N, K).clamp(-448, 448).to(torch.float8_e4m3fn))
    linear.weight_scale.copy_(torch.rand(linear.weight_scale.shape) + 0.5)
    return linear


@pytest.mark.parametrize("tokens", TOKENS)
def test_rows_behind_the_last_change_nothing(device: torch.device, linear: BlockFP8Linear, tokens: int) -> None:
    """NaN in the values and in the scales of the padding, against zeros there."""
    padded = (tokens + 3) // 4 * 4
    torch.manual_seed(tokens)
    values = torch.randn(tokens, K).to(torch.float8_e4m3fn).view(torch.uint8).to(device)
    scales = torch.rand(tokens, K // 128).to(device)
    results = []
    for code, scale in ((0x7F, float("nan")), (0x00, 0.0)):
        fp8 = torch.full((padded, K), code, dtype=torch.uint8, device=device)
        columns = torch.full((K // 128, padded), scale, device=device).t()
        fp8[:tokens], columns[:tokens] = values, scales
        rows = Fp8Activation(fp8.view(torch.float8_e4m3fn)[:tokens], columns[:tokens], ScaleLayout.COLUMN_MAJOR)
        results.append(linear(rows))
    assert results[0].isfinite().all()
    assert torch.equal(*results)


@pytest.mark.parametrize("tokens", [*TOKENS, 16])
def test_a_norm_and_a_product_copy_nothing(device: torch.device, linear: BlockFP8Linear, tokens: int) -> None:
    x = torch.randn(tokens, K, device=device, dtype=torch.bfloat16)
    norm = RMSNorm(K, dtype=torch.bfloat16, device=device)

    def step() -> torch.Tensor:
        y: torch.Tensor = linear(norm.forward_quant_per_group(x, x).hidden_states) + linear(x)
        return y

    want = step()
    got = torch.empty(0)

    def run() -> None:
        nonlocal got
        got = step()

    launched = count_kernels(run, torch.cuda.synchronize)
    assert launched, "the profiler saw no kernel"
    assert [name for name in launched if "Memcpy" in name or "copy_kernel" in name] == []
    assert torch.equal(got, want)
