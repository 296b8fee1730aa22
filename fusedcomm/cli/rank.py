"""The entry of a rank process that launch.run_on_ranks starts.

``python -m fusedcomm.cli.rank LAUNCHER_PID module:name JSON``
"""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def main() -> None:
    """Runs the function. An error is recorded for the launcher, which prints it once; nothing is printed here."""
    from torch.distributed.elastic.multiprocessing.errors import get_error_handler

    from fusedcomm.cli.launch import BROKEN_PIPE

    launcher, function, arguments = sys.argv[1:]
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGTERM))  # end with the launcher, however it ends
    if os.getppid() != int(launcher):
        return  # it was gone before
    module, _, name = function.partition(":")
    handler = get_error_handler()
    handler.initialize()
    code = 0
    try:
        getattr(importlib.import_module(module), name)(**json.loads(arguments))
        sys.stdout.flush()
    except BrokenPipeError:
        code = BROKEN_PIPE
    except Exception as error:
        handler.record_exception(error)
        code = 2 if isinstance(error, ValueError) else 1  # as the command itself: bad input, or a failure
    # Without the interpreter's farewell, which would try the closed pipe again, or wait for ranks that are gone.
    if code:
        os._exit(code)


if __name__ == "__main__":
    main()
