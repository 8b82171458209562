"""The table of what could not be read."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from enum import IntEnum
from typing import ClassVar, Self

import numpy as np

from crtrace.errors import ImageDamaged
from crtrace.image.fields import Cursor
from crtrace.image.framing import RecordType
from crtrace.image.places import PAGE_LIMIT
from crtrace.units import U64, intersect

UNREADABLE_ROW = struct.Struct("<IiQQII")


class UnreadableReason(IntEnum):
    """Why a page could not be read."""

    UNKNOWN = 0
    GUARD = 1
    SECRET = 2
    DEVICE = 3
    READ_FAILED = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class UnreadableRange:
    """``count`` pages of ``space`` from page ``first`` that could not be read."""

    space: int
    first: int
    count: int
    errno: int
    reason: int = UnreadableReason.UNKNOWN


@dataclass(frozen=True, slots=True)
class Unreadable:
    """The pages of the image that could not be read, as ranges."""

    TYPE: ClassVar = RecordType.UNREADABLE

    rows: tuple[UnreadableRange, ...]

    def pack(self) -> bytes:
        """The payload. Raises ``ValueError`` for what no reader would take."""
        if wrong := _misplaced(self.rows):
            raise ValueError(wrong)
        rows = [(r.space, r.errno, r.first, r.count, r.reason, 0) for r in self.rows]
        head = struct.pack("<II", len(rows), UNREADABLE_ROW.size)
        return head + b"".join(UNREADABLE_ROW.pack(*row) for row in rows)

    @classmethod
    def unpack(cls, data: bytes, where: str) -> Self:
        """Raises ``ImageDamaged`` when the rows do not fit or are out of order."""
        cursor = Cursor(data, where)
        count, size = cursor.u32(), cursor.u32()
        if size < UNREADABLE_ROW.size or size % 8:
            raise ImageDamaged(f"{where}: rows are {size} bytes, expected {UNREADABLE_ROW.size}")
        data = cursor.raw(count * size, f"table of {count} rows")
        rows = (UNREADABLE_ROW.unpack_from(data, at) for at in range(0, count * size, size))
        ranges = tuple(
            UnreadableRange(space=space, first=first, count=pages, errno=errno, reason=reason)
            for space, errno, first, pages, reason, _ in rows
        )
        if wrong := _misplaced(ranges):
            raise ImageDamaged(f"{where}: {wrong}")
        return cls(ranges)


def _misplaced(ranges: tuple[UnreadableRange, ...]) -> str:
    """What is wrong with the order of ranges; nothing: an empty text."""
    reach = 0, 0
    for row in ranges:
        end = row.first + row.count
        if not row.count or end > PAGE_LIMIT or (row.space, row.first) < reach:
            return (
                f"pages {row.first:#x}-{end:#x} of space {row.space} are none, "
                "beyond 2^52 or out of order"
            )
        reach = row.space, end
    return ""


def narrowed(rows: Iterable[UnreadableRange], pages: U64) -> Iterator[UnreadableRange]:
    """The parts of ``rows`` that lie in a range array."""
    for row in rows:
        whole = np.array([[row.first, row.first + row.count]], dtype=np.uint64)
        for first, end in intersect(whole, pages).tolist():
            yield replace(row, first=first, count=end - first)
