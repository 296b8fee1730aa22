"""What the model needs to know of a Hugging Face ``config.json``, checked."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fusedcomm.layers.sharding import FP8_BLOCK
from fusedcomm.models.errors import CheckpointError

ARCHITECTURE = "Qwen3ForCausalLM"
_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


@dataclass(frozen=True)
class BlockFP8Config:
    """``quantization_config`` of a block-FP8 checkpoint; modules at or below the names are not quantised."""

    unquantized_modules: tuple[str, ...] = ()

    def covers(self, module: str) -> bool:
        return not any(module == name or module.startswith(f"{name}.") for name in self.unquantized_modules)


@dataclass(frozen=True)
class Qwen3Config:
    """The shape and constants of a Qwen3 model."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    max_position_embeddings: int
    tie_word_embeddings: bool
    attention_bias: bool
    dtype: torch.dtype
    eos_token_ids: tuple[int, ...]
    pad_token_id: int | None
    fp8: BlockFP8Config | None

    @classmethod
    def from_pretrained(cls, path: str | Path) -> Qwen3Config:
        """Reads ``config.json`` (and the end tokens of ``generation_config.json``) in the directory ``path``.

        Raises:
            CheckpointError: no such file, not JSON, or a model that this class cannot describe.
        """
        raw = _read_json(Path(path) / "config.json")
        generation = Path(path) / "generation_config.json"
        if generation.is_file():
            eos = _read_json(generation).get("eos_token_id")
            raw = raw if eos is None else {**raw, "eos_token_id": eos}
        return cls.from_dict(raw)

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> Qwen3Config:
        """Parses the contents of a ``config.json``, of transformers 4 or 5.

        Raises:
            CheckpointError: a value is missing, ill-typed, or one that this model does not implement.
        """
        architectures = raw.get("architectures") or [ARCHITECTURE if raw.get("model_type") == "qwen3" else None]
        if ARCHITECTURE not in architectures:
            raise _error("architectures", f"[{ARCHITECTURE!r}]", architectures)
        _refuse_unsupported(raw)
        num_heads = _positive_int(raw, "num_attention_heads")
        num_kv_heads = _positive_int(raw, "num_key_value_heads", default=num_heads)
        if num_heads % num_kv_heads:
            raise _error("num_key_value_heads", f"a divisor of num_attention_heads ({num_heads})", num_kv_heads)
        head_dim = _positive_int(raw, "head_dim", default=128)
        if head_dim % 2:
            raise _error("head_dim", "an even number", head_dim)
        hidden_size = _positive_int(raw, "hidden_size")
        fp8 = _parse_quantization(raw.get("quantization_config"))
        if fp8 is not None and hidden_size % FP8_BLOCK:
            raise _error("hidden_size", f"a multiple of {FP8_BLOCK} with block-FP8 weights", hidden_size)
        eos = raw.get("eos_token_id")
        return cls(
            vocab_size=_positive_int(raw, "vocab_size"),
            hidden_size=hidden_size,
            intermediate_size=_positive_int(raw, "intermediate_size"),
            num_layers=_positive_int(raw, "num_hidden_layers"),
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            rms_norm_eps=_positive_float(raw, "rms_norm_eps", default=1e-6),
            rope_theta=_rope_theta(raw),
            max_position_embeddings=_positive_int(raw, "max_position_embeddings", default=32768),
            tie_word_embeddings=bool(raw.get("tie_word_embeddings", False)),
            attention_bias=bool(raw.get("attention_bias", False)),
            dtype=_dtype(raw),
            eos_token_ids=tuple(eos) if isinstance(eos, list) else () if eos is None else (int(eos),),
            pad_token_id=raw.get("pad_token_id"),
            fp8=fp8,
        )

    def check_world_size(self, world_size: int) -> None:
        """Refuses a number of ranks that cannot divide this model.

        Raises:
            ValueError: names the size, what would do, and the ranks.
        """
        divided = {"num_attention_heads": self.num_heads, "intermediate_size": self.intermediate_size}
        for key, size in divided.items():
            if size % world_size:
                raise ValueError(f"{key}: expected a multiple of the group's {world_size} ranks, got {size}")
        if self.num_kv_heads % world_size and world_size % self.num_kv_heads:
            raise ValueError(
                f"num_key_value_heads: expected a multiple or a divisor of the group's {world_size} ranks, "
                f"got {self.num_kv_heads}"
            )
        if self.fp8 is None or world_size == 1:
            return
        rows = {
            "num_attention_heads * head_dim": self.num_heads * self.head_dim // world_size,
            "num_key_value_heads * head_dim": max(self.num_kv_heads // world_size, 1) * self.head_dim,
            "intermediate_size": self.intermediate_size // world_size,
        }
        for key, size in rows.items():
            if size % FP8_BLOCK:
                raise ValueError(
                    f"{key}: expected a multiple of {FP8_BLOCK} on each of {world_size} ranks for block-FP8 weights, "
                    f"got {size}"
                )


def _error(key: str, expected: str, got: object) -> CheckpointError:
    return CheckpointError(f"config.json: {key}: expected {expected}, got {got!r}")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"path: expected a checkpoint directory with {path.name}, got {error}") from error
    except ValueError as error:
        raise CheckpointError(f"{path}: expected JSON, got {error}") from error
    if not isinstance(raw, dict):
        raise CheckpointError(f"{path}: expected a JSON object, got {type(raw).__name__}")
    return raw


