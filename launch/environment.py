"""Tells launch/setup, by exit code, whether the environment of this interpreter has what is needed.

environment.py torch 2.11     torch of that version or later is installed
environment.py complete       fusedcomm is, and every package that it and its extras (but dev) require
"""

import re
import sys
from importlib.metadata import PackageNotFoundError, distribution, version


def has_torch(minimum):
    """Whether torch is installed in at least this version; Python itself must be new enough too."""
    if sys.version_info < (3, 10):  # noqa: UP036 (it is asked of interpreters we did not choose)
        return False
    try:
        found = version("torch")
    except PackageNotFoundError:
        return False
    return tuple(map(int, re.findall(r"\d+", found)[:2])) >= tuple(map(int, minimum.split(".")))


def is_complete():
    """Whether fusedcomm's requirements are all there; versions are pip's business at installation."""
    try:
        for requirement in distribution("fusedcomm").requires or []:
            if "extra == 'dev'" not in requirement.replace('"', "'"):
                distribution(re.match(r"[\w.-]+", requirement).group())
    except PackageNotFoundError:
        return False
    return True


if __name__ == "__main__":
    if sys.argv[1] == "torch":
        sys.exit(not has_torch(sys.argv[2]))
    sys.exit(not is_complete())
