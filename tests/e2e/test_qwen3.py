"""Qwen3 over real ranks against transformers' own Qwen3 on the same random checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from harness import RankPool
from qwen3_bodies import NEW_TOKENS, PROMPTS, Reference, decode, decode_by_every_stage, reference
from safetensors import safe_open

import fusedcomm
from fusedcomm.models import CheckpointError, Qwen3ForCausalLM, make_tiny_qwen3
from fusedcomm.models.checkpoint import SINGLE
from fusedcomm.models.tiny import TinyShape
from fusedcomm.ops import reference as reference_ops

transformers = pytest.importorskip("transformers", reason="needs transformers: pip install fusedcomm[test]")

WORLD_SIZES = [1, 2, 8]
SMALL = {"hidden_size": 256, "intermediate_size": 512, "num_layers": 3, "head_dim": 64}


# ---- on the ranks ----


def sampled(path: Path) -> torch.Tensor:
    """A sampled continuation; every rank seeds its generator differently."""
    group = fusedcomm.init_distributed()
    model = Qwen3ForCausalLM.from_pretrained(path, group, torch.float32)
    generator = torch.Generator().manual_seed(group.rank)
    return model.generate(PROMPTS, NEW_TOKENS, 0.9, 0.95, generator)


def weight_elements(path: Path) -> tuple[int, int]:
    """Elements of the parameters on this rank, and bytes read from the checkpoint's files meanwhile."""
    group = fusedcomm.init_distributed()
    read = 0

    class Counting:
        def __init__(self, file: Any) -> None:
            self.file = file

        def keys(self) -> Any:
            return self.file.keys()

        def get_slice(self, name: str) -> Any:
            stored = self.file.get_slice(name)

            class Slice:
                get_shape = stored.get_shape

                def __getitem__(self, index: Any) -> torch.Tensor:
                    nonlocal read
                    values: torch.Tensor = stored[index]
                    read += values.numel()
                    return values

            return Slice()

    from fusedcomm.models import checkpoint

    class Opened:
        def __init__(self, *args: Any, **options: Any) -> None:
            self.context = safe_open(*args, **options)

        def __enter__(self) -> Counting:
            return Counting(self.context.__enter__())

        def __exit__(self, *error: Any) -> None:
            self.context.__exit__(*error)

    original, checkpoint.safe_open = checkpoint.safe_open, Opened
    try:
        model = Qwen3ForCausalLM.from_pretrained(path, group)
    finally:
        checkpoint.safe_open = original
    return sum(p.numel() for p in model.parameters()), read


def loads_then_sums(paths: list[Path]) -> str:
    """The error of loading this rank's path; the group must still work after it."""
    group = fusedcomm.init_distributed()
    try:
        Qwen3ForCausalLM.from_pretrained(paths[group.rank], group)
        message = "loaded"
    except (CheckpointError, ValueError) as error:
        message = f"{type(error).__name__}: {error}"
    assert torch.equal(group.all_reduce(torch.ones(8)), torch.full((8,), float(group.world_size)))
    return message


# ---- what they must give ----


def save_theirs(path: Path) -> Path:
    """A checkpoint that transformers writes: in several files, untied, with biases, as many key as query heads."""
    config = transformers.Qwen3Config(
        vocab_size=300,
        hidden_size=192,
        intermediate_size=320,
        num_hidden_layers=3,
        num_attention_heads=8,
        num_key_value_heads=8,
        head_dim=32,
        attention_bias=True,
        rms_norm_eps=1e-5,
    )
    config.rope_parameters = {"rope_type": "default", "rope_theta": 5000.0}
    torch.manual_seed(1)
    model = transformers.Qwen3ForCausalLM(config)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.data.normal_(1.0, 0.2)
        else:
            parameter.data.normal_(0.0, parameter.shape[-1] ** -0.5)
    model.save_pretrained(path, max_shard_size="400KB")
    assert len(list(path.glob("*.safetensors"))) > 2
    return path


@pytest.fixture(scope="module")
def references(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Reference]:
    root = tmp_path_factory.mktemp("qwen3")
    return {
        "untied": reference(make_tiny_qwen3(root / "untied", shape=TinyShape(**SMALL))),
        "tied": reference(
            make_tiny_qwen3(root / "tied", shape=TinyShape(**SMALL, tie_word_embeddings=True), num_files=3)
        ),
        "theirs": reference(save_theirs(root / "theirs")),
    }


