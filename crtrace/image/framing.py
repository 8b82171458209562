"""How records lie in an image: header, checksum, directory row, tail. FORMAT.md has the tables."""

from __future__ import annotations

import struct
from collections.abc import Iterable
from dataclasses import dataclass
from enum import IntEnum
from typing import ClassVar, Protocol, Self

import numpy as np
from xxhash import xxh3_64

from crtrace.units import CHUNK_BYTES, CHUNK_PAGES

MAJOR, MINOR = 1, 0
IMAGE_MAGIC = b"\x89crtimg\n"
TAIL_MAGIC = b"\x89crtend\n"
OPTIONAL = 1
"""Record flag: a reader that does not know the type may pass over the record."""

HEADER = struct.Struct("<IIQIIQ")
TAIL = struct.Struct("<8sQQQ16s")
CHUNK_HEAD = struct.Struct("<IIII")
INDEX_HEAD = struct.Struct("<IIQ")
SUMMARY_HEAD = struct.Struct("<IIQQQQ")
TAIL_SIZE = HEADER.size + TAIL.size
MAX_CHUNK = 16 + 8 * CHUNK_PAGES + CHUNK_BYTES
MAX_PAYLOAD = 256 << 20
"""Longest payload that is read as a whole; a page index, which is not, may be longer."""

DIRECTORY_ROW = np.dtype(
    [
        ("type", "<u4"),
        ("id", "<u4"),
        ("parent", "<u4"),
        ("flags", "<u4"),
        ("offset", "<u8"),
        ("length", "<u8"),
        ("checksum", "<u8"),
    ]
)
ROW = struct.Struct("<IIIIQQQ")
"""The same, for one row."""

MAX_RECORDS = MAX_PAYLOAD // DIRECTORY_ROW.itemsize - 2
"""Most records before the directory, which is read as a whole, too."""


class RecordType(IntEnum):
    """The record types of version 1."""

    IMAGE = 1
    ARCH = 2
    TASK = 3
    MM = 4
    VMAS = 5
    FILES = 6
    THREAD = 7
    CPU = 8
    CHUNK = 9
    PAGE_INDEX = 10
    UNREADABLE = 11
    STATS = 12
    DIRECTORY = 13
    TAIL = 14
    SUMMARY = 15


MAX_PAYLOADS: dict[int, int] = {
    RecordType.PAGE_INDEX: 1 << 63,  # read in pieces, so any that a file can hold
    RecordType.IMAGE: 1 << 20,
    RecordType.ARCH: 1 << 20,
    RecordType.TASK: 16 << 20,
    RecordType.MM: 1 << 20,
    RecordType.THREAD: 1 << 20,
    RecordType.CPU: 1 << 20,
    RecordType.CHUNK: MAX_CHUNK,
    RecordType.STATS: 4 << 20,
}
"""Longest payloads of some types: what is read becomes Python objects, which take many times as
much, so that no type may be longer than it has a reason to be."""


def max_payload(kind: int) -> int:
    """The longest payload of a record type."""
    return MAX_PAYLOADS.get(kind, MAX_PAYLOAD)


class Record(Protocol):
    """A payload that packs into bytes and comes back from them unchanged."""

    TYPE: ClassVar[RecordType]

    def pack(self) -> bytes:
        """The payload."""
        ...

    @classmethod
    def unpack(cls, data: bytes, where: str) -> Self:
        """The payload read back; ``where`` names it in errors. Raises ``ImageDamaged``."""
        ...


Part = bytes | bytearray | memoryview
"""A piece of a payload; payloads are written and hashed piece by piece and never joined."""


@dataclass(frozen=True, slots=True)
class RecordHeader:
    """The 32 bytes before a payload."""

    type: int
    flags: int
    length: int
    id: int
    parent: int
    checksum: int = 0

    def sealed(self, parts: Iterable[Part]) -> RecordHeader:
        """This header with the checksum that goes with the payload in ``parts``."""
        state = xxh3_64(self.pack()[:24])
        for part in parts:
            state.update(part)
        return RecordHeader(
            self.type, self.flags, self.length, self.id, self.parent, state.intdigest()
        )

    def pack(self) -> bytes:
        """The 32 bytes."""
        return HEADER.pack(self.type, self.flags, self.length, self.id, self.parent, self.checksum)

    @classmethod
    def unpack(cls, data: bytes) -> RecordHeader:
        """From 32 bytes, believing nothing."""
        return cls(*HEADER.unpack(data))


@dataclass(frozen=True, slots=True)
class Tail:
    """The end of an image, which says where its directory is."""

    directory_offset: int
    directory_length: int
    file_length: int
    image_hash: bytes

    def pack(self) -> bytes:
        """The payload."""
        return TAIL.pack(
            TAIL_MAGIC,
            self.directory_offset,
            self.directory_length,
            self.file_length,
            self.image_hash,
        )


_NAMES = {int(kind): kind.name for kind in RecordType}


def padding(length: int) -> int:
    """Zero bytes after a payload of ``length``."""
    return -length % 8


def type_name(number: int) -> str:
    """The name of a record type for messages."""
    return _NAMES.get(number, f"type {number}")
