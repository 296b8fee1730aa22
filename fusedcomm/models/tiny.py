"""Small random Qwen3 checkpoints, for demonstrations and tests."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file

from fusedcomm.layers.sharding import FP8_BLOCK
from fusedcomm.models.byte_tokenizer import END_OF_TEXT_ID, PRINTABLE, VOCAB_SIZE, write_byte_tokenizer
from fusedcomm.models.checkpoint import INDEX, SINGLE
from fusedcomm.models.config import ARCHITECTURE

Quantization = Literal["fp8"]


@dataclass(frozen=True)
class TinyShape:
    """Sizes that 1, 2, 4 and 8 ranks can divide, in FP8 blocks of 128 too; 4 and 8 share key/value heads."""

    hidden_size: int = 512
    intermediate_size: int = 1024
    num_layers: int = 4
    num_heads: int = 8
    num_kv_heads: int = 2
    head_dim: int = 128
    tie_word_embeddings: bool = False
    max_position_embeddings: int = 4096


def make_tiny_qwen3(
    path: str | Path,
    quantization: Quantization | None = None,
    seed: int = 0,
    *,
    shape: TinyShape | None = None,
    dtype: torch.dtype = torch.bfloat16,
    num_files: int = 1,
) -> Path:
    """Writes a random Qwen3 checkpoint with a byte-level tokenizer into the directory ``path``; returns it.

    The weights depend on ``seed`` and ``shape`` alone; ``quantization="fp8"`` stores the same ones rounded to
    block-FP8. ``num_files > 1`` divides the tensors among files with an index.

    Raises:
        ValueError: quantization or num_files out of its range.
    """
    if quantization not in (None, "fp8"):
        raise ValueError(f"quantization: expected None or 'fp8', got {quantization!r}")
    if num_files < 1:
        raise ValueError(f"num_files: expected at least 1, got {num_files}")
    shape = shape or TinyShape()
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, torch.Tensor] = {}
    generator = torch.Generator().manual_seed(seed)
    for name, weight in _random_weights(shape, generator):
        if quantization == "fp8" and name.endswith("_proj.weight"):
            tensors[name], tensors[f"{name}_scale_inv"] = quantize_blocks(weight)
        else:
            tensors[name] = weight.to(dtype)
    _save(path, tensors, num_files)
    config = json.dumps(_config(shape, dtype, quantization), indent=2)
    (path / "config.json").write_text(config + "\n", encoding="utf-8")
    write_byte_tokenizer(path)
    return path


def quantize_blocks(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """``weight [N, K]`` as e4m3 and fp32 scales ``[ceil(N / 128), ceil(K / 128)]``: value = fp8 · scale."""
    rows, columns = weight.shape
    padded = torch.nn.functional.pad(weight.float(), (0, -columns % FP8_BLOCK, 0, -rows % FP8_BLOCK))
    blocks = padded.view(-1, FP8_BLOCK, padded.shape[1] // FP8_BLOCK, FP8_BLOCK)  # [N/128, 128, K/128, 128]
    scale = blocks.abs().amax((1, 3)).clamp(min=1e-10) / torch.finfo(torch.float8_e4m3fn).max
    fp8 = (blocks / scale[:, None, :, None]).to(torch.float8_e4m3fn)
    return fp8.view(padded.shape)[:rows, :columns].contiguous(), scale


def _random_weights(shape: TinyShape, generator: torch.Generator) -> Iterator[tuple[str, torch.Tensor]]:
    """Weights whose products keep unit variance, so that each sublayer counts in the residual stream."""

    def matrix(rows: int, columns: int) -> torch.Tensor:
        return torch.randn(rows, columns, generator=generator).mul_(columns**-0.5)

    hidden, inner = shape.hidden_size, shape.intermediate_size
    q_size, kv_size = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
    # Rows of bytes that do not print are short, so their logits are small: a demonstration shows text.
    length = torch.full((VOCAB_SIZE, 1), 0.05)
    length[list(PRINTABLE)] = 1.0
    # A tied table is short, or the embedding outweighs the layers and every token predicts itself.
    scale = 2 * hidden**-0.5 if shape.tie_word_embeddings else 1.0
    yield "model.embed_tokens.weight", torch.randn(VOCAB_SIZE, hidden, generator=generator) * length * scale
    for index in range(shape.num_layers):
        name = f"model.layers.{index}"
        yield f"{name}.input_layernorm.weight", 1 + 0.1 * torch.randn(hidden, generator=generator)
        yield f"{name}.self_attn.q_proj.weight", matrix(q_size, hidden)
        yield f"{name}.self_attn.k_proj.weight", matrix(kv_size, hidden)
        yield f"{name}.self_attn.v_proj.weight", matrix(kv_size, hidden)
        # Queries of twice the length make attention choose; with 1 it averages, and the text soon repeats.
        yield f"{name}.self_attn.q_norm.weight", 2 + 0.1 * torch.randn(shape.head_dim, generator=generator)
        yield f"{name}.self_attn.k_norm.weight", 1 + 0.1 * torch.randn(shape.head_dim, generator=generator)
        yield f"{name}.self_attn.o_proj.weight", 2 * matrix(hidden, q_size)
        yield f"{name}.post_attention_layernorm.weight", 1 + 0.1 * torch.randn(hidden, generator=generator)
        yield f"{name}.mlp.gate_proj.weight", matrix(inner, hidden)
        yield f"{name}.mlp.up_proj.weight", matrix(inner, hidden)
        yield f"{name}.mlp.down_proj.weight", 2 * matrix(hidden, inner)
    yield "model.norm.weight", 1 + 0.1 * torch.randn(hidden, generator=generator)
    if not shape.tie_word_embeddings:
        yield (
            "lm_head.weight",
            torch.randn(VOCAB_SIZE, hidden, generator=generator) * length * 2 * hidden**-0.5,
        )


def _save(path: Path, tensors: dict[str, torch.Tensor], num_files: int) -> None:
    for old in path.glob("model*.safetensors*"):
        old.unlink()
    if num_files == 1:
        save_file(tensors, path / SINGLE, metadata={"format": "pt"})
        return
    files = [f"model-{i + 1:05}-of-{num_files:05}.safetensors" for i in range(num_files)]
    weight_map = {name: files[i * num_files // len(tensors)] for i, name in enumerate(tensors)}
    for file in files:
        part = {name: tensors[name] for name, where in weight_map.items() if where == file}
        save_file(part, path / file, metadata={"format": "pt"})
    size = sum(t.numel() * t.element_size() for t in tensors.values())
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    (path / INDEX).write_text(json.dumps(index, indent=2), encoding="utf-8")


def _config(shape: TinyShape, dtype: torch.dtype, quantization: Quantization | None) -> dict[str, Any]:
    config: dict[str, Any] = {
        "architectures": [ARCHITECTURE],
        "model_type": "qwen3",
        "vocab_size": VOCAB_SIZE,
        "hidden_size": shape.hidden_size,
        "intermediate_size": shape.intermediate_size,
        "num_hidden_layers": shape.num_layers,
        "num_attention_heads": shape.num_heads,
        "num_key_value_heads": shape.num_kv_heads,
        "head_dim": shape.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "max_position_embeddings": shape.max_position_embeddings,
        "tie_word_embeddings": shape.tie_word_embeddings,
        "attention_bias": False,
        "torch_dtype": str(dtype).removeprefix("torch."),
        "eos_token_id": END_OF_TEXT_ID,
    }
    if quantization == "fp8":
        config["quantization_config"] = {
            "quant_method": "fp8",
            "fmt": "e4m3",
            "weight_block_size": [FP8_BLOCK, FP8_BLOCK],
            "activation_scheme": "dynamic",
            "modules_to_not_convert": ["lm_head"],
        }
    return config
