"""Bad input is refused before anything is sent: on one rank alone, with argument, expected and got; no peer notices."""

from __future__ import annotations

import gc
import multiprocessing
import os
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from harness import RankPool
from ranked import bits, check_all_reduce, raises, works

import fusedcomm
from fusedcomm import AddRMSNorm, AddRMSNormQuant, GroupClosedError, GroupCoordinator, ScaleLayout, Settings

X = torch.ones(4, 256, dtype=torch.bfloat16)
W = torch.ones(256, dtype=torch.bfloat16)
Call = Callable[..., Any]
Cases = list[tuple[dict[str, Any], tuple[str, ...]]]  # arguments, and parts of the message


def sums(group: GroupCoordinator) -> dict[str, Call]:
    return {"all_reduce": lambda x=X, **o: group.all_reduce(x, **o)}


def norms(group: GroupCoordinator) -> dict[str, Call]:
    """Every way to call an operation that norms, with good arguments by default."""
    quant: dict[str, Any] = {"emit_bf16": True}
    return {
        "allreduce_rmsnorm": lambda x=X, r=X, w=W, eps=1e-6, **o: group.allreduce_rmsnorm(x, r, w, eps, **o),
        "fused_allreduce_rmsnorm": lambda x=X, r=X, w=W, eps=1e-6, **o: group.fused_allreduce_rmsnorm(
            x, r, w, eps, **o
        ),
        "allreduce_rmsnorm_quant": lambda x=X, r=X, w=W, eps=1e-6, **o: group.allreduce_rmsnorm_quant(
            x, r, w, eps, **{**quant, **o}
        ),
        "fused_allreduce_rmsnorm_quant_per_group": lambda x=X, r=X, w=W, eps=1e-6, **o: (
            group.fused_allreduce_rmsnorm_quant_per_group(x, r, w, eps, **{**quant, **o})
        ),
        "function": lambda x=X, r=X, w=W, eps=1e-6, **o: fusedcomm.allreduce_rmsnorm(x, r, w, eps, group=group, **o),
    }


META = X.to("meta")
X_CASES: Cases = [
    ({"x": X.double()}, ("x: expected dtype bfloat16, float16 or float32", "got torch.float64")),
    ({"x": X.int()}, ("x: expected dtype", "got torch.int32")),
    ({"x": META}, ("x: expected a tensor on cpu", "got meta")),
    ({"x": torch.tensor(1.0)}, ("x: expected at least one dimension", "got a scalar")),
    ({"x": [1.0]}, ("x: expected a torch.Tensor", "got list")),
    ({"x": None}, ("x: expected a torch.Tensor", "got NoneType")),
    ({"x": X.to_sparse()}, ("x: expected a dense tensor", "got torch.sparse_coo")),
]
OUT_CASES: Cases = [
    ({"out": torch.empty(4, 255, dtype=torch.bfloat16)}, ("out: expected shape (4, 256) like x", "got (4, 255)")),
    ({"out": torch.empty(2, 2, 256, dtype=torch.bfloat16)}, ("out: expected shape (4, 256)", "got (2, 2, 256)")),
    ({"out": torch.empty(4, 256)}, ("out: expected dtype torch.bfloat16 like x", "got torch.float32")),
    ({"out": META}, ("out: expected device cpu like x", "got meta")),
    (
        {"out": torch.empty(256, 4, dtype=torch.bfloat16).t()},
        ("out: expected a contiguous tensor", "got strides (1, 4)"),
    ),
    ({"out": 3}, ("out: expected a torch.Tensor", "got int")),
]
NORM_CASES: Cases = [
    ({"r": X[:3]}, ("residual: expected shape (4, 256) like x", "got (3, 256)")),
    ({"r": X.view(2, 2, 256)}, ("residual: expected shape (4, 256)", "got (2, 2, 256)")),
    ({"r": X.view(256, 4)}, ("residual: expected shape (4, 256)", "got (256, 4)")),
    ({"r": X.half()}, ("residual: expected dtype torch.bfloat16 like x", "got torch.float16")),
    ({"r": META}, ("residual: expected device cpu", "got meta")),
    ({"r": 0.0}, ("residual: expected a torch.Tensor", "got float")),
    ({"w": W[:255]}, ("weight: expected shape (256,)", "got (255,)")),
    ({"w": W.view(1, 256)}, ("weight: expected shape (256,)", "got (1, 256)")),
    ({"w": W.view(2, 128)}, ("weight: expected shape (256,)", "got (2, 128)")),
    ({"w": W.half()}, ("weight: expected dtype torch.bfloat16 or torch.float32", "got torch.float16")),
    ({"w": W.double()}, ("weight: expected dtype", "got torch.float64")),
    ({"w": W.to("meta")}, ("weight: expected device cpu", "got meta")),
    ({"w": None}, ("weight: expected shape (256,)", "got NoneType")),
    ({"eps": -1e-6}, ("eps: expected a finite number >= 0", "got -1e-06")),
    ({"eps": float("nan")}, ("eps: expected a finite number >= 0", "got nan")),
    ({"eps": float("inf")}, ("eps: expected a finite number >= 0", "got inf")),
    ({"weight_bias": float("nan")}, ("weight_bias: expected a finite number", "got nan")),
    ({"weight_bias": float("inf")}, ("weight_bias: expected a finite number", "got inf")),
    (
        {"x": torch.ones(4, 0), "r": None, "w": torch.ones(0)},
        ("x: expected a last dimension between 1 and 32768", "got 0"),
    ),
    (
        {"x": torch.ones(1, 32769), "r": None, "w": torch.ones(32769)},
        ("x: expected a last dimension between 1 and 32768", "got 32769"),
    ),
]
WIDE = torch.ones(2, 320)
QUANT_CASES: Cases = [
    ({"group_size": 100}, ("group_size: expected one of (32, 64, 128, 256)", "got 100")),
    ({"group_size": 0}, ("group_size: expected one of", "got 0")),
    ({"group_size": 512}, ("group_size: expected one of", "got 512")),
    ({"x": WIDE, "r": None, "w": torch.ones(320)}, ("group_size: expected a divisor of H = 320", "got 128")),
    ({"x": WIDE, "r": None, "w": torch.ones(320), "group_size": 256}, ("divisor of H = 320", "got 256")),
    ({"scale_layout": "row_major"}, ("scale_layout: expected a ScaleLayout", "got 'row_major'")),
    ({"scale_layout": None}, ("scale_layout: expected a ScaleLayout", "got None")),
]

