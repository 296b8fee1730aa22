"""greedy_chain_verify of blocks of 4 drafts, of which requests accept 2, 4, 1, 3, 0 in turn.

    loop   Python over lists: two copies to the host, one back; calls, not a graph
    torch  all requests together (fusedcomm.ops.speculative.reference)

A call has to read both blocks and to write the result. The vocabulary does not matter.
"""

from __future__ import annotations

import torch

from fusedcomm.cli.bench.collectives import OURS
from fusedcomm.cli.bench.registry import WrongResultError
from fusedcomm.cli.bench.sampling.chain import DRAFTS, accepted_drafts
from fusedcomm.cli.bench.sampling.checks import Precision
from fusedcomm.cli.bench.sampling.rows import BATCHES, LOOP, TINY_BATCHES, TORCH, VOCABS, Way, peers_of
from fusedcomm.cli.bench.single.machine import copy_peer
from fusedcomm.cli.bench.single.spec import Spec
from fusedcomm.cli.bench.single.workload import Peer, Place, Results, Workload
from fusedcomm.ops.speculative import ChainVerify, greedy_chain_verify, reference

OP = "greedy_chain_verify"
BLOCK = DRAFTS + 1


class BlockSet:
    """Candidates and the target's choices ``[B, 5]``, what is to come out, and places for it."""

    def __init__(self, batch: int, place: Place, seed: int) -> None:
        generator = place.generator(seed)
        shape = (batch, BLOCK)
        self.target = torch.randint(0, VOCABS[0], shape, generator=generator, device=place.device)
        self.candidates = self.target.roll(1, dims=1)
        counts = [accepted_drafts(request) for request in range(batch)]
        committed = []
        for request, (count, row) in enumerate(zip(counts, self.target.tolist(), strict=True)):
            if count < DRAFTS:
                self.candidates[request, count + 1] += 1
            committed.append(row[: count + 1] + [-1] * (DRAFTS - count))
        self.expected = ChainVerify(
            torch.tensor(counts, dtype=torch.int32, device=place.device),
            torch.tensor([row[count] for count, row in zip(counts, committed, strict=True)], device=place.device),
            torch.tensor(committed, device=place.device),
        )
        self.out = ChainVerify(*(torch.empty_like(t) for t in self.expected))


def check(own: BlockSet, results: Results, precision: Precision, peer: str) -> None:
    """Compares integers."""
    for name, got, expected in zip(ChainVerify._fields, results, own.expected, strict=True):
        if not torch.equal(got, expected):
            raise WrongResultError(f"{name}: not what was to come out")


def workloads(spec: Spec) -> list[Workload]:
    """A size for each number of rows."""
    return [_workload(batch) for batch in spec.tokens or (TINY_BATCHES if spec.tiny else BATCHES)]


def _workload(batch: int) -> Workload:
    moved = batch * (3 * BLOCK * 8 + 8 + 4)

    def peers(place: Place) -> list[Peer]:
        sets = place.make_sets(lambda seed: BlockSet(batch, place, seed))
        ways: dict[str, Way[BlockSet]] = {LOOP: loop, TORCH: _torch, OURS: _ours}
        return [copy_peer(place, moved), *peers_of(sets, ways, check)]

    return Workload(OP, str(batch), {"batch": batch, "drafts": DRAFTS}, peers, moved, counts_kernels=batch == 16)


def loop(own: BlockSet) -> Results:
    """Lists on the host."""
    counts, bonuses, rows = [], [], []
    for candidates, target in zip(own.candidates.tolist(), own.target.tolist(), strict=True):
        count = 0
        while count < DRAFTS and candidates[count + 1] == target[count]:
            count += 1
        counts.append(count)
        bonuses.append(target[count])
        rows.append([*candidates[1 : count + 1], target[count], *[-1] * (DRAFTS - count)])
    device = own.candidates.device
    accept_len = torch.tensor(counts, dtype=torch.int32, device=device)
    return accept_len, torch.tensor(bonuses, device=device), torch.tensor(rows, device=device)


def _torch(own: BlockSet) -> Results:
    reference.greedy_chain_verify_out(own.candidates, own.target, *own.out)
    return own.out


def _ours(own: BlockSet) -> Results:
    return greedy_chain_verify(own.candidates, own.target, out=own.out)
