"""One image, read: nothing in it is believed before it is checked."""

from __future__ import annotations

import os
from collections.abc import Container, Iterator
from functools import cached_property
from typing import TypeVar

import numpy as np
from xxhash import xxh3_64, xxh3_128_digest

from crtrace.errors import ImageDamaged
from crtrace.image.chainindex import IndexEntry
from crtrace.image.chunk import Chunk, unpack_chunk
from crtrace.image.directory import Directory, check_parents, unpack_directory
from crtrace.image.filepool import FilePool
from crtrace.image.framing import (
    DIRECTORY_ROW,
    HEADER,
    INDEX_HEAD,
    MAX_PAYLOAD,
    TAIL,
    TAIL_MAGIC,
    TAIL_SIZE,
    RecordHeader,
    RecordType,
    Tail,
    max_payload,
    padding,
    type_name,
)
from crtrace.image.header import NO_EPOCH, NO_ID, ImageHeader, Stats
from crtrace.image.losses import Unreadable
from crtrace.image.pageindex import PageIndex, SummaryPart
from crtrace.image.places import PAGE_LIMIT
from crtrace.image.records import Arch, Cpu, Mm, Task, Thread
from crtrace.image.tables import Files, Vmas

SLICE = 1 << 20
AT_ONCE = 1 << 13
"""Bytes read from either end of the file when it is opened: often all that is needed then."""

AnyRecord = ImageHeader | Arch | Task | Mm | Vmas | Files | Thread | Cpu | Unreadable | Stats

RECORDS: dict[int, type[AnyRecord]] = {
    kind.TYPE: kind
    for kind in (ImageHeader, Arch, Task, Mm, Vmas, Files, Thread, Cpu, Unreadable, Stats)
}
T = TypeVar("T", ImageHeader, Arch, Task, Mm, Vmas, Files, Thread, Cpu, Unreadable, Stats)


