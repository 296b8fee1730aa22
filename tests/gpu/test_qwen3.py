"""Qwen3 on GPUs against transformers' own Qwen3 on the same random checkpoints, as tests/e2e/test_qwen3.py on CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from qwen3_bodies import NEW_TOKENS, PROMPTS, Reference, decode, decode_by_every_stage, reference

from fusedcomm.models import make_tiny_qwen3
from fusedcomm.models.tiny import TinyShape

pytest.importorskip("transformers", reason="needs transformers: pip install fusedcomm[test]")
SMALL = {"hidden_size": 256, "intermediate_size": 512, "num_layers": 3, "head_dim": 64}


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> Reference:
    """transformers' logits and tokens of a checkpoint, from the CPU."""
    return reference(make_tiny_qwen3(tmp_path_factory.mktemp("qwen3"), shape=TinyShape(**SMALL)))


@pytest.mark.worlds("divides")
def test_fp32_matches_transformers(world: Any, expected: Reference) -> None:
    for logits, tokens, stats in world.run(decode, expected.path, torch.float32, True):
        # Only the order of fp32 sums differs; tests/e2e/test_qwen3.py says what that comes to.
        torch.testing.assert_close(logits, expected.fp32, rtol=0, atol=1e-4)
        assert torch.equal(tokens, expected.tokens)
        assert tokens.shape[1] == PROMPTS.shape[1] + NEW_TOKENS
        assert {name for name in stats if not name.startswith("algorithm")} == {"allreduce_rmsnorm.fused_norm"}


@pytest.mark.worlds("divides")
def test_bf16_is_as_close_to_fp32_as_transformers_is(world: Any, expected: Reference) -> None:
    logits, _, _ = world.run(decode, expected.path, torch.bfloat16, True)[0]
    theirs = (expected.bf16 - expected.fp32).square().mean().sqrt()
    ours = (logits.float() - expected.fp32).square().mean().sqrt()
    # each rank rounds its addend to bf16 before the sum, where one product rounds once
    assert ours < 1.5 * theirs


@pytest.mark.worlds("divides")
@pytest.mark.parametrize("quantization", [None, "fp8"])
def test_every_stage_gives_the_same_tokens(world: Any, tmp_path: Path, quantization: Any) -> None:
    path = make_tiny_qwen3(tmp_path, quantization, shape=TinyShape(num_layers=2))
    tokens = world.run(decode_by_every_stage, path, world.few(32, 8))
    assert all(torch.equal(tokens[0], other) for other in tokens)


@pytest.mark.worlds("divides")
def test_fusion_changes_no_bit_and_merges_launches(world: Any, tmp_path: Path) -> None:
    path = make_tiny_qwen3(tmp_path, "fp8", shape=TinyShape(num_layers=2))
    fused = world.run(decode, path, None, True)[0]
    separate = world.run(decode, path, None, False)[0]
    assert torch.equal(fused[0], separate[0])
    assert torch.equal(fused[1], separate[1])
    stats = {key: n for key, n in fused[2].items() if not key.startswith("algorithm")}
    assert stats == {"allreduce_rmsnorm_quant.fused": 4, "allreduce_rmsnorm.fused_norm": 1}
    assert separate[2]["all_reduce.custom"] == 5
