"""Which pages of a process have contents, which were written, and arm them again.

``PAGEMAP_SCAN`` answers it from Linux 6.7 on: categories and flags are those of its
``include/uapi/linux/fs.h``. What it says of contents and of soft-dirty bits, though not of armed
pages, can also be read out of ``/proc/PID/pagemap`` word by word, as older kernels need it.
"""

from __future__ import annotations

import errno
import mmap
import os
import struct
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from crtrace.errors import TargetGone
from crtrace.faults import point
from crtrace.linux.addrspace import EVERYTHING, AddressSpace
from crtrace.linux.libc import ioctl
from crtrace.units import (
    PAGE_SHIFT,
    PAGE_SIZE,
    U64,
    count_pages,
    intersect,
    merge,
    no_pages,
    pairs,
    subtract,
)

WPALLOWED, WRITTEN, FILE, PRESENT, SWAPPED, PFNZERO = (1 << bit for bit in range(6))
SOFT_DIRTY, GUARD = 1 << 7, 1 << 8
"""Guard regions tell of themselves from Linux 6.15 on; before, nothing that excludes them does."""

REPORTED = WPALLOWED | WRITTEN | PRESENT | SWAPPED | GUARD
"""Categories in the answer. Not FILE: to tell it, the kernel looks at every page's own descriptor,
and a scan takes ten times as long; so it is used only as a condition, and only where needed."""

WP_MATCHING = 1
_ARG = struct.Struct("<12Q")
_PAGEMAP_SCAN = 0xC0606610
_VECTOR = 8192


@dataclass(frozen=True, slots=True)
class Filter:
    """Which pages a scan reports: all of ``need``, none of ``exclude``, any of ``any_of``.

    In ``any_of``, what is in ``inverted`` means its absence.
    """

    need: int = 0
    exclude: int = 0
    any_of: int = PRESENT | SWAPPED
    inverted: int = 0


NOTHING_THERE = Filter(inverted=PRESENT, any_of=PRESENT | PFNZERO)
"""Pages that are not present, or are the zero page. Swapped-out ones among them say so."""


OWN = Filter(exclude=FILE | PFNZERO | GUARD)
"""Pages with contents of their own. The kernel takes ten times as long for these, see above."""
OWN_OR_ZEROS = Filter(exclude=FILE | GUARD)
"""And the zero page: in private mappings of files, where KSM has found own pages to be zeros."""


class Scanner(Protocol):
    """Tells which pages of one process match a filter."""

    def scan(
        self, want: Filter, within: U64 | None = None, *, report: int = REPORTED
    ) -> tuple[U64, U64]:
        """Page ranges that match, and the categories of each.

        Returns an ``(n, 2)`` array of half-open page ranges and ``(n,)`` categories, those of
        ``report``. ``within``: page ranges, ascending and disjoint, outside of which nothing is
        looked at. Raises ``TargetGone``.
        """


def scanner(fd: int, space: AddressSpace) -> Scanner:
    """The best scanner that works for a process, given its open pagemap."""
    return KernelScanner(fd) if supported(fd) else PlainScanner(fd, space)


