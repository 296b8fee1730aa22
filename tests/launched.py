"""What an operator launches, compiled for GPUs that need not be here, and what is in it.

A launch is recorded where it would happen and compiled as Triton would specialise it, so the tests see the kernels with
the constants, the alignments and the number of warps that the library gives them.
"""

from __future__ import annotations

import re
import subprocess
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
import triton

_INTEGERS = 2**31
_POINTERS = {
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float32: "*fp32",
    torch.uint8: "*u8",
    torch.int32: "*i32",
    torch.int64: "*i64",
}
_WIDTHS = {"byte": 1, "ubyte": 1, "short": 2, "ushort": 2, "sshort": 2, "dword": 4, "dwordx2": 8, "dwordx4": 16}


@dataclass(frozen=True)
class Target:
    """A GPU architecture, the FP8 format of its instructions, and whether Triton has the instruction."""

    backend: str
    arch: int | str
    lanes: int
    fp8: torch.dtype
    hardware_fp8: bool

    def __str__(self) -> str:
        return f"sm_{self.arch}" if self.backend == "cuda" else str(self.arch)


TARGETS = [
    Target("cuda", 90, 32, torch.float8_e4m3fn, hardware_fp8=True),
    Target("hip", "gfx942", 64, torch.float8_e4m3fnuz, hardware_fp8=True),
    Target("hip", "gfx950", 64, torch.float8_e4m3fn, hardware_fp8=False),
]


@dataclass(frozen=True)
class Compiled:
    """A kernel's PTX or AMDGCN, and the object that the assembler made of it."""

    target: Target
    asm: str
    object: bytes
    shared_bytes: int
    """Shared memory of a program."""
    threads: int
    """Threads of a program."""

    @property
    def on_nvidia(self) -> bool:
        return self.target.backend == "cuda"

    def accesses(self) -> Counter[str]:
        """Loads and stores of global memory in the code by their width in bytes: ``{"load 16": 2}``."""
        found: Counter[str] = Counter()
        if self.on_nvidia:
            for kind, count, bits in re.findall(r"\b(ld|st)\.global\S*?(?:\.v(\d))?\.b(\d+)", self.asm):
                found[f"{'load' if kind == 'ld' else 'store'} {int(count or 1) * int(bits) // 8}"] += 1
            return found
        for kind, width in re.findall(r"\b(?:global|buffer)_(load|store)_([a-z]+x?\d?)", self.asm):
            found[f"{kind} {_WIDTHS[width]}"] += 1
        return found

    def products(self) -> int:
        """fp32 products whose result is rounded, in the code; those that a compiler contracted are not.

        On NVIDIA in that of the machine: what PTX leaves apart its assembler may contract.
        """
        if self.on_nvidia:
            return len(re.findall(r"\bFMUL\b", self._disassembled("nvdisasm")))
        return len(re.findall(r"\bv_mul_f32", self.asm)) + 2 * len(re.findall(r"\bv_pk_mul_f32", self.asm))

    def converts_to_fp8(self) -> bool:
        """Whether an instruction of the device does."""
        return ("cvt.rn.satfinite.e4m3x2.f32" if self.on_nvidia else "v_cvt_pk_fp8_f32") in self.asm

    def check_registers(self) -> None:
        """Everything is held in registers."""
        if not self.on_nvidia:
            assert re.search(r"\.vgpr_spill_count: 0\b", self.asm)
            assert re.search(r"\.private_segment_fixed_size: 0\b", self.asm)
            return
        usage = self._disassembled("cuobjdump", "-res-usage")
        assert re.search(r"\bSTACK:0 .*\bLOCAL:0\b", usage), usage

    def check_arithmetic(self) -> None:
        """Correctly rounded operations, subnormals and all."""
        if self.on_nvidia:
            assert ".ftz" not in self.asm
            assert "approx" not in self.asm
            return
        assert re.search(r"\.amdhsa_float_denorm_mode_32 3\b", self.asm), "subnormals are flushed"
        assert re.search(r"\.amdhsa_float_round_mode_32 0\b", self.asm)

    def _disassembled(self, tool: str, *options: str) -> str:
        """What one of Triton's tools says of the object."""
        with TemporaryDirectory() as folder:
            cubin = Path(folder) / "kernel.cubin"
            cubin.write_bytes(self.object)
            command = [getattr(triton.knobs.nvidia, tool).path, *options, str(cubin)]
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@dataclass(frozen=True)
class Launch:
    """A recorded launch."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]
    options: dict[str, Any]

    def compile(self, target: Target, **changes: Any) -> Compiled:
        """Compiled as Triton would for these arguments; ``changes`` replace options."""
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource

        options = {name: v for name, v in (self.options | changes).items() if name in ("num_warps", "enable_fp_fusion")}
        given = dict(zip(self.kernel.arg_names, self.arguments, strict=False))
        given |= {name: value for name, value in self.options.items() if name not in options}
        signature, constants, attributes = {}, {}, {}
        for i, parameter in enumerate(self.kernel.params):
            name, value = parameter.name, given[parameter.name]
            is_one = isinstance(value, int) and value == 1 and not parameter.do_not_specialize
            if parameter.is_constexpr or value is None or is_one:
                signature[name], constants[name] = "constexpr", value
                continue
            signature[name] = _type_of(value)
            as_it_is = parameter.do_not_specialize or parameter.do_not_specialize_on_alignment
            if not as_it_is and _is_aligned(value):
                attributes[(i,)] = [["tt.divisibility", 16]]
        compiled = triton.compile(
            ASTSource(self.kernel, signature=signature, constexprs=constants, attrs=attributes),
            target=GPUTarget(target.backend, target.arch, target.lanes),
            options=options,
        )
        text, code = ("ptx", "cubin") if target.backend == "cuda" else ("amdgcn", "hsaco")
        threads = options["num_warps"] * target.lanes
        return Compiled(target, str(compiled.asm[text]), compiled.asm[code], compiled.metadata.shared, threads)


def _type_of(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return _POINTERS[value.dtype]
    if isinstance(value, float):
        return "fp32"
    return "i32" if -_INTEGERS <= value < _INTEGERS else "i64"


def _is_aligned(value: Any) -> bool:
    if isinstance(value, torch.Tensor):
        return value.data_ptr() % 16 == 0
    return isinstance(value, int) and value % 16 == 0


def record(monkeypatch: pytest.MonkeyPatch, module: Any, target: Target, function: str, *arguments: Any) -> Launch:
    """What a function of a module of operators launches on a target; the tensors, on the CPU, stay as they are."""
    found: list[Launch] = []

    def launch(kernel: Any, grid: tuple[int, ...], device: torch.device, *given: Any, **options: Any) -> None:
        found.append(Launch(kernel, grid, given, options))

    with monkeypatch.context() as patch:
        patch.setattr(module, "launch", launch)
        patch.setattr(module, "_lanes", lambda: target.lanes)
        patch.setattr(module, "converts_to", lambda fp8, device: fp8 is target.fp8 and target.hardware_fp8)
        getattr(module, function)(*arguments)
    (only,) = found
    return only
