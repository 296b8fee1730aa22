"""Making a group's custom all-reduce: all ranks together, from what they agreed on."""

from __future__ import annotations

import struct
from dataclasses import dataclass

import torch

from fusedcomm import platform
from fusedcomm.comm import process_group
from fusedcomm.comm.custom import CustomAllReduce
from fusedcomm.comm.custom_gpu import GpuCustomAllReduce
from fusedcomm.comm.native_collectives import NativeCollectives
from fusedcomm.comm.symmetric_buffer import Exchange, SetupError
from fusedcomm.comm.tuning import choose_gpu_tuning, choose_tuning, slot_bytes
from fusedcomm.groups.topology import Agreement, GpuFacts, no_peer_access
from fusedcomm.native import Native, NativeGpu


@dataclass(frozen=True)
class Sizes:
    """What of the tuning plans depend on."""

    slot_bytes: int
    one_shot_max_bytes: int


def gpu_facts(device: torch.device, library: NativeGpu | None) -> GpuFacts:
    """What this rank tells the others of its GPU; RuntimeError or OSError if it cannot be used."""
    facts = platform.device_facts(device)
    uuid = facts.uuid if library is None else bytes(library.device_facts(device.index).uuid)
    return GpuFacts(uuid, facts.arch, facts.num_sms, library is not None, process_group.has_nccl())


def choose_sizes(agreement: Agreement, device_type: str) -> Sizes:
    """The sizes for a group of as many ranks as agreed; pure."""
    world_size = len(agreement.pids)
    if device_type == "cuda":
        return Sizes(0, choose_gpu_tuning(world_size).one_shot_max_bytes)
    slot = slot_bytes(agreement.settings.buffer_mb_on(device_type))
    return Sizes(slot, choose_tuning(world_size, agreement.cores, slot).one_shot_max_bytes)


def make_custom(
    agreement: Agreement,
    device: torch.device,
    exchange: Exchange,
    rank: int,
    native: Native | None,
    gpu: NativeGpu | None,
) -> tuple[NativeCollectives | None, str]:
    """The custom all-reduce, or why no rank has one: empty if the settings turned it off or there is one rank alone."""
    settings, world_size = agreement.settings, len(agreement.pids)
    if settings.disable or settings.backend not in (None, "native") or world_size == 1:
        return None, agreement.custom_unavailable
    if agreement.custom_unavailable or native is None:
        return None, agreement.custom_unavailable
    try:
        if device.type == "cpu":
            return _make_cpu(agreement, exchange, rank, native), ""
        assert gpu is not None  # or custom_unavailable would say so
        unreachable = no_peer_access(_exchange_access(gpu, device, agreement, exchange), agreement.gpus)
        return (None, unreachable) if unreachable else (_make_gpu(agreement, device, exchange, rank, native, gpu), "")
    except SetupError as error:
        return None, f"set-up failed: {error}"


def _make_cpu(agreement: Agreement, exchange: Exchange, rank: int, native: Native) -> CustomAllReduce:
    settings, world_size = agreement.settings, len(agreement.pids)
    slot = slot_bytes(settings.buffer_mb_on("cpu"))
    return CustomAllReduce(
        native,
        exchange,
        rank,
        world_size,
        slot_bytes=slot,
        tuning=choose_tuning(world_size, agreement.cores, slot),
        timeout_s=settings.timeout_s,
        pids=agreement.pids,
    )


def _make_gpu(
    agreement: Agreement, device: torch.device, exchange: Exchange, rank: int, native: Native, gpu: NativeGpu
) -> GpuCustomAllReduce:
    settings, world_size = agreement.settings, len(agreement.pids)
    return GpuCustomAllReduce(
        native,
        gpu,
        exchange,
        rank,
        world_size,
        device=device,
        buffer_bytes=settings.buffer_mb_on("cuda") << 20,
        tuning=choose_gpu_tuning(world_size),
        timeout_s=settings.timeout_s,
        pids=agreement.pids,
    )


def _exchange_access(
    gpu: NativeGpu, device: torch.device, agreement: Agreement, exchange: Exchange
) -> list[tuple[int, ...]]:
    """Every rank's answers, for every rank's GPU: can it write there."""
    form = struct.Struct(f"{len(agreement.gpus)}b")
    own = [gpu.peer_access(device.index, peer.uuid) for peer in agreement.gpus]
    return [form.unpack(data) for data in exchange(form.pack(*own))]
