"""Page indexes and summaries of them, searched on disk: memory does not grow with them."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Protocol

import numpy as np

from crtrace.errors import ImageDamaged
from crtrace.image.fields import must_be_zero
from crtrace.image.framing import INDEX_HEAD, SUMMARY_HEAD
from crtrace.image.header import NO_EPOCH
from crtrace.image.places import PAGE_LIMIT, PageKind, kinds
from crtrace.units import U64, Bools

FENCE_ROWS = 1024
"""Every so many rows, one page number stays in memory: 8 bytes for 8 KiB of the column."""
MAX_ROWS = 1 << 16
"""Most rows read at once by a search."""
SUMMARY_ROWS = 1 << 16
"""Most rows of one SUMMARY record."""


@dataclass(frozen=True, slots=True)
class IndexRows:
    """Some rows of an index: pages ``(n,)`` ascending, places ``(n,)``, hashes ``(n, 2)``."""

    pages: U64
    places: U64
    hashes: U64


class Payloads(Protocol):
    """An image, or what there is of one that is being written."""

    def where(self, number: int) -> str:
        """A record for messages."""

    def length(self, number: int) -> int:
        """The length of a payload."""

    def slices(self, number: int) -> Iterator[bytes]:
        """A payload in pieces, at least the head of an index in the first, whole rows in each."""

    def span(self, number: int, at: int, length: int) -> bytes:
        """Part of a payload."""


class PageIndex:
    """The rows of a PAGE_INDEX record, checked as a whole once, then read as needed."""

    HEAD: ClassVar[struct.Struct] = INDEX_HEAD
    COLUMNS: ClassVar[tuple[int, ...]] = (8, 8, 16)
    """Bytes a row in each column: page, place, hash."""

    def __init__(self, image: Payloads, number: int) -> None:
        self._image = image
        self._number = number
        self._rows = 0
        self._fences = self._check()
        self._kept: dict[int, tuple[int, U64]] = {}
        """By column, the block that was searched last, and its first row: pages come in order."""

    def __len__(self) -> int:
        """Rows."""
        return self._rows

    @property
    def fences(self) -> U64:
        """Every 1024th page number, from the first."""
        return self._fences

    def _check(self) -> U64:
        """Read everything once: checksum, order of the pages."""
        where = self._image.where(self._number)
        fences = [np.empty(0, dtype=np.uint64)]
        at, reach = 0, -1
        for piece in self._image.slices(self._number):
            if not at:
                self._rows = self._count(piece, where)
            pages, first = self._pages_in(piece, at)
            at += len(piece)
            if len(pages):
                if int(pages[0]) <= reach or (pages[1:] <= pages[:-1]).any():
                    raise ImageDamaged(f"{where}: page numbers do not ascend")
                reach = int(pages[-1])
                # A view would keep the whole piece in memory.
                fences.append(pages[-first % FENCE_ROWS :: FENCE_ROWS].copy())
        if reach >= PAGE_LIMIT:
            raise ImageDamaged(f"{where}: page number {reach:#x} is not below 2^52")
        return np.concatenate(fences)

    def _count(self, piece: bytes, where: str) -> int:
        length = self._image.length(self._number)
        rows = self._read_head(piece, where)
        if self.HEAD.size + rows * sum(self.COLUMNS) != length:
            raise ImageDamaged(f"{where}: {rows} rows do not fit a payload of {length} bytes")
        return rows

    def _read_head(self, piece: bytes, where: str) -> int:
        """The number of rows."""
        if len(piece) < self.HEAD.size:
            raise ImageDamaged(f"{where}: {len(piece)} bytes are too few")
        _, reserved, rows = self.HEAD.unpack_from(piece)
        must_be_zero(reserved, where)
        return int(rows)

    def _pages_in(self, piece: bytes, at: int) -> tuple[U64, int]:
        """The page numbers in the piece of the payload at ``at``, and the first one's row."""
        column = self.HEAD.size, self.HEAD.size + 8 * self._rows
        start, end = max(at, column[0]), min(at + len(piece), column[1])
        if start >= end:
            return np.empty(0, dtype=np.uint64), 0
        pages = np.frombuffer(piece, dtype="<u8", count=(end - start) // 8, offset=start - at)
        return pages, (start - column[0]) // 8

    def _column(self, column: int, start: int, end: int) -> U64:
        """Rows ``[start, end)`` of a column, as uint64: 1 a row, of hashes 2."""
        base = self.HEAD.size + self._rows * sum(self.COLUMNS[:column])
        size = self.COLUMNS[column]
        data = self._image.span(self._number, base + start * size, (end - start) * size)
        return np.frombuffer(data, dtype="<u8")

    def _block(self, column: int, start: int) -> U64:
        """``FENCE_ROWS`` rows of a column, from ``start`` on; the last block may have fewer."""
        kept = self._kept.get(column)
        if kept is None or kept[0] != start:
            kept = start, self._column(column, start, min(start + FENCE_ROWS, self._rows))
            self._kept[column] = kept
        return kept[1]

    def find(self, pages: U64) -> tuple[Bools, U64, U64]:
        """Which of ``pages`` (ascending) have a row; place and row number of those that do."""
        if not len(pages) or not self._rows:
            none = np.empty(0, dtype=np.uint64)
            return np.zeros(len(pages), dtype=np.bool_), none, none
        ends = self._fences.searchsorted(pages[[0, -1]], side="right")
        start = max(int(ends[0]) - 1, 0) * FENCE_ROWS
        end = min(int(ends[1]) * FENCE_ROWS, self._rows)
        if end - start > MAX_ROWS and len(pages) > 1:
            return self._find_halves(pages)
        return self._find_between(pages, start, end)

    def _find_halves(self, pages: U64) -> tuple[Bools, U64, U64]:
        half = len(pages) // 2
        low, high = self.find(pages[:half]), self.find(pages[half:])
        found, places, rows = (np.concatenate(pair) for pair in zip(low, high, strict=True))
        return found, places, rows

    def _find_between(self, pages: U64, start: int, end: int) -> tuple[Bools, U64, U64]:
        one = end - start <= FENCE_ROWS
        have = self._block(0, start) if one else self._column(0, start, end)
        at = have.searchsorted(pages)
        found = at < len(have)
        found[found] = have[at[found]] == pages[found]
        at = at[found]
        if not len(at):
            none = np.empty(0, dtype=np.uint64)
            return found, none, none
        if one:
            places = self._block(1, start)[at]
        else:
            places = self._column(1, start + int(at[0]), start + int(at[-1]) + 1)[at - at[0]]
        self._check_kinds(places)
        return found, places, at.astype(np.uint64) + np.uint64(start)

    def _check_kinds(self, places: U64) -> None:
        if len(places) and kinds(places).max() > PageKind.INHERITED:
            where = self._image.where(self._number)
            raise ImageDamaged(f"{where}: a page of kind {kinds(places).max()}, expected 0 to 4")

    def hashes(self, rows: U64) -> U64:
        """The hashes, ``(n, 2)``, of rows given ascending."""
        if not len(rows):
            return np.empty((0, 2), dtype=np.uint64)
        start, end = int(rows[0]), int(rows[-1]) + 1
        if end - start > MAX_ROWS and len(rows) > 1:
            half = len(rows) // 2
            return np.concatenate((self.hashes(rows[:half]), self.hashes(rows[half:])))
        hashes: U64 = self._column(2, start, end).reshape(-1, 2)[rows - np.uint64(start)]
        return hashes

    def rows(self, start: int, end: int) -> IndexRows:
        """Rows ``[start, end)`` with all columns."""
        pages, places, hashes = (self._column(column, start, end) for column in range(3))
        self._check_kinds(places)
        return IndexRows(pages, places, hashes.reshape(-1, 2))

    def between(self, first: int, end: int) -> IndexRows:
        """The rows of the pages ``[first, end)``."""
        return self.rows(*self.rows_between(first, end))

    def rows_between(self, first: int, end: int) -> tuple[int, int]:
        """The numbers ``[start, end)`` of the rows of the pages ``[first, end)``."""
        return self._row_of(first), self._row_of(end)

    def at_or_after(self, page: int) -> int:
        """The first page with a row that is not below ``page``; ``PAGE_LIMIT`` for none."""
        row = self._row_of(page)
        if row == self._rows:
            return PAGE_LIMIT
        return int(self._block(0, row - row % FENCE_ROWS)[row % FENCE_ROWS])

    def _row_of(self, page: int) -> int:
        """The number of rows with pages below ``page``."""
        block = int(self._fences.searchsorted(np.uint64(page), side="left")) - 1
        if block < 0:
            return 0
        start = block * FENCE_ROWS
        return start + int(self._block(0, start).searchsorted(np.uint64(page)))


class SummaryPart(PageIndex):
    """The rows of a SUMMARY record: those of the newest of several images that has the page.

    ``base`` is the epoch after which they begin, or ``NO_EPOCH``; the record is about the pages
    ``[first, end)`` alone.
    """

    HEAD: ClassVar[struct.Struct] = SUMMARY_HEAD
    COLUMNS: ClassVar[tuple[int, ...]] = (8, 8, 16, 8)
    """Bytes a row in each column: page, place, hash, epoch of the image that the place is in."""

    space = base = first = end = 0

    def _read_head(self, piece: bytes, where: str) -> int:
        if len(piece) < self.HEAD.size:
            raise ImageDamaged(f"{where}: {len(piece)} bytes are too few")
        head = self.HEAD.unpack_from(piece)
        self.space, reserved, self.base, self.first, self.end, rows = head
        must_be_zero(reserved, where)
        if rows > SUMMARY_ROWS:
            raise ImageDamaged(f"{where}: {rows} rows, expected at most {SUMMARY_ROWS}")
        return int(rows)

    def check_within(self, epoch: int) -> None:
        """Raise ``ImageDamaged`` unless pages and epochs, up to ``epoch``, are in its bounds."""
        if not len(self):
            return
        pages = self._column(0, len(self) - 1, len(self))
        epochs = self.epochs(0, len(self))
        oldest = 0 if self.base == NO_EPOCH else self.base + 1
        if (
            self.fences[0] < self.first or pages[0] >= self.end
            or epochs.min() < oldest or epochs.max() > epoch
        ):  # fmt: skip
            where = self._image.where(self._number)
            raise ImageDamaged(f"{where}: a row is out of the bounds that it gives itself")

    def epochs(self, start: int, end: int) -> U64:
        """The epochs of rows ``[start, end)``."""
        return self._column(3, start, end)
