"""GPUs: what they are, who reaches whose memory, and whether processes can share it."""

from __future__ import annotations

import contextlib
import ctypes
import subprocess
import sys
from collections.abc import Sequence

import torch

from fusedcomm import native
from fusedcomm.cli.doctor.check import Finding, Level
from fusedcomm.groups.topology import gpu_name
from fusedcomm.native import ERROR_BYTES, NativeGpu, error_text
from fusedcomm.platform import device_facts

AREA = "GPUs"
_TEST_BYTES = 1 << 20
_OPEN = """
import sys, ctypes
from fusedcomm import native
library, error = native.load_gpu(), ctypes.create_string_buffer(256)
address = library.slab_open(int(sys.argv[1]), bytes.fromhex(sys.argv[2]), error)
if not address:
    sys.exit(error.value.decode(errors="replace") or "no reason given")
library.slab_close(int(sys.argv[1]), address)
"""


def count_gpus() -> int:
    """How many torch sees."""
    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def check_gpus() -> list[Finding]:
    """Everything about GPUs that needs no ranks; on a machine without one a single line."""
    count = count_gpus()
    if not count:
        why = "torch is built for the CPU" if torch.version.cuda is None and torch.version.hip is None else "none seen"
        return [Finding(AREA, "gpu", Level.INFO, f"{why}; groups run on the CPU")]
    findings = [Finding(AREA, f"gpu {index}", Level.OK, _describe(index)) for index in range(count)]
    access = [[a == b or torch.cuda.can_device_access_peer(a, b) for b in range(count)] for a in range(count)]
    findings += [*check_peer_access(access), *_check_links(count)]
    library, finding = _load_library()
    return [*findings, finding, *([] if library is None else [_check_ipc(library)])]


def check_peer_access(access: Sequence[Sequence[bool]]) -> list[Finding]:
    """``access[a][b]``: whether GPU a reaches the memory of GPU b."""
    count = len(access)
    if count == 1:
        return []
    missing = [f"{a} to {b}" for a in range(count) for b in range(count) if not access[a][b]]
    if not missing:
        return [Finding(AREA, "peer access", Level.OK, f"all {count} reach each other's memory")]
    text = f"not from GPU {', '.join(missing)}: groups of these take the process group"
    return [Finding(AREA, "peer access", Level.WARN, text)]


def _describe(index: int) -> str:
    facts = device_facts(torch.device("cuda", index))
    memory = torch.cuda.get_device_properties(index).total_memory / 2**30
    return f"{facts.name}, {facts.arch}, {facts.num_sms} multiprocessors, {memory:.0f} GiB, GPU-{gpu_name(facts.uuid)}"


def _check_links(count: int) -> list[Finding]:
    """NVLinks that are up, where pynvml is installed to ask."""
    if torch.version.cuda is None:
        return []
    try:
        import pynvml
    except ImportError:
        text = "not known (pip install nvidia-ml-py to see NVLinks)"
        return [Finding(AREA, "links", Level.INFO, text)] if count > 1 else []
    links = []
    try:
        pynvml.nvmlInit()
        for index in range(count):
            uuid = f"GPU-{gpu_name(device_facts(torch.device('cuda', index)).uuid)}"
            handle = pynvml.nvmlDeviceGetHandleByUUID(uuid)
            up = 0
            for link in range(pynvml.NVML_NVLINK_MAX_LINKS):
                with contextlib.suppress(pynvml.NVMLError):  # no such link
                    up += pynvml.nvmlDeviceGetNvLinkState(handle, link)
            links.append(up)
    except pynvml.NVMLError as error:
        return [Finding(AREA, "links", Level.INFO, f"not known: {error}")]
    return [Finding(AREA, "links", Level.INFO, f"NVLinks up, by GPU: {', '.join(map(str, links))}")]


def _load_library() -> tuple[NativeGpu | None, Finding]:
    name = "native GPU library"
    path = native.library_path(native.GPU_LIBRARY_NAME)
    if path is None:
        text = "not built: Triton or torch and the process group serve; install again where nvcc or hipcc is found"
        return None, Finding(AREA, name, Level.WARN, text)
    try:
        library = native.load_gpu()
    except OSError as error:
        return None, Finding(AREA, name, Level.FAIL, str(error))
    if library is None:
        return None, Finding(AREA, name, Level.FAIL, f"{path} needs {native.LIBRARY_NAME} beside it")
    return library, Finding(AREA, name, Level.OK, f"{path}, build {library.build_id().decode()}")


def _check_ipc(library: NativeGpu) -> Finding:
    """Whether another process can map memory of the first GPU, as ranks do with each other's."""
    name, handle, error = "IPC", ctypes.create_string_buffer(64), ctypes.create_string_buffer(ERROR_BYTES)
    address = library.slab_allocate(0, _TEST_BYTES, handle, error)
    if not address:
        return Finding(AREA, name, Level.FAIL, f"cannot allocate memory to share: {error_text(error)}")
    last = count_gpus() - 1
    try:
        arguments = [sys.executable, "-c", _OPEN, str(last), handle.raw.hex()]
        done = subprocess.run(arguments, capture_output=True, text=True, check=False)
    finally:
        library.slab_free(0, address)
    if done.returncode:
        why = done.stderr.strip().rpartition("\n")[2]
        return Finding(AREA, name, Level.FAIL, f"another process cannot map memory of GPU 0 on GPU {last}: {why}")
    return Finding(AREA, name, Level.OK, f"another process maps memory of GPU 0 on GPU {last}")
