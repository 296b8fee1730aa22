"""Checkpoints that are not as they should be, on a group of one."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from fusedcomm import GroupCoordinator
from fusedcomm.models import CheckpointError, Qwen3ForCausalLM, make_tiny_qwen3
from fusedcomm.models.checkpoint import INDEX, SINGLE
from fusedcomm.models.tiny import TinyShape

SHAPE = TinyShape(hidden_size=128, intermediate_size=128, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=128)


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("checkpoints")
    return {
        "bf16": make_tiny_qwen3(root / "bf16", shape=SHAPE),
        "fp8": make_tiny_qwen3(root / "fp8", "fp8", shape=SHAPE),
        "files": make_tiny_qwen3(root / "files", shape=SHAPE, num_files=3),
    }


@pytest.fixture
def copy_of(originals: dict[str, Path], tmp_path: Path) -> Callable[[str], Path]:
    return lambda name: Path(shutil.copytree(originals[name], tmp_path / name))


@pytest.fixture
def group() -> Iterator[GroupCoordinator]:
    with GroupCoordinator() as group:
        yield group


def edit_tensors(path: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(path / SINGLE)
    edit(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path / SINGLE)


def edit_config(path: Path, **changes: object) -> None:
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, **changes}))


def test_one_file_or_many_hold_the_same_model(originals: dict[str, Path], group: GroupCoordinator) -> None:
    one = Qwen3ForCausalLM.from_pretrained(originals["bf16"], group)
    many = Qwen3ForCausalLM.from_pretrained(originals["files"], group)
    for a, b in zip(one.parameters(), many.parameters(), strict=True):
        assert torch.equal(a, b)


def test_all_missing_tensors_are_listed(copy_of: Callable[[str], Path], group: GroupCoordinator) -> None:
    path = copy_of("bf16")
    missing = ["lm_head.weight", "model.layers.1.mlp.up_proj.weight"]
    edit_tensors(path, lambda tensors: [tensors.pop(name) for name in missing])
    with pytest.raises(CheckpointError, match=r"2 tensors are missing: lm_head\.weight, model\.layers\.1\.mlp\.up"):
        Qwen3ForCausalLM.from_pretrained(path, group)


def test_many_missing_tensors_are_counted(copy_of: Callable[[str], Path], group: GroupCoordinator) -> None:
    path = copy_of("bf16")
    edit_config(path, num_hidden_layers=5)
    with pytest.raises(CheckpointError, match=r"33 tensors are missing: model\.layers\.2\..* and 13 more"):
        Qwen3ForCausalLM.from_pretrained(path, group)


def test_a_scale_that_is_missing_counts(copy_of: Callable[[str], Path], group: GroupCoordinator) -> None:
    path = copy_of("fp8")
    edit_tensors(path, lambda tensors: tensors.pop("model.layers.0.self_attn.k_proj.weight_scale_inv"))
    with pytest.raises(CheckpointError, match=r"missing: model\.layers\.0\.self_attn\.k_proj\.weight_scale_inv"):
        Qwen3ForCausalLM.from_pretrained(path, group)


def test_a_wrong_shape_is_named(copy_of: Callable[[str], Path], group: GroupCoordinator) -> None:
    path = copy_of("bf16")
    edit_config(path, intermediate_size=256)
    with pytest.raises(CheckpointError, match=r"gate_proj\.weight: expected shape \[256, 128\], got \[128, 128\]"):
        Qwen3ForCausalLM.from_pretrained(path, group)


def test_quantised_weights_need_their_config(copy_of: Callable[[str], Path], group: GroupCoordinator) -> None:
    path = copy_of("fp8")
    edit_config(path, quantization_config=None)
    with pytest.raises(CheckpointError, match=r"q_proj\.weight: expected bf16, fp16 or fp32, got torch\.float8_e4m3fn"):
        Qwen3ForCausalLM.from_pretrained(path, group)


def test_a_quantisation_config_needs_quantised_weights(copy_of: Callable[[str], Path], group: GroupCoordinator) -> None:
    path = copy_of("fp8")
    name = "model.layers.0.mlp.down_proj.weight"
    edit_tensors(path, lambda tensors: tensors.update({name: tensors[name].bfloat16()}))
    with pytest.raises(CheckpointError, match=r"down_proj\.weight: expected float8_e4m3fn .* got torch\.bfloat16"):
        Qwen3ForCausalLM.from_pretrained(path, group)


def test_modules_left_unquantised_load(copy_of: Callable[[str], Path], group: GroupCoordinator) -> None:
    path = copy_of("fp8")
    quantised = Qwen3ForCausalLM.from_pretrained(path, group)
    down = "model.layers.0.mlp.down_proj"

    def dequantise(tensors: dict[str, torch.Tensor]) -> None:
        scale = tensors.pop(f"{down}.weight_scale_inv")
        tensors[f"{down}.weight"] = (tensors[f"{down}.weight"].float() * scale).bfloat16()

    edit_tensors(path, dequantise)
    config = json.loads((path / "config.json").read_text())["quantization_config"]
    edit_config(path, quantization_config={**config, "modules_to_not_convert": ["lm_head", down]})
    mixed = Qwen3ForCausalLM.from_pretrained(path, group)
    ids = torch.arange(40).unsqueeze(0)
    # One linear without the quantiser's noise (e4m3 keeps 4 bits): a few percent of the logits' size of about 1.
    difference = (mixed(ids).float() - quantised(ids).float()).std()
    assert 0 < difference < 0.2

    edit_config(path, quantization_config={**config, "modules_to_not_convert": ["model.layers.1.self_attn.q_proj"]})
    with pytest.raises(CheckpointError, match=r"modules_to_not_convert: expected all or none of .*q_proj.*k_proj"):
        Qwen3ForCausalLM.from_pretrained(path, group)


def test_files_that_cannot_be_read_are_named(copy_of: Callable[[str], Path], group: GroupCoordinator) -> None:
    path = copy_of("bf16")
    (path / SINGLE).write_bytes((path / SINGLE).read_bytes()[:1000])
    with pytest.raises(CheckpointError, match="path: expected readable safetensors files"):
        Qwen3ForCausalLM.from_pretrained(path, group)
    (path / SINGLE).unlink()
    with pytest.raises(CheckpointError, match="path: expected readable safetensors files"):
        Qwen3ForCausalLM.from_pretrained(path, group)

    path = copy_of("files")
    next(path.glob("model-00002*")).unlink()
    with pytest.raises(CheckpointError, match="model-00002-of-00003"):
        Qwen3ForCausalLM.from_pretrained(path, group)
    (path / INDEX).write_text("{}")
    with pytest.raises(CheckpointError, match="expected JSON with a weight_map"):
        Qwen3ForCausalLM.from_pretrained(path, group)


def test_progress_counts_to_the_end(originals: dict[str, Path], group: GroupCoordinator) -> None:
    seen: list[tuple[int, int]] = []
    Qwen3ForCausalLM.from_pretrained(
        originals["fp8"], group, on_progress=lambda done, total: seen.append((done, total))
    )
    total = len(load_file(originals["fp8"] / SINGLE))
    assert seen == [(i + 1, total) for i in range(total)]
