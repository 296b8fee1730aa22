"""fused_qk_rmsnorm against fp64, against rms_norm to the bit, and its Triton kernel against that."""

from __future__ import annotations

from typing import Any

import pytest
import qk_bodies as bodies
import spec
import torch
from cases import DTYPES, KINDS, make
from qk_bodies import all_same, call, same, split
from torch._subclasses.fake_tensor import FakeTensorMode
from triton_backend import TritonOps

from fusedcomm.ops.attention import QK, fused_qk_rmsnorm

# (T, Hq, Hk, D): as many keys as queries, fewer, more; heads that fill no tile; dimensions that are no powers of two
SHAPES = [(5, 4, 4, 64), (3, 32, 8, 128), (2, 5, 3, 96), (2, 3, 7, 80), (1, 1, 1, 1), (4, 2, 1, 576), (7, 16, 1, 1024)]
# One rounding to the dtype; fp32 itself: a sum of D squares, a root, a quotient and two products.
TOLERANCE = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 2.0**-20}


def arguments(shape: tuple[int, int, int, int], dtype: torch.dtype, kind: str = "ordinary") -> tuple[Any, ...]:
    """q and k as views of one packed tensor, and weights of both dtypes."""
    rows, heads_q, heads_k, head_dim = shape
    q, k, _ = split(make(1, (rows, (heads_q + 2 * heads_k) * head_dim), dtype, kind), heads_q, heads_k, head_dim)
    weights = make(2, (head_dim,), dtype, "ordinary"), make(3, (head_dim,), torch.float32, "ordinary")
    return q, k, *weights


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_against_fp64(shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    q, k, q_weight, k_weight = arguments(shape, dtype)
    for bias in (0.0, 1.0):
        got = fused_qk_rmsnorm(q, k, q_weight, k_weight, 1e-5, weight_bias=bias)
        for x, weight, y in ((q, q_weight, got.q), (k, k_weight, got.k)):
            exact = x.double() / (x.double().square().mean(-1, keepdim=True) + 1e-5).sqrt() * (weight.double() + bias)
            assert y.dtype is dtype
            assert y.is_contiguous()
            assert ((y.double() - exact).abs() <= exact.abs() * TOLERANCE[dtype] + 1e-7).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_bits_of_rms_norm(dtype: torch.dtype, kind: str) -> None:
    q, k, q_weight, k_weight = arguments((6, 8, 2, 128), dtype, kind)
    got = fused_qk_rmsnorm(q, k, q_weight, k_weight, 1e-6, weight_bias=-0.5)
    for x, weight, y in ((q, q_weight, got.q), (k, k_weight, got.k)):
        spec.assert_same(y, spec.add_norm(spec.widen(x), None, weight, 1e-6, dtype, -0.5).norm)


def test_strided_views() -> None:
    """A packed qkv, heads before tokens, and a last dimension with a stride: the same as copies of them."""
    q_weight, k_weight = make(2, (64,), torch.bfloat16, "ordinary"), make(3, (64,), torch.bfloat16, "ordinary")
    packed = make(1, (6, 2, 8 * 64), torch.bfloat16, "ordinary")[:, 1]
    q, k, _ = split(packed, 4, 2, 64)
    across = make(4, (4, 6, 64), torch.bfloat16, "ordinary").transpose(0, 1)
    sparse = make(5, (6, 2, 64, 3), torch.bfloat16, "ordinary")[..., 1]
    for queries, keys in ((q, k), (across, k), (q, sparse)):
        assert not queries.is_contiguous()
        got = fused_qk_rmsnorm(queries, keys, q_weight, k_weight, 1e-6)
        want = fused_qk_rmsnorm(queries.contiguous(), keys.contiguous(), q_weight, k_weight, 1e-6)
        assert all_same(got, want)


def test_out_may_be_strided() -> None:
    q, k, q_weight, k_weight = arguments((5, 4, 2, 64), torch.bfloat16)
    want = fused_qk_rmsnorm(q, k, q_weight, k_weight, 1e-6)
    memory = torch.full((5, 9, 64), 7.0, dtype=torch.bfloat16)
    out = QK(memory[:, 1:5], memory[:, 6:8])
    assert fused_qk_rmsnorm(q, k, q_weight, k_weight, 1e-6, out=out) is out
    assert all_same(out, want)
    assert (memory[:, [0, 5, 8]] == 7).all()


def test_no_tokens() -> None:
    q, k, q_weight, k_weight = arguments((0, 4, 2, 64), torch.bfloat16)
    got = fused_qk_rmsnorm(q, k, q_weight, k_weight, 1e-6)
    assert (got.q.shape, got.k.shape) == ((0, 4, 64), (0, 2, 64))


def test_compile_without_graph_breaks() -> None:
    bodies.norm_compiles("cpu")


# ---- Triton ----


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [*SHAPES, (0, 4, 2, 64)])
def test_triton_to_the_bit(triton_ops: TritonOps, shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    given = arguments(shape, dtype)
    for bias in (0.0, 1.0, 0.0):
        got, _, _ = triton_ops.run(call, "fused_qk_rmsnorm", (*given, 1e-6), {"weight_bias": bias})
        assert all_same(got, fused_qk_rmsnorm(*given, 1e-6, weight_bias=bias))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_triton_of_every_kind_of_values(triton_ops: TritonOps, dtype: torch.dtype, kind: str) -> None:
    q, k, q_weight, k_weight = arguments((3, 4, 2, 96), dtype, kind)
    got, _, _ = triton_ops.run(call, "fused_qk_rmsnorm", (q, k, q_weight, k_weight, 0.0), {})
    for x, weight, y in ((q, q_weight, got.q), (k, k_weight, got.k)):
        spec.assert_same(y, spec.add_norm(spec.widen(x), None, weight, 0.0, dtype).norm)


def test_triton_writes_where_it_is_told(triton_ops: TritonOps) -> None:
    given = arguments((5, 4, 2, 96), torch.bfloat16)
    memory = torch.full((5, 9, 96), 7.0, dtype=torch.bfloat16)
    out = QK(memory[:, 1:5], memory[:, 6:8])
    got, _, _ = triton_ops.run(call, "fused_qk_rmsnorm", (*given, 1e-6), {"out": out})
    assert all_same(got, fused_qk_rmsnorm(*given, 1e-6))
    if triton_ops.device == "cpu":  # memory between the results comes back with them
        around = got.q._base if got.q._base is not None else got.q.as_strided((5, 9, 96), (9 * 96, 96, 1), 0)
        assert (around[:, [0, 5, 8]] == 7).all()


def test_triton_compiles_without_graph_breaks(triton_ops: TritonOps) -> None:
    triton_ops.run(bodies.norm_compiles)


# ---- refusals ----

Q, K = torch.ones(4, 8, 64), torch.ones(4, 2, 64)
W = torch.ones(64)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"q": 1}, r"q: expected a torch\.Tensor, got int"),
        ({"q": Q.long()}, r"q: expected dtype bfloat16, float16 or float32, got torch\.int64"),
        ({"q": Q[0]}, r"q: expected dimensions \[T, Hq, D\], got shape \(8, 64\)"),
        ({"q": Q[:, :0]}, r"q: expected at least one head, got shape \(4, 0, 64\)"),
        ({"q": torch.ones(1, 1, 1025)}, r"q: expected a head dimension between 1 and 1024, got 1025"),
        ({"q": torch.ones(4, 1, 0)}, r"q: expected a head dimension between 1 and 1024, got 0"),
        ({"k": K[:3]}, r"k: expected shape \(4, 2, 64\), got \(3, 2, 64\)"),
        ({"k": K[..., :32]}, r"k: expected shape \(4, 2, 64\), got \(4, 2, 32\)"),
        ({"k": K.half()}, r"k: expected dtype torch\.float32, got torch\.float16"),
        ({"k": K.to("meta")}, r"k: expected device cpu, got meta"),
        ({"k": K[:, :0]}, r"k: expected at least one head, got shape \(4, 0, 64\)"),
        ({"q_weight": W[:63]}, r"q_weight: expected shape \(64,\), got \(63,\)"),
        ({"k_weight": W.half()}, r"k_weight: expected dtype torch\.float32, got torch\.float16"),
        ({"k_weight": None}, r"k_weight: expected a torch\.Tensor, got NoneType"),
        ({"eps": -1.0}, r"eps: expected a finite number >= 0, got -1\.0"),
        ({"weight_bias": float("nan")}, r"weight_bias: expected a finite number, got nan"),
        ({"out": QK(Q.clone(), K[:3].clone())}, r"out\.k: expected shape \(4, 2, 64\), got \(3, 2, 64\)"),
        ({"out": QK(Q.half(), K.clone())}, r"out\.q: expected dtype torch\.float32, got torch\.float16"),
        ({"out": QK(Q, K.clone())}, r"out\.q: expected memory apart from q, got a tensor that overlaps q"),
        ({"out": QK(torch.ones(4, 8, 128)[..., ::2], K.clone())}, r"out\.q: expected a last dimension of stride 1"),
        ({"out": QK(torch.ones(1, 8, 64).expand(4, 8, 64), K.clone())}, r"out\.q: expected no stride of 0"),
    ],
)
def test_bad_input(bad: dict[str, Any], message: str) -> None:
    given: dict[str, Any] = {"q": Q, "k": K, "q_weight": W, "k_weight": W, "eps": 1e-6} | bad
    with pytest.raises(ValueError, match=message):
        fused_qk_rmsnorm(**given)


def test_results_of_one_shape_in_one_tensor() -> None:
    one = torch.empty(4, 2, 64)
    with pytest.raises(ValueError, match=r"out\.k: expected a tensor of its own"):
        fused_qk_rmsnorm(torch.ones(4, 2, 64), K, W, W, 1e-6, out=QK(one, one))


def test_same_tells_bits_apart() -> None:
    """What the tests above rest on."""
    assert not same(torch.tensor([0.0]), torch.tensor([-0.0]))
    assert same(torch.tensor([float("nan")]), torch.tensor([float("nan")]))


def test_fake_tensors_have_no_addresses_to_overlap() -> None:
    with FakeTensorMode():
        q, k, weight = torch.empty(3, 4, 64), torch.empty(3, 2, 64), torch.empty(64)
        out = QK(torch.empty_like(q), torch.empty_like(k))
        assert fused_qk_rmsnorm(q, k, weight, weight, 1e-6, out=out) is out
