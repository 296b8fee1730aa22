"""A PartialSum must not pass for a tensor anywhere."""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable, Iterator
from dataclasses import FrozenInstanceError
from typing import Any

import pytest
import torch

from fusedcomm import GroupCoordinator
from fusedcomm.layers import BlockFP8Linear, PartialSum, RMSNorm, UnreducedSumError
from fusedcomm.layers.local_linear import UnquantizedLinear


@pytest.fixture
def partial() -> Iterator[PartialSum]:
    with GroupCoordinator() as group:
        yield PartialSum(torch.randn(4, 128), group)


X = torch.randn(4, 128)
USES: dict[str, Callable[[Any], Any]] = {
    "p + x": lambda p: p + X,
    "x + p": lambda p: X + p,
    "p * 2": lambda p: p * 2,
    "2 * p": lambda p: 2 * p,
    "x -= p": lambda p: operator.isub(X.clone(), p),
    "p += x": lambda p: operator.iadd(p, X),
    "p @ x.T": lambda p: p @ X.T,
    "x @ p": lambda p: X @ p,
    "-p": lambda p: -p,
    "abs": abs,
    "p ** 2": lambda p: p**2,
    "p == x": lambda p: p == X,
    "p < x": lambda p: p < X,
    "p[0]": lambda p: p[0],
    "p[0] = 1": lambda p: operator.setitem(p, 0, 1),
    "x[p]": lambda p: X[p],
    "len": len,
    "iter": list,
    "unpack": lambda p: [*p],
    "bool": bool,
    "float": float,
    "in": lambda p: 1.0 in p,
    "torch.add": lambda p: torch.add(X, p),
    "torch.cat": lambda p: torch.cat([X, p]),
    "torch.stack": lambda p: torch.stack([p, p]),
    "torch.nn.functional.linear": lambda p: torch.nn.functional.linear(p, X),
    "p.view": lambda p: p.view(-1),
    "p.shape": lambda p: p.shape,
    "p.to": lambda p: p.to(torch.float32),
    "p.dtype": lambda p: p.dtype,
    "x.copy_": lambda p: X.clone().copy_(p),
    "numpy": lambda p: __import__("numpy").asarray(p),
    "RMSNorm": lambda p: RMSNorm(128)(p),
    "RMSNorm with residual": lambda p: RMSNorm(128)(p, X),
    "RMSNorm with quantisation": lambda p: RMSNorm(128).forward_quant_per_group(p),
    "linear": lambda p: UnquantizedLinear(128, 8)(p),
    "FP8 linear": lambda p: BlockFP8Linear(128, 8)(p),
}


@pytest.mark.parametrize("use", USES.values(), ids=USES.keys())
def test_use_as_a_tensor_says_to_reduce(partial: PartialSum, use: Callable[[Any], Any]) -> None:
    with pytest.raises(TypeError, match=r"\.reduce\(\)"):
        use(partial)


def test_it_is_no_tensor_and_asking_so_is_no_error(partial: PartialSum) -> None:
    assert not isinstance(partial, torch.Tensor)
    assert not hasattr(partial, "shape")
    assert getattr(partial, "dtype", None) is None
    assert len({partial, partial}) == 1
    assert copy.copy(partial).tensor is partial.tensor
    with pytest.raises(AttributeError, match="has no attribute 'nonsense'"):
        _ = partial.nonsense


def test_it_cannot_change(partial: PartialSum) -> None:
    with pytest.raises(FrozenInstanceError):
        partial.tensor = X  # type: ignore[misc]


def test_reduce_at_world_size_1_is_the_tensor(partial: PartialSum) -> None:
    torch.testing.assert_close(partial.reduce(), partial.tensor, rtol=0, atol=0)


def test_the_error_is_public() -> None:
    assert issubclass(UnreducedSumError, TypeError)
