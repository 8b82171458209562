"""Every byte of one image: records, padding, and each stored page against its hash."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np

from crtrace.errors import ImageDamaged
from crtrace.image.chunk import Chunk
from crtrace.image.codec import ZERO_PAGE_HASH, hash_pages
from crtrace.image.framing import RecordType, type_name
from crtrace.image.imagefile import RECORDS, Image
from crtrace.image.pageindex import IndexRows, PageIndex
from crtrace.image.places import PageKind, chunks, kinds, place, slots
from crtrace.image.records import Mm
from crtrace.image.tables import Files, Vmas
from crtrace.units import U64, Bools, to_ranges

ROWS = 1 << 16
"""Rows of a page index looked at together."""


@dataclass(slots=True)
class Finding:
    """Damage inside an image; ``ranges`` are the page numbers ``[start, end)`` that are lost."""

    record: str
    offset: int
    message: str
    space: int = 0
    pages: int = 0
    ranges: list[tuple[int, int]] = field(default_factory=list)

    def lose(self, space: int, pages: U64) -> None:
        """Add pages (ascending) to what is lost."""
        self.space = space
        self.pages += len(pages)
        self.ranges += [(first, end) for first, end in to_ranges(pages).tolist()]


def check_image(image: Image, advance: Callable[[int], None]) -> list[Finding]:
    """Everything wrong with an image whose tail and directory are sound, in file order.

    ``advance`` is called with the bytes looked at so far.
    """
    return list(_ImageCheck(image).run(advance))


class _ImageCheck:
    """One pass over the records, then one over the page indexes for what the first left out."""

    def __init__(self, image: Image) -> None:
        self.image = image
        self.indexes: dict[int, PageIndex] = {}
        self.seen: dict[int, Bools] = {}
        self.users: dict[int, list[int]] = {}
        """The spaces whose indexes name a chunk, by its number."""
        self.bad: dict[int, Finding] = {}

    def run(self, advance: Callable[[int], None]) -> Iterator[Finding]:
        self._load_indexes()
        for row in self.image.directory:
            number = int(row["id"])
            try:
                self._check_record(number)
            except ImageDamaged as error:
                self._add(number, str(error))
            advance(int(row["offset"]) + int(row["length"]))
        for space, index in self.indexes.items():
            try:
                self._check_index(space, index)
            except ImageDamaged as error:
                self._add(self.image.index_id(space), str(error))
        return iter([self.bad[number] for number in sorted(self.bad)])

    def _add(self, number: int, message: str) -> Finding:
        if number not in self.bad:
            kind = type_name(int(self.image.directory[number - 1]["type"]))
            offset = int(self.image.directory[number - 1]["offset"])
            self.bad[number] = Finding(f"{kind} {number}", offset, message)
        return self.bad[number]

    def _load_indexes(self) -> None:
        for space in self.image.spaces:
            try:
                index = self.image.page_index(space)
            except ImageDamaged:
                continue  # reported as a record
            if index is not None:
                self.indexes[space] = index
                self.seen[space] = np.zeros(len(index), dtype=np.bool_)
                self._find_users(space, index)

    def _find_users(self, space: int, index: PageIndex) -> None:
        for start in range(0, len(index), ROWS):
            try:
                places = index.rows(start, min(start + ROWS, len(index))).places
            except ImageDamaged:
                return  # reported as a record
            for number in np.unique(chunks(places[kinds(places) == PageKind.STORED])).tolist():
                if space not in (users := self.users.setdefault(number, [])):
                    users.append(space)

    def _check_record(self, number: int) -> None:
        image, row = self.image, self.image.directory[number - 1]
        if any(image.padding(number)):
            self._add(number, f"{image.where(number)}: padding is not zero")
        if not row["parent"] < number:
            self._add(number, f"{image.where(number)}: belongs to the later {row['parent']}")
        if row["type"] == RecordType.CHUNK:
            self._check_chunk(number)
        elif row["type"] in RECORDS:
            self._check_contents(number)
        else:
            for _ in image.slices(number):
                pass
            if row["type"] == RecordType.PAGE_INDEX:
                PageIndex(image, number)

    def _check_contents(self, number: int) -> None:
        record = self.image.record(number)
        named: set[int] = set()
        if isinstance(record, Mm):
            named = {record.space}
        elif isinstance(record, Vmas | Files):
            named = {row.object_space for row in record.rows} - {0}
        for space in sorted(named - set(self.image.spaces)):
            self._add(number, f"{self.image.where(number)}: space {space} has no page index")

    def _check_chunk(self, number: int) -> None:
        chunk = self.image.chunk(number)
        for space in self.users.get(number, ()):
            self._check_pages(number, chunk, space)

    def _check_pages(self, number: int, chunk: Chunk, space: int) -> None:
        """The pages that the index of ``space`` says are in this chunk."""
        index = self.indexes[space]
        found, places, rows = index.find(chunk.pages)
        # A slot that the index does not name was superseded in the same epoch.
        mine = (kinds(places) == PageKind.STORED) & (chunks(places) == number)
        mine &= slots(places) == np.flatnonzero(found).astype(np.uint64)
        at, rows = np.flatnonzero(found)[mine], rows[mine]
        right = (hash_pages(chunk.data[at]) == index.hashes(rows)).all(axis=1)
        self.seen[space][rows] = True
        if not right.all():
            where = self.image.where(number)
            finding = self._add(number, f"{where}: contents do not have the hash in the index")
            finding.lose(space, chunk.pages[at[~right]])

    def _check_index(self, space: int, index: PageIndex) -> None:
        for start in range(0, len(index), ROWS):
            end = min(start + ROWS, len(index))
            self._check_rows(space, index.rows(start, end), self.seen[space][start:end])

    def _check_rows(self, space: int, rows: IndexRows, seen: Bools) -> None:
        """What no chunk accounted for, and entries that must say nothing but their kind."""
        kind = kinds(rows.places)
        stored = kind == PageKind.STORED
        self._lose_unseen(space, rows, stored & ~seen)
        plain = rows.places == np.uint64(place(0)) + (kind.astype(np.uint64) << np.uint64(48))
        expected = np.where((kind == PageKind.ZERO)[:, None], ZERO_PAGE_HASH, np.uint64(0))
        inherited = kind == PageKind.INHERITED
        odd = ~stored & ~inherited & ~(plain & (rows.hashes == expected).all(axis=1))
        # A full image has no parent to inherit from.
        odd |= inherited & (self.image.header.full | (slots(rows.places) != 0))
        if odd.any():
            number = self.image.index_id(space)
            where = self.image.where(number)
            self._add(number, f"{where}: {odd.sum()} entries contradict their kind").lose(
                space, rows.pages[odd]
            )

    def _lose_unseen(self, space: int, rows: IndexRows, unseen: Bools) -> None:
        if not unseen.any():
            return
        pages, where = rows.pages[unseen], chunks(rows.places[unseen])
        for value in np.unique(where):
            number = int(value)
            if number not in self.bad:
                number = self.image.index_id(space)
                self._add(
                    number, f"{self.image.where(number)}: record {value} lacks pages it names"
                )
            self.bad[number].lose(space, pages[where == value])