BASE = torch.empty(8, 256, dtype=torch.bfloat16)
ROW, COLUMN = ScaleLayout.ROW_MAJOR, ScaleLayout.COLUMN_MAJOR
FP8, SCALE = torch.empty(4, 256, dtype=torch.float8_e4m3fn), torch.empty(4, 2)


def rows() -> torch.Tensor:
    return torch.empty_like(X)


def into(**fields: Any) -> dict[str, Any]:
    """An out that is right but for these fields."""
    right = {"fp8": FP8, "scale": SCALE, "residual": rows(), "norm": rows(), "scale_layout": ROW}
    return {"out": AddRMSNormQuant(**{**right, **fields})}


# those that are like x: of both operations
ROWS_OUT_CASES: list[tuple[dict[str, Any], tuple[str, ...]]] = [
    *(
        ({name: arguments["out"]}, tuple(part.replace("out:", f"out.{name}:") for part in parts))
        for name in ("norm", "residual")
        for arguments, parts in OUT_CASES
    ),
    ({"norm": None, "residual": None}, ("out.residual: expected a torch.Tensor", "got NoneType")),
    ({"norm": BASE[:4], "residual": BASE[2:6]}, ("out.norm: expected memory apart from out.residual",)),
    ({"norm": BASE[:4], "residual": BASE[:4]}, ("out.norm: expected another tensor than out.residual",)),
]
# x and the residual are BASE[2:6] and [4:8]
OVERLAPS: list[tuple[dict[str, Any], tuple[str, ...]]] = [
    ({"norm": BASE[:4]}, ("out.norm: expected x itself, or memory apart from it", "overlaps x")),
    ({"residual": BASE[1:5]}, ("out.residual: expected x itself", "overlaps x")),
]
QUANT_OUT_CASES: Cases = [
    (into(fp8=torch.empty(4, 255, dtype=torch.float8_e4m3fn)), ("out.fp8: expected shape (4, 256)", "got (4, 255)")),
    (into(fp8=FP8.view(2, 2, 256)), ("out.fp8: expected shape (4, 256)", "got (2, 2, 256)")),
    (into(fp8=FP8.view(torch.uint8)), ("out.fp8: expected", "torch.float8_e4m3fn", "torch.uint8")),
    (into(fp8=FP8.view(torch.float8_e4m3fnuz)), ("out.fp8: expected", "float8_e4m3fnuz")),
    (into(fp8=FP8.to("meta")), ("out.fp8: expected", "on meta")),
    (into(fp8=None), ("out.fp8: expected a torch.Tensor", "got NoneType")),
    (into(scale=torch.empty(4, 3)), ("out.scale: expected shape (4, 2)", "got (4, 3)")),
    (into(scale=torch.empty(4, 2, dtype=torch.int32)), ("out.scale: expected", "torch.float32", "torch.int32")),
    (into(scale=torch.empty(2, 4).t()), ("out.scale: expected", "strides (2, 1)", "(1, 4)")),
    (into(scale=SCALE.t().contiguous().t(), scale_layout=COLUMN), ("out.scale_layout: expected", "COLUMN_MAJOR")),
    ({**into(scale_layout=COLUMN), "scale_layout": COLUMN}, ("out.scale: expected", "strides (1, 4)", "(2, 1)")),
    ({**into(scale_layout=COLUMN), "scale_layout": ScaleLayout.UE8M0_PACKED}, ("out.scale_layout: expected",)),
    (into(norm=None), ("out.norm: expected a tensor exactly if emit_bf16", "got None")),
    ({**into(), "emit_bf16": False}, ("out.norm: expected a tensor exactly if emit_bf16", "got a tensor")),
    (into(fp8=BASE.view(torch.float8_e4m3fn)[:2].view(4, 256), norm=BASE[:4]), ("out.fp8: expected memory apart",)),
    (into(scale=BASE[1].view(torch.float32)[:8].view(4, 2), norm=BASE[:4]), ("out.scale: expected memory apart",)),
    (into(fp8=X.view(torch.float8_e4m3fn)[:2].view(4, 256)), ("out.fp8: expected memory apart from x",)),
    (into(scale=SCALE, fp8=SCALE.new_empty(256).view(torch.float8_e4m3fn).view(4, 256), residual=W), ("out.residual",)),
    ({"out": AddRMSNorm(rows(), rows())}, ("out: expected an AddRMSNormQuant", "got AddRMSNorm")),
    ({"out": (FP8, SCALE, rows(), None)}, ("out: expected an AddRMSNormQuant", "got tuple")),
]
NORM_OUT_CASES: Cases = [
    ({"out": (rows(), rows())}, ("out: expected an AddRMSNorm, got tuple",)),
    ({"out": rows()}, ("out: expected an AddRMSNorm, got Tensor",)),
    ({"out": into()["out"]}, ("out: expected an AddRMSNorm, got AddRMSNormQuant",)),
]


