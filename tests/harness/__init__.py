"""Runs ordinary functions of a test file on every rank of a real job, and shows which rank failed and how.

def body(scale):                          # a module-level function; runs on every rank
    rank = torch.distributed.get_rank()
    ...
    return rank * scale                   # anything that pickles

def test_pooled(ranks):                   # a standing torchrun job, shared by all tests: milliseconds a body
    assert ranks(8).run(body, 2) == [0, 2, 4, 6, 8, 10, 12, 14]

def test_on_gpus():                       # ranks that have GPUs find theirs with harness.device(): here two share one
    ranks(4, gpus=2).run(body, 2)

def test_own_job():                       # a job of its own, ended afterwards: seconds under torchrun
    run_ranks(8, body, 2, launcher="mpiexec", env={"FUSEDCOMM_DEBUG": "1"}, timeout=30)
"""

from harness.group import DEAD, LAUNCHERS, RankFailure, RankGroup, RankPool, run_ranks
from harness.worker import device

__all__ = ["DEAD", "LAUNCHERS", "RankFailure", "RankGroup", "RankPool", "device", "run_ranks"]