NAMES = ["untied", "tied", "theirs"]


@pytest.mark.parametrize("world_size", WORLD_SIZES)
@pytest.mark.parametrize("name", NAMES)
def test_fp32_matches_transformers(
    ranks: RankPool, references: dict[str, Reference], name: str, world_size: int
) -> None:
    expected = references[name]
    results = ranks(world_size).run(decode, expected.path, torch.float32, True)
    for logits, tokens, _ in results:
        # Only the order of fp32 sums differs (by rank, and in the norms). The logits are of size 1, behind some ten
        # products of up to 512 terms that each add about sqrt(512) * 2^-24 = 1.3e-6; 2e-5 was seen.
        torch.testing.assert_close(logits, expected.fp32, rtol=0, atol=1e-4)
        assert torch.equal(tokens, expected.tokens)
        assert tokens.shape[1] == PROMPTS.shape[1] + NEW_TOKENS


@pytest.mark.parametrize("world_size", WORLD_SIZES)
@pytest.mark.parametrize("name", NAMES)
def test_bf16_is_as_close_to_fp32_as_transformers_is(
    ranks: RankPool, references: dict[str, Reference], name: str, world_size: int
) -> None:
    expected = references[name]
    logits, _, _ = ranks(world_size).run(decode, expected.path, torch.bfloat16, True)[0]
    theirs = (expected.bf16 - expected.fp32).square().mean().sqrt()
    ours = (logits.float() - expected.fp32).square().mean().sqrt()
    # Each of 8 ranks rounds its addend to bf16 before the sum, where one product rounds once; the addends are smaller
    # by sqrt(8), so the noise of a sum is that of one rounding more. 1.1 was seen.
    assert ours < 1.5 * theirs
    assert theirs < 0.05 * expected.fp32.std()


@pytest.mark.parametrize("world_size", WORLD_SIZES)
@pytest.mark.parametrize("quantization", [None, "fp8"])
def test_fusion_changes_no_bit_and_merges_launches(
    ranks: RankPool, tmp_path: Path, quantization: Any, world_size: int
) -> None:
    path = make_tiny_qwen3(tmp_path, quantization, shape=TinyShape(num_layers=2))
    fused = ranks(world_size).run(decode, path, None, True)[0]
    separate = ranks(world_size).run(decode, path, None, False)[0]
    assert torch.equal(fused[0], separate[0])
    assert torch.equal(fused[1], separate[1])
    stats = {key: n for key, n in fused[2].items() if not key.startswith("algorithm")}
    if quantization == "fp8":  # two norms a layer feed FP8 products, the final norm the bf16 head
        assert stats == {"allreduce_rmsnorm_quant.fused": 4, "allreduce_rmsnorm.fused_norm": 1}
    else:
        assert stats == {"allreduce_rmsnorm.fused_norm": 5}
    assert separate[2]["all_reduce.custom"] == 5


class QuantisedLinear(torch.nn.Module):
    """A product with dequantised weights and an input rounded to FP8 in groups of 128, in fp32."""

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        fp8, scale, _ = reference_ops.per_group_quant_fp8(x)
        return (fp8.float() * scale.repeat_interleave(128, -1)) @ self.weight.T


def dequantised(path: Path) -> Any:
    """transformers' model in fp32 with the checkpoint's weights dequantised and its inputs quantised."""
    with safe_open(path / SINGLE, framework="pt") as file:
        stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    config = transformers.Qwen3Config.from_pretrained(path)
    del config.quantization_config
    model = transformers.Qwen3ForCausalLM(config).float().eval()
    for name, tensor in stored.items():
        if name.endswith("_scale_inv"):
            continue
        scale = stored.get(f"{name}_scale_inv")
        if scale is None:
            model.get_parameter(name).data.copy_(tensor.float())
            continue
        weight = tensor.float() * scale.repeat_interleave(128, 0).repeat_interleave(128, 1)
        parent, _, child = name.removesuffix(".weight").rpartition(".")
        setattr(model.get_submodule(parent), child, QuantisedLinear(weight))
    return model


