"""torch.compile takes a layer whole."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fusedcomm.layers import BlockFP8Linear, GemmaRMSNorm, RMSNorm


class Block(nn.Module):
    """Norm, FP8 product, add and norm."""

    def __init__(self) -> None:
        super().__init__()
        self.first = RMSNorm(256, dtype=torch.bfloat16)
        self.linear = BlockFP8Linear(256, 256)
        self.second = GemmaRMSNorm(256, dtype=torch.bfloat16)
        self.linear.weight.copy_(torch.randn(256, 256).to(torch.float8_e4m3fn))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        hidden = self.linear(self.first(x))
        norm, residual = self.second(hidden, x)
        return norm, residual


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_layer_compiles_without_graph_breaks(backend: str) -> None:
    torch.manual_seed(0)
    block, x = Block(), torch.randn(5, 256, dtype=torch.bfloat16)
    compiled = torch.compile(block, fullgraph=True, backend=backend)
    for got, expected in zip(compiled(x), block(x), strict=True):
        assert torch.equal(got, expected)
