"""Tables with byte strings: rows of one size, then a heap that they point into."""

from __future__ import annotations

import struct
from collections.abc import Iterable
from typing import Any

from crtrace.errors import ImageDamaged
from crtrace.image.fields import Cursor, decode, whole_name
from crtrace.image.framing import MAX_PAYLOAD

TABLE = struct.Struct("<IIQ")


class Heap:
    """The byte strings of a table, each stored once."""

    def __init__(self) -> None:
        self.data = bytearray()
        self._known: dict[bytes, int] = {}

    def put(self, value: bytes) -> tuple[int, int]:
        """Offset and length of ``value``."""
        if value not in self._known:
            self._known[value] = len(self.data)
            self.data += value
        return self._known[value], len(value)


def pack_table(row: struct.Struct, rows: Iterable[tuple[Any, ...]], heap: Heap) -> bytes:
    """The payload of a table."""
    packed = b"".join(row.pack(*values) for values in rows)
    head = TABLE.pack(len(packed) // row.size, row.size, len(heap.data))
    return head + packed + bytes(heap.data)


class Strings:
    """The byte strings of a table that was read.

    Rows share them, so few bytes can stand for many. Different strings must not overlap, or a
    heap could become a multiple of itself in memory: what they take is limited as they are read,
    and ``check_apart`` finds the rest. What all rows name, shared or not, is
    limited as well, since it is printed for each. Methods raise ``ImageDamaged``.
    """

    def __init__(self, heap: bytes, where: str) -> None:
        self._heap = heap
        self._where = where
        self._known: dict[tuple[int, int], bytes] = {}
        self._texts: dict[tuple[int, int], str] = {}
        self._different = self._named = 0

    def get(self, offset: int, length: int) -> bytes:
        """``length`` bytes from ``offset``."""
        self._named += length
        key = offset, length
        if key not in self._known:
            self._different += length
            self._known[key] = self._cut(offset, length)
        if self._named > MAX_PAYLOAD:
            raise ImageDamaged(f"{self._where}: rows name more than {MAX_PAYLOAD} bytes of text")
        return self._known[key]

    def _cut(self, offset: int, length: int) -> bytes:
        if offset + length > len(self._heap):
            raise ImageDamaged(
                f"{self._where}: {length} bytes at {offset:#x} are outside of a heap of "
                f"{len(self._heap)}"
            )
        if self._different > len(self._heap):
            raise ImageDamaged(f"{self._where}: different byte strings overlap in the heap")
        return self._heap[offset : offset + length]

    def check_apart(self) -> None:
        """Raise ``ImageDamaged`` when two of the strings that were asked for share bytes."""
        reach = 0
        for offset, length in sorted(key for key in self._known if key[1]):
            if offset < reach:
                raise ImageDamaged(f"{self._where}: different byte strings overlap in the heap")
            reach = offset + length

    def text(self, offset: int, length: int) -> str:
        """The same as a name."""
        data = self.get(offset, length)
        key = offset, length
        if key not in self._texts:
            self._texts[key] = decode(whole_name(data, self._where))
        return self._texts[key]


def unpack_table(
    data: bytes, where: str, row: struct.Struct
) -> tuple[list[tuple[Any, ...]], Strings]:
    """The rows of a table, and the byte strings of its heap.

    Raises ``ImageDamaged`` when something does not fit; rows may be longer than this reader knows.
    """
    cursor = Cursor(data, where)
    count, size, heap_length = cursor.take(TABLE)
    if size < row.size or size % 8:
        raise ImageDamaged(f"{where}: rows are {size} bytes, expected at least {row.size}")
    rows = cursor.raw(count * size, f"table of {count} rows")
    heap = cursor.raw(heap_length, "heap")
    unpacked = [row.unpack_from(rows, at) for at in range(0, count * size, size)]
    return unpacked, Strings(heap, where)
