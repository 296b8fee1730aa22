"""chain_speculative_sampling of 4 drafts, whose outcome the probabilities say, not the uniforms.

Requests accept 2, 4, 1, 3, 0 drafts in turn: drafts before the refusal have the target's own probabilities, so any
uniform accepts them; the one that is refused has the probability 0 in the target, and a distribution of its own. So
peers that draw their own uniforms have the same rows to read.

    loop        Python over requests and drafts, a number at a time to the host; calls, not a graph
    torch       all requests together (fusedcomm.ops.speculative.reference)
    flashinfer  its chain_speculative_sampling; draws uniforms of its own

A call has to read the target's row after the last draft that was accepted, and the draft's row if one was refused.
"""

from __future__ import annotations

from typing import Any

import torch

from fusedcomm.cli.bench.collectives import OURS
from fusedcomm.cli.bench.registry import WrongResultError
from fusedcomm.cli.bench.sampling.checks import Precision, check_draw
from fusedcomm.cli.bench.sampling.rows import LOOP, TORCH, Size, Way, peers_of, philox, probabilities, sizes
from fusedcomm.cli.bench.single.flashinfer import FLASHINFER
from fusedcomm.cli.bench.single.machine import copy_peer
from fusedcomm.cli.bench.single.spec import Spec
from fusedcomm.cli.bench.single.workload import Peer, Place, Results, Workload
from fusedcomm.ops.speculative import ChainSampling, chain_speculative_sampling, reference

OP = "chain_speculative_sampling"
DRAFTS = 4
MOST_BYTES = 1 << 30
"""Of the probabilities of one set; larger sizes are left out."""


def accepted_drafts(request: int) -> int:
    """How many drafts a request accepts."""
    return (2 * request + 2) % (DRAFTS + 1)


class ChainSet:
    """B chains, the number of drafts that each accepts, and places for results."""

    def __init__(self, size: Size, place: Place, seed: int) -> None:
        batch, vocab, device = size.batch, size.vocab, place.device
        counts = [accepted_drafts(request) for request in range(batch)]
        self.accepted = torch.tensor(counts, device=device)
        self.target_probs = probabilities((batch, DRAFTS + 1, vocab), place, seed)
        self.draft_probs = self.target_probs[:, :DRAFTS].clone()
        refusing = [(request, count) for request, count in enumerate(counts) if count < DRAFTS]
        refused = torch.tensor(refusing, device=device).unbind(-1)  # request 0 is always among them
        self.draft_probs[refused] = probabilities((len(refusing), vocab), place, seed + 1)
        generator = place.generator(seed + 2)
        ids = torch.multinomial(self.draft_probs.flatten(0, 1), 1, generator=generator).view(batch, DRAFTS)
        self.target_probs[(*refused, ids[refused])] = 0.0
        self.draft_ids = ids.to(torch.int32)
        self.uniforms = torch.rand(batch, DRAFTS, generator=generator, device=device)
        self.final_uniforms = torch.rand(batch, generator=generator, device=device)
        empty = (torch.empty(shape, dtype=torch.int32, device=device) for shape in ((batch, DRAFTS + 1), (batch,)))
        self.out = ChainSampling(*empty)
        self.philox = philox(device, seed)
        self.counted = [torch.zeros(batch, dtype=torch.int32, device=device) for _ in range(2)]
        """What FlashInfer adds its counts to."""
        self.inputs = {
            "draft_probs": self.draft_probs,
            "draft_ids": self.draft_ids,
            "target_probs": self.target_probs,
            "uniforms": self.uniforms,
            "final_uniforms": self.final_uniforms,
        }

    def residual(self) -> torch.Tensor:
        """fp32 ``[B, V]``: what the last token is drawn from."""
        request = torch.arange(len(self.accepted), device=self.accepted.device)
        target = self.target_probs[request, self.accepted]
        draft = self.draft_probs[request, self.accepted.clamp(max=DRAFTS - 1)]
        is_refused = (self.accepted < DRAFTS).unsqueeze(-1)
        return (target - torch.where(is_refused, draft, 0.0)).clamp_(min=0.0)


