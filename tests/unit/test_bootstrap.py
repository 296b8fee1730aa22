"""Rank facts from what launchers leave in the environment."""

from __future__ import annotations

import builtins
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fusedcomm import FusedCommError
from fusedcomm.groups import bootstrap
from fusedcomm.groups.bootstrap import RankFacts, detect, first_host, slurm_rendezvous

TORCHRUN = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "MASTER_ADDR": "h", "MASTER_PORT": "1"}
SLURM = {
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_NTASKS": "6",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_ID": "2",
    "SLURM_JOB_ID": "77",
    "SLURM_STEP_NODELIST": "node[03-04]",
}


class FakeComm:
    """COMM_WORLD of a job of seven where this is rank 6, the third of its host."""

    def Get_rank(self) -> int:
        return 6

    def Get_size(self) -> int:
        return 7


@pytest.fixture
def mpi(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bootstrap, "_mpi_world", FakeComm)
    monkeypatch.setattr(bootstrap, "_mpi_local_rank", lambda comm: 2)


def test_alone() -> None:
    assert detect({}) == RankFacts("alone", 0, 1, 0)


def test_torchrun() -> None:
    assert detect(TORCHRUN) == RankFacts("torchrun", 5, 8, 1)


def test_torchrun_variables_win_over_the_scheduler_around_them(mpi: None) -> None:
    assert detect({**SLURM, **TORCHRUN, "PMI_RANK": "0"}).launcher == "torchrun"


def test_rank_and_world_size_suffice() -> None:
    assert detect({"RANK": "2", "WORLD_SIZE": "3"}) == RankFacts("torchrun", 2, 3, 2)


@pytest.mark.parametrize(
    "variables",
    [
        {"PMI_RANK": "0", "PMI_SIZE": "7"},  # MPICH, Intel MPI
        {"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "7"},  # Open MPI
        {"PMIX_RANK": "0"},  # anything over PMIx
    ],
)
def test_mpi_facts_come_from_mpi_itself(mpi: None, variables: dict[str, str]) -> None:
    assert detect(variables) == RankFacts("mpi", 6, 7, 2)


def test_mpirun_without_mpi4py_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *args: Any) -> Any:
        if name.startswith("mpi4py"):
            raise ImportError("no mpi4py here")
        return real(name, *args)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(FusedCommError, match=r"mpi4py.*pip install 'fusedcomm\[mpi\]'"):
        detect({"PMI_RANK": "0", "PMI_SIZE": "2"})


def test_srun_step() -> None:
    assert detect(SLURM) == RankFacts("slurm", 3, 4, 1)


def test_a_slurm_batch_script_is_one_process() -> None:
    """SLURM_PROCID and SLURM_NTASKS are set there too; only srun sets a step."""
    batch = {name: text for name, text in SLURM.items() if not name.startswith("SLURM_STEP")}
    assert detect(batch) == RankFacts("alone", 0, 1, 0)


@pytest.mark.parametrize("plugin", [{"PMIX_RANK": "3"}, {"PMI_RANK": "3", "PMI_SIZE": "4"}])
def test_srun_with_an_mpi_plugin_needs_no_mpi(monkeypatch: pytest.MonkeyPatch, plugin: dict[str, str]) -> None:
    """srun's default plugin (pmix, pmi2) sets MPI variables for every program, also one that has no MPI."""

    def no_mpi() -> None:
        raise FusedCommError("started by mpirun, but mpi4py is not installed")

    monkeypatch.setattr(bootstrap, "_mpi_world", no_mpi)
    assert detect({**SLURM, **plugin}) == RankFacts("slurm", 3, 4, 1)


def test_mpiexec_inside_a_slurm_step_is_mpi(mpi: None) -> None:
    """Hydra starts its proxies with srun, one a node: its ranks see the proxies' step."""
    proxies = {**SLURM, "SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1", "PMI_RANK": "6", "PMI_SIZE": "7"}
    assert detect(proxies).launcher == "mpi"


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        ({"RANK": "8", "WORLD_SIZE": "8"}, r"torchrun: expected a rank between 0 and 7, got 8"),
        ({"RANK": "-1", "WORLD_SIZE": "8"}, r"expected a rank between 0 and 7, got -1"),
        ({"RANK": "x", "WORLD_SIZE": "8"}, r"RANK: expected a whole number, got 'x'"),
        ({"RANK": "0", "WORLD_SIZE": ""}, r"WORLD_SIZE: expected a whole number, got ''"),
        ({**SLURM, "SLURM_PROCID": "4"}, r"slurm: expected a rank between 0 and 3, got 4"),
        ({**SLURM, "SLURM_LOCALID": "one"}, r"SLURM_LOCALID: expected a whole number, got 'one'"),
    ],
)
def test_variables_that_make_no_sense(environ: dict[str, str], message: str) -> None:
    with pytest.raises(FusedCommError, match=message):
        detect(environ)


# ---- where a Slurm step meets ----


@pytest.mark.parametrize(
    ("nodelist", "first"),
    [
        ("node1", "node1"),
        ("node1,node2", "node1"),
        ("node[03-10,12],gpu1", "node03"),
        ("node[7]", "node7"),
        ("node[007,9-11]", "node007"),
        ("gpu-a[1-2].cluster.example,login", "gpu-a1.cluster.example"),
        ("rack[0-63]_blade[2-41]", "rack0_blade2"),
        ("  node5 ", "node5"),
        ("10.0.0.1", "10.0.0.1"),
    ],
)
def test_the_first_host_of_a_list(nodelist: str, first: str) -> None:
    assert first_host(nodelist) == first


@pytest.mark.parametrize("nodelist", ["", "   ", ",node1"])
def test_a_host_list_without_a_host(nodelist: str) -> None:
    with pytest.raises(FusedCommError, match="SLURM_STEP_NODELIST: expected a host list, got"):
        first_host(nodelist)


def test_master_variables_win() -> None:
    assert slurm_rendezvous({**SLURM, "MASTER_ADDR": "boss", "MASTER_PORT": "4242"}) == ("boss", 4242)


@given(job=st.integers(0, 2**31), step=st.integers(0, 1000))
def test_every_rank_finds_the_same_port_outside_the_ephemeral_range(job: int, step: int) -> None:
    environ = {**SLURM, "SLURM_JOB_ID": str(job), "SLURM_STEP_ID": str(step)}
    host, port = slurm_rendezvous(environ)
    assert host == "node03"
    assert 1024 <= port < 32768
    assert slurm_rendezvous({**environ, "SLURM_PROCID": "0"}) == (host, port)


def test_steps_side_by_side_get_different_ports() -> None:
    ports = {slurm_rendezvous({**SLURM, "SLURM_STEP_ID": str(step)})[1] for step in range(20)}
    assert len(ports) == 20