def _positive_int(raw: Mapping[str, Any], key: str, default: int | None = None) -> int:
    value = raw.get(key)
    value = default if value is None else value
    if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
        raise _error(key, "a positive integer", value)
    return value


def _positive_float(raw: Mapping[str, Any], key: str, default: float) -> float:
    value = raw.get(key, default)
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < float("inf"):
        raise _error(key, "a positive number", value)
    return float(value)


def _dtype(raw: Mapping[str, Any]) -> torch.dtype:
    name = raw.get("dtype") or raw.get("torch_dtype") or "bfloat16"
    if name not in _DTYPES:
        raise _error("dtype", " or ".join(_DTYPES), name)
    return _DTYPES[name]


def _rope_theta(raw: Mapping[str, Any]) -> float:
    # transformers 4 writes rope_theta and rope_scaling, transformers 5 rope_parameters with both.
    parameters = {**(raw.get("rope_scaling") or {}), **(raw.get("rope_parameters") or {})}
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    if kind != "default":
        raise _error("rope_type", "'default' (no scaling of positions)", kind)
    if parameters.get("partial_rotary_factor", raw.get("partial_rotary_factor", 1.0)) != 1.0:
        raise _error("partial_rotary_factor", "1.0", parameters.get("partial_rotary_factor"))
    return _positive_float(parameters if "rope_theta" in parameters else raw, "rope_theta", default=10000.0)


def _refuse_unsupported(raw: Mapping[str, Any]) -> None:
    if raw.get("hidden_act", "silu") != "silu":
        raise _error("hidden_act", "'silu'", raw["hidden_act"])
    sliding = [kind for kind in raw.get("layer_types") or [] if kind != "full_attention"]
    if raw.get("use_sliding_window") or sliding:
        raise _error("use_sliding_window", "full attention in every layer", sliding or True)


def _parse_quantization(raw: Mapping[str, Any] | None) -> BlockFP8Config | None:
    if raw is None:
        return None
    required = {
        "quant_method": "fp8",
        "weight_block_size": [FP8_BLOCK, FP8_BLOCK],
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
    }
    for key, value in required.items():
        got = raw.get(key, value if key in ("activation_scheme", "fmt") else None)
        if got != value:
            raise _error(f"quantization_config.{key}", repr(value), got)
    return BlockFP8Config(tuple(raw.get("modules_to_not_convert") or ()))
