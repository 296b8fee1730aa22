"""The forms and limits of forward and generate, on a group of one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fusedcomm import GroupCoordinator
from fusedcomm.models import Qwen3ForCausalLM, make_tiny_qwen3
from fusedcomm.models.byte_tokenizer import END_OF_TEXT_ID, VOCAB_SIZE
from fusedcomm.models.tiny import TinyShape

SHAPE = TinyShape(hidden_size=256, intermediate_size=256, head_dim=64, max_position_embeddings=96)
PROMPT = torch.tensor([list(b"Push, with the data as the flag.")])


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_qwen3(tmp_path_factory.mktemp("tiny"), shape=SHAPE)


@pytest.fixture(scope="module")
def model(checkpoint: Path) -> Iterator[Qwen3ForCausalLM]:
    with GroupCoordinator() as group:
        yield Qwen3ForCausalLM.from_pretrained(checkpoint, group, torch.float32)


def test_generate_returns_prompt_and_continuation(model: Qwen3ForCausalLM) -> None:
    seen: list[int] = []
    ids = model.generate(PROMPT, 20, on_token=lambda tokens: seen.append(int(tokens)))
    assert ids.shape == (1, PROMPT.shape[1] + 20)
    assert torch.equal(ids[:, : PROMPT.shape[1]], PROMPT)
    assert ids[0, PROMPT.shape[1] :].tolist() == seen
    assert torch.equal(model.generate(PROMPT, 0), PROMPT)


def test_each_step_is_the_argmax_of_forward(model: Qwen3ForCausalLM) -> None:
    ids = model.generate(PROMPT, 20, ignore_eos=True)
    predicted = model(ids[:, :-1]).argmax(-1)
    assert torch.equal(predicted[:, PROMPT.shape[1] - 1 :], ids[:, PROMPT.shape[1] :])


def test_greedy_text_is_not_degenerate(model: Qwen3ForCausalLM) -> None:
    tokens = model.generate(PROMPT, 60)[0, PROMPT.shape[1] :].tolist()
    assert len(set(tokens)) > 15
    assert sum(0x20 <= token < 0x7F for token in tokens) > 50


def test_rows_of_a_batch_do_not_see_each_other(model: Qwen3ForCausalLM) -> None:
    batch = torch.cat([PROMPT, PROMPT.flip(1), PROMPT.roll(3, 1)])
    together = model.generate(batch, 24)
    for row in range(3):
        assert torch.equal(together[row : row + 1], model.generate(batch[row : row + 1], 24))


def test_a_finished_row_is_padded_and_all_finished_stop(checkpoint: Path, model: Qwen3ForCausalLM) -> None:
    batch = torch.cat([PROMPT, PROMPT.flip(1)])
    free = model.generate(batch, 24)[:, PROMPT.shape[1] :]
    # An end token that the first row meets early and the second later, or never.
    end = int(free[0, 4])
    first = free[0].tolist().index(end)
    second = free[1].tolist().index(end) if end in free[1] else None
    stopping = Qwen3ForCausalLM.from_pretrained(checkpoint, model.group, torch.float32)
    stopping.config = replace(stopping.config, eos_token_ids=(end, END_OF_TEXT_ID))
    got = stopping.generate(batch, 24)[:, PROMPT.shape[1] :]
    assert got[0, : first + 1].tolist() == free[0, : first + 1].tolist()
    assert (got[0, first + 1 :] == end).all()
    assert got.shape[1] == (24 if second is None else max(first, second) + 1)
    assert torch.equal(stopping.generate(batch, 24, ignore_eos=True)[:, PROMPT.shape[1] :], free)


def test_sampling_follows_its_generator(model: Qwen3ForCausalLM) -> None:
    def draw(seed: int, **options: float) -> list[int]:
        generator = torch.Generator().manual_seed(seed)
        ids: list[int] = model.generate(PROMPT, 24, generator=generator, **options)[0, PROMPT.shape[1] :].tolist()
        return ids

    assert draw(1, temperature=1.0) == draw(1, temperature=1.0)
    assert draw(1, temperature=1.0) != draw(2, temperature=1.0)
    greedy = model.generate(PROMPT, 24)[0, PROMPT.shape[1] :].tolist()
    assert draw(1, temperature=1.0, top_p=1e-6) == greedy
    torch.manual_seed(5)
    first = model.generate(PROMPT, 24, temperature=1.0)
    torch.manual_seed(5)
    assert torch.equal(model.generate(PROMPT, 24, temperature=1.0), first)


def test_the_same_bits_with_and_without_fusion(checkpoint: Path, model: Qwen3ForCausalLM) -> None:
    separate = Qwen3ForCausalLM.from_pretrained(checkpoint, model.group, torch.float32, enable_fusion=False)
    assert torch.equal(model(PROMPT), separate(PROMPT))


def test_limits_are_named(model: Qwen3ForCausalLM) -> None:
    length = PROMPT.shape[1]
    with pytest.raises(ValueError, match=r"input_ids: expected int64 \[B >= 1, S >= 1\], got torch.int32"):
        model(PROMPT.int())
    with pytest.raises(ValueError, match=r"input_ids: expected int64 \[B >= 1, S >= 1\], got torch.int64 \[1, 0\]"):
        model.generate(PROMPT[:, :0], 4)
    with pytest.raises(ValueError, match=f"ids: expected 0 to {VOCAB_SIZE - 1}, got .* to {VOCAB_SIZE}"):
        model(torch.full_like(PROMPT, VOCAB_SIZE))
    with pytest.raises(ValueError, match="input_ids: expected up to 96 positions, got 97"):
        model(torch.zeros(1, 97, dtype=torch.int64))
    with pytest.raises(ValueError, match=f"max_new_tokens: expected 0 to {96 - length} behind this prompt, got 96"):
        model.generate(PROMPT, 96)
    assert model.generate(PROMPT, 96 - length, ignore_eos=True).shape == (1, 96)
    with pytest.raises(ValueError, match="max_new_tokens: expected 0 to"):
        model.generate(PROMPT, -1)
    for temperature in (-0.1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="temperature: expected a finite number >= 0"):
            model.generate(PROMPT, 4, temperature)
    for top_p in (0.0, 1.1, float("nan")):
        with pytest.raises(ValueError, match=r"top_p: expected a number in \(0, 1\]"):
            model.generate(PROMPT, 4, 1.0, top_p)
