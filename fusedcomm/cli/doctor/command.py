"""The checks in order, and the report."""

from __future__ import annotations

import argparse
import json
import os
import sys
from typing import TYPE_CHECKING

from fusedcomm.cli.doctor.check import Finding, Level

if TYPE_CHECKING:
    from fusedcomm.env import SettingInfo

MARKS = {
    Level.OK: "[green]ok[/]",
    Level.INFO: "[dim]info[/]",
    Level.WARN: "[yellow]warn[/]",
    Level.FAIL: "[red]FAIL[/]",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--ranks", type=int, metavar="N", help="ranks of the self-test (default: a core or GPU each, 2 to 8); 0: none")
    add("--json", action="store_true", help="the report as one JSON object")


def run(arguments: argparse.Namespace) -> int:
    """0 if all is well, else 1."""
    if arguments.ranks is not None and arguments.ranks < 0:
        raise ValueError(f"--ranks: expected at least 0, got {arguments.ranks}")
    settings, findings = diagnose(arguments.ranks)
    is_well = all(finding.level is not Level.FAIL for finding in findings)
    if arguments.json:
        report = {
            "well": is_well,
            "findings": [finding._asdict() for finding in findings],
            "settings": [info._asdict() for info in settings],
        }
        print(json.dumps(report, indent=2))
    else:
        _print_report(settings, findings, is_well=is_well)
    return 0 if is_well else 1


def diagnose(ranks: int | None) -> tuple[list[SettingInfo], list[Finding]]:
    """The settings, and all findings; ``ranks`` None chooses, 0 leaves the self-test out."""
    from fusedcomm.cli.doctor import machine
    from fusedcomm.cli.doctor.aiter_package import check_aiter
    from fusedcomm.cli.doctor.gpu import check_gpus
    from fusedcomm.cli.doctor.settings import check_settings
    from fusedcomm.env import PREFIX, Settings, launcher_environ

    infos, settings_findings = check_settings(launcher_environ())
    settings = Settings(**{info.variable.removeprefix(PREFIX).lower(): info.value for info in infos})  # type: ignore[arg-type]
    findings = [
        *machine.check_versions(),
        *machine.check_machine(),
        *machine.check_native(),
        *machine.check_shared_memory(settings),
        *check_gpus(),
        *machine.check_mpi(),
        *check_aiter(),
        *settings_findings,
        *machine.check_backend(settings),
    ]
    is_usable = all(finding.level is not Level.FAIL for finding in findings if finding.area != "shared memory")
    return infos, [*findings, *_self_test(ranks, is_usable=is_usable)]


def _self_test(ranks: int | None, *, is_usable: bool) -> list[Finding]:
    from fusedcomm.cli.doctor.gpu import count_gpus
    from fusedcomm.cli.doctor.self_test import AREA, check_ranks
    from fusedcomm.groups import bootstrap

    def skipped(why: str) -> list[Finding]:
        return [Finding(AREA, "ranks", Level.INFO, f"not run: {why}")]

    if ranks == 0:
        return skipped("--ranks 0")
    if not is_usable:
        return skipped("put the failures above right first")
    launcher = bootstrap.detect().launcher
    if launcher != "alone":
        return skipped(f"doctor starts its own ranks, and {launcher} has started this one")
    count = min(8, max(2, len(os.sched_getaffinity(0)))) if ranks is None else ranks
    print(f"self-test on {count} ranks ...", file=sys.stderr)
    findings = check_ranks(count, "cpu")
    if gpus := count_gpus():
        count = min(8, max(2, gpus)) if ranks is None else ranks
        print(f"self-test on {count} ranks on {gpus} GPUs ...", file=sys.stderr)
        findings += check_ranks(count, "cuda")
    return findings


def _print_report(settings: list[SettingInfo], findings: list[Finding], *, is_well: bool) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console(width=None if sys.stdout.isatty() else 160)
    report = Table("", "", "", "", box=None, show_header=False)
    area = ""
    for finding in findings:
        shown = "" if finding.area == area else f"[bold]{escape(finding.area)}[/]"
        area = finding.area
        report.add_row(shown, escape(finding.name), MARKS[finding.level], escape(finding.text))
    console.print(report)
    table = Table("setting", "value", "default", "source", "meaning", box=None, header_style="bold")
    for info in settings:
        style = None if info.source == "default" else "yellow"
        cells = (info.variable, str(info.value), str(info.default), info.source, info.help)
        table.add_row(*(escape(cell) for cell in cells), style=style)
    console.print()
    console.print(table)
    console.print("\n[green]all is well[/]" if is_well else "\n[red]not all is well: see FAIL above[/]")
