"""Every byte of one image: records, padding, and each stored page against its hash."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from crtrace.analyze.references import References, wrong_registers
from crtrace.errors import ImageDamaged
from crtrace.image.codec import ZERO_PAGE_HASH, hash_pages
from crtrace.image.framing import RecordType, type_name
from crtrace.image.imagefile import RECORDS, Image
from crtrace.image.pageindex import IndexRows, PageIndex
from crtrace.image.places import PageKind, chunks, kinds, place, slots
from crtrace.image.records import Cpu
from crtrace.units import PAGE_SIZE, U64, Bools, to_ranges

ROWS = 1 << 16
"""Rows of a page index looked at together."""
WINDOW = 4096
"""Records of which the hashes of the pages are kept together: at most 32 MiB."""


@dataclass(slots=True)
class Finding:
    """Damage inside an image. ``lost`` are range arrays of page numbers, by their space.

    ``usable``: what the record holds is as it was, but for those pages. ``anywhere``: pages may be
    lost that nobody can name.
    """

    number: int
    record: str
    offset: int
    message: str
    pages: int = 0
    lost: dict[int, list[U64]] = field(default_factory=dict)
    usable: bool = False
    anywhere: bool = False

    def lose(self, space: int, pages: U64) -> None:
        """Add pages (ascending) to what is lost."""
        self.pages += len(pages)
        self.lost.setdefault(space, []).append(to_ranges(pages))


def finding(image: Image, number: int, message: str, *, usable: bool = False) -> Finding:
    """Damage of a record."""
    row = image.directory[number - 1]
    name = f"{type_name(int(row['type']))} {number}"
    return Finding(number, name, int(row["offset"]), message, usable=usable)


def check_image(image: Image, advance: Callable[[int], None]) -> list[Finding]:
    """Everything wrong with an image whose tail and directory are sound, in file order.

    ``advance`` is called with the bytes looked at so far.
    """
    return _ImageCheck(image).run(advance)


@dataclass(slots=True)
class _Batch:
    """Some rows of a page index, and the chunks ``[first, end)`` that they name."""

    space: int
    start: int
    stop: int
    first: int
    end: int


class _Window:
    """The hashes of the pages in the chunks of some records, which follow one another."""

    def __init__(self, first: int, count: int) -> None:
        self.first, self.end = first, first + count
        self._starts = np.zeros(count, dtype=np.int64)
        self._counts = np.zeros(count, dtype=np.int64)
        self._hashes: list[U64] = []
        self._total = 0

    def add(self, number: int, hashes: U64) -> None:
        """A chunk with the hashes of its pages, ``(n, 2)``."""
        at = number - self.first
        self._starts[at], self._counts[at] = self._total, len(hashes)
        self._hashes.append(hashes)
        self._total += len(hashes)

    def close(self) -> None:
        """No more chunks follow."""
        self._hashes = [np.concatenate([np.empty((0, 2), dtype=np.uint64), *self._hashes])]

    def match(self, places: U64, hashes: U64) -> tuple[Bools, Bools]:
        """Which places, all in this window, exist; and which have these hashes."""
        at = (chunks(places) - np.uint64(self.first)).astype(np.int64)
        slot = slots(places).astype(np.int64)
        there: Bools = slot < self._counts[at]
        right = there.copy()
        rows = self._starts[at[there]] + slot[there]
        right[there] = (self._hashes[0][rows] == hashes[there]).all(axis=1)
        return there, right


class _ImageCheck:
    """The records in file order, window by window; after each, the index rows that name it."""

    def __init__(self, image: Image) -> None:
        self.image = image
        self.indexes: dict[int, PageIndex] = {}
        self.batches: list[_Batch] = []
        self.bad: dict[int, Finding] = {}
        self.references = References(image)
        self.counts: Counter[int] = Counter()
        self.slots = 0

    def run(self, advance: Callable[[int], None]) -> list[Finding]:
        self._load_indexes()
        directory = self.image.directory
        for first in range(1, len(directory) + 1, WINDOW):
            window = _Window(first, min(WINDOW, len(directory) + 1 - first))
            for number in range(window.first, window.end):
                try:
                    self._check_record(number, window)
                except ImageDamaged as error:
                    self._add(number, str(error))
                row = directory[number - 1]
                advance(int(row["offset"]) + int(row["length"]))
            window.close()
            for batch in self.batches:
                if batch.first < window.end and batch.end > window.first:
                    self._check_places(batch, window)
        self._check_summaries()
        self._check_whole()
        return [self.bad[number] for number in sorted(self.bad)]

    def _add(self, number: int, message: str, *, usable: bool = False) -> Finding:
        """Damage of a record, of which the first message is told."""
        if number not in self.bad:
            self.bad[number] = finding(self.image, number, message, usable=usable)
        self.bad[number].usable &= usable
        return self.bad[number]

    def _usable(self, number: int) -> bool:
        return number not in self.bad or self.bad[number].usable

    def _note(self, number: int, message: str) -> Finding:
        """Something that is wrong with a record, and leaves what it holds as it is."""
        return self._add(number, f"{self.image.where(number)}: {message}", usable=True)

    def _load_indexes(self) -> None:
        try:
            self.references.load_table()
        except ImageDamaged as error:
            self._add(self.references.table_id, str(error))
        for space in self.image.spaces:
            number = self.image.index_id(space)
            try:
                index = self.image.page_index(space)
                if index is None:
                    continue
                self.indexes[space] = index
                for start in range(0, len(index), ROWS):
                    stop = min(start + ROWS, len(index))
                    self._check_rows(space, start, stop, index.rows(start, stop))
            except ImageDamaged as error:
                self._add(number, str(error))

    def _check_record(self, number: int, window: _Window) -> None:
        image, row = self.image, self.image.directory[number - 1]
        if any(image.padding(number)):
            self._note(number, "padding is not zero")
        if row["type"] == RecordType.CHUNK:
            hashes = hash_pages(image.chunk(number).data)
            window.add(number, hashes)
            self.slots += len(hashes)
        elif number == self.references.table_id:
            pass  # it was read before the page indexes
        elif row["type"] in RECORDS:
            self._check_contents(number)
        else:
            for _ in image.slices(number):
                pass

    def _check_contents(self, number: int) -> None:
        record = self.image.record(number)
        if isinstance(record, Cpu) and (wrong := wrong_registers(record)):
            self._add(number, f"{self.image.where(number)}: {wrong}")
        missing = self.references.add(number, record)
        for space in missing:
            self._note(number, f"space {space} has no page index").anywhere = True

    def _check_summaries(self) -> None:
        for space, numbers in self.image.summary_ids.items():
            if not all(map(self._usable, numbers)):
                continue
            try:
                parts = self.image.summary(space)
                if space not in self.image.spaces:
                    self._add(numbers[0], f"{self.image.where(numbers[0])}: there is no such space")
                for number, part in zip(numbers, parts, strict=True):
                    if odd_entries(part.rows(0, len(part))).any():
                        text = "entries contradict their kind"
                        self._add(number, f"{self.image.where(number)}: {text}")
            except ImageDamaged as error:
                self._add(numbers[0], str(error))

    def _check_rows(self, space: int, start: int, stop: int, rows: IndexRows) -> None:
        """Entries that must say nothing but their kind, and places outside of the image."""
        kind = kinds(rows.places)
        self.counts.update(dict(enumerate(np.bincount(kind).tolist())))
        stored = kind == PageKind.STORED
        named = chunks(rows.places)
        odd = odd_entries(rows)
        if self.image.header.full:
            # There is no parent that could have had a page or has one.
            odd |= (kind == PageKind.INHERITED) | (kind == PageKind.HOLE)
        self._lose(space, rows.pages[odd], f"{odd.sum()} entries contradict their kind")
        outside = stored & ((named == 0) | (named > len(self.image.directory)))
        self._lose(space, rows.pages[outside], f"{outside.sum()} entries name no record")
        unread = rows.pages[kind == PageKind.UNREADABLE]
        if number := self.references.not_named(space, unread):
            text = f"{number} entries are unreadable, and UNREADABLE does not name their pages"
            self._note(self.image.index_id(space), text)
        named = named[stored & ~outside]
        if len(named):
            batch = _Batch(space, start, stop, int(named.min()), int(named.max()) + 1)
            self.batches.append(batch)

    def _check_places(self, batch: _Batch, window: _Window) -> None:
        """Each entry of a batch that names a chunk of the window against that chunk."""
        rows = self.indexes[batch.space].rows(batch.start, batch.stop)
        named = chunks(rows.places)
        mine = (kinds(rows.places) == PageKind.STORED) & (named >= window.first)
        mine &= named < window.end
        there, right = window.match(rows.places[mine], rows.hashes[mine])
        pages, named = rows.pages[mine], named[mine]
        for which, text in (
            (there & ~right, "contents do not have the hash in the index"),
            (~there, "lacks pages that a page index names"),
        ):
            for value in np.unique(named[which]):
                found = self._note(int(value), text)
                found.lose(batch.space, pages[which & (named == value)])

    def _lose(self, space: int, pages: U64, text: str) -> None:
        if len(pages):
            self._note(self.image.index_id(space), text).lose(space, pages)

    def _check_whole(self) -> None:
        """What records say of each other, as far as those that were compared are sound."""
        for number, text in self.references.contradictions(self._usable):
            self._note(number, text)
        if self.bad:
            return
        entry, counts = self.image.entry, self.counts
        found = (
            counts[PageKind.STORED] + counts[PageKind.ZERO], counts[PageKind.HOLE],
            self.slots * PAGE_SIZE,
        )  # fmt: skip
        expected = entry.pages_written, entry.pages_hole, entry.bytes_raw
        if found != expected:
            self._note(
                1, "the image has {} pages, {} holes and {} bytes in chunks, its index entry "
                "says {}, {} and {}".format(*found, *expected)
            )  # fmt: skip


def odd_entries(rows: IndexRows) -> Bools:
    """Which entries have anything that their kind has not."""
    kind = kinds(rows.places)
    plain = rows.places == np.uint64(place(0)) + (kind.astype(np.uint64) << np.uint64(48))
    expected = np.where((kind == PageKind.ZERO)[:, None], ZERO_PAGE_HASH, np.uint64(0))
    odd: Bools = ~(plain & (rows.hashes == expected).all(axis=1))
    odd &= kind != PageKind.STORED
    inherited = kind == PageKind.INHERITED
    odd[inherited] = slots(rows.places[inherited]) != 0
    return odd
