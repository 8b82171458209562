"""An address space as the capture holds it, with everything that is bound to it."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from crtrace.errors import CrtraceError, TargetGone
from crtrace.image.tables import VmaFlag
from crtrace.linux.addrspace import AddressSpace, filled_by_reads
from crtrace.linux.memory import MemoryReader
from crtrace.linux.pagemap import scanner
from crtrace.linux.pins import Pins
from crtrace.linux.procfs import Process, Stat
from crtrace.linux.ptrace import signals_held
from crtrace.linux.stop import StoppedProcess, reaping
from crtrace.track.armer import Armer, How, Scan, Told
from crtrace.track.choose import choose
from crtrace.track.compare import CompareArmer
from crtrace.track.dirty import WrittenPages
from crtrace.track.guide import Guide
from crtrace.units import U64, contains, merge, no_pages


class Target:
    """One program in one process; ``space`` is its number in the chain.

    Until :meth:`arm`, all of its pages count as written. An ``execve`` ends it: make a new one.
    ``carried`` is what an attempt at an epoch that failed had found written.
    """

    def __init__(self, process: Process, space: int) -> None:
        self.process = process
        self.space = space
        self.map = AddressSpace(process)
        self.advice = Advice()
        self.armed = False
        self.fresh = True
        self.carried = no_pages()
        self.recent = no_pages()
        """What was written for the last epoch, where something may still be under way into it: a
        direct read, or what somebody else does."""
        self.revisit = no_pages()
        """What the last epoch was in doubt about; see ``Part``."""
        self.doubted = no_pages()
        """What an attempt at an epoch that failed was in doubt about."""
        self.visited_before = False
        """Somebody else was in its memory since the last scan and before this epoch began."""
        self._unsure = False
        """Whether the next scan may find more than was written since the one before."""
        self._guide: Guide | None = None
        self._map_as_of: tuple[int, ...] = ()
        """The counts when the map was read."""
        self.pins = Pins()
        self._filled_by_reads = False
        """Faults for reading bring memory that can be written without another."""
        self.limits: list[str] = []
        """What of it is not seen, and why."""
        self._pagemap = -1
        self.armer: Armer = CompareArmer(process, self.map)
        self.reader = MemoryReader(process)
        try:
            self._pagemap = process.open("pagemap")
            self.scanner = scanner(self._pagemap, self.map)
            self._landmark = _landmark(_stat_of_living(process))
        except BaseException:
            self.close()
            raise

    def arm(self, marks: WrittenPages, tgids: list[int]) -> None:
        """Have its writes noticed from now on, in the best way that works; stops it shortly.

        ``marks`` bound its scans, ``tgids`` run in it.
        """
        armer = choose(self.process, self.map)
        try:
            # Should it be killed, its first thread is reported only when the others are reaped.
            with (
                signals_held(),
                StoppedProcess(self.process) as stopped,
                reaping([stopped]),
            ):
                if not self.lives():
                    raise TargetGone(f"process {self.process.pid} runs a new program")
                armer.arm(stopped)
        except BaseException:
            armer.close()
            raise
        self.armer.close()
        self.armer, self.armed = armer, True
        if not self.compared:
            mm, number = marks.mm_behind(lambda: os.pread(self._pagemap, 8, 0))
            if mm:
                self._guide = Guide(marks, mm, number, by_bits=armer.stands_still)
                self._guide.settle(tgids)
                if armer.stands_still:
                    marks.migrations()  # sees to it that they are counted

    def close(self) -> None:
        """Disarm; the process goes on. It may be called twice."""
        self.armer.close()
        if self._guide:
            self._guide.close()
            self._guide = None
        self.reader.close()
        if self._pagemap >= 0:
            os.close(self._pagemap)
            self._pagemap = -1

    def lives(self) -> bool:
        """Whether its process still runs in this address space."""
        return self.holds(self.process) is not None

    def holds(self, process: Process) -> Stat | None:
        """What a process that has been in this address space and still is says of itself now; None
        if it is not."""
        try:
            stat = _stat_of_living(process)
        except TargetGone:
            return None
        same = _landmark(stat) == self._landmark and self.reader.same_program(stat.startcode)
        return stat if same else None

    # ---- its map, and scans --------------------------------------------------------------------

    def refresh(self, tgids: list[int]) -> bool:
        """Read the map again if anything can have changed it; whether it differs from before."""
        if not self._guide or not all(tgids):
            return self.map.refresh()
        now = self._guide.map_evidence(tgids)
        changed = now != self._map_as_of and self.map.refresh()
        self._map_as_of = now
        return changed

    def _guide_for(self, tgids: list[int]) -> Guide | None:
        """What bounds a scan, if anything can."""
        # io_uring's workers are not stopped, so their faults may be under way all the time.
        # A userfaultfd's pages are moved without the lock that is counted.
        unknown = (
            not all(tgids) or self.pins.rings or self.pins.userfaultfds or self._filled_by_reads
        )
        return None if unknown or not self.armer.boundable() else self._guide

    def scan(
        self,
        tgids: list[int],
        *,
        stopped: bool,
        ahead: bool = False,
        turned: bool = False,
        beside: ThreadPoolExecutor,
    ) -> Scan:
        """See :meth:`crtrace.track.armer.Armer.scan`; bounded where that is exact and shorter.

        ``tgids``: BPF's numbers of who runs in it. ``ahead``: what it finds is not for the pause to
        copy. ``turned``: marks go to the next generation since just before this scan, and all scans
        before were in the last one.
        """
        told = self._guide.told(tgids) if self._guide else Told()
        guide = self._guide_for(tgids)
        unsure, self._unsure = self._unsure, False
        if not guide:
            scan = self.armer.scan(self.map, How(stopped, ahead, beside=beside, told=told))
            if self._guide:
                self._guide.doubt()
                self._guide.scanned(no_pages(), turned=turned, stopped=stopped)
            return scan
        basis = guide.basis(tgids, self.map.changes)
        within = guide.bounds(tgids, turned=turned) if guide.holds(basis) else None
        scan = self.armer.scan(self.map, How(stopped, ahead, within, beside, told))
        if not scan.bounded:
            guide.everything_seen(basis)
        guide.scanned(no_pages() if unsure else scan.written, turned=turned, stopped=stopped)
        return scan

    def written_now(self, tgids: list[int]) -> int:
        """See :meth:`crtrace.track.armer.Armer.written_now`; 0 where only BPF has counted."""
        guide = self._guide_for(tgids)
        basis = guide.basis(tgids, self.map.changes) if guide else None
        written = self.armer.written_now()
        if guide and basis and written is not None:
            guide.looked_ahead(basis)
        return written or 0

    def paused(self, tgids: list[int]) -> None:
        """BPF's marks go to the next generation since the scan of the pause."""
        if self._guide:
            self._guide.paused(tgids)

    def written_by_others(self) -> int:
        """Write faults since the last pause by who does not run in it, or by no exception."""
        return self._guide.written_by_others() if self._guide else 0

    def marked_under(self, tgids: list[int]) -> list[int]:
        """The numbers that writes to it are marked under: who runs in it, and its own."""
        return [*tgids, self._guide.number] if self._guide else tgids

    def visited(self) -> bool:
        """Whether somebody from outside has been in its memory since this was asked last, for all
        that is known. What he has pinned there may change after a scan has armed it."""
        return self._guide is None or self._guide.visited()

    def marked(self, pages: U64, again: U64, tgids: list[int]) -> None:
        """BPF has marked ``pages``, page numbers, before its last switch of generations; ``again``:
        more than once."""
        if self._guide:
            private = self.map.private
            ours, twice = (each[contains(private, each)] for each in (pages, again))
            self._guide.await_faults(ours, twice, tgids)

    def failed(self) -> None:
        """An epoch came to nothing: the next scan looks at everything, and may find more than was
        written since."""
        self._unsure = True
        if self._guide:
            self._guide.doubt()

    def look_back(self, tgids: list[int], gone: U64, beside: ThreadPoolExecutor) -> int:
        """After a pause whose scan was bounded: how many pages have changed unnoticed since the
        last look at everything. ``gone`` as that scan had it."""
        guide = self._guide
        assert guide
        before = guide.basis(tgids, self.map.changes)
        found = guide.unexplained(self.armer.look(self.map, beside), tgids, gone)
        self.map.refresh()
        return guide.judge(found, before, guide.basis(tgids, self.map.changes))

    @property
    def compared(self) -> bool:
        """Whether nothing is armed, so that all is read in every pause."""
        return isinstance(self.armer, CompareArmer)

    def look_for_pins(self) -> None:
        """Find what may be written without a fault; while it runs, once an epoch."""
        self.limits = []
        if self.compared:
            return  # all is read each time anyway
        self.pins.find(self.process)
        self._filled_by_reads = filled_by_reads()
        self.visited_before = self.visited()
        who = f"process {self.process.pid}"
        if pinned := self.pins.unexplained(self.process):
            self.limits.append(
                f"{who}: what a device writes into {pinned} pinned bytes is not seen"
            )
        for device in sorted(self.pins.devices):
            self.limits.append(f"{who}: what is written into its memory by {device} is not seen")
        if self.pins.shared_with_cards(self.map):
            self.limits.append(f"{who}: what a network card writes into its memory is not seen")
        if self.pins.notes_writes:
            self.limits.append(
                f"{who}: it notes its own writes by userfaultfd, of which neither side sees all"
            )
        if rings := self.pins.unmapped_rings(self.process, self.map):
            self.limits.append(f"{who}: {rings} io_uring rings without a mapping are not seen")
        if self.pins.direct and (self.pins.rings or self._has_aio()):
            self.limits.append(f"{who}: direct reads that last longer than an epoch are not seen")

    def reads_directly(self) -> bool:
        """Whether direct reads may be under way; also by a descriptor that was not there when the
        epoch began. While it runs."""
        if self.compared or self.pins.direct:
            return bool(self.pins.direct)
        try:
            self.pins.find(self.process)
        except (CrtraceError, OSError):  # gone, or it calls exec just now: nobody knows
            return True
        return bool(self.pins.direct)

    def _has_aio(self) -> bool:
        return any(vma.name.startswith("/[aio]") for vma in self.map.vmas)

    def pinned(self, scanned: Callable[[], U64]) -> U64:
        """Pages to read whatever the scan says; while it is stopped. ``scanned``: what was found
        written for this epoch, and armed again, perhaps before a direct read into it ended."""
        if self.compared:
            return no_pages()
        fixed = self.pins.ranges(self.process)
        return merge(fixed, self.recent, scanned() if self.pins.direct else no_pages())


