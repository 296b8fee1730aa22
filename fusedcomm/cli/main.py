"""The command ``fusedcomm``: its subcommands, and what an error looks like."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence

from fusedcomm.cli.launch import BROKEN_PIPE, INTERRUPTED

BAD_INPUT = 2

# name: (module, help). A module has add_arguments(parser) and run(arguments) -> exit code, and imports what is heavy
# only in run.
COMMANDS = {
    "doctor": ("fusedcomm.cli.doctor", "say what is here, and test it on real ranks"),
    "explain": ("fusedcomm.cli.explain", "say what a collective or a sampling op runs on, and why not faster"),
    "generate": ("fusedcomm.cli.generate", "decode a prompt with a model over several ranks"),
    "bench": ("fusedcomm.cli.bench.command", "measure collectives, a decode step, attention or sampling ops"),
}


def build_parser() -> argparse.ArgumentParser:
    """The parser of all subcommands."""
    parser = argparse.ArgumentParser(prog="fusedcomm", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (module, text) in COMMANDS.items():
        command = commands.add_parser(name, help=text, description=text.capitalize() + ".")
        importlib.import_module(module).add_arguments(command)
        command.set_defaults(module=module)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a subcommand; the exit code: 0 all is well, 1 it failed, 2 bad input."""
    arguments = build_parser().parse_args(argv)
    from fusedcomm.errors import FusedCommError

    try:
        code: int = importlib.import_module(arguments.module).run(arguments)
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        # Nobody reads any more; neither does what the interpreter would flush at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE
    except KeyboardInterrupt:
        return INTERRUPTED
    except ValueError as error:  # SettingError and CheckpointError among them
        print(f"fusedcomm {arguments.command}: {error}", file=sys.stderr)
        return BAD_INPUT
    except (FusedCommError, OSError) as error:
        print(f"fusedcomm {arguments.command}: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
