"""Every rank of a group chooses the same tokens and accepts the same drafts, without telling the others."""

from __future__ import annotations

import torch
from harness import RankPool
from sampling_bodies import rows
from speculative_bodies import everything, everything_arguments

from fusedcomm.ops import sampling


def choose(seed: int) -> list[list[int]]:
    """Tokens of a few steps; each rank splits its work by a number of threads of its own."""
    rank, threads = torch.distributed.get_rank(), torch.get_num_threads()
    torch.set_num_threads(1 + rank)
    try:
        generator = torch.Generator().manual_seed(seed)
        tokens = []
        for step in range(3):
            probs = rows("flat", 8, 32_000, seed=step)
            tokens += [
                sampling.sampling_from_probs(probs, generator=generator).tolist(),
                sampling.top_k_top_p_sampling_from_probs(probs, 5000, 0.9, generator=generator).tolist(),
                sampling.top_k_top_p_sampling_from_probs(probs, 5000, 0.9, generator=generator, order="joint").tolist(),
            ]
        return tokens
    finally:
        torch.set_num_threads(threads)


def verify(seed: int) -> list[bytes]:
    """Results of all ops of verification, on as many threads as choose() has."""
    rank, threads = torch.distributed.get_rank(), torch.get_num_threads()
    torch.set_num_threads(1 + rank)
    try:
        return [result.numpy().tobytes() for result in everything(*everything_arguments(64, seed))]
    finally:
        torch.set_num_threads(threads)


def test_ranks_accept_the_same_drafts(ranks: RankPool) -> None:
    first, second = ranks(2).run(verify, 17)
    assert first == second
    assert ranks(2).run(verify, 18)[0] != first


def test_ranks_choose_the_same_tokens(ranks: RankPool) -> None:
    first, second = ranks(2).run(choose, 17)
    assert first == second
    assert len({tuple(step) for step in first}) == len(first)
    assert ranks(2).run(choose, 18)[0] != first
