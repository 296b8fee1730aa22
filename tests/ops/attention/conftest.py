"""The Triton backend behind the tests of its kernels."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator

import pytest
from qk_bodies import triton_backends
from triton_backend import TritonOps


@pytest.fixture(scope="module", params=["interpreter", "gpu"])
def triton_ops(request: pytest.FixtureRequest) -> Iterator[TritonOps]:
    """Runs module-level functions where Triton serves the attention ops."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("Triton is not installed")
    with triton_backends(request.param) as found:
        yield found
