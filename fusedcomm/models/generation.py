"""Decoding token by token."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from fusedcomm.models.config import Qwen3Config
from fusedcomm.models.sampling import greedy, sample

if TYPE_CHECKING:
    from fusedcomm.models.qwen3 import Qwen3ForCausalLM


def check_input_ids(input_ids: torch.Tensor, config: Qwen3Config) -> None:
    """Refuses ids that the model cannot take, before anything is sent.

    Raises:
        ValueError: not int64 ``[B, S]`` with B and S positive, or longer than the model's positions.
    """
    if input_ids.dtype is not torch.int64 or input_ids.dim() != 2 or not input_ids.numel():
        raise ValueError(f"input_ids: expected int64 [B >= 1, S >= 1], got {input_ids.dtype} {list(input_ids.shape)}")
    if input_ids.shape[1] > config.max_position_embeddings:
        raise ValueError(
            f"input_ids: expected up to {config.max_position_embeddings} positions, got {input_ids.shape[1]}"
        )


def generate(
    model: Qwen3ForCausalLM,
    input_ids: torch.Tensor,
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    generator: torch.Generator | None,
    *,
    on_token: Callable[[torch.Tensor], None] | None,
    ignore_eos: bool,
) -> torch.Tensor:
    """``input_ids [B, S]`` int64, prompts of one length, and N <= ``max_new_tokens`` new ids, ``[B, S + N]``.

    A collective call: every rank passes the same arguments and gets the same ids. Temperature 0 takes the
    most likely token, else a token of the top-p nucleus of ``softmax(logits / temperature)``. A row that has
    met an end token is filled with the pad token (without one, the end token), and decoding stops when all
    have; ``ignore_eos`` never stops. ``on_token`` gets each step's ids ``[B]``, on every rank.

    Why ranks cannot disagree: the logits are gathered, so each rank has the same bits, and a token is a pure
    function of them and of uniforms that rank 0 draws (from ``generator``, or torch's default) and broadcasts
    once, before the first step. So seeds may differ by rank, and no step waits for a broadcast.

    Raises:
        ValueError: an argument out of its range, or more positions than the model has.
    """
    _check(model.config, input_ids, max_new_tokens, temperature, top_p)
    batch_size, prompt_length = input_ids.shape
    if max_new_tokens == 0:
        return input_ids
    config, device = model.config, model.group.device
    input_ids = input_ids.to(device)
    uniforms = None
    if temperature > 0:
        # Drawn on every rank so that generators stay in step; rank 0's count.
        source = device if generator is None else generator.device
        uniforms = torch.rand(max_new_tokens, batch_size, generator=generator, device=source).to(device)
        uniforms = model.group.broadcast(uniforms)
    cache = model.new_cache(batch_size, prompt_length + max_new_tokens - 1)
    eos = torch.tensor(() if ignore_eos else config.eos_token_ids, dtype=torch.int64, device=device)
    pad = config.pad_token_id if config.pad_token_id is not None else (config.eos_token_ids or (0,))[0]
    finished = torch.zeros(batch_size, dtype=torch.bool, device=device)
    ids, step_ids = [input_ids], input_ids
    for step in range(max_new_tokens):
        logits = model.next_logits(step_ids, cache)
        tokens = greedy(logits) if uniforms is None else sample(logits, temperature, top_p, uniforms[step])
        tokens = tokens.masked_fill(finished, pad)
        if on_token is not None:
            on_token(tokens)
        step_ids = tokens.unsqueeze(1)
        ids.append(step_ids)
        if len(eos):
            finished |= torch.isin(tokens, eos)
            if bool(finished.all()):
                break
    return torch.cat(ids, dim=1)


def _check(config: Qwen3Config, input_ids: torch.Tensor, max_new_tokens: int, temperature: float, top_p: float) -> None:
    check_input_ids(input_ids, config)
    room = config.max_position_embeddings - input_ids.shape[1]
    if not 0 <= max_new_tokens <= room:
        raise ValueError(f"max_new_tokens: expected 0 to {room} behind this prompt, got {max_new_tokens}")
    if not (math.isfinite(temperature) and temperature >= 0):
        raise ValueError(f"temperature: expected a finite number >= 0, got {temperature}")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p: expected a number in (0, 1], got {top_p}")