def fused_out_cases(name: str) -> Cases:
    """Those of an operation of ``norms``."""
    quant = "quant" in name
    cases = list(QUANT_OUT_CASES if quant else NORM_OUT_CASES)
    read = {"x": BASE[2:6], "r": BASE[4:8]}
    for given, known in ((ROWS_OUT_CASES, {}), (OVERLAPS, read)):
        for fields, parts in given:
            if quant:
                cases.append(({**into(**fields), **known, "emit_bf16": fields.get("norm", 1) is not None}, parts))
            else:
                out = AddRMSNorm(**{"norm": rows(), "residual": rows(), **fields})
                if out.norm is not None:
                    cases.append(({"out": out, **known}, parts))
    return cases


SETTINGS = {
    "fused": Settings(),
    "staged": Settings(disable_fused_ar_norm=True, disable_fused_ar_quant=True),
    "process_group": Settings(disable=True, deterministic=True),
    "debug": Settings(debug=True),
}


def norms_counted(group: GroupCoordinator) -> int:
    return sum(n for name, n in group.stats().items() if "rmsnorm" in name)


def every_bad_argument(settings: Settings) -> None:
    """First before any good call of these shapes, then after it: a call that was checked once is checked again."""
    with GroupCoordinator(settings=settings) as group:
        good, counted = {**sums(group), **norms(group)}, 0
        for _ in range(2):
            cases = [(name, call, case) for name, call in good.items() for case in X_CASES]
            cases += [(name, call, case) for name, call in sums(group).items() for case in OUT_CASES]
            cases += [(name, call, case) for name, call in norms(group).items() for case in NORM_CASES]
            cases += [
                (name, call, case) for name, call in norms(group).items() if "quant" in name for case in QUANT_CASES
            ]
            cases += [(name, call, case) for name, call in norms(group).items() for case in fused_out_cases(name)]
            for number, (name, call, (arguments, parts)) in enumerate(cases):
                if group.rank == number % group.world_size:
                    try:
                        raises(ValueError, lambda call=call, arguments=arguments: call(**arguments), *parts)
                    except BaseException as error:
                        shown = {
                            k: v if not isinstance(v, torch.Tensor) else tuple(v.shape) for k, v in arguments.items()
                        }
                        raise AssertionError(f"{name} with {shown}") from error
                if number % 20 == 0:
                    works(group)
            works(group)
            assert norms_counted(group) == counted, "what was refused has been counted"
            for call in good.values():
                call()
            counted = norms_counted(group)


