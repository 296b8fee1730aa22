"""config.json: what is read, and what is refused with which words."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from fusedcomm.models import BlockFP8Config, CheckpointError, Qwen3Config

BASE: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"],
    "vocab_size": 1000,
    "hidden_size": 512,
    "intermediate_size": 1024,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e6,
    "max_position_embeddings": 4096,
    "torch_dtype": "float16",
}
FP8 = {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic", "fmt": "e4m3"}


def parse(**changes: Any) -> Qwen3Config:
    return Qwen3Config.from_dict({**BASE, **changes})


def test_both_generations_of_transformers_are_read() -> None:
    old = parse(eos_token_id=[3, 4], tie_word_embeddings=True)
    assert old.rope_theta == 1e6
    assert old.dtype is torch.float16
    assert old.eos_token_ids == (3, 4)
    assert old.tie_word_embeddings
    new = {key: value for key, value in BASE.items() if key not in ("rope_theta", "torch_dtype")}
    new |= {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}, "dtype": "float32", "eos_token_id": 7}
    parsed = Qwen3Config.from_dict(new)
    assert parsed.rope_theta == 5e5
    assert parsed.dtype is torch.float32
    assert parsed.eos_token_ids == (7,)
    assert parsed.fp8 is None


def test_what_transformers_writes_is_read(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    theirs = transformers.Qwen3Config(
        vocab_size=320,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    theirs.architectures = ["Qwen3ForCausalLM"]
    theirs.rope_parameters = {"rope_type": "default", "rope_theta": 12345.0}
    theirs.save_pretrained(tmp_path)
    ours = Qwen3Config.from_pretrained(tmp_path)
    assert ours.rope_theta == 12345.0
    assert (ours.vocab_size, ours.hidden_size, ours.intermediate_size) == (320, 64, 96)
    assert (ours.num_layers, ours.num_heads, ours.num_kv_heads, ours.head_dim) == (3, 4, 2, theirs.head_dim)


def test_the_end_tokens_of_generation_config_win(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**BASE, "eos_token_id": 1}))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 2]}))
    assert Qwen3Config.from_pretrained(tmp_path).eos_token_ids == (1, 2)


def test_quantisation_covers_all_but_what_is_named() -> None:
    fp8 = parse(quantization_config={**FP8, "modules_to_not_convert": ["lm_head", "model.layers.1"]}).fp8
    assert fp8 == BlockFP8Config(("lm_head", "model.layers.1"))
    assert fp8.covers("model.layers.0.mlp.up_proj")
    assert fp8.covers("model.layers.10.mlp.up_proj")
    assert not fp8.covers("model.layers.1.mlp.up_proj")
    assert not fp8.covers("lm_head")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["LlamaForCausalLM"]}, r"architectures: expected \['Qwen3ForCausalLM'\], got \['Llama"),
        ({"architectures": None}, "architectures: expected"),
        ({"hidden_size": None}, "hidden_size: expected a positive integer, got None"),
        ({"hidden_size": "512"}, "hidden_size: expected a positive integer, got '512'"),
        ({"num_hidden_layers": 0}, "num_hidden_layers: expected a positive integer, got 0"),
        ({"num_key_value_heads": 3}, r"num_key_value_heads: expected a divisor of num_attention_heads \(8\), got 3"),
        ({"head_dim": 65}, "head_dim: expected an even number, got 65"),
        ({"rms_norm_eps": -1.0}, "rms_norm_eps: expected a positive number"),
        ({"hidden_act": "gelu"}, "hidden_act: expected 'silu', got 'gelu'"),
        ({"use_sliding_window": True}, "use_sliding_window: expected full attention"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "use_sliding_window: expected full attention"),
        ({"torch_dtype": "int8"}, "dtype: expected bfloat16 or float16 or float32, got 'int8'"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope_type: expected 'default'.*got 'yarn'"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_type: expected 'default'.*got 'linear'"),
        ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4}}, "got 'llama3'"),
        ({"quantization_config": {"quant_method": "awq"}}, "quant_method: expected 'fp8', got 'awq'"),
        ({"quantization_config": {**FP8, "weight_block_size": [64, 64]}}, r"expected \[128, 128\], got \[64, 64\]"),
        ({"quantization_config": {**FP8, "weight_block_size": None}}, r"weight_block_size: .*got None"),
        ({"quantization_config": {**FP8, "activation_scheme": "static"}}, "expected 'dynamic', got 'static'"),
        ({"quantization_config": {**FP8, "fmt": "e5m2"}}, "fmt: expected 'e4m3', got 'e5m2'"),
        ({"quantization_config": FP8, "hidden_size": 500}, "hidden_size: expected a multiple of 128"),
    ],
)
def test_what_is_not_implemented_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        parse(**changes)


def test_an_unreadable_config_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"path: expected a checkpoint directory with config\.json"):
        Qwen3Config.from_pretrained(tmp_path / "nowhere")
    (tmp_path / "config.json").write_text("{not json")
    with pytest.raises(CheckpointError, match="expected JSON"):
        Qwen3Config.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(CheckpointError, match="expected a JSON object, got list"):
        Qwen3Config.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("changes", "world_size", "message"),
    [
        ({}, 3, "num_attention_heads: expected a multiple of the group's 3 ranks, got 8"),
        ({"intermediate_size": 1020}, 8, "intermediate_size: expected a multiple of the group's 8 ranks, got 1020"),
        (
            {"num_attention_heads": 12, "num_key_value_heads": 4, "intermediate_size": 1200},
            6,
            "num_key_value_heads: expected a multiple or a divisor of the group's 6 ranks, got 4",
        ),
        (
            {"quantization_config": FP8, "intermediate_size": 512},
            8,
            "intermediate_size: expected a multiple of 128 on each of 8 ranks for block-FP8 weights, got 64",
        ),
        ({"quantization_config": FP8, "head_dim": 64}, 8, r"num_attention_heads \* head_dim: .* got 64"),
        (
            {"quantization_config": FP8, "head_dim": 64, "num_attention_heads": 16},
            8,
            r"num_key_value_heads \* head_dim: .* got 64",
        ),
    ],
)
def test_ranks_that_cannot_divide_the_model_are_refused(changes: dict[str, Any], world_size: int, message: str) -> None:
    config = parse(**changes)
    config.check_world_size(1)
    with pytest.raises(ValueError, match=message):
        config.check_world_size(world_size)