class Image:
    """The image of one index entry, with its tail, directory and header checked on opening.

    Records are read, checked and unpacked when asked for. Not for several threads at once.
    Raises ``ImageDamaged``, ``ChainIncomplete`` or ``FormatTooNew``, from any method.
    """

    def __init__(self, files: FilePool, entry: IndexEntry, chain_id: bytes) -> None:
        self.entry = entry
        self.name = entry.name
        self.path = files.directory.path / self.name
        self._files = files
        self._parents_checked = False
        self._indexes: dict[int, PageIndex] = {}
        self._summaries: dict[int, tuple[SummaryPart, ...]] = {}
        length = os.fstat(files.get(self.name)).st_size
        if length != entry.length:
            raise ImageDamaged(
                f"{self.path}: file length is {length}, expected {entry.length}",
                hint="cut short or copied incompletely",
            )
        self._ends: tuple[bytes, int, bytes] = b"", length, b""
        end = max(length - AT_ONCE, 0)
        self._ends = self.read(0, min(AT_ONCE, length)), end, self.read(end, length - end)
        self.header = self._read_header()
        self.tail = self._read_tail(length)
        self.directory = self._read_directory()
        self._check_header(chain_id)
        self._spaces = self._find_spaces()
        self._ends = b"", length, b""

    def check_parents(self) -> None:
        """Raise ``ImageDamaged`` unless every record belongs to an earlier one that can have it."""
        if not self._parents_checked:
            check_parents(self.directory, f"{self.path}: DIRECTORY")
            self._parents_checked = True

    @cached_property
    def summary_ids(self) -> dict[int, list[int]]:
        """Space -> ids of the records that sum it up, as they say themselves, unchecked."""
        found: dict[int, list[int]] = {}
        for number in self.ids(RecordType.SUMMARY):
            found.setdefault(self._space_of(number), []).append(number)
        return found

    def read(self, offset: int, length: int) -> bytes:
        """Bytes of the file; they must be there."""
        head, end, tail = self._ends
        if offset + length <= len(head):
            return head[offset : offset + length]
        if offset >= end and tail:
            return tail[offset - end : offset - end + length]
        parts = []
        while length:
            try:
                part = os.pread(self._files.get(self.name), min(length, 1 << 30), offset)
            except OSError as error:
                reason = (error.strerror or str(error)).lower()
                raise ImageDamaged(f"{self.path}: {reason} at offset {offset:#x}") from error
            if not part:
                raise ImageDamaged(f"{self.path}: file ends at offset {offset:#x}")
            parts.append(part)
            offset, length = offset + len(part), length - len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def _read_header(self) -> ImageHeader:
        """Another major version is told from damage by what stays the same in all of them."""
        if self.entry.length < HEADER.size + TAIL_SIZE + ImageHeader.FIXED.size:
            raise ImageDamaged(f"{self.path}: {self.entry.length} bytes are no image")
        header = RecordHeader.unpack(self.read(0, HEADER.size))
        if header.type != RecordType.IMAGE or header.length > self.entry.length - HEADER.size:
            raise ImageDamaged(f"{self.path}: does not begin with an IMAGE record")
        payload = self.read(HEADER.size, min(header.length, max_payload(RecordType.IMAGE)))
        where = f"{self.path}: IMAGE 1 at offset 0x0"
        _check_sum(header, payload, where)
        return ImageHeader.unpack(payload, where)

    def _read_tail(self, length: int) -> Tail:
        offset = length - TAIL_SIZE
        where = f"{self.path}: TAIL at offset {offset:#x}"
        data = self.read(offset, TAIL_SIZE)
        header = RecordHeader.unpack(data[: HEADER.size])
        payload = data[HEADER.size :]
        magic, *fields = TAIL.unpack(payload)
        if magic != TAIL_MAGIC:
            raise ImageDamaged(f"{where}: magic is {magic.hex()}, expected {TAIL_MAGIC.hex()}")
        _check_sum(header, payload, where)
        tail = Tail(*fields)
        end = tail.directory_offset + HEADER.size + tail.directory_length
        rows, rest = divmod(tail.directory_length, DIRECTORY_ROW.itemsize)
        fits = end == offset and tail.directory_length <= MAX_PAYLOAD
        if tail.file_length != length or not fits or rest:
            raise ImageDamaged(f"{where}: directory or file length do not fit the file")
        expected = (RecordType.TAIL, 0, TAIL.size, rows + 2, 0)
        if (header.type, header.flags, header.length, header.id, header.parent) != expected:
            raise ImageDamaged(f"{where}: its record header is not that of a tail")
        if tail.image_hash != self.entry.image_hash:
            raise ImageDamaged(
                f"{where}: image hash is {tail.image_hash.hex()}, the index entry expects "
                f"{self.entry.image_hash.hex()}"
            )
        return tail

    def _read_directory(self) -> Directory:
        offset, length = self.tail.directory_offset, self.tail.directory_length
        where = f"{self.path}: DIRECTORY at offset {offset:#x}"
        header = RecordHeader.unpack(self.read(offset, HEADER.size))
        payload = self.read(offset + HEADER.size, length)
        expected = (RecordType.DIRECTORY, 0, length, length // DIRECTORY_ROW.itemsize + 1, 0)
        if (header.type, header.flags, header.length, header.id, header.parent) != expected:
            raise ImageDamaged(f"{where}: its record header is not that of the directory")
        _check_sum(header, payload, where)
        found = xxh3_128_digest(payload)
        if found != self.tail.image_hash:
            raise ImageDamaged(
                f"{where}: hash is {found.hex()}, expected {self.tail.image_hash.hex()}"
            )
        return unpack_directory(payload, offset, where)

    def _check_header(self, chain_id: bytes) -> None:
        self.check_header(1)
        header, entry = self.header, self.entry
        expected = (chain_id, entry.image_id, entry.epoch, entry.full, entry.wall_ns)
        found = (header.chain_id, header.image_id, header.epoch, header.full, header.wall_ns)
        above = header.parent_id, header.parent_epoch
        if found != expected or above != (entry.parent_id, entry.parent_epoch):
            raise ImageDamaged(f"{self.where(1)}: does not belong to its index entry")
        if header.full and (*above, header.parent_hash) != (NO_ID, NO_EPOCH, NO_ID):
            raise ImageDamaged(f"{self.where(1)}: is of a full image, and names a parent")

    def _find_spaces(self) -> dict[int, int]:
        """Space -> id of its page index."""
        spaces: dict[int, int] = {}
        for number in self.ids(RecordType.PAGE_INDEX):
            space = self._space_of(number)
            if space in spaces:
                raise ImageDamaged(f"{self.where(number)}: space {space} has two page indexes")
            spaces[space] = number
        return spaces

    def _space_of(self, number: int) -> int:
        """The space that an index or a summary is of, as it says itself, unchecked."""
        if self.directory[number - 1]["length"] < INDEX_HEAD.size:
            raise ImageDamaged(f"{self.where(number)}: too short for what it is")
        return int.from_bytes(self.span(number, 0, 4), "little")

    def length(self, number: int) -> int:
        """The length of a record's payload, as the directory has it."""
        return int(self.directory[number - 1]["length"])

    def index_id(self, space: int) -> int:
        """The id of the page index of a space of this epoch."""
        return self._spaces[space]

    @property
    def spaces(self) -> list[int]:
        """The spaces that exist in this epoch."""
        return sorted(self._spaces)

    def where(self, number: int) -> str:
        """A record for messages: "DIR/00000000.img: CHUNK 17 at offset 0x4a000"."""
        row = self.directory[number - 1]
        return f"{self.path}: {type_name(int(row['type']))} {number} at offset {row['offset']:#x}"

    def ids(self, kind: RecordType) -> list[int]:
        """The ids of the records of a type, ascending."""
        found: list[int] = (np.flatnonzero(self.directory["type"] == kind) + 1).tolist()
        return found

    def check_header(self, number: int) -> RecordHeader:
        """The header of a record, which must say what the directory says."""
        row = self.directory[number - 1]
        header = RecordHeader.unpack(self.read(int(row["offset"]), HEADER.size))
        found = header.type, header.id, header.parent, header.flags, header.length, header.checksum
        names = ("type", "id", "parent", "flags", "length", "checksum")
        if found != tuple(int(row[name]) for name in names):
            raise ImageDamaged(f"{self.where(number)}: its header differs from the directory")
        return header

    def slices(self, number: int) -> Iterator[bytes]:
        """The payload in pieces of up to 1 MiB; the checksum is checked after the last."""
        header = self.check_header(number)
        state = xxh3_64(header.pack()[:24])
        start = int(self.directory[number - 1]["offset"]) + HEADER.size
        for at in range(0, header.length, SLICE):
            part = self.read(start + at, min(SLICE, header.length - at))
            state.update(part)
            yield part
        _compare(state.intdigest(), header.checksum, self.where(number))

    def payload(self, number: int) -> bytes:
        """The whole checked payload of a record."""
        header = self.check_header(number)
        data = self.span(number, 0, header.length)
        _check_sum(header, data, self.where(number))
        return data

    def span(self, number: int, at: int, length: int) -> bytes:
        """Part of a payload, unchecked: for what was checked before."""
        return self.read(int(self.directory[number - 1]["offset"]) + HEADER.size + at, length)

    def padding(self, number: int) -> bytes:
        """What follows a payload; must be zeros."""
        row = self.directory[number - 1]
        length = int(row["length"])
        return self.read(int(row["offset"]) + HEADER.size + length, padding(length))

    def record(self, number: int) -> AnyRecord:
        """A record of ``RECORDS`` unpacked."""
        kind = RECORDS.get(int(self.directory[number - 1]["type"]))
        if kind is None:
            raise ImageDamaged(f"{self.where(number)}: holds no fields")
        return kind.unpack(self.payload(number), self.where(number))

    def records(
        self, kind: type[T], leave_out: Container[int] = ()
    ) -> Iterator[tuple[int, int, T]]:
        """Id, parent and contents of every record of a class, but for those left out."""
        self.check_parents()
        for number in self.ids(kind.TYPE):
            if number in leave_out:
                continue
            record = self.record(number)
            assert isinstance(record, kind)
            yield number, int(self.directory[number - 1]["parent"]), record

    def chunk(self, number: int) -> Chunk:
        """A chunk, decompressed."""
        where = self.where(number)
        if self.directory[number - 1]["type"] != RecordType.CHUNK:
            raise ImageDamaged(f"{where}: a page index takes it for a chunk")
        return unpack_chunk(self.payload(number), where)

    def page_index(self, space: int) -> PageIndex | None:
        """What this image says of a space; None when the space does not exist in it."""
        if space not in self._spaces:
            # Unless one of the others, damaged, only claims to be of another space.
            for other in self._spaces:
                self.page_index(other)
            return None
        if space not in self._indexes:
            self._indexes[space] = PageIndex(self, self._spaces[space])
        return self._indexes[space]

    def summary(self, space: int) -> tuple[SummaryPart, ...]:
        """What this image sums up of a space, in the order of the pages; nothing: empty.

        Raises ``ImageDamaged`` when it is wrong in any way; its parts cover all pages.
        """
        if space not in self._summaries:
            parts = [SummaryPart(self, number) for number in self.summary_ids.get(space, ())]
            reach = 0
            for part in parts:
                where = f"{self.path}: the summary of space {space}"
                follows = (part.space, part.first, part.base) == (space, reach, parts[0].base)
                if not follows or part.end <= reach:
                    raise ImageDamaged(f"{where} has no part for page {reach:#x}")
                part.check_within(self.entry.epoch)
                reach = part.end
            if parts and reach != PAGE_LIMIT:
                raise ImageDamaged(f"{where} ends at page {reach:#x}")
            self._summaries[space] = tuple(parts)
        return self._summaries[space]

    def check_parent(self, parent: Image) -> None:
        """Raise ``ImageDamaged`` unless this image was made on top of that one."""
        answers = {parent.tail.image_hash, parent.header.replaced_hash} - {NO_ID}
        if self.header.parent_id != parent.header.image_id:
            raise ImageDamaged(f"{self.path}: made on top of another image than {parent.path}")
        if self.header.parent_hash not in answers:
            raise ImageDamaged(
                f"{self.path}: parent's image hash is {parent.tail.image_hash.hex()}, expected "
                f"{self.header.parent_hash.hex()}"
            )


def _check_sum(header: RecordHeader, payload: bytes, where: str) -> None:
    _compare(header.sealed([payload]).checksum, header.checksum, where)


def _compare(found: int, expected: int, where: str) -> None:
    if found != expected:
        raise ImageDamaged(f"{where}: checksum is {found:016x}, expected {expected:016x}")
