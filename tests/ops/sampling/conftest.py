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
