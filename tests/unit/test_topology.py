"""What ranks tell each other at creation, and what they conclude from it together."""

from __future__ import annotations

import dataclasses
import os
import struct
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from fusedcomm import FusedCommError, SettingError, Settings, VersionMismatchError
from fusedcomm.groups.topology import HELLO_BYTES, Agreement, GpuFacts, Hello, agree, host_identity, no_peer_access

BUILD = b"0123456789abcdef"


def hello(settings: Settings | None = None, **changes: Any) -> Hello:
    made = Hello.of_this_rank(settings or Settings(), BUILD)
    return dataclasses.replace(made, **changes)


def over_the_wire(hellos: list[Hello]) -> Agreement:
    return agree([Hello.unpack(h.pack()) for h in hellos])


# ---- the record ----

settings_strategy = st.builds(
    Settings,
    disable=st.booleans(),
    disable_custom_ar=st.booleans(),
    disable_fused_ar_norm=st.booleans(),
    disable_fused_ar_quant=st.booleans(),
    disable_aiter=st.booleans(),
    disable_aiter_sampling=st.booleans(),
    backend=st.sampled_from([None, "native", "aiter", "triton", "torch"]),
    deterministic=st.booleans(),
    timeout_s=st.floats(0.001, 86400),
    debug=st.booleans(),
    dual_stream=st.booleans(),
    buffer_mb=st.none() | st.integers(1, 16384),
)
gpu_strategy = st.builds(
    GpuFacts,
    uuid=st.binary(min_size=16, max_size=16),
    arch=st.sampled_from(["sm_80", "sm_90", "gfx942", "gfx950"]),
    num_sms=st.integers(1, 2**32 - 1),
    library=st.booleans(),
    nccl=st.booleans(),
)


@given(
    settings=settings_strategy,
    pid=st.integers(1, 2**31 - 1),
    cores=st.integers(1, 4096),
    native=st.booleans(),
    error=st.text(st.characters(blacklist_characters="\0", blacklist_categories=["Cs"]), max_size=60),
    gpu=st.none() | gpu_strategy,
)
def test_a_record_comes_back_as_it_was(
    settings: Settings, pid: int, cores: int, native: bool, error: str, gpu: GpuFacts | None
) -> None:
    sent = hello(settings, pid=pid, cores=cores, native=native, error=error, gpu=gpu)
    data = sent.pack()
    assert len(data) == HELLO_BYTES
    assert Hello.unpack(data) == sent


def test_this_rank_states_its_own_facts() -> None:
    mine = Hello.of_this_rank(Settings(), BUILD, "what went wrong")
    assert mine.pid == os.getpid()
    assert mine.cores == len(os.sched_getaffinity(0))
    assert mine.native
    assert mine.build_id == BUILD
    assert mine.torch_version.rstrip(b"\0").decode() == torch.__version__
    assert mine.error == "what went wrong"
    assert not Hello.of_this_rank(Settings(), None).native


def test_a_long_error_is_cut_to_the_size_of_the_record() -> None:
    sent = hello(error="é" * 5000)  # two bytes each: the cut may fall within one
    assert len(sent.pack()) == HELLO_BYTES
    received = Hello.unpack(sent.pack()).error
    assert received.startswith("é" * 100)


@given(data=st.binary(max_size=2 * HELLO_BYTES))
@example(data=b"")
@example(data=b"\0" * HELLO_BYTES)
@example(data=Hello.of_this_rank(Settings(), BUILD).pack()[:-1])
@example(data=Hello.of_this_rank(Settings(), BUILD).pack()[:7])
@example(data=Hello.of_this_rank(Settings(), BUILD).pack() + b"\0")
def test_a_record_that_is_none_says_that_builds_differ(data: bytes) -> None:
    """Truncated, too long, or of another format: one clear error, never a struct.error or a wrong record."""
    with pytest.raises(VersionMismatchError, match="same build"):
        Hello.unpack(data)


