"""Memory that a kernel leaves partial results in for the next one: kept between calls, and only ever growing.

A kernel that reads it follows the one that wrote it on one stream, launched by one thread. So each thread has memory of
its own for each stream that it launches on, and calls on several streams or of several threads never meet. What is
outgrown goes back to the allocator, which hands it to later work of the same stream alone.

A captured graph must not share this: it may be replayed on any stream beside calls that run eagerly. Within a capture
memory comes from the graph's own pool, as all its intermediate results do; its address is part of the graph, and
nothing is allocated when it is replayed.
"""

from __future__ import annotations

import threading

import torch


class _Held(threading.local):
    """The memory of a thread by device and stream."""

    def __init__(self) -> None:
        self.memory: dict[tuple[torch.device, int], torch.Tensor] = {}


_held = _Held()


def workspace(num_elements: int, device: torch.device) -> torch.Tensor:
    """fp32 memory ``[num_elements]`` of any content, for work on the current stream of the current device.

    Valid until the thread asks for more on this stream.
    """
    stream = 0
    if device.type == "cuda":
        if torch.cuda.is_current_stream_capturing():
            return torch.empty(num_elements, dtype=torch.float32, device=device)
        stream = torch._C._cuda_getCurrentRawStream(device.index)
    key = device, stream
    memory = _held.memory.get(key)
    if memory is None or memory.numel() < num_elements:
        # Powers of two: few steps on the way to the largest call.
        size = 1 << (num_elements - 1).bit_length()
        memory = _held.memory[key] = torch.empty(size, dtype=torch.float32, device=device)
    return memory[:num_elements]
