"""``fusedcomm explain``: what a call would run on, from this machine and environment, without starting ranks.

Of a collective it is the plan that its ranks would follow, of an op of sampling or verification its backend.
"""

from __future__ import annotations

import argparse
import re
from typing import TYPE_CHECKING

from fusedcomm.cli.explain_sampling import SAMPLING_OPS, default_dtype, explain_sampling

if TYPE_CHECKING:
    import torch

    from fusedcomm.comm.plan import Plan

OPS = ("all_reduce", "allreduce_rmsnorm", "allreduce_rmsnorm_quant")
SHAPE_HELP = (
    "of each rank's x, T,H: 16,4096 or 16x4096; of probs or logits, B,V, for an op of sampling; of draft_probs, b,n,V "
    "(chain), target_probs, bs,D,V (dflash, tree) or candidates, bs,D (greedy) for one of verification"
)
DTYPE_HELP = (
    "of the same tensor: bf16, fp16, fp32, or torch's names (default: bf16; for sampling and verification fp32, "
    "or int64 of candidates)"
)
DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--op", choices=(*OPS, *SAMPLING_OPS), required=True, metavar="OP", help=", ".join((*OPS, *SAMPLING_OPS)))
    add("--shape", type=parse_shape, required=True, metavar="SHAPE", help=SHAPE_HELP)
    add("--dtype", metavar="DTYPE", help=DTYPE_HELP)
    add("--tp", type=int, metavar="N", help="ranks of the group that makes a collective")
    add("--device", choices=("cpu", "cuda"), help="where the tensors live (default: a GPU if there is one)")
    add("--group-size", type=int, default=128, metavar="G", help="of the quantisation (default 128)")


def run(arguments: argparse.Namespace) -> int:
    """The exit code; prints the plan."""
    op, shape, device = arguments.op, arguments.shape, arguments.device
    if op in SAMPLING_OPS:
        print(explain_sampling(op, shape, parse_dtype(arguments.dtype or default_dtype(op)), device=device))
        return 0
    if arguments.tp is None:
        raise ValueError(f"--tp: expected the number of ranks that make {op}, got none")
    dtype = parse_dtype(arguments.dtype or "bf16")
    print(explain(op, shape, dtype, arguments.tp, group_size=arguments.group_size, device=device))
    return 0


def explain(
    op: str, shape: tuple[int, ...], dtype: torch.dtype, tp: int, *, group_size: int = 128, device: str | None = None
) -> Plan:
    """The plan that a group of ``tp`` ranks, all like this process, would follow.

    On GPUs it takes for granted that they have access to each other's memory.

    Raises:
        ValueError: an argument that the collective would refuse; a malformed setting.
    """
    import torch

    from fusedcomm import native
    from fusedcomm.comm.plan import Facts, choose_plan
    from fusedcomm.env import Settings
    from fusedcomm.groups.custom_setup import choose_sizes, gpu_facts
    from fusedcomm.groups.device import choose_device
    from fusedcomm.groups.topology import Hello, agree
    from fusedcomm.ops.checks import check_group_size, check_norm, check_x
    from fusedcomm.ops.dispatch import find_local_backend

    if tp < 1:
        raise ValueError(f"--tp: expected at least 1, got {tp}")
    x = torch.empty(shape, dtype=dtype, device="meta")
    check_x(x)
    if op != "all_reduce":
        check_norm(x, None, torch.empty(shape[-1:], dtype=dtype, device="meta"), eps=0.0, weight_bias=0.0)
    if op == "allreduce_rmsnorm_quant":
        check_group_size(shape[-1], group_size)
    where = choose_device(device, 0)
    settings = Settings.from_environ()
    library = native.load()
    find_local_backend(settings, where.type)
    gpu = gpu_facts(where, native.load_gpu()) if where.type == "cuda" else None
    agreement = agree([Hello.of_this_rank(settings, None if library is None else library.build_id(), gpu=gpu)] * tp)
    sizes = choose_sizes(agreement, where.type)
    return choose_plan(
        Facts(
            op=op,
            num_tokens=x.numel() // shape[-1] if shape[-1] else 0,
            hidden_size=shape[-1],
            dtype=dtype,
            world_size=tp,
            settings=agreement.settings,
            custom_unavailable=agreement.custom_unavailable,
            slot_bytes=sizes.slot_bytes,
            one_shot_max_bytes=sizes.one_shot_max_bytes,
            group_size=group_size,
            device_type=where.type,
        )
    )


def parse_shape(text: str) -> tuple[int, ...]:
    """``16,4096``, ``16x4096`` or ``[16, 4096]``; ValueError otherwise."""
    parts = re.split(r"[,x]", text.strip("[]() ").replace(" ", ""))
    if not all(part.isdecimal() for part in parts):
        raise argparse.ArgumentTypeError(f"expected whole numbers such as 16,4096, got {text!r}")
    return tuple(int(part) for part in parts)


def parse_dtype(text: str) -> torch.dtype:
    """bf16, fp16, fp32, or a dtype by torch's name; ValueError otherwise."""
    import torch

    name = text.removeprefix("torch.")
    dtype = getattr(torch, DTYPES.get(name, name), None)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"--dtype: expected bf16, fp16 or fp32, got {text!r}")
    return dtype
