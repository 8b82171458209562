"""Which contents an image has stored already, so that equal pages are stored once."""

from __future__ import annotations

import threading

import numpy as np

from crtrace.image.places import place
from crtrace.units import CHUNK_PAGES, U64, Bools

FIRST_SLOTS = 1 << 14
"""By steps of 4 this leads to 4 times ``MOST``, and no further."""
MOST = 1 << 20
"""Different contents remembered in one epoch: 4 GiB of them, in 40 MiB."""

_FIRST = np.arange(CHUNK_PAGES, dtype=np.uint64) << np.uint64(32)
"""The places of the slots of a chunk 0."""

Slots = np.ndarray[tuple[int], np.dtype[np.intp]]


class StoredContents:
    """A hash table from the xxh3-128 of a page to its place. For several threads.

    Beyond ``MOST`` different contents it learns no new ones, so that it stays small.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._slots = np.zeros(FIRST_SLOTS, dtype=np.uint32)
        """Open addressing: the number of an entry, from 1; 0 is free."""
        self._high, self._low, self._places = np.empty((3, FIRST_SLOTS // 4), dtype=np.uint64)
        self._count = 0

    def claim(self, hashes: U64, chunk: int) -> tuple[U64, Bools]:
        """For pages with these hashes, ``(n, 2)``, that are about to be stored in ``chunk``: the
        place of each, and which must be stored there, in their order; the others are elsewhere.
        """
        high, low = hashes[:, 0].copy(), hashes[:, 1].copy()
        count = len(high)
        with self._lock:
            first = self._count
            if first + count > MOST:
                return self._find(high, low, chunk)
            self._make_room(first + count)
            self._high[first : first + count], self._low[first : first + count] = high, low
            entries, at = self._enter(high)
            here = _FIRST[:count] + place(0, chunk)
            if (entries == np.arange(first, first + count)).all():
                self._places[first : first + count] = here
                self._count += count
                return here, np.ones(count, dtype=np.bool_)
            return self._share(high, low, chunk, entries, at)

    def _share(
        self, high: U64, low: U64, chunk: int, entries: Slots, at: Slots
    ) -> tuple[U64, Bools]:
        """``claim`` where some are there already, or twice: they leave their entries to others."""
        first = self._count
        mine = entries == np.arange(first, first + len(high))
        # Half a hash in common is nothing: such a page is stored for itself, and not entered.
        new: Bools = mine | (self._low[entries] != low)
        rank = np.cumsum(mine) - 1
        here = ((np.cumsum(new, dtype=np.uint64) - np.uint64(1)) << np.uint64(32)) + place(0, chunk)
        self._count += int(mine.sum())
        self._high[first : self._count], self._low[first : self._count] = high[mine], low[mine]
        self._places[first : self._count] = here[mine]
        self._slots[at[mine]] = first + rank[mine] + 1
        inside = entries >= first
        entries[inside] = first + rank[entries[inside] - first]
        return np.where(new, here, self._places[entries]), new

    def _enter(self, high: U64) -> tuple[Slots, Slots]:
        """The entry of each, from ``count`` on if it is new, and its slot.

        Of a hash, the first half alone decides.
        """
        at = self._home(high)
        entries, slots = np.empty(len(high), dtype=np.intp), at.copy()
        todo = np.arange(len(high))
        while len(todo):
            free = self._slots[at] == 0
            # Of several that want the same slot, the first gets it: it is written last.
            self._slots[at[free][::-1]] = self._count + 1 + todo[free][::-1]
            found = self._slots[at].astype(np.intp) - 1
            entries[todo], slots[todo] = found, at
            on = np.flatnonzero(self._high[found] != high[todo])
            todo, at = todo[on], self._next(at[on])
        return entries, slots

    def _find(self, high: U64, low: U64, chunk: int) -> tuple[U64, Bools]:
        """As ``claim``, with nothing learnt."""
        new: Bools = np.ones(len(high), dtype=np.bool_)
        places = np.zeros(len(high), dtype=np.uint64)
        todo, at = np.arange(len(high)), self._home(high)
        while len(todo):
            found = self._slots[at].astype(np.intp) - 1
            used = found >= 0
            todo, at, found = todo[used], at[used], found[used]
            same = (self._high[found] == high[todo]) & (self._low[found] == low[todo])
            new[todo[same]], places[todo[same]] = False, self._places[found[same]]
            todo, at = todo[~same], self._next(at[~same])
        here = ((np.cumsum(new, dtype=np.uint64) - np.uint64(1)) << np.uint64(32)) + place(0, chunk)
        return np.where(new, here, places), new

    def _link(self) -> None:
        """Enter everything into slots that are all free."""
        entries = np.arange(self._count)
        at = self._home(self._high[: self._count])
        while len(entries):
            free = self._slots[at] == 0
            self._slots[at[free]] = entries[free] + 1
            on = self._slots[at] != entries + 1
            entries, at = entries[on], self._next(at[on])

    def _home(self, high: U64) -> Slots:
        return (high & np.uint64(len(self._slots) - 1)).astype(np.intp)

    def _next(self, at: Slots) -> Slots:
        return at + 1 & len(self._slots) - 1

    def _make_room(self, count: int) -> None:
        """Keep three quarters of the slots free: most searches then take one step."""
        size = len(self._slots)
        while count > size // 4:
            size *= 4
        if size > len(self._slots):
            columns = np.empty((3, size // 4), dtype=np.uint64)
            columns[:, : self._count] = [
                each[: self._count] for each in (self._high, self._low, self._places)
            ]
            self._high, self._low, self._places = columns
            self._slots = np.zeros(size, dtype=np.uint32)
            self._link()
