"""The page entries of an epoch under way, kept aside until it is committed."""

from __future__ import annotations

import threading
from dataclasses import dataclass

import numpy as np

from crtrace.image.losses import UnreadableRange
from crtrace.image.pagetable import KnownPages
from crtrace.image.places import SAME, PageKind, chunks, kinds, place, slots
from crtrace.units import U64, Bools, to_ranges

LAST_ROUND = 1 << 30
"""The round of what is true at the end of an epoch whatever was read before: holes."""

STEP = 1 << 16
"""Rows changed at a time."""

Positions = np.ndarray[tuple[int], np.dtype[np.intp]]


@dataclass(slots=True)
class Entries:
    """Page index columns of one space: pages ascending, each once; hashes are ``(n, 2)``."""

    pages: U64
    places: U64
    hashes: U64

    def select(self, which: np.ndarray[tuple[int], np.dtype[np.bool_]]) -> Entries:
        """The entries that ``which`` marks."""
        if which.all():
            return self
        return Entries(self.pages[which], self.places[which], self.hashes[which])

    def part(self, start: int, end: int) -> Entries:
        """The entries ``[start, end)``, as views."""
        return Entries(self.pages[start:end], self.places[start:end], self.hashes[start:end])

    def number_chunks(self, numbers: U64) -> None:
        """Put ``numbers[n]`` in place of each chunk *n* of the stored pages."""
        for start in range(0, len(self.places), STEP):
            places = self.places[start : start + STEP]
            stored = kinds(places) == PageKind.STORED
            found = places[stored]
            places[stored] = found - chunks(found) + numbers[chunks(found).astype(np.intp)]

    def count(self, kind: PageKind) -> int:
        """How many entries are of that kind."""
        return int(np.count_nonzero(kinds(self.places) == kind))


class PendingSpace:
    """What was said of the pages of one space, piece by piece, in rounds; the last round wins."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._rounds: list[int] = []
        self._pages: list[U64] = []
        self._places: list[U64] = []
        self._hashes: list[U64 | None] = []

    def add(self, round: int, pages: U64, places: U64, hashes: U64 | None = None) -> None:
        """Enter pages (ascending, kept without a copy); no hashes: zeros."""
        if not len(pages):
            return
        with self._lock:
            self._rounds.append(round)
            self._pages.append(pages)
            self._places.append(places)
            self._hashes.append(hashes)

    def settle(self, parent: KnownPages | None) -> Entries:
        """The entries that go into the image; this object is empty afterwards.

        ``parent`` is what the chain holds already: without a page there, a hole is nothing to
        tell.
        """
        if not self._pages:
            return _no_entries()
        joined = _joined(self._rounds, self._pages, self._places, self._hashes)
        self._rounds = []
        return _meaningful(joined, parent)


def _no_entries() -> Entries:
    none = np.empty(0, dtype=np.uint64)
    return Entries(none, none, none.reshape(0, 2))


def _joined(
    rounds: list[int], pieces: list[U64], places: list[U64], hashes: list[U64 | None]
) -> Entries:
    """One piece of many, by page, each page as its last round has it; the lists are emptied.

    Columns are joined one after another and their pieces freed at once, because for a large target
    they are the largest thing in memory.
    """
    # Chunks are written as threads get to them: most often sorting the pieces is enough.
    order = sorted(range(len(pieces)), key=lambda at: int(pieces[at][0]))
    pages = np.concatenate([pieces[at] for at in order])
    picked = None
    if (pages[1:] <= pages[:-1]).any():
        order = sorted(range(len(pieces)), key=lambda at: rounds[at])
        pages = np.concatenate([pieces[at] for at in order])
        picked = _Picked(_last_of_each(pages))
        pages = pages[picked.rows]
    lengths = list(map(len, pieces))
    pieces.clear()
    every_place = _join(places, order, lengths, picked, np.empty(len(pages), np.uint64))
    every_hash = _join(hashes, order, lengths, picked, np.zeros((len(pages), 2), np.uint64))
    places.clear()
    hashes.clear()
    return Entries(pages, every_place, every_hash)


class _Picked:
    """Rows picked out of joined columns; kept so that they can be found piece by piece."""

    def __init__(self, rows: Positions) -> None:
        self.rows = rows
        self._to = np.argsort(rows)
        self._ascending = rows[self._to]

    def within(self, start: int, end: int) -> tuple[Positions, Positions]:
        """Where the picked rows of ``[start, end)`` go, and which they are, from ``start``."""
        first, last = np.searchsorted(self._ascending, (start, end))
        return self._to[first:last], self._ascending[first:last] - start


def _join(
    pieces: list[U64] | list[U64 | None],
    order: list[int],
    lengths: list[int],
    picked: _Picked | None,
    joined: U64,
) -> U64:
    """Fill a column from its pieces; each is freed as soon as it is copied."""
    end = 0
    for at in order:
        start, end = end, end + lengths[at]
        piece, pieces[at] = pieces[at], None  # type: ignore[call-overload]
        if piece is not None and picked is None:
            joined[start:end] = piece
        elif piece is not None and picked is not None:
            to, rows = picked.within(start, end)
            joined[to] = piece[rows]
    return joined


def _last_of_each(pages: U64) -> Positions:
    """Where the last of each page is, in the order of the pages."""
    order = np.argsort(pages, kind="stable")
    ranked = pages[order]
    last = np.append(ranked[1:] != ranked[:-1], True)
    found: Positions = order[last]
    return found


def _meaningful(entries: Entries, parent: KnownPages | None) -> Entries:
    """Without the pages that equal the parent's again, or are holes where it has nothing."""
    kind = kinds(entries.places)
    keep = kind != SAME
    holes = np.flatnonzero(kind == PageKind.HOLE)
    if len(holes):
        keep[holes] = False if parent is None else parent.lookup(entries.pages[holes])[0]
    return entries if keep.all() else _compacted(entries, keep)


def _compacted(entries: Entries, keep: Bools) -> Entries:
    """The entries that ``keep`` marks, in the same memory: a copy of all would be too much."""
    count = int(np.count_nonzero(keep))
    for column in (entries.pages, entries.places, entries.hashes):
        column[:count] = column[keep]
    return entries.part(0, count)


def unreadable(errno: int, reason: int) -> np.uint64:
    """The place of an unreadable page while it is pending: errno and reason ride along."""
    return place(PageKind.UNREADABLE, errno, reason)


def take_unreadable(space: int, entries: Entries) -> list[UnreadableRange]:
    """The unreadable pages as ranges; errno and reason are then wiped from ``entries``."""
    which = kinds(entries.places) == PageKind.UNREADABLE
    if not which.any():
        return []
    places = entries.places[which]
    ranges = []
    for value in np.unique(places):
        errno, reason = int(chunks(value)), int(slots(value))
        for first, end in to_ranges(entries.pages[which][places == value]).tolist():
            ranges.append(
                UnreadableRange(
                    space=space, first=first, count=end - first, errno=errno, reason=reason
                )
            )
    entries.places[which] = place(PageKind.UNREADABLE)
    return sorted(ranges, key=lambda found: found.first)
