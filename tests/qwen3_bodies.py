"""Decoding with Qwen3 on ranks, on CPU and on GPUs alike, and what transformers makes of the same checkpoint."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from ranked import init_group, new_group

from fusedcomm import GroupCoordinator, Settings
from fusedcomm.models import Qwen3ForCausalLM

NEW_TOKENS = 64
PROMPTS = torch.tensor([list(b"A block is its own communicator."), list(b"Same bits on every rank, always.")])


def decode(path: Path, dtype: torch.dtype | None, enable_fusion: bool) -> tuple[torch.Tensor, torch.Tensor, Any]:
    """Logits of the prompts, their greedy continuation, and what the collectives did; the same on all ranks."""
    return decoded(init_group(), path, dtype, enable_fusion, NEW_TOKENS)


def decoded(
    group: GroupCoordinator, path: Path, dtype: torch.dtype | None, enable_fusion: bool, new_tokens: int
) -> tuple[torch.Tensor, torch.Tensor, Any]:
    """What decode returns, on a group."""
    model = Qwen3ForCausalLM.from_pretrained(path, group, dtype, enable_fusion=enable_fusion)
    prompts = PROMPTS.to(group.device)
    group.reset_stats()
    logits, stats = model(prompts), group.stats()
    tokens = model.generate(prompts, new_tokens)
    for x in (logits, tokens):
        assert all(torch.equal(x, other) for other in group.all_gather(x.unsqueeze(0), dim=0))
    return logits.cpu(), tokens.cpu(), stats


STAGES = {
    "fused": Settings(),
    "fused_norm": Settings(disable_fused_ar_quant=True),
    "custom": Settings(disable_fused_ar_quant=True, disable_fused_ar_norm=True),
    "process_group": Settings(disable=True, deterministic=True),
}


def decode_by_every_stage(path: Path, new_tokens: int) -> torch.Tensor:
    """Logits and tokens have the same bits by every stage; returns the tokens."""
    first: tuple[torch.Tensor, torch.Tensor, Any] | None = None
    for stage, settings in STAGES.items():
        with new_group(settings=settings) as group:
            found = decoded(group, path, None, True, new_tokens)
        ran = {name.partition(".")[2] for name in found[2] if not name.startswith("algorithm.")}
        assert stage in ran or (stage == "fused" and ran == {"fused_norm"}), f"{stage} was asked for, {ran} ran"
        first = first or found
        for name, got, expected in zip(("logits", "tokens"), found[:2], first[:2], strict=True):
            assert torch.equal(got, expected), f"{name} differ between the stages fused and {stage}"
    assert first is not None
    return first[1]


@dataclass(frozen=True)
class Reference:
    """transformers' logits in fp32 and bf16, and its greedy continuation in fp32."""

    path: Path
    fp32: torch.Tensor
    bf16: torch.Tensor
    tokens: torch.Tensor


def reference(path: Path) -> Reference:
    import transformers

    logits = {}
    for dtype in (torch.float32, torch.bfloat16):
        model = transformers.Qwen3ForCausalLM.from_pretrained(path, dtype=dtype).eval()
        with torch.no_grad():
            logits[dtype] = model(PROMPTS).logits.float()
        if dtype is torch.float32:
            tokens = model.generate(PROMPTS, max_new_tokens=NEW_TOKENS, do_sample=False)
    return Reference(path, logits[torch.float32], logits[torch.bfloat16], tokens)
