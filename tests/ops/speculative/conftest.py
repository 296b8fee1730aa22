"""The backends behind the tests of the verification ops."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from speculative_bodies import BACKENDS, backends
from triton_backend import TritonOps


@pytest.fixture(scope="module", params=BACKENDS)
def ops(request: pytest.FixtureRequest) -> Iterator[TritonOps]:
    """Runs module-level functions where this backend serves the verification ops."""
    with backends(request.param) as found:
        yield found