@pytest.mark.parametrize("name", SETTINGS)
def test_every_bad_argument_on_one_rank(ranks: RankPool, name: str) -> None:
    ranks(3).run(every_bad_argument, SETTINGS[name])


def by_all_ranks() -> None:
    """The same bad call on all ranks: the same error on all, and the next call works."""
    with GroupCoordinator() as group:
        for arguments, parts in X_CASES:
            raises(ValueError, lambda arguments=arguments: group.all_reduce(**arguments), *parts)
        for arguments, parts in NORM_CASES:
            raises(ValueError, lambda arguments=arguments: norms(group)["allreduce_rmsnorm"](**arguments), *parts)
        for name, call in norms(group).items():
            for arguments, parts in fused_out_cases(name):
                raises(ValueError, lambda call=call, arguments=arguments: call(**arguments), *parts)
        works(group)
        assert "open" in repr(group)


def test_bad_arguments_on_all_ranks(ranks: RankPool) -> None:
    ranks(2).run(by_all_ranks)


def bad_for_one() -> None:
    with GroupCoordinator() as group:
        for arguments, parts in X_CASES:
            raises(ValueError, lambda arguments=arguments: group.all_reduce(**arguments), *parts)
        for arguments, parts in OUT_CASES:
            raises(ValueError, lambda arguments=arguments: group.all_reduce(X, **arguments), *parts)
        for name, call in norms(group).items():
            for arguments, parts in [*NORM_CASES, *fused_out_cases(name)]:
                raises(ValueError, lambda call=call, arguments=arguments: call(**arguments), *parts)
        works(group)


def test_bad_arguments_at_world_size_one() -> None:
    bad_for_one()


def odd_but_good() -> None:
    """What looks wrong and is documented to work."""
    with GroupCoordinator() as group:
        x = torch.ones(4, 256, dtype=torch.bfloat16, requires_grad=True)
        weight = torch.nn.Parameter(torch.ones(256, dtype=torch.bfloat16))
        assert group.allreduce_rmsnorm(x, X, weight, 0.0).norm.shape == x.shape  # eps may be 0
        assert group.allreduce_rmsnorm(X, X, torch.ones(256), 1).norm.dtype is torch.bfloat16  # an int; an fp32 weight
        with torch.inference_mode():
            result = group.allreduce_rmsnorm_quant(torch.ones(4, 256), torch.ones(4, 256), torch.ones(256), 1e-6)
        assert result.scale_layout is ScaleLayout.ROW_MAJOR
        with torch.no_grad():
            group.all_reduce(x)
        many = torch.ones(1, 2, 1, 2, 1, 2, 1, 2, 1, 2, 1, 2, 1, 2, 1, 2, 3)
        assert group.all_reduce(many).shape == many.shape
        shared = torch.ones(4, 256)
        same = group.allreduce_rmsnorm(shared, shared, torch.ones(256), 1e-6)  # x is its own residual
        assert (same.residual == group.world_size + 1).all()
        assert (shared == 1).all()


def test_odd_but_good_arguments(ranks: RankPool) -> None:
    ranks(2).run(odd_but_good)


# ---- closed, forked, two threads ----


def closed() -> None:
    group = GroupCoordinator()
    works(group)
    dist.barrier()
    group.close()
    calls = [*sums(group).values(), *norms(group).values(), group.barrier, lambda: group.all_gather(X)]
    for call in [*calls, lambda: group.reduce_scatter(torch.ones(6, 2)), lambda: group.broadcast(X)]:
        raises(GroupClosedError, call, "closed")
    assert group.closed
    assert group.rank == dist.get_rank()  # who it was can still be asked
    group.stats()
    with GroupCoordinator() as another:
        works(another)


