"""The backends behind the tests of the verification ops."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from sampling_bodies import runners
from triton_backend import TritonOps


@pytest.fixture(scope="module", params=["torch", "native", "native-gpu", "triton-gpu"])
def ops(request: pytest.FixtureRequest) -> Iterator[TritonOps]:
    """Runs module-level functions where this backend serves the verification ops."""
    with runners(request.param) as found:
        yield found


@pytest.fixture(scope="module")
def interpreted_ops() -> Iterator[TritonOps]:
    """The same where Triton's interpreter serves them."""
    with runners("triton") as found:
        yield found
