"""The armer of kernels with soft-dirty bits: ``clear_refs`` takes them off, a write sets one.

Nothing is injected. But looking at the bits and taking them off are two steps, between which a
running target would write unseen: so a scan wants it stopped. Who cannot be stopped waits for the
lock of the address space, which ``clear_refs`` holds: so whoever wrote in between was counted by
then. Where the kernel loses a bit, or keeps a page writable that has none, or somebody was counted,
all that may be concerned counts as written.

A bounded scan takes no bits off, which could only be done to all: so everything can be looked at
before it and after it, while the target runs. What it finds counts as written until bits are taken
off again.
"""

from __future__ import annotations

import fcntl
import mmap
import os
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import cache

import numpy as np

from crtrace.errors import COMPARE_INSTEAD, FeatureMissing, TargetBusy, TargetGone
from crtrace.faults import point
from crtrace.linux import pagemap
from crtrace.linux.addrspace import EVERYTHING, AddressSpace
from crtrace.linux.libc import kernel_version
from crtrace.linux.pagemap import PFNZERO, SOFT_DIRTY, SWAPPED, Scanner
from crtrace.linux.procfs import Process, Vma
from crtrace.linux.stop import StoppedProcess
from crtrace.track.armer import How, Look, Scan, Told
from crtrace.track.windows import effort, large, worth_while
from crtrace.units import (
    PAGE_SHIFT,
    PAGE_SIZE,
    U64,
    count_pages,
    intersect,
    merge,
    no_pages,
    subtract,
    to_ranges,
)

SINCE = (6, 1)
"""The oldest Linux on which this was tried, of those that tell who is in the target's memory."""
BOUNDED_UNTIL = (6, 12)
"""The newest on which bounds were tried. Later ones discard pages without the lock of the address
space, where no userfaultfd is, and nobody tells."""
CANARIES = 4
"""Pages that are kept soft-dirty, so that somebody else's clearing shows."""
A_READ = 32
"""Pages that a scan of everything passes while one is read once more. It only decides which of two
exact ways is taken."""
_CLEAR = b"4"
_TOLD_APART = SOFT_DIRTY | SWAPPED | PFNZERO


