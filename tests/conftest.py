"""What every test shares: a clean environment, the standing jobs of ranks, and the reasons to skip."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

# The settings and rank facts of whoever starts the tests must not steer them.
_STEERING = (
    "FUSEDCOMM_",
    "TORCHELASTIC_",
    "SLURM_",
    "PMI_",
    "OMPI_",
    "RANK",
    "WORLD_SIZE",
    "LOCAL_",
    "MASTER_",
)
for _name in [name for name in os.environ if name.startswith(_STEERING)]:
    del os.environ[_name]
# Ranks and xdist workers share a few cores; a thread pool in each would only get in the way.
os.environ["OMP_NUM_THREADS"] = "1"
sys.path.insert(0, str(Path(__file__).parent))

import pytest
from harness import RankPool
from hypothesis import HealthCheck, settings

# A busy machine makes single examples slow; that is no finding.
settings.register_profile(
    "fusedcomm",
    deadline=None,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
settings.load_profile("fusedcomm")


@pytest.fixture(scope="session")
def ranks() -> Iterator[RankPool]:
    """Standing torchrun jobs: ranks(8).run(body, *args) runs a module-level function on 8 ranks."""
    pool = RankPool()
    try:
        yield pool
    finally:
        pool.close()


@pytest.fixture(scope="session")
def mpiexec() -> str:
    """The mpiexec that belongs to this Python; skips the test where there is none."""
    from harness.launch import mpiexec_path

    pytest.importorskip("mpi4py", reason="needs mpi4py: pip install fusedcomm[mpi]")
    path = mpiexec_path()
    if path is None:
        pytest.skip("needs mpiexec beside this Python: pip install fusedcomm[mpi]")
    return path


def pytest_addoption(parser: pytest.Parser) -> None:
    """Options of tests/gpu; launch/test --gpu passes them on."""
    group = parser.getgroup("tests/gpu")
    group.addoption("--gpus", type=int, help="use this many GPUs (default: all there are)")
    group.addoption("--worlds", help="these only, as ranks/GPUs: 4/4,8/4")
    group.addoption("--on-cpu", action="store_true", help="run on CPU ranks what does not need a GPU (tests the tests)")


def pytest_configure(config: pytest.Config) -> None:
    """Also: a run started in the background ignores SIGINT, and so would every rank that inherits it."""
    config.addinivalue_line("markers", "smoke: the core of tests/gpu, in a minute")
    config.addinivalue_line("markers", "worlds(which): on which jobs of ranks a GPU test runs (tests/gpu/conftest.py)")
    config.addinivalue_line("markers", "needs_cuda: cannot run on CPU ranks (--on-cpu)")
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
