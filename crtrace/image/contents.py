"""Which contents an image has stored already, so that equal pages are stored once."""

from __future__ import annotations

import threading

import numpy as np

from crtrace.image.places import place
from crtrace.units import U64, Bools

FIRST_SLOTS = 1 << 12
MOST = 1 << 20
"""Different contents remembered in one epoch: 4 GiB of them, in 32 MiB."""

Slots = np.ndarray[tuple[int], np.dtype[np.intp]]


class StoredContents:
    """A hash table from the xxh3-128 of a page to its place. For several threads.

    Beyond ``MOST`` different contents it learns no new ones, so that it stays small.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._slots = np.zeros(FIRST_SLOTS, dtype=np.uint32)
        """Open addressing: the number of an entry, from 1; 0 is free."""
        self._high, self._low, self._places = np.empty((3, FIRST_SLOTS // 2), dtype=np.uint64)
        self._count = 0

    def claim(self, hashes: U64, chunk: int) -> tuple[U64, Bools]:
        """For pages with these hashes, ``(n, 2)``, that are about to be stored in ``chunk``: the
        place of each, and which must be stored there, in their order; the others are elsewhere.
        """
        high, low = hashes[:, 0].copy(), hashes[:, 1].copy()
        # Which repeat the one before them, in the order of their hashes.
        order = np.argsort(high, kind="stable")
        repeats = np.zeros(len(high), dtype=np.bool_)
        repeats[1:] = (high[order][1:] == high[order][:-1]) & (low[order][1:] == low[order][:-1])
        first = order[~repeats]
        with self._lock:
            self._make_room(len(first))
            known, places = self._look_up(high[first], low[first])
            new: Bools = np.zeros(len(high), dtype=np.bool_)
            new[first[~known]] = True
            slots = np.cumsum(new, dtype=np.uint64) - np.uint64(1)
            fresh = first[~known]
            places[~known] = (slots[fresh] << np.uint64(32)) + place(0, chunk)
            self._enter(high[fresh], low[fresh], places[~known])
        every = np.empty(len(high), dtype=np.uint64)
        every[order] = places[np.cumsum(~repeats) - 1]
        return every, new

    def _look_up(self, high: U64, low: U64) -> tuple[Bools, U64]:
        """Which are there, and their places."""
        known = np.zeros(len(high), dtype=np.bool_)
        places = np.zeros(len(high), dtype=np.uint64)
        todo, at = np.arange(len(high)), self._home(high)
        while len(todo):
            entry = self._slots[at].astype(np.intp) - 1
            used = entry >= 0
            todo, at, entry = todo[used], at[used], entry[used]
            same = (self._high[entry] == high[todo]) & (self._low[entry] == low[todo])
            known[todo[same]], places[todo[same]] = True, self._places[entry[same]]
            todo, at = todo[~same], self._next(at[~same])
        return known, places

    def _enter(self, high: U64, low: U64, places: U64) -> None:
        """Add contents that are not there, each once, as long as there is room."""
        count = min(len(high), MOST - self._count)
        first, self._count = self._count, self._count + count
        self._high[first : self._count] = high[:count]
        self._low[first : self._count] = low[:count]
        self._places[first : self._count] = places[:count]
        self._link(np.arange(first, self._count))

    def _link(self, entries: Slots) -> None:
        at = self._home(self._high[entries])
        while len(entries):
            free = self._slots[at] == 0
            self._slots[at[free]] = entries[free] + 1
            # Of several that wanted the same slot, one got it.
            on = self._slots[at] != entries + 1
            entries, at = entries[on], self._next(at[on])

    def _home(self, high: U64) -> Slots:
        return (high & np.uint64(len(self._slots) - 1)).astype(np.intp)

    def _next(self, at: Slots) -> Slots:
        return at + 1 & len(self._slots) - 1

    def _make_room(self, count: int) -> None:
        """Keep at least half of the slots free."""
        size = len(self._slots)
        while min(self._count + count, MOST) > size // 2:
            size *= 4
        if size > len(self._slots):
            columns = np.empty((3, size // 2), dtype=np.uint64)
            columns[:, : self._count] = [
                each[: self._count] for each in (self._high, self._low, self._places)
            ]
            self._high, self._low, self._places = columns
            self._slots = np.zeros(size, dtype=np.uint32)
            self._link(np.arange(self._count))