@cache
def try_on_ourselves() -> None:
    """Map, write, clear, write again and see whether exactly the second write is noticed.

    Raises ``OSError`` or ``FeatureMissing`` where soft-dirty bits do not work: a kernel without
    them takes the request and does nothing. Each page of ours is a fault afterwards, so it is done
    once, before there are buffers.
    """
    if kernel_version() < SINCE:
        raise FeatureMissing("soft-dirty bits are not to be relied on before Linux 6.1")
    memory = mmap.mmap(-1, 4 * PAGE_SIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory[:] = b"x" * len(memory)
    first = np.frombuffer(memory, dtype=np.uint8).ctypes.data >> PAGE_SHIFT
    clear = os.open("/proc/self/clear_refs", os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(clear, _CLEAR)
    finally:
        os.close(clear)
    memory[2 * PAGE_SIZE] = 0
    with open("/proc/self/pagemap", "rb", buffering=0) as file:
        words = np.frombuffer(os.pread(file.fileno(), 32, first * 8), dtype=np.uint64)
    if (words >> np.uint64(55) & np.uint64(1)).tolist() != [0, 0, 1, 0]:
        raise FeatureMissing("this kernel does not keep soft-dirty bits (CONFIG_MEM_SOFT_DIRTY)")


@dataclass(frozen=True, slots=True)
class Bits:
    """Page ranges of private memory: own pages; those with the bit; those not in place, swapped out
    or on their way; and zeros among those of files, which have no bit."""

    own: U64
    dirty: U64
    away: U64
    zeros: U64

    def renewed(self, windows: U64, there: Bits) -> Bits:
        """With what was found in page ranges later; bits stay on."""

        def now(before: U64, found: U64) -> U64:
            return merge(subtract(before, windows), found)

        own = now(self.own, there.own)
        dirty = intersect(merge(self.dirty, there.dirty), own)
        return Bits(own, dirty, now(self.away, there.away), now(self.zeros, there.zeros))

    def nothing(self) -> U64:
        """Where there are no own pages."""
        return subtract(EVERYTHING, self.own)


class SoftDirtyArmer:
    """Arms one process. Nothing of it is in the target, so nothing has to be taken back: a page
    that is written later costs one page fault, and that is all."""

    name = "soft-dirty"
    heals = True
    ldt = b""
    stands_still = True

    def __init__(self, process: Process, space: AddressSpace) -> None:
        self._process = process
        self._space = space
        self._pagemap = self._clear_refs = self._mem = -1
        self._doubtful = True
        """The bits do not tell what was written."""
        self._vmas: frozenset[Vma] = frozenset()
        """The mappings when the bits were last taken off."""
        self._map_as_of = -1
        """The changes of the map until then."""
        self._canaries = no_pages()
        self._moving = no_pages()
        """Found written while the kernel moved them to other memory, perhaps: they arrive writable,
        and without a bit."""
        self._unlike_bits: tuple[object, object, object] = None, None, None
        """As told before the bits were last taken off."""
        self._seen: Bits | None = None
        """As everything was last looked at since then, and renewed by bounded scans."""
        self._not_rearmed = no_pages()
        """What bounded scans have found since then, of what has bits."""
        self._read_again = 0
        """Pages of it that were read in vain, perhaps."""
        self._effort = 0
        """How much a scan of everything has to do, in pages."""
        try_on_ourselves()
        try:
            self._pagemap = process.open("pagemap")
            self._clear_refs = process.open("clear_refs", os.O_WRONLY)
            self._mem = process.open("mem", os.O_RDWR)
            self._scanner = _scanner(self._pagemap, space)
        except BaseException:
            self.close()
            raise

    def arm(self, stopped: StoppedProcess) -> None:
        """See :class:`crtrace.track.armer.Armer`. Two of us would clear each other's bits: the lock
        is advisory, and goes with its holder."""
        try:
            fcntl.flock(self._clear_refs, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise TargetBusy(
                f"another crtrace watches process {self._process.pid} by soft-dirty bits",
                hint=COMPARE_INSTEAD,
            ) from error

    def scan(self, space: AddressSpace, how: How) -> Scan:
        """See :class:`crtrace.track.armer.Armer`; always with the target stopped."""
        if not how.stopped:
            raise ValueError("soft-dirty bits are only taken off while the target is stopped")
        return self._scan_within(space, how) or self._scan_all(space, how)

    def _scan_within(self, space: AddressSpace, how: How) -> Scan | None:
        """A bounded scan; None where that is not exact, or not worth it."""
        windows = self._windows(space, how)
        if not self._seen or windows is None:
            return None
        there = self._bits(windows)
        if not self._canaries_live(there.dirty) or how.told.unlike_bits() != self._unlike_bits:
            return None
        self._seen = bits = self._seen.renewed(windows, there)
        unlike = merge(self._without_bits(), bits.zeros)
        written = intersect(bits.own, merge(bits.dirty, self._moving, unlike))
        unarmed, left = intersect(bits.own, unlike), self._not_rearmed
        self._not_rearmed = merge(left, subtract(written, unlike))
        return Scan(written, bits.nothing, unarmed, left, bounded=True)

    def _windows(self, space: AddressSpace, how: How) -> U64 | None:
        """Where to look, given the bounds; None: everywhere, and take the bits off.

        Mapped files and what was not in memory are not bounded, as in ``track/userfaultfd``.
        """
        if how.ahead or how.within is None or not self._seen or self._doubtful:
            return None
        if space.changes != self._map_as_of or how.told.unlike_bits() != self._unlike_bits:
            return None
        self._read_again += count_pages(self._not_rearmed)
        if A_READ * self._read_again > self._effort:
            return None
        within = intersect(how.within, space.anonymous)
        beyond = merge(space.private_files, self._seen.away, self._canaries)
        return worth_while(merge(within, beyond), self._effort, beside=False)

    def _scan_all(self, space: AddressSpace, how: How) -> Scan:
        """Read all bits and take them off."""
        left, self._not_rearmed = self._not_rearmed, no_pages()
        self._seen, self._read_again = None, 0
        again, self._doubtful = self._doubtful, True  # what fails below has taken bits off, perhaps
        migrated, before = how.told.migrated(), how.told.others()
        replaced, joined = self._unlike(how.told)
        mapped = self._compare_map(space)
        joints = space.touching_alike if joined else no_pages()
        bits = self._bits()
        again |= replaced or not self._canaries_live(bits.dirty)
        self._clear()
        away = bits.away
        if how.told.others() != before:  # then bits came and went in between
            again, bits = True, self._bits()
            away = merge(away, bits.away)
        unarmed = intersect(bits.own, merge(self._without_bits(), bits.zeros))
        changed = merge(bits.dirty, mapped, joints, self._moving, unarmed)
        written = bits.own if again else intersect(bits.own, changed)
        self._moving = intersect(written, away)
        self._plant(space, subtract(bits.own, merge(space.hugetlb, bits.zeros)))
        # Who sets out meanwhile may arrive writable, and without a bit.
        self._doubtful = how.told.migrated() != migrated
        return Scan(written, bits.nothing, unarmed, left)

    def _unlike(self, told: Told) -> tuple[bool, bool]:
        """Whether, since the last scan, pages may have been replaced; and mappings joined that were
        there with one that was new, and with each other."""
        before, self._unlike_bits = self._unlike_bits, told.unlike_bits()
        replaced, grown, remade = (b != n for b, n in zip(before, self._unlike_bits, strict=True))
        return replaced, grown and remade

    def _bits(self, windows: U64 | None = None) -> Bits:
        ranges, categories = self._scanner.scan(pagemap.OWN_OR_ZEROS, windows, report=_TOLD_APART)
        zero, dirty, away = (
            categories & np.uint64(bit) != 0 for bit in (PFNZERO, SOFT_DIRTY, SWAPPED)
        )
        private = self._space.private
        zeros = intersect(merge(ranges[zero]), self._space.private_files)
        return Bits(
            intersect(merge(ranges[~zero], zeros), private),
            intersect(merge(ranges[dirty & ~zero]), private),
            intersect(merge(ranges[away]), private),
            zeros,
        )

    def _clear(self) -> None:
        point("write /proc/PID/clear_refs")
        try:
            os.write(self._clear_refs, _CLEAR)
        except ProcessLookupError as error:
            raise TargetGone(f"process {self._process.pid} has exited") from error

    # ---- what would go unnoticed ---------------------------------------------------------------

    def _compare_map(self, space: AddressSpace) -> U64:
        """The mappings that are not as they were when the bits were last taken off. The kernel says
        of a new one that all of it is dirty, but forgets that where it joins it with an old one."""
        if space.changes == self._map_as_of:
            return no_pages()
        before, self._vmas = self._vmas, frozenset(space.vmas)
        self._map_as_of = space.changes
        return merge(space.ranges(lambda vma: vma not in before))

    def _without_bits(self) -> U64:
        """Where the kernel keeps no bits, hugetlbfs, or does not always set them: where a file is
        only read it puts breakpoints (uprobes), and may take them away as the target itself."""
        code = intersect(self._space.private_files, self._space.only_read)
        return merge(self._space.hugetlb, code)

    def _canaries_live(self, dirty: U64) -> bool:
        """Whether nobody else has taken bits off: those of our canaries are there."""
        return len(self._canaries) > 0 and not len(subtract(self._canaries, dirty))

    def _plant(self, space: AddressSpace, armed: U64) -> None:
        """Write what is there already into pages that the target does not write: the end of its
        first stack, and what may only be read."""
        fixed = intersect(armed, space.only_read)[: CANARIES - 1, 0].tolist()
        stack = [vma.end_page - 1 for vma in space.vmas if vma.name == "[stack]"]
        pages = [page for page in {*fixed, *stack} if self._rewrite(page)]
        self._canaries = to_ranges(np.array(sorted(pages), dtype=np.uint64))

    def _rewrite(self, page: int) -> bool:
        point("pwrite /proc/PID/mem")
        at = page << PAGE_SHIFT
        with suppress(OSError):
            return os.pwrite(self._mem, os.pread(self._mem, 1, at), at) == 1
        return False

    # ---- the rest of an armer ------------------------------------------------------------------

    def written_now(self) -> int:
        """See :class:`crtrace.track.armer.Armer`: all of a huge page is dirty after one fault."""
        self._space.refresh()
        self._seen = self._bits()
        self._effort = effort(count_pages(self._seen.own), len(self._space.vmas))
        return count_pages(self._seen.own if self._doubtful else self._seen.dirty)

    def boundable(self) -> bool:
        """See :class:`crtrace.track.armer.Armer`."""
        return large(self._effort) and kernel_version() <= BOUNDED_UNTIL

    def look(self, space: AddressSpace, beside: ThreadPoolExecutor) -> Look:
        """See :class:`crtrace.track.armer.Armer`."""
        # What was on its way may have arrived, and where dirty memory is moved, bits are set.
        known = merge(self._not_rearmed, self._seen.away if self._seen else no_pages())
        self._seen = self._bits()
        written = subtract(self._seen.dirty, known)
        absent = subtract(space.anonymous, merge(self._seen.own, space.vdso))
        return Look(intersect(written, space.anonymous), absent)

    def let_go(self, address: int) -> None:
        """See :class:`crtrace.track.armer.Armer`: nobody waits for it."""

    def everything(self) -> U64:
        """See :class:`crtrace.track.armer.Armer`."""
        ranges, _ = self._scanner.scan(pagemap.OWN)
        return subtract(intersect(merge(ranges), self._space.private), self._without_bits())

    def close(self) -> None:
        """See :class:`crtrace.track.armer.Armer`."""
        for name in ("_pagemap", "_clear_refs", "_mem"):
            fd = getattr(self, name)
            if fd >= 0:
                os.close(fd)
                setattr(self, name, -1)


def _scanner(fd: int, space: AddressSpace) -> Scanner:
    if pagemap.supported(fd, SOFT_DIRTY):
        return pagemap.KernelScanner(fd)
    return pagemap.PlainScanner(fd, space)
