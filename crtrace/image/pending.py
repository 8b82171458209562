"""The page entries of an epoch under way, kept aside until it is committed."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from crtrace.image.losses import UnreadableRange
from crtrace.image.pagetable import KnownPages
from crtrace.image.places import PAGE_LIMIT, SAME, PageKind, chunks, kinds, place, slots
from crtrace.units import U64, to_ranges

LAST_ROUND = 1 << 30
"""The round of what is true at the end of an epoch whatever was read before: holes."""

STEP, SAMPLE = 1 << 16, 1 << 6
"""Rows looked at together; one in so many is looked at to find out where to cut."""

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


@dataclass(frozen=True, slots=True)
class Piece:
    """What was said of some pages, ascending, at one time. ``order``: which of several pieces is
    believed, the greatest: round, and turn within it. No ``hashes``: zeros."""

    order: tuple[int, int]
    pages: U64
    places: U64
    hashes: U64 | None

    def cut(self, bound: int) -> tuple[Piece, Piece]:
        """What lies before the page ``bound``, and the rest, as views."""
        at = int(np.searchsorted(self.pages, np.uint64(bound)))
        return self._part(slice(at)), self._part(slice(at, None))

    def _part(self, rows: slice) -> Piece:
        hashes = None if self.hashes is None else self.hashes[rows]
        return Piece(self.order, self.pages[rows], self.places[rows], hashes)


class PendingSpace:
    """What was said of the pages of one space, piece by piece, in rounds; the last round wins."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._pieces: list[Piece] = []

    def add(self, round: int, pages: U64, places: U64, hashes: U64 | None = None) -> None:
        """Enter pages (ascending, kept without a copy); no hashes: zeros."""
        if len(pages):
            with self._lock:
                order = round, len(self._pieces)
                self._pieces.append(Piece(order, pages, places, hashes))

    def settle(self, parent: KnownPages | None) -> Entries:
        """The entries that go into the image; this object is empty afterwards.

        ``parent`` is what the chain holds already: without a page there, a hole is nothing to
        tell. For a large target pieces and entries are the largest things in memory, so pieces are
        freed as they are used up.
        """
        pieces, self._pieces = self._pieces, []
        if not pieces:
            return _no_entries()
        most = sum(len(piece.pages) for piece in pieces)
        # Rows that are not used are not touched, and so take no memory.
        pages, places = np.empty((2, most), dtype=np.uint64)
        settled = Entries(pages, places, np.empty((most, 2), dtype=np.uint64))
        end = 0
        for window in _windows(pieces):
            part = _meaningful(_joined(window), parent)
            start, end = end, end + len(part.pages)
            settled.pages[start:end] = part.pages
            settled.places[start:end] = part.places
            settled.hashes[start:end] = part.hashes
        return settled.part(0, end)


def _windows(pieces: list[Piece]) -> Iterator[list[Piece]]:
    """The pieces, cut at the same pages, so that about ``STEP`` rows come together, by page.

    The list is emptied meanwhile.
    """
    pieces.sort(key=lambda piece: piece.pages[0], reverse=True)
    begun: list[Piece] = []
    for bound in _bounds(pieces):
        while pieces and pieces[-1].pages[0] < bound:
            begun.append(pieces.pop())
        cuts = [piece.cut(bound) for piece in begun]
        begun = [after for _, after in cuts if len(after.pages)]
        if window := [before for before, _ in cuts if len(before.pages)]:
            yield window


def _bounds(pieces: list[Piece]) -> list[int]:
    """Pages at which to cut, ascending; the last one is above all pages."""
    sampled = np.sort(np.concatenate([piece.pages[::SAMPLE] for piece in pieces]))
    return [*np.unique(sampled[STEP // SAMPLE :: STEP // SAMPLE]).tolist(), PAGE_LIMIT]


def _joined(pieces: list[Piece]) -> Entries:
    """One piece of many, by page, each page as the piece that is believed has it."""
    # Chunks are written as threads get to them: most often sorting the pieces is enough.
    pieces.sort(key=lambda piece: piece.pages[0])
    pages = np.concatenate([piece.pages for piece in pieces])
    picked = None
    if (pages[1:] <= pages[:-1]).any():
        pieces.sort(key=lambda piece: piece.order)
        pages = np.concatenate([piece.pages for piece in pieces])
        picked = _last_of_each(pages)
    places = np.concatenate([piece.places for piece in pieces])
    hashes = np.concatenate([
        np.zeros((len(piece.pages), 2), np.uint64) if piece.hashes is None else piece.hashes
        for piece in pieces
    ])  # fmt: skip
    if picked is None:
        return Entries(pages, places, hashes)
    return Entries(pages[picked], places[picked], hashes[picked])


def _no_entries() -> Entries:
    none = np.empty(0, dtype=np.uint64)
    return Entries(none, none, none.reshape(0, 2))


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
    return entries.select(keep)


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
