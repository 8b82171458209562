"""Tables with byte strings: rows of one size, then a heap that they point into."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable
from typing import Any

from crtrace.errors import ImageDamaged
from crtrace.image.fields import Cursor

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


def unpack_table(
    data: bytes, where: str, row: struct.Struct
) -> tuple[list[tuple[Any, ...]], Callable[[int, int], bytes]]:
    """The rows of a table, and a function that gets a byte string of its heap.

    Raises ``ImageDamaged`` when something does not fit; rows may be longer than this reader knows.
    """
    cursor = Cursor(data, where)
    count, size, heap_length = cursor.take(TABLE)
    if size < row.size or size % 8:
        raise ImageDamaged(f"{where}: rows are {size} bytes, expected at least {row.size}")
    rows = cursor.raw(count * size, f"table of {count} rows")
    heap = cursor.raw(heap_length, "heap")

    def get(offset: int, length: int) -> bytes:
        if offset + length > len(heap):
            raise ImageDamaged(
                f"{where}: {length} bytes at {offset:#x} are outside of a heap of {len(heap)}"
            )
        return heap[offset : offset + length]

    return [row.unpack_from(rows, at) for at in range(0, count * size, size)], get
