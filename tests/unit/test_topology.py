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
from fusedcomm.groups.topology import HELLO_BYTES, Agreement, Hello, agree, host_identity

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
    buffer_mb=st.integers(1, 16384),
)


@given(
    settings=settings_strategy,
    pid=st.integers(1, 2**31 - 1),
    cores=st.integers(1, 4096),
    native=st.booleans(),
    error=st.text(st.characters(blacklist_characters="\0", blacklist_categories=["Cs"]), max_size=60),
)
def test_a_record_comes_back_as_it_was(settings: Settings, pid: int, cores: int, native: bool, error: str) -> None:
    sent = hello(settings, pid=pid, cores=cores, native=native, error=error)
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
        ("backend", (None, "native", None), "torch"),
        ("backend", ("native", "torch", "native"), "torch"),
        ("timeout_s", (60.0, 5.0, 60.0), 60.0),
        ("buffer_mb", (16, 16, 4), 4),
    ],
)
def test_a_disagreement_takes_the_safer_value_and_says_so(
    field: str, values: tuple[object, ...], taken: object
) -> None:
    agreement = over_the_wire([hello(Settings(**{field: value})) for value in values])  # type: ignore[arg-type]
    assert agreement.settings == Settings(**{field: taken})  # type: ignore[arg-type]
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
        for f in dataclasses.fields(Settings):
            if f.type == "bool":
                assert getattr(merged, f.name) >= getattr(settings, f.name)
        assert merged.timeout_s >= settings.timeout_s
        assert merged.buffer_mb <= settings.buffer_mb
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