class KernelScanner:
    """``PAGEMAP_SCAN``, which can also arm. ``vector`` is touched when made, not in use."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self._known = ~0 if supported(fd, GUARD) else ~GUARD
        self._vector = np.ones((_VECTOR, 3), dtype=np.uint64)  # zeros would not be touched
        self._vector_at = self._vector.ctypes.data

    def scan(
        self,
        want: Filter,
        within: U64 | None = None,
        *,
        report: int = REPORTED,
        arm: bool = False,
    ) -> tuple[U64, U64]:
        """See :class:`Scanner`.

        With ``arm``, each reported page that was written is write-protected in the same step, and
        pages outside write-protect VMAs are passed over in silence (so ask for those apart).
        """
        exclude = want.exclude & self._known
        conditions = (
            exclude | want.inverted, want.need | exclude, want.any_of, report & self._known,
        )  # fmt: skip
        windows = EVERYTHING if within is None else within
        parts: list[U64] = []
        for at, end in (windows << np.uint64(PAGE_SHIFT)).tolist():
            done = at
            while done < end:
                done = self._scan_some(done, end, conditions, arm, parts)
        if not parts:
            return no_pages(), np.empty(0, dtype=np.uint64)
        found = parts[0] if len(parts) == 1 else np.concatenate(parts)
        return found[:, :2] >> np.uint64(PAGE_SHIFT), found[:, 2]

    def _scan_some(
        self, start: int, end: int, conditions: tuple[int, ...], arm: bool, parts: list[U64]
    ) -> int:
        """As much of the addresses as the vector holds; where to go on."""
        arg = bytearray(
            _ARG.pack(
                _ARG.size, WP_MATCHING if arm else 0, start, end, 0, self._vector_at,
                _VECTOR, 0, *conditions,
            )
        )  # fmt: skip
        try:
            name = "PAGEMAP_SCAN, arming" if arm else "PAGEMAP_SCAN"
            count = ioctl(name, self.fd, _PAGEMAP_SCAN, arg)
        except OSError as error:
            if error.errno not in (errno.ESRCH, errno.ENOTTY):
                raise
            raise TargetGone("the address space that was scanned is gone") from error
        if count:
            parts.append(self._vector[:count].copy())
        walked: int = _ARG.unpack(arg)[4]
        if walked <= start:
            raise OSError(errno.EIO, f"PAGEMAP_SCAN does not get beyond {start:#x}")
        return walked


def supported(fd: int, category: int = PRESENT) -> bool:
    """Whether this kernel has the scan at all, and knows ``category``."""
    probe = np.zeros((1, 3), dtype=np.uint64)
    arg = bytearray(
        _ARG.pack(
            _ARG.size, 0, 0, PAGE_SIZE, 0, probe.ctypes.data, 1, 0, 0, 0, category, category
        )
    )  # fmt: skip
    try:
        ioctl("PAGEMAP_SCAN", fd, _PAGEMAP_SCAN, arg)
    except ProcessLookupError:
        pass  # it is known; the process is gone
    except OSError:
        return False
    return True


_IN_WORD = ((PRESENT, 63), (SWAPPED, 62), (FILE, 61), (GUARD, 58), (SOFT_DIRTY, 55))
"""Categories, and the bits of a word of ``/proc/PID/pagemap`` that tell them."""
_FRAME, _IN_PLACE = np.uint64((1 << 55) - 1), np.uint64(1 << 63)
_BLOCK = 1 << 18
"""Pages looked at in one step: 1 GiB of them, described by 2 MiB."""
_ATTEMPTS = 100
"""Before Linux 6.5, words are left out where a huge page goes while they are read, and what follows
moves up: they are read again then."""
_SPARSE = 32
"""Mapped pages for one in memory from which on it is quicker to ask ``smaps`` what is empty. That
takes 43 ms for a GiB in memory, and to pass an empty one 1.1 ms (medians of 9, Linux 6.18)."""


class PlainScanner:
    """Reads the words of ``/proc/PID/pagemap``: all but WPALLOWED and WRITTEN, of the VMAs in
    ``space`` as last refreshed. Of a whole GiB that is empty, no soft-dirty bit is told.

    Where there are far more than in memory, larger VMAs are passed over if ``smaps`` says that they
    are empty; else a TiB takes a second.
    Without CAP_SYS_ADMIN the zero page is not told from others: contents that are zeros.
    """

    def __init__(self, fd: int, space: AddressSpace) -> None:
        self.fd = fd
        self._space = space
        self._zero = _zero_frame()

    def scan(
        self, want: Filter, within: U64 | None = None, *, report: int = REPORTED
    ) -> tuple[U64, U64]:
        """See :class:`Scanner`. ``ValueError`` if ``want`` speaks of armed pages."""
        if (want.need | want.exclude | want.any_of) & (WPALLOWED | WRITTEN):
            raise ValueError("pagemap does not tell that")
        mapped = self._space.mapped if within is None else intersect(self._space.mapped, within)
        found = [(no_pages(), np.empty(0, dtype=np.uint64))]
        large = mapped[mapped[:, 1] - mapped[:, 0] > _BLOCK]
        empty = no_pages()
        if len(large) and count_pages(large) > _SPARSE * self._space.resident():
            empty = intersect(mapped, self._space.empty())
        blank = [empty]
        for first, last in subtract(mapped, empty).tolist():
            for at in range(first, last, _BLOCK):
                words = self._words(at, min(at + _BLOCK, last))
                if int(words.max()) >> 58:  # the bits below tell nothing that is asked
                    found.append(self._runs(at, words, want, report))
                else:
                    blank.append(np.array([[at, at + len(words)]], dtype=np.uint64))
        nothing = merge(*blank)
        found.append(_matching(nothing, np.zeros(len(nothing), dtype=np.uint64), want, report))
        ranges, categories = (np.concatenate(column) for column in zip(*found, strict=True))
        order = np.argsort(ranges[:, 0])
        return ranges[order], categories[order]

    def _words(self, first: int, end: int) -> U64:
        """What ``/proc/PID/pagemap`` has for each of the pages ``[first, end)``."""
        for _ in range(_ATTEMPTS):
            point("pread /proc/PID/pagemap")
            try:
                raw = os.pread(self.fd, 8 * (end - first), 8 * first)
            except ProcessLookupError as error:
                raise TargetGone("the address space that was scanned is gone") from error
            if not raw:
                raise TargetGone("the address space that was scanned is gone")
            if len(raw) == 8 * (end - first):
                return np.frombuffer(raw, dtype=np.uint64)
        raise OSError(errno.EIO, f"/proc/PID/pagemap ends within a mapping, near page {first:#x}")

    def _runs(self, first: int, words: U64, want: Filter, report: int) -> tuple[U64, U64]:
        """Ranges of matching pages that are alike; page ``first`` is the first of all."""
        asked = want.need | want.exclude | want.any_of | want.inverted | report
        bits = [(category, bit) for category, bit in _IN_WORD if category & asked]
        # The highest 16 bits have all that is asked; bit 0 of them is free for the zero page.
        top = words.view(np.uint16)[3::4] & np.uint16(sum(1 << bit - 48 for _, bit in bits))
        if self._zero and asked & PFNZERO:
            top |= words & (_FRAME | _IN_PLACE) == self._zero | _IN_PLACE
        inner = np.flatnonzero(top[1:] != top[:-1]) + 1
        edges = np.concatenate(([0], inner, [len(top)])).astype(np.uint64)
        alike = top[edges[:-1]].astype(np.uint64)
        categories = (alike & np.uint64(1)) * np.uint64(PFNZERO)
        for category, bit in bits:
            categories |= (alike >> np.uint64(bit - 48) & np.uint64(1)) * np.uint64(category)
        ranges = pairs(edges[:-1], edges[1:]) + np.uint64(first)
        return _matching(ranges, categories, want, report)


def _matching(ranges: U64, categories: U64, want: Filter, report: int) -> tuple[U64, U64]:
    """The ranges that ``want`` asks for, decided as ``PAGEMAP_SCAN`` does."""
    seen = categories ^ np.uint64(want.exclude | want.inverted)
    mask = np.uint64(want.need | want.exclude)
    matching = (seen & mask == mask) & (seen & np.uint64(want.any_of) != 0)
    return ranges[matching], categories[matching] & np.uint64(report)


def _zero_frame() -> np.uint64:
    """The frame of the page that all memory reads from which was never written; 0 if unknown."""
    memory = mmap.mmap(-1, PAGE_SIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    page = np.frombuffer(memory, dtype=np.uint8)
    page.max()  # brings it into the page table
    with open("/proc/self/pagemap", "rb", buffering=0) as pagemap:
        word = os.pread(pagemap.fileno(), 8, page.ctypes.data >> PAGE_SHIFT << 3)
    frame: np.uint64 = np.frombuffer(word, dtype=np.uint64)[0] & _FRAME
    return frame
