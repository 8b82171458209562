"""TEMPORARY until merged."""

from __future__ import annotations

import os

from crtrace.linux import pagemap
from crtrace.linux.addrspace import AddressSpace
from crtrace.linux.pagemap import Scanner
from crtrace.linux.procfs import Process
from crtrace.linux.ptrace import StoppedProcess
from crtrace.track.armer import Scan
from crtrace.track.userfaultfd import EVERYTHING
from crtrace.units import U64, merge, no_pages, subtract


class CompareArmer:
    name = "compare"
    heals = True
    ldt = b""

    def __init__(self, process: Process, space: AddressSpace) -> None:
        self._pagemap = process.open("pagemap")
        self._scanner = Scanner(self._pagemap)
        self._own = pagemap.Filter(exclude=pagemap.FILE | pagemap.PFNZERO)

    def arm(self, stopped: StoppedProcess) -> None:
        pass

    def scan(self, space: AddressSpace) -> Scan:
        own = self.everything()
        mapped = merge(space.ranges(lambda vma: not vma.shared))
        own2 = subtract(own, subtract(EVERYTHING, mapped))
        return Scan(own2, subtract(EVERYTHING, own2), no_pages())

    def everything(self) -> U64:
        ranges, _ = self._scanner.scan(self._own)
        return merge(ranges)

    def close(self) -> None:
        if self._pagemap >= 0:
            os.close(self._pagemap)
            self._pagemap = -1
