"""Which armer to use: the best that works here, unless the environment names one."""

from __future__ import annotations

import os

from crtrace.errors import CrtraceError, UsageError
from crtrace.linux.addrspace import AddressSpace
from crtrace.linux.procfs import Process
from crtrace.track.armer import Armer
from crtrace.track.compare import CompareArmer
from crtrace.track.userfaultfd import UserfaultfdArmer, try_on_ourselves

VARIABLE = "CRTRACE_ARMER"
_ARMERS: dict[str, type[UserfaultfdArmer] | type[CompareArmer]] = {
    armer.name: armer for armer in (UserfaultfdArmer, CompareArmer)
}


def choose(process: Process, space: AddressSpace) -> Armer:
    """An armer for a process; ``UsageError`` if the environment asks for one that there is not."""
    name = os.environ.get(VARIABLE) or _best()
    if name not in _ARMERS:
        raise UsageError(
            f"{VARIABLE} is {name!r}", hint=f"it can be {' or '.join(_ARMERS)}, or be left away"
        )
    return _ARMERS[name](process, space)


def _best() -> str:
    try:
        try_on_ourselves()
    except (OSError, CrtraceError):
        return CompareArmer.name
    return UserfaultfdArmer.name
