"""tree_speculative_sampling_target_only over trees of 9 drafts, whose walks the uniforms say.

            0             the siblings of a node hold the tokens that the target likes best after it, the best first;
        ┌───┼───┐         the walks of requests end at nodes 2, 9, 0, 5 in turn: with all children refused, with as many
        1   2   3         drafts as a path may have, with the root's children refused, at a leaf
       ┌┴┐ ┌┴┐
       4 5 6 7
       │   │
       8   9

    loop   Python over requests and nodes, a number at a time to the host; calls, not a graph
    torch  all requests together (fusedcomm.ops.speculative.reference)

A call has to read the target's row where the walk ends, and the draft's unless the path is full. What a call writes to
the draft's rows, the next one writes again.
"""

from __future__ import annotations

import torch

from fusedcomm.cli.bench.collectives import OURS
from fusedcomm.cli.bench.registry import WrongResultError
from fusedcomm.cli.bench.sampling.chain import MOST_BYTES, draw
from fusedcomm.cli.bench.sampling.checks import Precision, check_draw
from fusedcomm.cli.bench.sampling.rows import LOOP, TORCH, Size, Way, peers_of, probabilities, sizes
from fusedcomm.cli.bench.single.machine import copy_peer
from fusedcomm.cli.bench.single.spec import Spec
from fusedcomm.cli.bench.single.workload import Peer, Place, Results, Workload
from fusedcomm.ops.speculative import reference, tree_speculative_sampling_target_only

OP = "tree_speculative_sampling"
PARENTS = (-1, 0, 0, 0, 1, 1, 2, 2, 4, 6)
NODES = len(PARENTS)
CHILDREN = {node: [child for child, parent in enumerate(PARENTS) if parent == node] for node in range(NODES)}
ENDS = (2, 9, 0, 5)
"""Where the walks of requests end, in turn."""
PATH = 4
"""Nodes of a path, with the root."""


def path_to(node: int) -> list[int]:
    """The nodes from the root on."""
    return [node] if node == 0 else [*path_to(PARENTS[node]), node]


def is_full(end: int) -> bool:
    """Whether a walk that ends there accepts as many drafts as a path may have."""
    return len(path_to(end)) == PATH


class TreeSet:
    """B trees, and places for results."""

    def __init__(self, size: Size, place: Place, seed: int) -> None:
        batch, vocab, device = size.batch, size.vocab, place.device
        self.target_probs = probabilities((batch, NODES, vocab), place, seed)
        self.draft_probs = torch.zeros_like(self.target_probs)
        generator = place.generator(seed + 1)
        self.candidates = torch.randint(0, vocab, (batch, NODES), generator=generator, device=device)
        self.uniforms = torch.rand(batch, NODES, generator=generator, device=device)
        self.final_uniforms = torch.rand(batch, generator=generator, device=device)
        for node, children in CHILDREN.items():
            if children:
                best = self.target_probs[:, node].topk(len(children), dim=-1)
                self.candidates[:, children] = best.indices
                self.uniforms[:, node] = self._coins(node, best.values)
        self.positions = torch.arange(batch * NODES, device=device).view(batch, NODES)
        firsts = [children[0] if children else -1 for children in CHILDREN.values()]
        siblings = [n + 1 if n + 1 < NODES and PARENTS[n + 1] == PARENTS[n] else -1 for n in range(NODES)]
        self.next_token, self.next_sibling = (
            torch.tensor(links, device=device).expand(batch, NODES).contiguous() for links in (firsts, siblings)
        )
        shapes = {"predicts": (batch * NODES,), "accept_index": (batch, PATH), "accept_token_num": (batch,)}
        results = {name: torch.empty(shape, dtype=torch.int32, device=device) for name, shape in shapes.items()}
        self.results = tuple(results.values())
        self.arguments = {
            **results,
            "candidates": self.candidates,
            "retrive_index": self.positions,
            "retrive_next_token": self.next_token,
            "retrive_next_sibling": self.next_sibling,
            "uniform_samples": self.uniforms,
            "uniform_samples_for_final_sampling": self.final_uniforms,
            "target_probs": self.target_probs,
            "draft_probs": self.draft_probs,
        }

    def _coins(self, node: int, p: torch.Tensor) -> torch.Tensor:
        """``[B]``: in the middle of what makes the walks of the requests go on as they are to; p ``[B, children]``."""
        bounds = torch.nn.functional.pad(p.cumsum(-1), (1, 0))
        bounds = torch.cat((bounds, torch.ones_like(bounds[:, :1])), dim=-1)
        middles = (bounds[:, :-1] + bounds[:, 1:]) / 2
        chosen = [self._chosen(node, ENDS[request % len(ENDS)]) for request in range(len(p))]
        return middles.gather(-1, torch.tensor(chosen, device=p.device).unsqueeze(-1)).squeeze(-1)

    @staticmethod
    def _chosen(node: int, end: int) -> int:
        """The place among its siblings of the child that a walk to ``end`` goes on to; their number if to none."""
        path = path_to(end)
        following = path[path.index(node) + 1] if node in path and node != end else None
        return len(CHILDREN[node]) if following is None else CHILDREN[node].index(following)