def _stat_of_living(process: Process) -> Stat:
    stat = process.stat()
    if stat.state in "ZX":
        raise TargetGone(f"process {process.pid} has exited")
    return stat


def _landmark(stat: Stat) -> tuple[int, int]:
    """Addresses that an ``execve`` changes. The address space alone does not tell: a process that
    shares it may keep it alive."""
    return stat.startcode, stat.startstack


@dataclass(slots=True)
class Advice:
    """Flags of VMAs beyond protection, by (start, end), as of the last :meth:`read`."""

    flags: dict[tuple[int, int], int] = field(default_factory=dict)

    def read(self, process: Process) -> None:
        """Ask for the flags of every VMA. It takes the kernel time in proportion to all memory, so
        that is only done for full images."""
        self.flags = {}
        span = (0, 0)
        for line in process.read("smaps").decode(errors="replace").split("\n")[:-1]:
            word, _, rest = line.partition(" ")
            if word == "VmFlags:":
                self.flags[span] = sum(_ADVICE.get(name, 0) for name in rest.split())
            elif not word.endswith(":"):
                start, _, end = word.partition("-")
                span = int(start, 16), int(end, 16)


_ADVICE = {
    "gd": VmaFlag.GROWS_DOWN, "lo": VmaFlag.LOCKED, "dd": VmaFlag.DONT_DUMP,
    "dc": VmaFlag.DONT_FORK, "wf": VmaFlag.WIPE_ON_FORK, "nr": VmaFlag.NO_RESERVE,
    "hg": VmaFlag.HUGE_PAGE, "nh": VmaFlag.NO_HUGE_PAGE, "mg": VmaFlag.MERGEABLE,
    "ss": VmaFlag.SHADOW_STACK,
}  # fmt: skip
"""By their names in the VmFlags line of proc(5)."""