@pytest.mark.parametrize("world_size", WORLD_SIZES)
@pytest.mark.parametrize("num_layers", [1, 2])
def test_fp8_matches_a_dequantised_model(ranks: RankPool, tmp_path: Path, num_layers: int, world_size: int) -> None:
    path = make_tiny_qwen3(tmp_path, "fp8", shape=TinyShape(num_layers=num_layers))
    with torch.no_grad():
        expected = dequantised(path)(PROMPTS).logits
    logits = ranks(world_size).run(decode, path, torch.float32, True)[0][0]
    error = (logits - expected).square().mean(-1).sqrt() / expected.std()  # of each position
    if num_layers == 1:
        # Most positions differ by fp32 noise alone (5e-7 was seen): every scale, block and group is right.
        assert error.median() < 5e-6
    # At some, noise tips an FP8 value over a rounding edge, and attention spreads that 2^-4 of one value to later
    # positions. Noise of 1e-6 on the embedding moves the reference itself by 0.02 (1 layer) and 0.05 (2).
    assert error.square().mean().sqrt() < 0.05
    bf16 = ranks(world_size).run(decode, path, None, True)[0][0].float()
    # bf16 activations tip many values.
    assert (bf16 - expected).square().mean().sqrt() < 0.15 * expected.std()


def test_sampled_tokens_are_the_same_on_all_ranks_and_at_all_sizes(
    ranks: RankPool, references: dict[str, Reference]
) -> None:
    path = references["untied"].path
    alone = ranks(1).run(sampled, path)[0]
    assert not torch.equal(alone, references["untied"].tokens)
    for world_size in (2, 8):
        results = ranks(world_size).run(sampled, path)
        # Rank 0's generator decides, so the number of ranks does not matter either (up to fp32 noise at an edge).
        assert all(torch.equal(tokens, alone) for tokens in results)


def test_the_process_group_alone_gives_the_same_tokens(ranks: RankPool, references: dict[str, Reference]) -> None:
    expected = references["untied"]
    for logits, tokens, stats in ranks(2, {"FUSEDCOMM_DISABLE": "1"}).run(decode, expected.path, torch.float32, True):
        torch.testing.assert_close(logits, expected.fp32, rtol=0, atol=1e-4)
        assert torch.equal(tokens, expected.tokens)
        assert stats == {"allreduce_rmsnorm.process_group": 7}


@pytest.mark.parametrize("quantization", [None, "fp8"])
def test_every_stage_gives_the_same_tokens(ranks: RankPool, tmp_path: Path, quantization: Any) -> None:
    path = make_tiny_qwen3(tmp_path, quantization, shape=TinyShape(num_layers=2))
    tokens = ranks(2).run(decode_by_every_stage, path, 16)
    assert torch.equal(tokens[0], tokens[1])


def test_each_rank_reads_its_share(ranks: RankPool, references: dict[str, Reference]) -> None:
    path = references["untied"].path
    with safe_open(path / SINGLE, framework="pt") as file:
        total = sum(file.get_tensor(name).numel() for name in file.keys())  # noqa: SIM118 (no mapping)
    for elements, read in ranks(8).run(weight_elements, path):
        # One eighth, with norms whole, key/value heads on four ranks each, and the vocabulary padded.
        assert read <= elements
        assert read < 0.2 * total


@pytest.mark.parametrize("broken", [[0, 1, 2], [1]], ids=["everywhere", "on one rank"])
def test_loading_fails_together(ranks: RankPool, tmp_path: Path, broken: list[int]) -> None:
    shape = TinyShape(hidden_size=96, intermediate_size=96, num_layers=1, num_heads=3, num_kv_heads=1, head_dim=32)
    paths = [make_tiny_qwen3(tmp_path / str(rank), shape=shape) for rank in range(3)]
    for rank in broken:
        (paths[rank] / SINGLE).unlink()
    for rank, error in enumerate(ranks(3).run(loads_then_sums, paths)):
        if rank in broken:
            assert error.startswith("CheckpointError: path: expected readable safetensors files")
        else:
            assert error == f"CheckpointError: loading failed on ranks {broken}; their own errors say why"


def test_a_model_that_the_ranks_cannot_divide(ranks: RankPool, references: dict[str, Reference]) -> None:
    errors = ranks(3).run(loads_then_sums, [references["untied"].path] * 3)
    assert errors == ["ValueError: num_attention_heads: expected a multiple of the group's 3 ranks, got 8"] * 3
