"""Settings: every variable of the specification's table, its default, its parsing, its refusals."""

from __future__ import annotations

import dataclasses

import pytest

from fusedcomm import SettingError, Settings

SWITCHES = [
    "DISABLE",
    "DISABLE_CUSTOM_AR",
    "DISABLE_FUSED_AR_NORM",
    "DISABLE_FUSED_AR_QUANT",
    "DISABLE_AITER",
    "DISABLE_AITER_SAMPLING",
    "DETERMINISTIC",
    "DEBUG",
    "DUAL_STREAM",
]
DEFAULTS = {
    **dict.fromkeys(SWITCHES, False),
    "BACKEND": None,
    "TIMEOUT_S": 60.0,
    "BUFFER_MB": None,
}


def read(**variables: str) -> Settings:
    return Settings.from_environ({f"FUSEDCOMM_{name}": text for name, text in variables.items()})


def value(settings: Settings, name: str) -> object:
    return getattr(settings, name.lower())


@pytest.mark.parametrize("name", DEFAULTS)
def test_defaults_of_unset_empty_and_blank(name: str) -> None:
    for settings in (Settings(), read(), read(**{name: ""}), read(**{name: "  "})):
        assert value(settings, name) == DEFAULTS[name]
        assert type(value(settings, name)) is type(DEFAULTS[name])


@pytest.mark.parametrize("name", SWITCHES)
def test_a_switch_is_0_or_1_and_moves_nothing_else(name: str) -> None:
    on = read(**{name: "1"})
    assert value(on, name) is True
    assert dataclasses.replace(on, **{name.lower(): False}) == Settings()
    assert read(**{name: "0"}) == Settings()
    assert read(**{name: " 1 "}) == on


@pytest.mark.parametrize("name", SWITCHES)
@pytest.mark.parametrize("text", ["2", "true", "yes", "-1", "01", "1.0", "on"])
def test_a_malformed_switch_is_refused(name: str, text: str) -> None:
    with pytest.raises(SettingError) as error:
        read(**{name: text})
    assert str(error.value) == f"FUSEDCOMM_{name}: expected 0 or 1, got {text!r}"


@pytest.mark.parametrize("text", ["native", "aiter", "triton", "torch"])
def test_backends(text: str) -> None:
    assert read(BACKEND=text).backend == text


@pytest.mark.parametrize("text", ["Native", "cuda", "1", "native,torch"])
def test_a_malformed_backend_names_the_allowed_ones(text: str) -> None:
    with pytest.raises(SettingError, match=r"FUSEDCOMM_BACKEND.*native.*aiter.*triton.*torch.*got") as error:
        read(BACKEND=text)
    assert repr(text) in str(error.value)


@pytest.mark.parametrize(("text", "seconds"), [("60", 60.0), ("0.5", 0.5), ("1e2", 100.0), ("0.001", 0.001)])
def test_timeouts(text: str, seconds: float) -> None:
    assert read(TIMEOUT_S=text).timeout_s == seconds


@pytest.mark.parametrize("text", ["0", "-1", "nan", "inf", "-inf", "soon", "10s", "1e30", "0.0001"])
def test_a_malformed_timeout_is_refused(text: str) -> None:
    with pytest.raises(SettingError, match=r"FUSEDCOMM_TIMEOUT_S: expected .*seconds.*got ") as error:
        read(TIMEOUT_S=text)
    assert repr(text) in str(error.value)


@pytest.mark.parametrize(("text", "size"), [("1", 1), ("16", 16), ("64", 64), ("16384", 16384)])
def test_buffer_sizes(text: str, size: int) -> None:
    assert read(BUFFER_MB=text).buffer_mb == size


def test_the_default_buffer_size_is_that_of_the_device() -> None:
    assert [Settings().buffer_mb_on(kind) for kind in ("cpu", "cuda")] == [2, 160]
    assert [read(BUFFER_MB="5").buffer_mb_on(kind) for kind in ("cpu", "cuda")] == [5, 5]


@pytest.mark.parametrize("text", ["0", "-16", "16.5", "16MB", "16385", "99999999999999999999", "0x10"])
def test_a_malformed_buffer_size_is_refused(text: str) -> None:
    with pytest.raises(SettingError, match=r"FUSEDCOMM_BUFFER_MB: expected .*MiB.*got ") as error:
        read(BUFFER_MB=text)
    assert repr(text) in str(error.value)


def test_setting_errors_are_value_errors() -> None:
    with pytest.raises(ValueError, match="FUSEDCOMM_DEBUG"):
        read(DEBUG="x")


def test_other_variables_are_left_alone() -> None:
    assert Settings.from_environ({"DISABLE": "1", "FUSEDCOMM_": "1", "XFUSEDCOMM_DEBUG": "1"}) == Settings()


def test_the_process_environment_is_the_default_source(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FUSEDCOMM_BUFFER_MB", "3")
    assert Settings.from_environ().buffer_mb == 3


def test_describe_shows_value_default_source_and_help() -> None:
    environ = {"FUSEDCOMM_TIMEOUT_S": "5", "FUSEDCOMM_DEBUG": "", "FUSEDCOMM_DISABLE": "0"}
    rows = {row.variable: row for row in Settings.from_environ(environ).describe(environ)}
    assert {f"FUSEDCOMM_{name}" for name in DEFAULTS} <= set(rows)
    assert rows["FUSEDCOMM_TIMEOUT_S"][1:4] == (5.0, 60.0, "environment")
    assert rows["FUSEDCOMM_DISABLE"][1:4] == (False, False, "environment")
    assert rows["FUSEDCOMM_DEBUG"][1:4] == (False, False, "default")
    assert rows["FUSEDCOMM_BACKEND"][1:4] == (None, None, "default")
    assert all(row.help for row in rows.values())


def test_settings_do_not_change() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Settings().debug = True  # type: ignore[misc]


@pytest.mark.parametrize(
    ("field", "bad"),
    [
        ("timeout_s", 0.0),
        ("timeout_s", -1.0),
        ("timeout_s", float("nan")),
        ("timeout_s", float("inf")),
        ("buffer_mb", 0),
        ("buffer_mb", 1 << 40),
        ("backend", "cuda"),
    ],
)
def test_values_given_in_the_program_are_checked_as_well(field: str, bad: object) -> None:
    """Settings(...) goes to GroupCoordinator(settings=...): a bad value there would fail on one rank, in the middle."""
    with pytest.raises(ValueError, match=rf"(?i)FUSEDCOMM_{field}: expected .*got"):
        Settings(**{field: bad})  # type: ignore[arg-type]
