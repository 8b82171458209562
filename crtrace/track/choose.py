"""Which armer to use: the best that works here, unless the environment names one."""

from __future__ import annotations

import os
from collections.abc import Callable

from crtrace.errors import CrtraceError, UsageError
from crtrace.linux.addrspace import AddressSpace
from crtrace.linux.procfs import Process
from crtrace.track import softdirty, userfaultfd
from crtrace.track.armer import Armer
from crtrace.track.compare import CompareArmer
from crtrace.track.softdirty import SoftDirtyArmer
from crtrace.track.userfaultfd import UserfaultfdArmer

VARIABLE = "CRTRACE_ARMER"
_ARMERS: dict[str, type[UserfaultfdArmer | SoftDirtyArmer | CompareArmer]] = {
    armer.name: armer for armer in (UserfaultfdArmer, SoftDirtyArmer, CompareArmer)
}
_TRIALS: dict[str, Callable[[], None]] = {
    UserfaultfdArmer.name: userfaultfd.try_on_ourselves,
    SoftDirtyArmer.name: softdirty.try_on_ourselves,
}
"""Those that not every kernel has, the best first."""


def choose(process: Process, space: AddressSpace) -> Armer:
    """An armer for a process; ``UsageError`` if the environment asks for one that nobody knows,
    ``FeatureMissing`` or ``OSError`` if for one that does not work here."""
    return _ARMERS[armer_name()](process, space)


def armer_name() -> str:
    """Which armer is used here; ``UsageError`` as for :func:`choose`."""
    name = os.environ.get(VARIABLE)
    if not name:
        return next((name for name in _TRIALS if _works(name)), CompareArmer.name)
    if name not in _ARMERS:
        raise UsageError(
            f"{VARIABLE} is {name!r}", hint=f"it can be {' or '.join(_ARMERS)}, or be left away"
        )
    return name


def _works(name: str) -> bool:
    try:
        _TRIALS[name]()
    except (OSError, CrtraceError):
        return False
    return True