def check(own: TreeSet, results: Results, precision: Precision, peer: str) -> None:
    """Holds the paths, the tokens on them and the last tokens against what the set was made for."""
    predicts, accept_index, accept_token_num = (t.long() for t in results)
    expected = torch.full_like(own.positions, -1)
    paths = torch.full_like(accept_index, -1)
    lengths = torch.empty_like(accept_token_num)
    got = predicts.view_as(expected).clone()
    for turn, end in enumerate(ENDS):
        rows, path = slice(turn, None, len(ENDS)), path_to(end)
        paths[rows, : len(path)] = own.positions[rows][:, path]
        lengths[rows] = len(path) - 1
        expected[rows, path[:-1]] = own.candidates[rows][:, path[1:]]
        weights = own.target_probs[rows, end].clone()
        if not is_full(end):
            weights.scatter_(-1, own.candidates[rows][:, CHILDREN[end]], 0.0)
        if len(weights):
            check_draw(weights, got[rows, end], own.final_uniforms[rows], precision.slack)
        got[rows, end] = -1
    if not (torch.equal(accept_index, paths) and torch.equal(accept_token_num, lengths)):
        raise WrongResultError("accept_index, accept_token_num: not the path that was to be taken")
    if not torch.equal(got, expected):
        raise WrongResultError("predicts: not the tokens of the path")


def workloads(spec: Spec) -> list[Workload]:
    """Each size whose probabilities are not too many."""
    return [_workload(size) for size in sizes(spec) if 2 * NODES * size.rows_bytes <= MOST_BYTES]


def _workload(size: Size) -> Workload:
    rows = sum(1 + (not is_full(ENDS[request % len(ENDS)])) for request in range(size.batch))
    moved = rows * size.row_bytes

    def peers(place: Place) -> list[Peer]:
        sets = place.make_sets(lambda seed: TreeSet(size, place, seed))
        ways: dict[str, Way[TreeSet]] = {LOOP: loop, TORCH: _torch, OURS: _ours}
        return [copy_peer(place, moved), *peers_of(sets, ways, check)]

    fields = {**size.fields, "nodes": NODES}
    return Workload(OP, size.label, fields, peers, moved, counts_kernels=size.is_counted)


def loop(own: TreeSet) -> Results:
    """The nodes one by one, on the host."""
    batch = len(own.candidates)
    predicts, paths, counts = [-1] * (batch * NODES), [], []
    for request in range(batch):
        node, path = 0, [0]
        while len(path) < PATH:
            following = _accepted_child(own, request, node)
            if following < 0:
                break
            predicts[request * NODES + node] = int(own.candidates[request, following].item())
            node = following
            path.append(node)
        weights = own.target_probs[request, node]
        if len(path) < PATH:
            weights = (weights - own.draft_probs[request, node]).clamp(min=0.0)
        predicts[request * NODES + node] = draw(weights, own.final_uniforms[request])
        paths.append([*(request * NODES + n for n in path), *[-1] * (PATH - len(path))])
        counts.append(len(path) - 1)
    device = own.candidates.device
    return tuple(torch.tensor(values, dtype=torch.int32, device=device) for values in (predicts, paths, counts))


def _accepted_child(own: TreeSet, request: int, node: int) -> int:
    """The first child that the coin accepts, else -1; those before it are written to the draft."""
    coin, acc = own.uniforms[request, node].item(), 0.0
    child = int(own.next_token[request, node].item())
    while child >= 0:
        token = int(own.candidates[request, child].item())
        p = own.target_probs[request, node, token].item()
        acc += p
        if coin < acc:
            return child
        own.draft_probs[request, node, token] = p
        child = int(own.next_sibling[request, child].item())
    return -1


def _torch(own: TreeSet) -> Results:
    reference.tree_speculative_sampling_target_only(**own.arguments, threshold_single=1.0, threshold_acc=1.0)
    return own.results


def _ours(own: TreeSet) -> Results:
    tree_speculative_sampling_target_only(**own.arguments, threshold_single=1.0, threshold_acc=1.0, deterministic=True)
    return own.results
