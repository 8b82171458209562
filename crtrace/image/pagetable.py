"""What a chain's newest epoch holds of one space: page -> hash, about 17 bytes a page."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Protocol

import numpy as np
import numpy.typing as npt

from crtrace.units import REGION_PAGES, U64, Bools, contains, distinct, pairs

SLAB_REGIONS = 256
"""Regions allocated together: 2 MiB of hashes. Tables grow by slabs, so nothing is ever copied."""
SLAB_PAGES = SLAB_REGIONS * REGION_PAGES

REGION_SHIFT = np.uint64(REGION_PAGES.bit_length() - 1)
IN_REGION = np.uint64(REGION_PAGES - 1)

HASH = np.dtype("V16")
"""A hash as one thing, which numpy moves in one step."""
Cells = np.ndarray[tuple[int], np.dtype[np.int64]]


class KnownPages(Protocol):
    """What a parent image has of a space, as a writer asks it."""

    def lookup(self, pages: U64) -> tuple[Bools, U64]:
        """Which of ``pages`` (any order) are known, ``(n,)``, and their hashes, ``(n, 2)``."""


class PageTable:
    """Page number -> 16-byte hash, in regions of 512 pages, all operations on whole arrays.

    Threads may look up and store different pages at the same time. A page without an entry is
    one that the chain holds no contents of.
    """

    def __init__(self) -> None:
        self._hashes: list[npt.NDArray[np.void]] = []
        self._known: list[Bools] = []
        # Replaced as a whole under the lock, so readers need none: region numbers, row of each.
        self._regions = np.empty(0, dtype=np.uint64), np.empty(0, dtype=np.int64)
        self._grow = threading.Lock()

    def __len__(self) -> int:
        """Pages known."""
        return sum(int(np.count_nonzero(known)) for known in self._known)

    def lookup(self, pages: U64) -> tuple[Bools, U64]:
        """Which of ``pages`` (any order) are known, ``(n,)``, and their hashes, ``(n, 2)``.

        The hash of a page that is not known is zeros.
        """
        known = np.zeros(len(pages), dtype=np.bool_)
        hashes = np.zeros(len(pages), dtype=HASH)
        for slab, which, at in _by_slab(self._cells(pages)):
            known[which] = self._known[slab][at]
            hashes[which] = self._hashes[slab][at]
        hashes[~known] = np.zeros(1, dtype=HASH)
        return known, hashes.view(np.uint64).reshape(-1, 2)

    def store(self, pages: U64, hashes: U64) -> None:
        """Enter or replace the hashes, ``(n, 2)``, of ``pages``, ``(n,)``."""
        cells = self._cells(pages)
        if len(cells) and cells.min() < 0:
            self._add_regions(distinct(pages[cells < 0] >> REGION_SHIFT))
            cells = self._cells(pages)
        whole = np.ascontiguousarray(hashes).view(HASH).reshape(-1)
        for slab, which, at in _by_slab(cells):
            self._hashes[slab][at] = whole[which]
            self._known[slab][at] = True

    def drop(self, pages: U64) -> None:
        """Forget ``pages``, known or not."""
        for slab, _, at in _by_slab(self._cells(pages)):
            self._known[slab][at] = False

    def absent_from(self, present: U64) -> U64:
        """The known pages, ascending, that lie in none of the ranges of a range array."""
        regions, rows = self._regions
        some = ~_covered(regions, present)
        regions, rows = regions[some], rows[some]
        if not len(regions):
            return np.empty(0, dtype=np.uint64)
        bitmaps = np.empty((len(rows), REGION_PAGES), dtype=np.bool_)
        for slab, which, at in _by_slab(rows * REGION_PAGES):
            bitmaps[which] = self._known[slab].reshape(-1, REGION_PAGES)[at // REGION_PAGES]
        known = bitmaps.reshape(-1)
        if len(present):
            known &= ~_painted(regions, present)
        at = np.flatnonzero(known)
        first = regions << REGION_SHIFT
        absent: U64 = first[at >> int(REGION_SHIFT)] + (at.astype(np.uint64) & IN_REGION)
        return absent

    def _cells(self, pages: U64) -> Cells:
        """Where each page is among the cells of all slabs; -1 for nowhere."""
        regions, rows = self._regions
        if not len(regions):
            return np.full(len(pages), -1, dtype=np.int64)
        wanted = pages >> REGION_SHIFT
        at = np.minimum(np.searchsorted(regions, wanted), len(regions) - 1)
        inside = (pages & IN_REGION).astype(np.int64)
        return np.where(regions[at] == wanted, rows[at] * REGION_PAGES + inside, -1)

    def _add_regions(self, wanted: U64) -> None:
        with self._grow:
            regions, rows = self._regions
            new = wanted[self._cells(wanted << REGION_SHIFT) < 0]  # others may have added some
            added = len(rows) + np.arange(len(new), dtype=np.int64)
            while len(self._known) * SLAB_REGIONS < len(rows) + len(new):
                # Zeros from the kernel: untouched parts of a slab take no memory.
                self._hashes.append(np.zeros(SLAB_PAGES, dtype=HASH))
                self._known.append(np.zeros(SLAB_PAGES, dtype=np.bool_))
            regions, rows = np.concatenate((regions, new)), np.concatenate((rows, added))
            order = np.argsort(regions)
            self._regions = regions[order], rows[order]


def _by_slab(cells: Cells) -> Iterator[tuple[int, Bools | slice, Cells]]:
    """Each slab that ``cells`` are in, which of them are, and where in it; -1 is in none."""
    if not len(cells):
        return
    low, high = int(cells.min()) // SLAB_PAGES, int(cells.max()) // SLAB_PAGES
    if low == high >= 0:
        yield low, slice(None), cells - low * SLAB_PAGES
    elif high >= 0:
        slabs = cells // SLAB_PAGES
        for slab in distinct(slabs[slabs >= 0]).tolist():
            which: Bools = slabs == slab
            yield slab, which, cells[which] - slab * SLAB_PAGES


def _covered(regions: U64, present: U64) -> Bools:
    """Which of ``regions`` lie in one range of ``present`` as a whole."""
    whole = present[present[:, 1] - present[:, 0] >= REGION_PAGES]
    firsts = pairs(whole[:, 0], whole[:, 1] - np.uint64(REGION_PAGES - 1))
    return contains(firsts, regions << REGION_SHIFT)


def _painted(regions: U64, present: U64) -> Bools:
    """For each page of ``regions`` in turn: does it lie in a range of ``present``?

    The ranges' ends are moved to positions in that row of pages, an end in a region that is not
    there to the beginning of the next; +1 and -1 at the positions then add up to the answer, at a
    cost that does not depend on how many ranges there are to a region.
    """
    size = len(regions) * REGION_PAGES
    wanted = present >> REGION_SHIFT
    at = np.searchsorted(regions, wanted)
    there = regions[np.minimum(at, len(regions) - 1)] == wanted
    inside = np.where(there, present & IN_REGION, np.uint64(0)).astype(np.int64)
    position = at * REGION_PAGES + inside
    position = position[position[:, 0] < position[:, 1]]
    # What is left has each start, and each end, once; only so may they be counted by index.
    change = np.zeros(size + 1, dtype=np.int8)
    change[position[:, 0]] += 1
    change[position[:, 1]] -= 1
    painted: Bools = np.cumsum(change[:-1], dtype=np.int8).view(np.bool_)
    return painted
