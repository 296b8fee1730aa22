"""What the ranks of the demonstration do: decode each checkpoint in each way, count and time it."""

from __future__ import annotations

import functools
import itertools
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from fusedcomm.cli.demo.launches import count_launches

if TYPE_CHECKING:
    from fusedcomm.groups.coordinator import GroupCoordinator
    from fusedcomm.models import Qwen3ForCausalLM

FUSED, UNFUSED, GLOO = "fused", "unfused", "gloo"
WAYS = {
    GLOO: "the all-reduce of torch.distributed; add, norm and quantisation in launches of their own",
    UNFUSED: "the all-reduce of fusedcomm; add, norm and quantisation in launches of their own",
    FUSED: "all-reduce, add, norm and quantisation in one launch",
}
ROUNDS = {GLOO: 1, UNFUSED: 3, FUSED: 3}  # Gloo takes several times as long, and once is enough to see that


@dataclass(frozen=True)
class Result:
    """One checkpoint, decoded in one way."""

    checkpoint: str
    way: str
    tokens: list[int]
    text: str
    stats: dict[str, int]
    """GroupCoordinator.stats() of one decoding."""
    collectives_per_layer: int
    launches_per_layer: int
    ms_per_token: float
    """The slowest rank's median."""


def decode_on_rank(checkpoints: dict[str, str], prompt: str, num_tokens: int, report: str) -> None:
    """Runs on every rank; rank 0 writes the results, a JSON list, to ``report``."""
    import dataclasses

    import fusedcomm
    from fusedcomm.models import Qwen3ForCausalLM

    group = fusedcomm.init_distributed()
    disabled = dataclasses.replace(fusedcomm.Settings.from_environ(), disable=True)
    results = []
    try:
        with fusedcomm.GroupCoordinator(settings=disabled) as gloo_group:
            for checkpoint, path in checkpoints.items():
                models = {
                    GLOO: Qwen3ForCausalLM.from_pretrained(path, gloo_group, enable_fusion=False),
                    UNFUSED: Qwen3ForCausalLM.from_pretrained(path, group, enable_fusion=False),
                    FUSED: Qwen3ForCausalLM.from_pretrained(path, group),
                }
                results += _decode(checkpoint, Path(path), models, prompt, num_tokens)
        if group.is_first_rank:
            Path(report).write_text(json.dumps([asdict(result) for result in results]))
    finally:
        fusedcomm.destroy_distributed()


def _decode(
    checkpoint: str, path: Path, models: dict[str, Qwen3ForCausalLM], prompt: str, num_tokens: int
) -> list[Result]:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(path / "tokenizer.json"))
    ids = torch.tensor([tokenizer.encode(prompt).ids])
    times: dict[str, list[float]] = {way: [] for way in models}
    tokens, stats = {}, {}
    for turn in range(max(ROUNDS.values())):  # in turns: what else the machine does meets all of them
        for way, model in models.items():
            if turn >= ROUNDS[way]:
                continue
            model.group.reset_stats()
            steps = _Steps()
            out = model.generate(ids, num_tokens, ignore_eos=True, on_token=steps)
            times[way] += steps.seconds()
            tokens[way] = out[0, ids.shape[1] :].tolist()
            stats[way] = model.group.stats()
    results = []
    for way, model in models.items():
        layer = model.layers[len(model.layers) // 2]
        counter = count_launches(layer, functools.partial(_decode_two, model, ids))
        results.append(
            Result(
                checkpoint=checkpoint,
                way=way,
                tokens=tokens[way],
                text=tokenizer.decode(tokens[way]),
                stats={name: n for name, n in stats[way].items() if not name.startswith("algorithm.")},
                collectives_per_layer=counter.num_collectives,
                launches_per_layer=counter.num_launches,
                ms_per_token=1e3 * _slowest(model.group, statistics.median(times[way])),
            )
        )
    return results


class _Steps:
    """When the steps of a decoding were done; called with each step's tokens."""

    def __init__(self) -> None:
        self._ends: list[float] = []

    def __call__(self, tokens: torch.Tensor) -> None:
        self._ends.append(time.perf_counter())

    def seconds(self) -> list[float]:
        """How long each step took, without the first, which reads the prompt."""
        return [end - start for start, end in itertools.pairwise(self._ends)]


def _decode_two(model: Qwen3ForCausalLM, ids: torch.Tensor, on_token: Callable[[torch.Tensor], None]) -> None:
    model.generate(ids, 2, ignore_eos=True, on_token=on_token)


def _slowest(group: GroupCoordinator, seconds: float) -> float:
    return float(group.all_gather(torch.tensor([seconds], dtype=torch.float64), dim=0).max())
