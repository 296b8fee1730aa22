"""The backends behind the tests of the sampling ops."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from sampling_bodies import BACKENDS, SamplingOps, backends


@pytest.fixture(scope="module", params=BACKENDS)
def ops(request: pytest.FixtureRequest) -> Iterator[SamplingOps]:
    """fusedcomm.ops.sampling on one backend: CPU tensors in and out."""
    with backends(request.param) as found:
        yield found


@pytest.fixture(scope="module")
def interpreted_ops() -> Iterator[SamplingOps]:
    """The same on Triton's interpreter; each call is one of the op, into a result that held something else."""
    with backends("triton") as found:
        yield found
