"""What a chain's newest epoch holds of one space: page -> hash, about 17 bytes a page."""

from __future__ import annotations

import threading
from typing import Protocol

import numpy as np

from crtrace.units import REGION_PAGES, U64, Bools, distinct

SLAB_REGIONS = 256
"""Regions allocated together: 2 MiB of hashes. Tables grow by slabs, so nothing is ever copied."""

REGION_SHIFT = np.uint64(REGION_PAGES.bit_length() - 1)
IN_REGION = np.uint64(REGION_PAGES - 1)


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
        self._hashes: list[U64] = []
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
        rows = self._rows(pages)
        known = np.zeros(len(pages), dtype=np.bool_)
        hashes = np.zeros((len(pages), 2), dtype=np.uint64)
        for slab, at in _by_slab(rows):
            row, column = rows[at] % SLAB_REGIONS, pages[at] & IN_REGION
            known[at] = self._known[slab][row, column]
            hashes[at] = self._hashes[slab][row, column]
        hashes[~known] = 0
        return known, hashes

    def store(self, pages: U64, hashes: U64) -> None:
        """Enter or replace the hashes, ``(n, 2)``, of ``pages``, ``(n,)``."""
        rows = self._rows(pages)
        if len(rows) and rows.min() < 0:
            self._add_regions(distinct(pages[rows < 0] >> REGION_SHIFT))
            rows = self._rows(pages)
        for slab, at in _by_slab(rows):
            row, column = rows[at] % SLAB_REGIONS, pages[at] & IN_REGION
            self._hashes[slab][row, column] = hashes[at]
            self._known[slab][row, column] = True

    def drop(self, pages: U64) -> None:
        """Forget ``pages``, known or not."""
        rows = self._rows(pages)
        for slab, at in _by_slab(rows):
            self._known[slab][rows[at] % SLAB_REGIONS, pages[at] & IN_REGION] = False

    def absent_from(self, present: U64) -> U64:
        """The known pages, ascending, that lie in none of the ranges of a range array."""
        regions, rows = self._regions
        if not len(regions):
            return np.empty(0, dtype=np.uint64)
        known = np.concatenate(self._known)[rows].reshape(-1)
        if len(present):
            known &= ~_painted(regions, present)
        at = np.flatnonzero(known)
        first = regions << REGION_SHIFT
        absent: U64 = first[at >> int(REGION_SHIFT)] + (at.astype(np.uint64) & IN_REGION)
        return absent

    def _rows(self, pages: U64) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
        """The row of each page's region among all slabs; -1 for none."""
        regions, rows = self._regions
        if not len(regions):
            return np.full(len(pages), -1, dtype=np.int64)
        wanted = pages >> REGION_SHIFT
        at = np.minimum(np.searchsorted(regions, wanted), len(regions) - 1)
        return np.where(regions[at] == wanted, rows[at], -1)

    def _add_regions(self, wanted: U64) -> None:
        with self._grow:
            regions, rows = self._regions
            new = wanted[self._rows(wanted << REGION_SHIFT) < 0]  # others may have added some
            added = len(rows) + np.arange(len(new), dtype=np.int64)
            while len(self._known) * SLAB_REGIONS < len(rows) + len(new):
                # Zeros from the kernel: untouched parts of a slab take no memory.
                self._hashes.append(np.zeros((SLAB_REGIONS, REGION_PAGES, 2), dtype=np.uint64))
                self._known.append(np.zeros((SLAB_REGIONS, REGION_PAGES), dtype=np.bool_))
            regions, rows = np.concatenate((regions, new)), np.concatenate((rows, added))
            order = np.argsort(regions)
            self._regions = regions[order], rows[order]


def _by_slab(
    rows: np.ndarray[tuple[int], np.dtype[np.int64]],
) -> list[tuple[int, np.ndarray[tuple[int], np.dtype[np.bool_]] | slice]]:
    """Each slab that ``rows`` touch, with the rows that do; rows below 0 are in none."""
    if not len(rows):
        return []
    slabs = rows // SLAB_REGIONS
    low, high = int(slabs.min()), int(slabs.max())
    if low == high:
        return [(low, slice(None))] if low >= 0 else []
    counted = distinct(slabs)
    return [(int(slab), slabs == slab) for slab in counted if slab >= 0]


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