@given(flips=st.lists(st.integers(8, HELLO_BYTES * 8 - 1), min_size=1, max_size=20))
def test_a_damaged_record_is_a_record_or_a_clear_error(flips: list[int]) -> None:
    data = bytearray(hello().pack())
    for bit in flips:
        data[bit // 8] ^= 1 << bit % 8
    try:
        received = Hello.unpack(bytes(data))
    except VersionMismatchError:
        return
    received.pack()


def test_nothing_is_unpickled() -> None:
    """A pickle in place of a record is refused like any other garbage."""
    bomb = b"cos\nsystem\n(S'exit 1'\ntR.".ljust(HELLO_BYTES, b"\0")
    with pytest.raises(VersionMismatchError):
        Hello.unpack(bomb)


# ---- the host ----


def test_the_host_is_told_by_boot_id_and_name(monkeypatch: pytest.MonkeyPatch) -> None:
    here = host_identity()
    assert len(here) == 32
    assert host_identity() == here
    monkeypatch.setattr("socket.gethostname", lambda: "another")
    assert host_identity() != here


def test_the_host_can_be_overridden_for_tests() -> None:
    assert host_identity("a") == host_identity("a")
    assert len({host_identity(), host_identity("a"), host_identity("b")}) == 3


# ---- what they agree on ----


def test_equal_ranks_agree_on_what_they_have() -> None:
    settings = Settings(buffer_mb=4, timeout_s=7.0)
    agreement = over_the_wire([hello(settings, pid=100 + r, cores=8 - r) for r in range(3)])
    assert agreement == Agreement(
        settings=settings, disagreements=(), cores=6, pids=(100, 101, 102), custom_unavailable=""
    )


@pytest.mark.parametrize(
    ("field", "values", "taken"),
    [
        ("disable", (False, True, False), True),
        ("disable_custom_ar", (False, False, True), True),
        ("disable_fused_ar_norm", (True, False, False), True),
        ("disable_fused_ar_quant", (False, True, True), True),
        ("disable_aiter", (False, True, False), True),
        ("disable_aiter_sampling", (False, True, False), True),
        ("deterministic", (False, False, True), True),
        ("debug", (False, True, False), True),
        ("dual_stream", (False, True, False), False),
        ("backend", (None, "native", None), "torch"),
        ("backend", ("native", "torch", "native"), "torch"),
        ("timeout_s", (60.0, 5.0, 60.0), 60.0),
        ("buffer_mb", (16, 16, 4), 4),
        ("buffer_mb", (2, 1, 1), 1),
    ],
)
def test_a_disagreement_takes_the_safer_value_and_says_so(
    field: str, values: tuple[object, ...], taken: object
) -> None:
    agreement = over_the_wire([hello(Settings(**{field: value})) for value in values])  # type: ignore[arg-type]
    expected = {"buffer_mb": 2, field: taken}
    assert agreement.settings == Settings(**expected)  # type: ignore[arg-type]
    (line,) = agreement.disagreements
    assert f"FUSEDCOMM_{field.upper()}" in line
    for rank, value in enumerate(values):
        assert f"rank {rank}: {value}" in line
    assert f"take {taken}" in line


@given(st.lists(settings_strategy, min_size=1, max_size=5))
def test_the_agreement_does_not_depend_on_who_is_first(all_settings: list[Settings]) -> None:
    forward = over_the_wire([hello(s) for s in all_settings])
    backward = over_the_wire([hello(s) for s in reversed(all_settings)])
    assert forward.settings == backward.settings
    assert len(forward.disagreements) == len(backward.disagreements)
    merged = forward.settings
    for settings in all_settings:
        # nobody gets a fast path that it turned off, loses a check that it turned on, or waits for less than it asked
        assert merged.dual_stream <= settings.dual_stream
        for f in dataclasses.fields(Settings):
            if f.type == "bool" and f.name != "dual_stream":
                assert getattr(merged, f.name) >= getattr(settings, f.name)
        assert merged.timeout_s >= settings.timeout_s
        assert merged.buffer_mb_on("cpu") <= settings.buffer_mb_on("cpu")
        assert merged.backend in (settings.backend, "torch")


def test_mixed_builds_are_an_error_that_names_them() -> None:
    other = b"fedcba9876543210"
    with pytest.raises(VersionMismatchError) as error:
        over_the_wire([hello(), hello(), hello(build_id=other)])
    text = str(error.value)
    assert f"rank 2 {other.decode()}" in text
    assert f"rank 0 {BUILD.decode()}" in text


def test_a_rank_without_the_native_library_turns_the_custom_stages_off() -> None:
    without = Hello.of_this_rank(Settings(), None)
    assert over_the_wire([hello(), without, hello()]).custom_unavailable == "rank 1 has no native library"
    assert over_the_wire([without, without]).custom_unavailable == "rank 0 has no native library"


def test_mixed_torch_versions_turn_the_custom_stages_off() -> None:
    other = b"2.11.0".ljust(32, b"\0")
    agreement = over_the_wire([hello(), hello(), hello(torch_version=other)])
    assert "rank 2" in agreement.custom_unavailable
    assert "2.11.0" in agreement.custom_unavailable
    assert torch.__version__ in agreement.custom_unavailable


def test_another_host_turns_the_custom_stages_off() -> None:
    agreement = over_the_wire([hello(), hello(host=host_identity("elsewhere")), hello()])
    assert "rank 1 is on another host" in agreement.custom_unavailable
    assert over_the_wire([hello(Settings(host_id="a")), hello(Settings(host_id="a"))]).custom_unavailable == ""
    assert "rank 1" in over_the_wire([hello(Settings(host_id="a")), hello(Settings(host_id="b"))]).custom_unavailable


@pytest.mark.parametrize("bad_rank", [0, 1, 2])
def test_an_error_on_one_rank_is_raised_by_all(bad_rank: int) -> None:
    hellos = [hello(error="no torch to speak of" if r == bad_rank else "") for r in range(3)]
    with pytest.raises(FusedCommError, match=rf"no torch to speak of \(rank {bad_rank}\)"):
        over_the_wire(hellos)


def test_a_malformed_setting_on_one_rank_is_a_setting_error_on_all() -> None:
    with pytest.raises(SettingError, match=r"FUSEDCOMM_DEBUG: expected 0 or 1, got 'x' \(rank 1\)"):
        over_the_wire([hello(), hello(error="FUSEDCOMM_DEBUG: expected 0 or 1, got 'x'")])


def test_an_error_comes_before_a_mixed_build() -> None:
    with pytest.raises(SettingError):
        over_the_wire([hello(error="FUSEDCOMM_DEBUG: x"), hello(build_id=b"f" * 16)])


def test_the_records_size_is_part_of_it() -> None:
    data = bytearray(hello().pack())
    struct.pack_into("<I", data, 4, HELLO_BYTES + 8)  # what a later format of the same magic would say
    with pytest.raises(VersionMismatchError):
        Hello.unpack(bytes(data))


# ---- ranks on GPUs ----


def gpu(number: int = 0, **changes: Any) -> GpuFacts:
    facts = GpuFacts(uuid=bytes([number]) * 16, arch="sm_90", num_sms=132, library=True, nccl=True)
    return dataclasses.replace(facts, **changes)


def gpu_hellos(*gpus: GpuFacts, settings: Settings | None = None) -> list[Hello]:
    return [hello(settings, gpu=facts) for facts in gpus]


def test_equal_gpus_agree() -> None:
    agreement = over_the_wire(gpu_hellos(gpu(0), gpu(1), gpu(2), gpu(3)))
    assert agreement.custom_unavailable == ""
    assert agreement.nccl
    assert agreement.gpus == (gpu(0), gpu(1), gpu(2), gpu(3))
    assert agreement.settings.buffer_mb == 160


def test_ranks_that_share_a_gpu_have_no_nccl_and_keep_the_custom_stages() -> None:
    agreement = over_the_wire(gpu_hellos(gpu(0), gpu(1), gpu(0), gpu(1)))
    assert not agreement.nccl
    assert agreement.custom_unavailable == ""


def test_equal_uuids_on_two_hosts_are_two_gpus() -> None:
    here, there = gpu_hellos(gpu(0), gpu(0))
    agreement = over_the_wire([here, dataclasses.replace(there, host=host_identity("elsewhere"))])
    assert agreement.nccl
    assert "another host" in agreement.custom_unavailable


def test_nccl_needs_all_ranks() -> None:
    assert not over_the_wire(gpu_hellos(gpu(0), gpu(1, nccl=False))).nccl
    assert not over_the_wire([hello(), hello()]).nccl


@pytest.mark.parametrize(
    ("last", "reason"),
    [
        ({"library": False}, "rank 2 has no native GPU library"),
        ({"arch": "gfx950"}, "rank 2 has a gfx950 of 132 multiprocessors, rank 0 a sm_90 of 132"),
        ({"num_sms": 114}, "rank 2 has a sm_90 of 114 multiprocessors, rank 0 a sm_90 of 132"),
    ],
)
def test_a_gpu_that_differs_turns_the_custom_stages_off(last: dict[str, Any], reason: str) -> None:
    assert over_the_wire(gpu_hellos(gpu(0), gpu(1), gpu(2, **last))).custom_unavailable == reason


def test_a_missing_cpu_library_turns_them_off_on_gpus_too() -> None:
    hellos = gpu_hellos(gpu(0), gpu(1))
    hellos[1] = dataclasses.replace(hellos[1], native=False, build_id=bytes(16))
    assert over_the_wire(hellos).custom_unavailable == "rank 1 has no native library"


def test_devices_of_different_types_are_an_error_on_all_ranks() -> None:
    with pytest.raises(FusedCommError, match="different types: rank 0 cuda, rank 1 cpu, rank 2 cuda"):
        over_the_wire([hello(gpu=gpu(0)), hello(), hello(gpu=gpu(1))])


@pytest.mark.parametrize(("size", "on_gpu", "fits"), [(8, True, True), (9, True, False), (16, False, True)])
def test_the_kernels_serve_so_many_ranks(size: int, on_gpu: bool, fits: bool) -> None:
    agreement = over_the_wire([hello(gpu=gpu(r) if on_gpu else None) for r in range(size)])
    assert (agreement.custom_unavailable == "") == fits
    if not fits:
        assert agreement.custom_unavailable == f"the kernels serve up to 8 ranks, got {size}"


def test_an_unset_buffer_size_and_its_default_are_no_disagreement() -> None:
    hellos = [hello(Settings(buffer_mb=size), gpu=gpu(r)) for r, size in enumerate((None, 160))]
    assert over_the_wire(hellos).disagreements == ()
    hellos = [hello(Settings(buffer_mb=size), gpu=gpu(r)) for r, size in enumerate((None, 128))]
    agreement = over_the_wire(hellos)
    assert agreement.settings.buffer_mb == 128
    assert "rank 0: 160, rank 1: 128" in agreement.disagreements[0]


def test_peer_access_has_to_go_both_ways() -> None:
    gpus = [gpu(0), gpu(1), gpu(2)]
    assert no_peer_access([[1, 1, 1]] * 3, gpus) == ""
    # not visible: opening its memory decides
    assert no_peer_access([[1, -1, -1], [-1, 1, -1], [-1, -1, 1]], gpus) == ""
    reason = no_peer_access([[1, 1, 1], [1, 1, 1], [0, 1, 1]], gpus)
    assert reason.startswith("rank 2 (GPU 02020202-0202-")
    assert "no peer access to rank 0 (GPU 00000000-0000-" in reason
    assert "rank 0 (GPU 0000" in no_peer_access([[1, -1, 0], [1, 1, 1], [1, 1, 1]], gpus)[:20]
