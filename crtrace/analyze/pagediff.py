"""Which pages read otherwise in another epoch, told by their hashes: no contents are read.

What a page reads as is FORMAT.md's, "VMAS": its own entry, else the object's, else the file or
zeros. The page indexes of both epochs are walked side by side, a window at a time, so that neither
memory nor time grow with what no index speaks of.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import IntEnum

import numpy as np

from crtrace.image.codec import ZERO_PAGE_HASH
from crtrace.image.epoch import Epoch
from crtrace.image.pageindex import IndexRows
from crtrace.image.places import PageKind, kinds
from crtrace.image.resolve import UNKNOWN_WHEN_ABSENT, Source
from crtrace.image.tables import Vma, VmaFlag
from crtrace.units import PAGE_SHIFT, U64, Bools, Bytes, merge, no_pages, pairs, subtract, to_ranges

END = 1 << 53
"""Beyond every page number."""
KEPT_RUNS = 1 << 19
"""Runs of shared objects remembered for the next process that maps them: 9 MiB."""

SOURCES = tuple(source for source in Source if source is not Source.LOST)
STORED, ZERO, OBJECT, FILE, UNREADABLE = range(5)


class Verdict(IntEnum):
    """What can be said of a page that both epochs have.

    ``CHANGED`` reads otherwise, or was taken from a file into own memory, or the other way round:
    the file's contents are not kept. ``UNKNOWN``: contents of the same file that one epoch keeps
    and the other does not, or that neither does, and the file has changed.
    """

    SAME = 0
    CHANGED = 1
    UNKNOWN = 2
    UNREADABLE = 3


@dataclass(frozen=True, slots=True)
class Runs:
    """Neighbouring pages that fared alike and are not the same.

    ``ranges``: a range array; ``codes``: ``(n,)``, what happened to each, for ``meaning``.
    """

    ranges: U64
    codes: Bytes

    def of(self, verdict: Verdict) -> U64:
        """The ranges of that verdict."""
        ranges: U64 = self.ranges[self.codes // 25 == verdict]
        return ranges

    def moved(self, by: int) -> Runs:
        """The same with ``by`` pages added to all addresses."""
        return Runs(self.ranges + np.uint64(by % 2**64), self.codes)

    def count(self) -> dict[int, int]:
        """Pages by code."""
        pages = np.bincount(self.codes, self.ranges[:, 1] - self.ranges[:, 0])
        return {int(code): int(pages[code]) for code in np.flatnonzero(pages)}


def meaning(code: int) -> tuple[Verdict, Source, Source]:
    """What a code of ``Runs`` stands for: the verdict, and the sources before and after."""
    return Verdict(code // 25), SOURCES[code // 5 % 5], SOURCES[code % 5]


def changed_ranges(parts: Iterable[Runs]) -> Iterator[U64]:
    """The range arrays of what changed, ascending; neighbours are joined across parts."""
    held = no_pages()
    for runs in parts:
        ranges = merge(held, runs.of(Verdict.CHANGED))
        yield ranges[:-1]
        held = ranges[-1:]
    yield held


@dataclass(frozen=True, slots=True)
class Pair:
    """The pages ``[start, end)``, which lie in the mapping ``a`` of one epoch and ``b`` of the
    other. ``same_file``: both map the same place of the same file; ``file_changed``: which has
    another size or time of change than before.
    """

    start: int
    end: int
    a: Vma
    b: Vma
    same_file: bool = False
    file_changed: bool = False


_NONE = np.empty(0, dtype=np.uint64)
NO_ROWS = IndexRows(_NONE, _NONE, _NONE.reshape(0, 2))


class Cursor:
    """The page index of one space, read from front to back. Space 0 is empty."""

    def __init__(self, epoch: Epoch, space: int) -> None:
        self.epoch, self.space = epoch, space
        self._rewind()

    def _rewind(self) -> None:
        self._parts = self.epoch.index_parts(self.space) if self.space else iter(())
        self._rows, self._first, self._end = NO_ROWS, 0, 0

    def cover(self, page: int) -> int:
        """Have the rows from ``page`` on at hand; the page up to which they are."""
        if page < self._first:
            self._rewind()
        while self._end <= page:
            rows = next(self._parts, None)
            self._first = self._end
            self._rows, self._end = NO_ROWS, END
            if rows:
                self._rows = IndexRows(rows.pages, rows.places, rows.hashes)
                self._end = int(rows.pages[-1]) + 1
        return self._end

    def between(self, first: int, end: int) -> IndexRows:
        """The rows of the pages ``[first, end)``, all of which ``cover`` has at hand."""
        edges = np.searchsorted(self._rows.pages, np.array([first, end], dtype=np.uint64))
        part, rows = slice(*edges.tolist()), self._rows
        return IndexRows(rows.pages[part], rows.places[part], rows.hashes[part])


class Side:
    """A mapping in one epoch: own pages before those of the object before file or zeros."""

    def __init__(self, own: Cursor, behind: Cursor, vma: Vma) -> None:
        self._own, self._behind = own, behind
        self._shift = (vma.pgoff - vma.start) >> PAGE_SHIFT
        self.backing = _backing(vma)

    def cover(self, page: int) -> int:
        """Have the rows from ``page`` of the address space on; up to which page they are there."""
        return min(self._own.cover(page), self._behind.cover(page + self._shift) - self._shift)

    def rows(self, first: int, end: int) -> tuple[IndexRows, IndexRows]:
        """The rows of ``[first, end)``, by address: of the object, and own ones."""
        rows = self._behind.between(first + self._shift, end + self._shift)
        pages = rows.pages - np.uint64(self._shift % 2**64)
        return IndexRows(pages, rows.places, rows.hashes), self._own.between(first, end)


def _backing(vma: Vma) -> int:
    """The source of a page that no index speaks of."""
    if vma.object_space:
        return FILE if vma.flags & VmaFlag.FILE_BEHIND else ZERO
    if vma.kind in UNKNOWN_WHEN_ABSENT:
        return UNREADABLE
    return FILE if vma.file else ZERO


@dataclass(frozen=True, slots=True)
class Values:
    """What pages read as: sources and hashes ``(n, 2)``, and which are own pages."""

    sources: Bytes
    hashes: U64
    own: Bools

    @classmethod
    def of(cls, pages: U64, backing: int, behind: IndexRows, own: IndexRows) -> Values:
        """Of ``pages`` (ascending), which have all that the rows name."""
        sources = np.full(len(pages), backing, dtype=np.uint8)
        hashes = np.tile(ZERO_PAGE_HASH, (len(pages), 1))
        mine = np.zeros(len(pages), dtype=np.bool_)
        for rows, source in ((behind, OBJECT), (own, STORED)):
            at = np.searchsorted(pages, rows.pages)
            zero = (rows.hashes == ZERO_PAGE_HASH).all(axis=1)
            sources[at] = np.where(zero, ZERO, source)
            sources[at[kinds(rows.places) == PageKind.UNREADABLE]] = UNREADABLE
            hashes[at] = rows.hashes
            mine[at] = source == STORED
        return cls(sources, hashes, mine)


def _judge(pair: Pair, a: Values, b: Values) -> Bytes:
    """The code of each page."""
    verdict = (a.hashes != b.hashes).any(axis=1).astype(np.uint8)  # Verdict.CHANGED
    file_a, file_b = a.sources == FILE, b.sources == FILE
    file = file_a | file_b
    verdict[file] = Verdict.CHANGED
    if pair.same_file:
        verdict[file & ~(a.own | b.own)] = Verdict.UNKNOWN
        if not pair.file_changed:
            verdict[file_a & file_b] = Verdict.SAME
    verdict[(a.sources == UNREADABLE) | (b.sources == UNREADABLE)] = Verdict.UNREADABLE
    codes: Bytes = verdict * np.uint8(25) + a.sources * np.uint8(5) + b.sources
    return codes


def _compare(pair: Pair, sides: tuple[Side, Side], first: int, end: int) -> Runs:
    """The pages ``[first, end)``, which both sides have at hand."""
    rows = [side.rows(first, end) for side in sides]
    pages = np.unique(np.concatenate([part.pages for both in rows for part in both]))
    codes = _codes(pair, sides, pages, rows)
    absent = _codes(pair, sides, np.zeros(1, dtype=np.uint64), [(NO_ROWS, NO_ROWS)] * 2)
    pages, codes, listed = pages[codes >= 25], codes[codes >= 25], to_ranges(pages)
    ranges = pairs(pages, pages + np.uint64(1))
    if absent[0] >= 25:
        gaps = subtract(np.array([[first, end]], dtype=np.uint64), listed)
        ranges = np.concatenate((ranges, gaps))
        codes = np.concatenate((codes, np.repeat(absent, len(gaps))))
        order = np.argsort(ranges[:, 0])
        ranges, codes = ranges[order], codes[order]
    return _joined(ranges, codes)


def _codes(
    pair: Pair, sides: tuple[Side, Side], pages: U64, rows: list[tuple[IndexRows, IndexRows]]
) -> Bytes:
    values = (Values.of(pages, side.backing, *of) for side, of in zip(sides, rows, strict=True))
    return _judge(pair, *values)


def _joined(ranges: U64, codes: Bytes) -> Runs:
    """Neighbours with the same code as one."""
    new = np.ones(len(codes), dtype=np.bool_)
    new[1:] = (ranges[1:, 0] != ranges[:-1, 1]) | (codes[1:] != codes[:-1])
    last = np.roll(new, -1)  # the first is new, so the last one is, too
    return Runs(pairs(ranges[new, 0], ranges[last, 1]), codes[new])


class PageComparer:
    """Compares the pages of two epochs, mapping by mapping; best in the order of addresses."""

    def __init__(self, a: Epoch, b: Epoch) -> None:
        self._epochs = a, b
        self._cursors: dict[tuple[int, str], Cursor] = {}
        self._shared: dict[tuple[object, ...], list[Runs]] = {}
        self._room = KEPT_RUNS

    def runs(self, spaces: tuple[int, int], pair: Pair) -> Iterator[tuple[int, Runs]]:
        """What is not the same in ``pair``, and the page up to which that is known.

        ``spaces``: those of the process's private memory in the two epochs.
        """
        own = [self._cursor(side, "own", space) for side, space in enumerate(spaces)]
        key = _object_key(pair)
        if not key or any(_has_rows(cursor, pair) for cursor in own):
            yield from self._stream(pair, own)
            return
        if key not in self._shared:
            yield from self._remembering(key, pair)
            return
        for runs in self._shared[key]:
            yield int(runs.ranges[-1, 1]) + pair.start, runs.moved(pair.start)

    def _remembering(self, key: tuple[object, ...], pair: Pair) -> Iterator[tuple[int, Runs]]:
        """Compare what only objects have, and keep the outcome: others may map them, too."""
        found: list[Runs] = []
        count = 0
        for reached, runs in self._stream(pair, [Cursor(epoch, 0) for epoch in self._epochs]):
            count += len(runs.codes)
            if count <= self._room and len(runs.codes):
                found.append(runs.moved(-pair.start))
            yield reached, runs
        if count <= self._room:
            self._room -= count
            self._shared[key] = found

    def _stream(self, pair: Pair, own: list[Cursor]) -> Iterator[tuple[int, Runs]]:
        a, b = (
            Side(own[at], self._cursor(at, "object", vma.object_space), vma)
            for at, vma in enumerate((pair.a, pair.b))
        )
        at = pair.start
        while at < pair.end:
            end = min(pair.end, a.cover(at), b.cover(at))
            yield end, _compare(pair, (a, b), at, end)
            at = end

    def _cursor(self, side: int, role: str, space: int) -> Cursor:
        held = self._cursors.get((side, role))
        if held is None or held.space != space:
            held = self._cursors[side, role] = Cursor(self._epochs[side], space)
        return held


def _object_key(pair: Pair) -> tuple[object, ...]:
    """What decides how pages without own contents compare; empty where that is not worthwhile."""
    if not (pair.a.object_space and pair.b.object_space):
        return ()
    parts = (
        (vma.object_space, (pair.start << PAGE_SHIFT) - vma.start + vma.pgoff, _backing(vma))
        for vma in (pair.a, pair.b)
    )
    return (*parts, pair.end - pair.start, pair.same_file, pair.file_changed)


def _has_rows(cursor: Cursor, pair: Pair) -> bool:
    at = pair.start
    while at < pair.end:
        end = min(cursor.cover(at), pair.end)
        if len(cursor.between(at, end).pages):
            return True
        at = end
    return False
