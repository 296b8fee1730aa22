"""The random checkpoints: reproducible, and readable by the libraries that read real ones."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fusedcomm.models import make_tiny_qwen3
from fusedcomm.models.byte_tokenizer import END_OF_TEXT, END_OF_TEXT_ID
from fusedcomm.models.checkpoint import SINGLE
from fusedcomm.models.tiny import TinyShape, quantize_blocks

SHAPE = TinyShape(hidden_size=128, intermediate_size=256, num_layers=1)


def test_the_seed_decides(tmp_path: Path) -> None:
    paths = [make_tiny_qwen3(tmp_path / str(i), seed=seed, shape=SHAPE) for i, seed in enumerate([3, 3, 4])]
    files = [(path / SINGLE).read_bytes() for path in paths]
    assert files[0] == files[1]
    assert files[0] != files[2]


def test_fp8_stores_the_same_weights(tmp_path: Path) -> None:
    plain = load_file(make_tiny_qwen3(tmp_path / "plain", shape=SHAPE, dtype=torch.float32) / SINGLE)
    fp8 = load_file(make_tiny_qwen3(tmp_path / "fp8", "fp8", shape=SHAPE) / SINGLE)
    name = "model.layers.0.mlp.down_proj.weight"
    scale = fp8[f"{name}_scale_inv"].repeat_interleave(128, 0).repeat_interleave(128, 1)
    # e4m3 keeps 4 significant bits (half an ulp is 2^-4 relative); below 2^-6 of its range values are subnormal.
    torch.testing.assert_close(fp8[name].float() * scale, plain[name], rtol=2**-4, atol=float(scale.max()) * 2**-10)


@pytest.mark.parametrize("shape", [(128, 128), (200, 300), (1, 1)])
def test_blocks_have_their_own_scale(shape: tuple[int, int]) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    fp8, scale = quantize_blocks(weight)
    assert fp8.shape == shape
    assert scale.shape == (-(-shape[0] // 128), -(-shape[1] // 128))
    for i in range(scale.shape[0]):
        for j in range(scale.shape[1]):
            block = weight[i * 128 : (i + 1) * 128, j * 128 : (j + 1) * 128]
            assert scale[i, j] == block.abs().max() / 448


def test_the_tokenizer_is_bytes(tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    path = make_tiny_qwen3(tmp_path, shape=SHAPE)
    tokenizer = tokenizers.Tokenizer.from_file(str(path / "tokenizer.json"))
    text = "naïve 日本\n\t\x00 <end>  "
    assert tokenizer.encode(text).ids == list(text.encode())
    assert tokenizer.decode(list(text.encode())) == text
    assert tokenizer.token_to_id(END_OF_TEXT) == END_OF_TEXT_ID
    assert tokenizer.encode(f"a{END_OF_TEXT}").ids == [97, END_OF_TEXT_ID]


def test_transformers_reads_the_tokenizer(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(make_tiny_qwen3(tmp_path, shape=SHAPE))
    assert tokenizer("fused").input_ids == list(b"fused")
    assert tokenizer.eos_token_id == END_OF_TEXT_ID


def test_bad_arguments_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="quantization: expected None or 'fp8', got 'int4'"):
        make_tiny_qwen3(tmp_path, "int4")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="num_files: expected at least 1, got 0"):
        make_tiny_qwen3(tmp_path, num_files=0)
