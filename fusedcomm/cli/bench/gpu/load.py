"""A kernel that keeps memory busy on a second stream, for as long as it is told, on part of the multiprocessors.

Its blocks stay resident: it competes for memory bandwidth, as a large kernel of an engine does that overlaps
communication. What it leaves free is for kernels whose blocks need a multiprocessor for themselves: NCCL's could not
start beside it, and would wait for its end. (A kernel of many short blocks would measure how the hardware queues
blocks; many launches in a row would, where streams share a hardware queue, hold up what comes after.)
"""

# mypy: disable-error-code="untyped-decorator,no-untyped-def"

from __future__ import annotations

import torch
import triton
import triton.language as tl

BUFFER_BYTES = 512 << 20
"""Far more than the caches; read and written in turn."""
BLOCK = 8192
WARPS = 16
SHARE = 3 / 4
"""Of the multiprocessors."""
TRIAL_PASSES = 8


@triton.jit(do_not_specialize=["passes"])  # a count of 1 would be compiled apart
def _stream(source, target, num_blocks, passes, BLOCK: tl.constexpr):
    for _ in range(passes):
        for block in range(tl.program_id(0), num_blocks, tl.num_programs(0)):
            at = tl.cast(block, tl.int64) * BLOCK + tl.arange(0, BLOCK)
            tl.store(target + at, tl.load(source + at) + 1.0)


class MemoryLoad:
    """Queues the kernel on a stream of its own; the bandwidth it reaches alone is measured at the start."""

    def __init__(self, device: torch.device) -> None:
        elements = BUFFER_BYTES // 4
        self.source = torch.zeros(elements, device=device)
        self.target = torch.empty_like(self.source)
        self.stream = torch.cuda.Stream(device)
        self.programs = int(SHARE * torch.cuda.get_device_properties(device).multi_processor_count)  # a block each
        torch.cuda.synchronize(device)  # the other stream reads what this one fills
        self._launch(1)
        torch.cuda.synchronize(device)
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record(self.stream)
        self._launch(TRIAL_PASSES)
        end.record(self.stream)
        torch.cuda.synchronize(device)
        self.pass_s: float = start.elapsed_time(end) * 1e-3 / TRIAL_PASSES

    @property
    def gbytes_per_s(self) -> float:
        """Read and written."""
        return 2 * BUFFER_BYTES / self.pass_s / 1e9

    def run(self, seconds: float) -> torch.cuda.Event:
        """Starts now, for at least ``seconds``; the event is its end."""
        self._launch(int(seconds / self.pass_s) + 1)
        end = torch.cuda.Event(enable_timing=True)
        end.record(self.stream)
        return end

    def _launch(self, passes: int) -> None:
        with torch.cuda.stream(self.stream):
            _stream[(self.programs,)](
                self.source, self.target, self.source.numel() // BLOCK, passes, BLOCK=BLOCK, num_warps=WARPS
            )
