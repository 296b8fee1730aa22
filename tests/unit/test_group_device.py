"""Which device a rank takes, with a pretended number of GPUs."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from fusedcomm import platform
from fusedcomm.comm.tuning import choose_gpu_tuning
from fusedcomm.groups.device import check_device, choose_device
from fusedcomm.platform import DeviceFacts, device_facts, fp8_dtype


def gpus(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)


def test_without_a_gpu_the_cpu_is_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    gpus(monkeypatch, 0)
    assert choose_device(None, 3) == torch.device("cpu")
    assert choose_device("cpu:0", 3) == torch.device("cpu")
    with pytest.raises(ValueError, match=r"^device: expected cpu .*, got cuda:1"):
        choose_device("cuda:1", 0)


def test_ranks_go_round_the_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    gpus(monkeypatch, 4)
    for given in (None, "cuda", torch.device("cuda")):
        assert [choose_device(given, rank).index for rank in range(8)] == [0, 1, 2, 3, 0, 1, 2, 3]
    assert choose_device("cuda:2", 1) == torch.device("cuda", 2)
    assert choose_device("cpu", 1) == torch.device("cpu")
    with pytest.raises(ValueError, match=r"^device: expected cuda:0 to cuda:3, got cuda:4"):
        choose_device("cuda:4", 0)


@pytest.mark.parametrize("device", ["meta", "xpu", "no such device", 1.5])
def test_what_no_group_is_on(device: object) -> None:
    with pytest.raises(ValueError, match=r"^device: expected .*, got "):
        check_device(device)  # type: ignore[arg-type]


def test_facts_of_the_cpu() -> None:
    assert device_facts(torch.device("cpu")).arch == "cpu"
    assert fp8_dtype(torch.device("cpu")) is torch.float8_e4m3fn


@pytest.mark.parametrize(
    ("arch", "dtype"),
    [
        ("sm_90", torch.float8_e4m3fn),
        ("gfx942", torch.float8_e4m3fnuz),
        ("gfx950", torch.float8_e4m3fn),
    ],
)
def test_the_fp8_format_follows_from_the_architecture(arch: str, dtype: torch.dtype) -> None:
    assert DeviceFacts(arch, "", b"", 0).fp8_dtype is dtype


def test_torch_compile_takes_the_facts_of_a_gpu_as_constants(monkeypatch: pytest.MonkeyPatch) -> None:
    """It could not trace how they are asked for: the UUID is an object of torch's own."""
    found = SimpleNamespace(
        major=9, minor=0, name="H", uuid=SimpleNamespace(bytes=list(range(16))), multi_processor_count=132
    )
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: found)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(platform, "_facts", {})

    def body(x: torch.Tensor) -> torch.Tensor:
        facts = device_facts(torch.device("cuda", 3))
        return x.to(facts.fp8_dtype).float() + facts.num_sms

    torch._dynamo.reset()
    compiled = torch.compile(body, backend="eager", fullgraph=True)
    assert compiled(torch.ones(2)).tolist() == [133.0, 133.0]
    assert device_facts(torch.device("cuda", 3)).uuid == bytes(range(16))


def test_one_shot_serves_ever_smaller_messages_as_groups_grow() -> None:
    """(W - 1) (W - 2) / W S crosses what a link carries in a hop; with two ranks two-shot never moves less."""
    limits = [choose_gpu_tuning(world_size).one_shot_max_bytes for world_size in range(2, 9)]
    assert limits == sorted(limits, reverse=True)
    assert limits[0] == 4 << 20
    assert limits[2] == 400_000 * 4 // 6
