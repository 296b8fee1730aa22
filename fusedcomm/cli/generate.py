"""``fusedcomm generate``: decodes a prompt over a group of ranks and streams the text."""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from fusedcomm.cli.launch import INTERRUPTED, run_on_ranks

if TYPE_CHECKING:
    import torch
    from tokenizers import Tokenizer

    from fusedcomm.groups.coordinator import GroupCoordinator
    from fusedcomm.models import Qwen3ForCausalLM

COMMAND = "fusedcomm generate"


@dataclass(frozen=True)
class Request:
    """What to decode, and how."""

    model: str
    prompt: str
    fusion: bool = True
    max_new_tokens: int = 64
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    ignore_eos: bool = False
    device: str | None = None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--model", type=Path, required=True, metavar="DIR", help="a Hugging Face checkpoint folder (Qwen3)")
    add("--prompt", required=True, help="the text to continue")
    add("--tp", type=int, metavar="N", help="ranks to start (default 1); under torchrun or mpirun: the ranks there are")
    add("--no-fusion", action="store_true", help="all-reduce, add, norm and quantise in separate steps")
    add("--max-new-tokens", type=int, default=Request.max_new_tokens, metavar="N", help="default %(default)s")
    add(
        "--temperature", type=float, default=Request.temperature, metavar="T", help="0 (default): the most likely token"
    )
    add("--top-p", type=float, default=Request.top_p, metavar="P", help="sample from the nucleus of mass P (default 1)")
    add("--seed", type=int, help="of the sampling (default: a different one each time)")
    add("--device", choices=("cpu", "cuda"), help="where to decode (default: on GPUs if there are any)")
    add("--ignore-eos", action="store_true", help="do not stop at an end token")


def run(arguments: argparse.Namespace) -> int:
    """The exit code. Text goes to stdout; progress and the report to stderr."""
    from fusedcomm.groups import bootstrap

    facts = bootstrap.detect()
    request = Request(
        model=str(arguments.model.resolve()),
        prompt=arguments.prompt,
        fusion=not arguments.no_fusion,
        max_new_tokens=arguments.max_new_tokens,
        temperature=arguments.temperature,
        top_p=arguments.top_p,
        seed=arguments.seed,
        ignore_eos=arguments.ignore_eos,
        device=arguments.device,
    )
    ranks = arguments.tp
    if facts.launcher != "alone":
        if ranks not in (None, facts.world_size):
            raise ValueError(f"--tp: expected {facts.world_size}, the ranks that {facts.launcher} started, got {ranks}")
    elif ranks is not None and ranks < 1:
        raise ValueError(f"--tp: expected at least 1, got {ranks}")
    elif (ranks or 1) > 1:
        read_tokenizer(arguments.model)  # what can be found out before ranks are started
        outcome = run_on_ranks(ranks, "fusedcomm.cli.generate:decode_on_rank", asdict(request))
        for line in outcome.errors:
            print(f"{COMMAND}: {line}", file=sys.stderr)
        return outcome.code
    try:
        decode_on_rank(**asdict(request))
    except KeyboardInterrupt:
        return INTERRUPTED
    return 0


def read_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer of a checkpoint folder.

    Raises:
        ValueError: it has none that the ``tokenizers`` library can read.
    """
    try:
        from tokenizers import Tokenizer
    except ImportError as error:
        raise ValueError(f"{COMMAND} needs the tokenizers library: pip install 'fusedcomm[models]'") from error
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise ValueError(f"--model: expected a checkpoint folder with tokenizer.json, got {folder}")
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises Exception itself
        raise ValueError(f"--model: expected a tokenizer in {path}, got {error}") from error


def decode_on_rank(**fields: object) -> None:
    """Decodes on this rank, with the others; rank 0 prints. ``fields`` are those of Request."""
    import fusedcomm

    request = Request(**fields)  # type: ignore[arg-type]  # they are what asdict made
    with fusedcomm.init_distributed(device=request.device) as group:
        try:
            _decode(request, group)
        finally:
            fusedcomm.destroy_distributed()


def _decode(request: Request, group: GroupCoordinator) -> None:
    import torch

    tokenizer = read_tokenizer(Path(request.model))
    model = _load(request, group)
    generator = torch.Generator()
    generator.seed() if request.seed is None else generator.manual_seed(request.seed)
    ids = torch.tensor([tokenizer.encode(request.prompt).ids], dtype=torch.int64).reshape(1, -1)
    stream = _Stream(tokenizer, is_shown=group.is_first_rank)
    start = time.perf_counter()
    model.generate(
        ids,
        request.max_new_tokens,
        request.temperature,
        request.top_p,
        generator,
        on_token=stream.put,
        ignore_eos=request.ignore_eos,
    )
    stream.report(start)


def _load(request: Request, group: GroupCoordinator) -> Qwen3ForCausalLM:
    from fusedcomm.cli.progress import loading_progress
    from fusedcomm.models import Qwen3ForCausalLM

    with loading_progress(Path(request.model).name, is_shown=group.is_first_rank) as on_progress:
        return Qwen3ForCausalLM.from_pretrained(
            request.model, group, enable_fusion=request.fusion, on_progress=on_progress
        )


class _Stream:
    """Prints tokens as text as they come, and how fast they came."""

    def __init__(self, tokenizer: Tokenizer, *, is_shown: bool) -> None:
        from tokenizers.decoders import DecodeStream

        self._tokenizer = tokenizer
        self._decoder = DecodeStream(skip_special_tokens=True)
        self._is_shown = is_shown
        self._times: list[float] = []

    def put(self, tokens: torch.Tensor) -> None:
        """Takes the ids ``[1]`` of one step."""
        self._times.append(time.perf_counter())
        if not self._is_shown:
            return
        text = self._decoder.step(self._tokenizer, int(tokens[0]))
        if text:
            print(text, end="", flush=True)

    def report(self, start: float) -> None:
        if not self._is_shown:
            return
        print(flush=True)
        if not self._times:
            return
        count, first = len(self._times), self._times[0] - start
        seconds = self._times[-1] - start
        steady = f", then {(count - 1) / (seconds - first):.1f} tokens/s" if count > 1 else ""
        print(f"{count} tokens in {seconds:.2f} s: the first after {first:.2f} s{steady}", file=sys.stderr)
