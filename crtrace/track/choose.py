"""TEMPORARY until merged."""

from __future__ import annotations

import os

from crtrace.linux.addrspace import AddressSpace
from crtrace.linux.procfs import Process
from crtrace.track.armer import Armer
from crtrace.track.compare import CompareArmer
from crtrace.track.userfaultfd import UserfaultfdArmer


def choose(process: Process, space: AddressSpace) -> Armer:
    if os.environ.get("CRTRACE_ARMER") == "compare":
        return CompareArmer(process, space)
    return UserfaultfdArmer(process, space)