def test_use_after_close(ranks: RankPool) -> None:
    ranks(3).run(closed)


def in_child(body: Callable[[], None]) -> int:
    """Exit status of a forked child that runs body, then its exit handlers, as sys.exit would."""
    pid = os.fork()
    if pid == 0:
        import atexit
        import traceback

        status = 1
        try:
            body()
            gc.collect()
            atexit._run_exitfuncs()
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.kill(pid, 9)
    os.waitpid(pid, 0)
    raise AssertionError("the child hangs")


def forked() -> None:
    """A child's calls are refused, and whatever it does with the group its parent and the peers never notice."""
    holder = [GroupCoordinator()]
    group = holder[0]
    works(group)

    def use() -> None:
        for call in [*sums(group).values(), *norms(group).values(), group.barrier]:
            raises(GroupClosedError, call, "fork")

    def close() -> None:
        group.close()
        group.close()

    def leave() -> None:
        pass

    for body in (use, close, leave):
        assert in_child(body) == 0, body.__name__
        works(group)
    with GroupCoordinator() as another:
        works(another)

    child = multiprocessing.get_context("fork").Process(target=use)
    child.start()
    child.join(30)
    assert child.exitcode == 0
    works(group)
    group.close()


def dropped_in_a_child() -> None:
    holder = [GroupCoordinator()]
    works(holder[0])
    assert in_child(holder.clear) == 0  # the last reference goes, and the garbage is collected
    works(holder[0])
    holder[0].close()


def child_uses_its_own() -> None:
    """A forked child may make groups: of itself alone here."""
    group = GroupCoordinator()
    works(group)

    def alone() -> None:
        with GroupCoordinator([dist.get_rank()]) as own:
            works(own)

    assert in_child(alone) == 0
    works(group)
    group.close()


@pytest.mark.parametrize("body", [forked, dropped_in_a_child, child_uses_its_own])
def test_use_after_fork(ranks: RankPool, body: Callable[[], None]) -> None:
    ranks(3).run(body)


def two_threads(settings: Settings) -> None:
    """The second thread is refused at once, the first one's call completes, and the group goes on."""
    with GroupCoordinator(settings=settings) as group:
        works(group)
        if group.rank == 1:
            time.sleep(1.0)
            check_all_reduce(group, 1, (4, 256), torch.float32)
        else:
            results: list[Any] = []

            def first() -> None:
                results.append(check_all_reduce(group, 1, (4, 256), torch.float32))

            thread = threading.Thread(target=first)
            thread.start()
            time.sleep(0.3)  # by now it waits for rank 1
            start = time.monotonic()
            refused: list[tuple[str, Call]] = [
                ("all_reduce", lambda: group.all_reduce(X)),
                ("barrier", group.barrier),
                ("all_gather", lambda: group.all_gather(X)),
                ("allreduce_rmsnorm", lambda: group.allreduce_rmsnorm(X, X, W, 1e-6)),
                ("close", group.close),
            ]
            for name, call in refused:
                raises(RuntimeError, call, name, "another thread")
            assert time.monotonic() - start < 0.6
            thread.join(20)
            assert len(results) == 1
        works(group)
        # one after another, any thread may use it
        thread = threading.Thread(target=works, args=(group,))
        thread.start()
        thread.join(20)
        works(group)


@pytest.mark.parametrize("name", ["fused", "process_group"])
def test_two_threads_at_once(ranks: RankPool, name: str) -> None:
    ranks(3).run(two_threads, SETTINGS[name])


def a_group_a_thread() -> None:
    """Two groups in two threads at once are no problem."""
    first, second = GroupCoordinator(), GroupCoordinator()
    failures: list[BaseException] = []

    def work(group: GroupCoordinator, seed: int) -> None:
        try:
            for call in range(100):
                check_all_reduce(group, seed + call, (3, 200), torch.float32)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(g, s)) for g, s in ((first, 1000), (second, 2000))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(50)
    if failures:
        raise failures[0]
    assert bits(first.all_reduce(X)) == bits(second.all_reduce(X))
    first.close()
    second.close()


def test_two_groups_in_two_threads(ranks: RankPool) -> None:
    ranks(3).run(a_group_a_thread)
