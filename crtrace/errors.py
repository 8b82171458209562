"""What can go wrong, each with the exit code that scripts rely on.

The message says what and where; ``hint`` says what to do about it, and only the command line
prints it. The codes are a contract: DESIGN.md, "Exit codes".
"""

from __future__ import annotations

COMPARE_INSTEAD = "CRTRACE_ARMER=compare reads all memory instead"
SEE_WHAT_IS_LOST = "crtrace verify tells what is lost; crtrace export --salvage writes what is left"


class CrtraceError(Exception):
    """The root of all errors that crtrace raises on purpose: exit code 1."""

    exit_code = 1
    usual_hint = ""

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint or self.usual_hint


class UsageError(CrtraceError):
    """The request makes no sense: no process to watch, or a directory that is no chain."""

    exit_code = 2


class LeaderGone(CrtraceError):
    """The first thread of a process has exited while others run on."""


class TargetGone(CrtraceError):
    """The target does not exist, has exited, or its number now belongs to another process."""

    exit_code = 10


class NotPermitted(CrtraceError):
    """The kernel or the file system refused for want of privilege."""

    exit_code = 11


class FeatureMissing(CrtraceError):
    """The kernel lacks something without which the command cannot work."""

    exit_code = 12


class TargetBusy(CrtraceError):
    """Somebody else holds the target: a tracer, or a userfaultfd over its ranges."""

    exit_code = 13


class AlreadyTraced(TargetBusy):
    """A debugger or another tracer has it."""


class ImageDamaged(CrtraceError):
    """Bytes of an image are not what was written, or lie."""

    exit_code = 20
    usual_hint = SEE_WHAT_IS_LOST


class ChainIncomplete(CrtraceError):
    """An epoch that another one needs is not there."""

    exit_code = 21
    usual_hint = SEE_WHAT_IS_LOST


class FormatTooNew(CrtraceError):
    """An image written by a later crtrace."""

    exit_code = 22
