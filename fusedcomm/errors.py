"""The errors this library raises besides ``ValueError`` for bad arguments."""

from __future__ import annotations


class FusedCommError(RuntimeError):
    """Base of every error that is not a bad argument."""


class SettingError(FusedCommError, ValueError):
    """A ``FUSEDCOMM_*`` variable holds a value that is not allowed, or asks for what this machine cannot do."""


class VersionMismatchError(FusedCommError):
    """Ranks of one group run different builds of the library."""


class GroupClosedError(FusedCommError):
    """The group has been closed, or was inherited through ``fork``."""


class GroupBrokenError(FusedCommError):
    """A collective failed earlier; the ranks are no longer in step and the group refuses further calls."""


class PeerTimeoutError(GroupBrokenError):
    """A wait passed its deadline (``FUSEDCOMM_TIMEOUT_S``)."""


class PeerDiedError(GroupBrokenError):
    """A rank this one waited for has exited, closed the group, or given up on it."""


class CallMismatchError(GroupBrokenError):
    """Ranks made different calls (operation, shape or dtype) where one collective was expected."""