def check(own: ChainSet, results: Results, precision: Precision, peer: str) -> None:
    """Holds the ids, and the counts if they are there, against what the set was made for."""
    ids, *counts = (t.long() for t in results)
    if ids.shape != (len(own.accepted), DRAFTS + 1):
        raise WrongResultError(f"output_ids: expected {DRAFTS + 1} for each request, got shape {tuple(ids.shape)}")
    if any(not torch.equal(count, own.accepted) for count in counts):
        raise WrongResultError("accepted: not the drafts that are the target's own")
    column, accepted = torch.arange(DRAFTS + 1, device=ids.device), own.accepted.unsqueeze(-1)
    drafts = torch.nn.functional.pad(own.draft_ids.long(), (0, 1), value=-1)
    if not torch.equal(torch.where(column == accepted, -1, ids), torch.where(column < accepted, drafts, -1)):
        raise WrongResultError("output_ids: not the accepted drafts, a token, then -1")
    uniforms = None if peer == FLASHINFER else own.final_uniforms
    check_draw(own.residual(), ids.gather(-1, accepted).squeeze(-1), uniforms, precision.slack)


def workloads(spec: Spec) -> list[Workload]:
    """Each size whose probabilities are not too many."""
    return [_workload(size) for size in sizes(spec) if (2 * DRAFTS + 1) * size.rows_bytes <= MOST_BYTES]


def _workload(size: Size) -> Workload:
    rows = sum(1 + (accepted_drafts(request) < DRAFTS) for request in range(size.batch))
    moved = rows * size.row_bytes

    def peers(place: Place) -> list[Peer]:
        sets = place.make_sets(lambda seed: ChainSet(size, place, seed))
        ways: dict[str, Way[ChainSet]] = {LOOP: loop, TORCH: _torch, OURS: _ours}
        return [copy_peer(place, moved), *peers_of(sets, ways, check, _of_flashinfer)]

    fields = {**size.fields, "drafts": DRAFTS}
    return Workload(OP, size.label, fields, peers, moved, counts_kernels=size.is_counted)


def loop(own: ChainSet) -> Results:
    """The drafts one by one, on the host."""
    rows, counts = [], []
    for request in range(len(own.draft_ids)):
        tokens: list[int] = []
        for i in range(DRAFTS):
            token = int(own.draft_ids[request, i].item())
            q, p = own.draft_probs[request, i, token].item(), own.target_probs[request, i, token].item()
            if not own.uniforms[request, i].item() * q < p:
                break
            tokens.append(token)
        count = len(tokens)
        weights = own.target_probs[request, count]
        if count < DRAFTS:
            weights = (weights - own.draft_probs[request, count]).clamp(min=0.0)
        last = draw(weights, own.final_uniforms[request])
        rows.append([*tokens, last, *[-1] * (DRAFTS - count)])
        counts.append(count)
    device = own.draft_ids.device
    return tuple(torch.tensor(values, dtype=torch.int32, device=device) for values in (rows, counts))


def draw(weights: torch.Tensor, uniform: torch.Tensor) -> int:
    """The id in ``weights [V]`` at which their sums pass the uniform, on the host."""
    sums = weights.cumsum(0)
    found = int(torch.searchsorted(sums, uniform * sums[-1], right=True).item())
    return min(found, len(sums) - 1)


def _torch(own: ChainSet) -> Results:
    reference.chain_speculative_sampling_out(**own.inputs, **own.out._asdict())
    return own.out


def _ours(own: ChainSet) -> Results:
    return chain_speculative_sampling(**own.inputs, out=own.out)


def _of_flashinfer(library: Any) -> Way[ChainSet]:
    def way(own: ChainSet) -> Results:
        inputs = own.draft_probs, own.draft_ids, own.target_probs
        return (library.chain_speculative_sampling(*inputs, *own.counted, **own.philox)[0],)

    return way
