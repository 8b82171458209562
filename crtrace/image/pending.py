"""The page entries of an epoch under way, kept aside until it is committed."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from crtrace.image.losses import UnreadableRange
from crtrace.image.pagetable import KnownPages
from crtrace.image.places import PAGE_LIMIT, SAME, PageKind, chunks, kinds, place, slots
from crtrace.units import U64, distinct, to_ranges

LAST_ROUND = 1 << 30
"""The round of what is true at the end of an epoch whatever was read before: holes."""

STEP, SAMPLE = 1 << 16, 1 << 6
"""Rows looked at together; one in so many is looked at to find out where to cut."""

KEPT = 1 << 18
"""Rows of one space that are kept in memory: 8 MiB."""

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
        stored = kinds(self.places) == PageKind.STORED
        found = self.places[stored]
        self.places[stored] = found - chunks(found) + numbers[chunks(found).astype(np.intp)]

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

    @property
    def first(self) -> int:
        """The first page."""
        return int(self.pages[0])

    @property
    def sample(self) -> U64:
        """One in so many pages."""
        return self.pages[::SAMPLE]

    def load(self) -> Piece:
        """Itself, as it is."""
        return self

    def cut(self, bound: int) -> tuple[Piece, Piece]:
        """What lies before the page ``bound``, and the rest, as views."""
        at = int(np.searchsorted(self.pages, np.uint64(bound)))
        return self._part(slice(at)), self._part(slice(at, None))

    def _part(self, rows: slice) -> Piece:
        hashes = None if self.hashes is None else self.hashes[rows]
        return Piece(self.order, self.pages[rows], self.places[rows], hashes)


class Overflow(Protocol):
    """Where pieces go for which there is no room in memory."""

    def write(self, columns: Sequence[U64]) -> int:
        """Keep the columns; where they are."""

    def read(self, at: int, length: int) -> bytes:
        """So many bytes from there."""


@dataclass(frozen=True, slots=True)
class PieceElsewhere:
    """A piece of which only what is needed to find it is in memory."""

    order: tuple[int, int]
    first: int
    sample: U64
    rows: int
    overflow: Overflow
    at: int

    def load(self) -> Piece:
        """The piece itself."""
        data = np.frombuffer(self.overflow.read(self.at, 32 * self.rows), dtype=np.uint64)
        pages, places, hashes = np.split(data, [self.rows, 2 * self.rows])
        return Piece(self.order, pages, places, hashes.reshape(-1, 2))


class PendingSpace:
    """What was said of the pages of one space, piece by piece, in rounds; the last round wins.

    Beyond ``KEPT`` rows pieces go to the ``overflow``, if there is one.
    """

    def __init__(self, overflow: Callable[[], Overflow] | None = None) -> None:
        self._lock = threading.Lock()
        self._overflow = overflow
        self._pieces: list[Piece | PieceElsewhere] = []
        self.rows = 0

    @property
    def large(self) -> bool:
        """Whether it should never be in memory as a whole."""
        return self.rows > KEPT

    def add(self, round: int, pages: U64, places: U64, hashes: U64 | None = None) -> None:
        """Enter pages (ascending, kept without a copy); no hashes: zeros."""
        if not len(pages):
            return
        with self._lock:
            order = round, len(self._pieces)
            piece = Piece(order, pages, places, hashes)
            self._pieces.append(piece)
            self.rows += len(pages)
            large = self.large
        if self._overflow and large:
            self._pieces[order[1]] = _put(piece, self._overflow())

    def settle(self, parent: KnownPages | None) -> Entries:
        """The entries that go into the image; this object is empty afterwards.

        ``parent`` is what the chain holds already: without a page there, a hole is nothing to
        tell.
        """
        parts = [_no_entries(), *self.windows(parent)]
        columns = [(part.pages, part.places, part.hashes) for part in parts]
        return Entries(*map(np.concatenate, zip(*columns, strict=True)))

    def windows(self, parent: KnownPages | None) -> Iterator[Entries]:
        """``settle`` in parts of about ``STEP`` rows."""
        pieces, self._pieces, self.rows = self._pieces, [], 0
        for window in _windows(pieces):
            part = _meaningful(_joined(window), parent)
            if len(part.pages):
                yield part


def _put(piece: Piece, overflow: Overflow) -> PieceElsewhere:
    rows = len(piece.pages)
    hashes = np.zeros((rows, 2), np.uint64) if piece.hashes is None else piece.hashes
    at = overflow.write([piece.pages, piece.places, hashes])
    return PieceElsewhere(piece.order, piece.first, piece.sample.copy(), rows, overflow, at)


def _windows(pieces: list[Piece | PieceElsewhere]) -> Iterator[list[Piece]]:
    """The pieces, cut at the same pages, so that about ``STEP`` rows come together, by page.

    The list is emptied meanwhile.
    """
    pieces.sort(key=lambda piece: piece.first, reverse=True)
    begun: list[Piece] = []
    for bound in _bounds(pieces):
        while pieces and pieces[-1].first < bound:
            begun.append(pieces.pop().load())
        cuts = [piece.cut(bound) for piece in begun]
        begun = [after for _, after in cuts if len(after.pages)]
        if window := [before for before, _ in cuts if len(before.pages)]:
            yield window


def _bounds(pieces: list[Piece | PieceElsewhere]) -> list[int]:
    """Pages at which to cut, ascending; the last one is above all pages."""
    if not pieces:
        return []
    sampled = np.sort(np.concatenate([piece.sample for piece in pieces]))
    return [*distinct(sampled[STEP // SAMPLE :: STEP // SAMPLE]).tolist(), PAGE_LIMIT]


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
    for value in distinct(places):
        errno, reason = int(chunks(value)), int(slots(value))
        for first, end in to_ranges(entries.pages[which][places == value]).tolist():
            ranges.append(
                UnreadableRange(
                    space=space, first=first, count=end - first, errno=errno, reason=reason
                )
            )
    entries.places[which] = place(PageKind.UNREADABLE)
    return sorted(ranges, key=lambda found: found.first)
