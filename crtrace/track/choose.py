"""Which armer to use: the best that works here, unless the environment names one."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass

from crtrace.errors import CrtraceError, UsageError
from crtrace.linux.addrspace import AddressSpace
from crtrace.linux.procfs import Process
from crtrace.track import softdirty, userfaultfd
from crtrace.track.armer import Armer
from crtrace.track.compare import CompareArmer
from crtrace.track.softdirty import SoftDirtyArmer
from crtrace.track.userfaultfd import UserfaultfdArmer

VARIABLE = "CRTRACE_ARMER"


@dataclass(frozen=True, slots=True)
class Way:
    """A way to find what was written. ``means`` is what follows for who watches."""

    armer: Callable[[Process, AddressSpace], Armer]
    try_on_ourselves: Callable[[], None]
    """Raises ``OSError`` or a ``CrtraceError`` where it does not work."""
    means: str


WAYS = {
    UserfaultfdArmer.name: Way(
        UserfaultfdArmer, userfaultfd.try_on_ourselves,
        "the kernel notes what is written, so pauses stay short however large the target is",
    ),
    SoftDirtyArmer.name: Way(
        SoftDirtyArmer, softdirty.try_on_ourselves,
        "pages tell that they were written; there is a second pause before it where much was,"
        " which grows slowly with the target, and so does the pause itself after Linux 6.12",
    ),
    CompareArmer.name: Way(
        CompareArmer, lambda: None,
        "all memory is read in each pause and compared, so the pause grows with the target",
    ),
}  # fmt: skip
"""By the name that the environment has for it, the best first. The last one works everywhere."""


def choose(process: Process, space: AddressSpace) -> Armer:
    """An armer for a process; ``UsageError`` if the environment asks for one that nobody knows,
    ``FeatureMissing`` or ``OSError`` if for one that does not work here."""
    return WAYS[armer_name()].armer(process, space)


def armer_name() -> str:
    """Which armer is used here; ``UsageError`` as for :func:`choose`."""
    name = os.environ.get(VARIABLE) or next(filter(_works, WAYS))
    if name not in WAYS:
        raise UsageError(
            f"{VARIABLE} is {name!r}", hint=f"it can be {' or '.join(WAYS)}, or be left away"
        )
    return name


def _works(name: str) -> bool:
    try:
        WAYS[name].try_on_ourselves()
    except (OSError, CrtraceError):
        return False
    return True
