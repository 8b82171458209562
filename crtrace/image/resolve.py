"""From an address to its contents: own page, object, file or zeros (FORMAT.md, "VMAS")."""

from __future__ import annotations

from collections.abc import Iterator
from enum import Enum
from typing import NamedTuple

import numpy as np

from crtrace.image.merged import MergedPages
from crtrace.image.places import PageKind
from crtrace.image.tables import Vma, VmaFlag, VmaKind
from crtrace.units import PAGE_SHIFT, PAGE_SIZE, U64, Bytes

FEW, BATCH = 1 << 6, 1 << 15
"""Pages looked up at a time: few where something begins, then more and more."""


class Source(Enum):
    """Where the contents of a page come from."""

    STORED = "stored"
    ZERO = "zero"
    OBJECT = "object"
    FILE = "file"
    UNREADABLE = "unreadable"
    LOST = "lost"
    """Not known, because the chain is damaged."""


SOURCES = tuple(Source)
STORED, ZERO, OBJECT, FILE, UNREADABLE, LOST = range(6)
UNKNOWN_WHEN_ABSENT = (VmaKind.VDSO, VmaKind.VVAR, VmaKind.VSYSCALL, VmaKind.DEVICE)

Codes = np.ndarray[tuple[int], np.dtype[np.uint8]]


class Run(NamedTuple):
    """Neighbouring pages with contents from the same source: ``npages`` from address ``addr``."""

    addr: int
    npages: int
    source: Source


def memory_runs(epoch: MergedPages, space: int, vma: Vma) -> Iterator[Run]:
    """The mapping from start to end, as runs; neither time nor memory grow with its empty parts."""
    open_run: Run | None = None
    for run in _pieces(epoch, space, vma):
        if open_run and open_run.source is run.source:
            open_run = Run(open_run.addr, open_run.npages + run.npages, run.source)
            continue
        if open_run:
            yield open_run
        open_run = run
    if open_run:
        yield open_run


def _pieces(epoch: MergedPages, space: int, vma: Vma) -> Iterator[Run]:
    """The mapping as runs of which neighbours may have the same source."""
    start, batch = 0, FEW
    while start < vma.pages:
        addr = vma.start + start * PAGE_SIZE
        empty = min(_empty(epoch, space, vma, addr), vma.pages - start)
        if empty:
            alike = _codes(epoch, space, vma, _pages(addr, 1))
            yield Run(addr, empty, SOURCES[alike[0]])
            start, batch = start + empty, FEW
            continue
        count = min(batch, vma.pages - start)
        yield from _runs(addr, _codes(epoch, space, vma, _pages(addr, count)))
        start, batch = start + count, min(2 * batch, BATCH)


def _empty(epoch: MergedPages, space: int, vma: Vma, addr: int) -> int:
    """Pages from ``addr`` on of which no index says anything."""
    page = addr >> PAGE_SHIFT
    empty = epoch.at_or_after(space, page) - page
    if vma.object_space:
        page = (vma.pgoff + addr - vma.start) >> PAGE_SHIFT
        empty = min(empty, epoch.at_or_after(vma.object_space, page) - page)
    return empty


def _runs(addr: int, codes: Codes) -> Iterator[Run]:
    edges = np.flatnonzero(np.diff(codes)) + 1
    starts = np.concatenate(([0], edges)).tolist()
    ends = np.concatenate((edges, [len(codes)])).tolist()
    for start, end in zip(starts, ends, strict=True):
        yield Run(addr + start * PAGE_SIZE, end - start, SOURCES[codes[start]])


def _pages(addr: int, count: int) -> U64:
    return np.arange(addr >> PAGE_SHIFT, (addr >> PAGE_SHIFT) + count, dtype=np.uint64)


def _shift(vma: Vma) -> np.uint64:
    """What to add (modulo 2^64) to a page of the address space to get the one of the object."""
    return np.uint64(((vma.pgoff >> PAGE_SHIFT) - (vma.start >> PAGE_SHIFT)) % 2**64)


# By PageKind; none is inherited any more when it comes here.
_OWN = np.array([STORED, ZERO, FILE, UNREADABLE, LOST, LOST], dtype=np.uint8)
_OBJECT = np.array([OBJECT, ZERO, ZERO, UNREADABLE, LOST, LOST], dtype=np.uint8)
_OBJECT_OF_FILE = np.array([OBJECT, ZERO, FILE, UNREADABLE, LOST, LOST], dtype=np.uint8)


def _codes(epoch: MergedPages, space: int, vma: Vma, pages: U64) -> Codes:
    """The source of each page, as an index into ``SOURCES``."""
    own = epoch.page_kinds(space, pages)
    codes: Codes = _OWN[own]
    absent = own == PageKind.HOLE
    if not absent.any():
        return codes
    if vma.object_space:
        behind = _OBJECT_OF_FILE if vma.flags & VmaFlag.FILE_BEHIND else _OBJECT
        codes[absent] = behind[epoch.page_kinds(vma.object_space, pages[absent] + _shift(vma))]
    elif vma.kind in UNKNOWN_WHEN_ABSENT:
        codes[absent] = UNREADABLE
    elif not vma.file:
        codes[absent] = ZERO
    return codes


def read_run(epoch: MergedPages, space: int, vma: Vma, addr: int, npages: int) -> Bytes:
    """The contents, ``(npages, 4096)``, of pages of a mapping; zeros where there are none.

    For a page from a file or an unreadable one, that is not what the target would see:
    ``memory_runs`` tells which. Ask for some thousand pages at a time.
    """
    pages = _pages(addr, npages)
    data = epoch.read_pages(space, pages)
    if vma.object_space:
        absent = epoch.page_kinds(space, pages) == PageKind.HOLE
        if absent.any():
            data[absent] = epoch.read_pages(vma.object_space, pages[absent] + _shift(vma))
    return data
