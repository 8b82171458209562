"""The armer that works on every kernel: it arms nothing, and takes every page for written.

All contents are then read in the pause, which therefore grows with the size of the target. What
did not change is found by its hash and not stored again.
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor

from crtrace.linux import pagemap
from crtrace.linux.addrspace import EVERYTHING, AddressSpace
from crtrace.linux.procfs import Process
from crtrace.linux.stop import StoppedProcess
from crtrace.track.armer import How, Look, Scan
from crtrace.units import U64, intersect, merge, no_pages, subtract


class CompareArmer:
    """Notices nothing of one process. The target is never touched."""

    name = "compare"
    heals = True
    ldt = b""
    stands_still = False

    def __init__(self, process: Process, space: AddressSpace) -> None:
        self._space = space
        self._pagemap = process.open("pagemap")
        self._scanner = pagemap.scanner(self._pagemap, space)

    def arm(self, stopped: StoppedProcess) -> None:
        """See :class:`crtrace.track.armer.Armer`."""

    def scan(self, space: AddressSpace, how: How) -> Scan:
        """See :class:`crtrace.track.armer.Armer`. Nothing is armed, so all is read in the pause."""
        own = intersect(self.everything(), space.private)
        return Scan(own, lambda: subtract(EVERYTHING, own), own)

    def written_now(self) -> None:
        """See :class:`crtrace.track.armer.Armer`: nobody knows better."""

    def boundable(self) -> bool:
        """See :class:`crtrace.track.armer.Armer`."""
        return False

    def look(self, space: AddressSpace, beside: ThreadPoolExecutor) -> Look:
        """See :class:`crtrace.track.armer.Armer`: there is nothing to find."""
        return Look(no_pages(), no_pages())

    def let_go(self, address: int) -> None:
        """See :class:`crtrace.track.armer.Armer`: nobody waits for it."""

    def everything(self) -> U64:
        """See :class:`crtrace.track.armer.Armer`."""
        ranges, categories = self._scanner.scan(pagemap.OWN_OR_ZEROS, report=pagemap.PFNZERO)
        zero = categories != 0
        return merge(ranges[~zero], intersect(ranges[zero], self._space.private_files))

    def close(self) -> None:
        """See :class:`crtrace.track.armer.Armer`."""
        if self._pagemap >= 0:
            os.close(self._pagemap)
            self._pagemap = -1
