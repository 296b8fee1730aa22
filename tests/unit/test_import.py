"""Importing fusedcomm does nothing: no environment read, no library load, no patch, no process group."""

from __future__ import annotations

import subprocess
import sys

PROGRAM = r'''
import logging, os, sys, warnings
from pathlib import Path
import torch, torch.distributed

class Recorder(type(os.environ)):
    """os.environ that notes the reads made by fusedcomm's own files."""
    reads = []
    def __getitem__(self, key):
        frame = sys._getframe(1)
        while frame and frame.f_code.co_filename.startswith(("<frozen", os.path.dirname(os.__file__) + "/os.py")):
            frame = frame.f_back
        if frame and "/fusedcomm/" in frame.f_code.co_filename:
            self.reads.append((key, frame.f_code.co_filename))
        return super().__getitem__(key)

recorder = Recorder.__new__(Recorder)
recorder.__dict__.update(os.environ.__dict__)
os.environ = recorder
os.environ["FUSEDCOMM_BACKEND"] = "no such backend"  # would raise where it was read

def snapshot():
    modules = [torch, torch.nn.functional, torch.distributed, torch.Tensor, torch.nn.Module, torch.library]
    # Attributes that appear are submodules that torch loads lazily; one that changes is a patch.
    attributes = {(str(owner), name): id(value) for owner in modules for name, value in vars(owner).items()}
    process = {
        "sys.path": list(sys.path),
        "excepthook": sys.excepthook,
        "log handlers": list(logging.getLogger().handlers),
        "warning filters": list(warnings.filters),
        "torch libraries": sorted(torch.ops.loaded_libraries),
        "threads": torch.get_num_threads(),
        "dtype": torch.get_default_dtype(),
    }
    return attributes, process

attributes, process = snapshot()
import fusedcomm
after, process_after = snapshot()

assert [key for key in attributes if after.get(key) != attributes[key]] == []
assert process_after == process, (process, process_after)
assert recorder.reads == [], recorder.reads
assert not torch.distributed.is_initialized()
assert not torch.cuda.is_initialized()
mapped = {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if ".so" in line}
assert not [path for path in mapped if "fusedcomm" in path], "the native library is loaded at import"
heavy = {"aiter", "matplotlib", "mpi4py", "safetensors", "tokenizers", "transformers", "triton"}
assert heavy.isdisjoint(sys.modules), heavy & set(sys.modules)
'''


def test_import_has_no_side_effects() -> None:
    result = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout == ""
    assert result.stderr == ""
