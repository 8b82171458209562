"""The table of what could not be read."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from enum import IntEnum
from typing import ClassVar, Self

import numpy as np

from crtrace.errors import ImageDamaged
from crtrace.image.fields import Cursor, must_be_zero
from crtrace.image.framing import RecordType
from crtrace.image.places import PAGE_LIMIT
from crtrace.units import U64, intersect, pairs

UNREADABLE_ROW = struct.Struct("<IiQQII")
HEAD = struct.Struct("<II")
FIELDS = [
    ("space", "<u4"),
    ("errno", "<i4"),
    ("first", "<u8"),
    ("count", "<u8"),
    ("reason", "<u4"),
    ("reserved", "<u4"),
]
Rows = np.ndarray[tuple[int], np.dtype[np.void]]


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
        rows = [(r.space, r.errno, r.first, r.count, r.reason, 0) for r in self.rows]
        if wrong := _misplaced(np.array(rows, dtype=FIELDS)):
            raise ValueError(wrong)
        head = HEAD.pack(len(rows), UNREADABLE_ROW.size)
        return head + b"".join(UNREADABLE_ROW.pack(*row) for row in rows)

    @classmethod
    def unpack(cls, data: bytes, where: str) -> Self:
        """Raises ``ImageDamaged`` when the rows do not fit or are out of order."""
        return cls(
            tuple(
                UnreadableRange(space=space, first=first, count=count, errno=errno, reason=reason)
                for space, errno, first, count, reason, *_ in _unpack(data, where).tolist()
            )
        )


def unreadable_pages(data: bytes, where: str) -> dict[int, U64]:
    """What a table names, by space, as range arrays: no more than 16 bytes a row.

    Raises ``ImageDamaged`` as ``Unreadable.unpack`` does.
    """
    rows = _unpack(data, where)
    ranges = pairs(rows["first"], rows["first"] + rows["count"])
    spaces, starts = np.unique(rows["space"], return_index=True)
    return (
        dict(zip(spaces.tolist(), np.split(ranges, starts[1:]), strict=True)) if len(rows) else {}
    )


def _unpack(data: bytes, where: str) -> Rows:
    """The rows, which are in order. Raises ``ImageDamaged``."""
    cursor = Cursor(data, where)
    count, size = cursor.take(HEAD)
    if size < UNREADABLE_ROW.size or size % 8:
        raise ImageDamaged(f"{where}: rows are {size} bytes, expected {UNREADABLE_ROW.size}")
    table = cursor.raw(count * size, f"table of {count} rows")
    more = size - UNREADABLE_ROW.size if count else 0
    rows: Rows = np.frombuffer(table, dtype=[*FIELDS, ("unknown", f"V{more}")])
    must_be_zero(int(rows["reserved"].max(initial=0)), where)
    if wrong := _misplaced(rows):
        raise ImageDamaged(f"{where}: {wrong}")
    return rows


def _misplaced(rows: Rows) -> str:
    """What is wrong with the order of ranges; nothing: an empty text."""
    first, count, space = rows["first"], rows["count"], rows["space"]
    limit = np.uint64(PAGE_LIMIT)
    bad = (count == 0) | (first >= limit) | (count > limit - np.minimum(first, limit))
    before = (space[1:] == space[:-1]) & (first[1:] < first[:-1] + count[:-1])
    bad[1:] |= (space[1:] < space[:-1]) | before
    if not bad.any():
        return ""
    at = int(np.flatnonzero(bad)[0])
    start, end = int(first[at]), int(first[at]) + int(count[at])
    return f"pages {start:#x}-{end:#x} of space {space[at]} are none, beyond 2^52 or out of order"


def narrowed(rows: Iterable[UnreadableRange], pages: U64) -> Iterator[UnreadableRange]:
    """The parts of ``rows`` that lie in a range array."""
    for row in rows:
        whole = np.array([[row.first, row.first + row.count]], dtype=np.uint64)
        for first, end in intersect(whole, pages).tolist():
            yield replace(row, first=first, count=end - first)
