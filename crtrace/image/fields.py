"""Variable parts of payloads: blobs, texts, lists, and a reader that cannot run past the end."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any

from crtrace.errors import ImageDamaged

U32 = struct.Struct("<I")
MAX_LISTED = 1024
"""Most things in a list within a record. The kernel has 32 levels of PID namespaces, 8 kinds of
namespaces and fewer register sets; as Python objects, a list takes many times its bytes."""


def blob(data: bytes, align: int = 4) -> bytes:
    """A length-prefixed byte string, padded to a multiple of ``align``."""
    return U32.pack(len(data)) + data + bytes(-len(data) % align)


def text(value: str) -> bytes:
    """A blob of UTF-8; bytes that were none (names on Linux are bytes) go back as they came."""
    return blob(encode(value))


def u32s(values: Sequence[int]) -> bytes:
    """A count and that many 32-bit numbers."""
    return struct.pack(f"<I{len(values)}I", len(values), *values)


def encode(value: str) -> bytes:
    """Text to the bytes it was read from."""
    return value.encode("utf-8", "surrogateescape")


def decode(data: bytes) -> str:
    """Bytes to text, losing nothing."""
    return data.decode("utf-8", "surrogateescape")


def whole_name(data: bytes, where: str) -> bytes:
    """The bytes of a name, in which Linux has no zero: what follows one would be another name.

    Raises ``ImageDamaged``.
    """
    if b"\0" in data:
        raise ImageDamaged(f"{where}: a name has a zero byte in it")
    return data


def must_be_zero(reserved: int, where: str) -> None:
    """Raise ``ImageDamaged`` for a reserved field that is used."""
    if reserved:
        raise ImageDamaged(f"{where}: a reserved field is {reserved:#x}, expected 0")


class Cursor:
    """Takes one field after another off a payload and checks every length before using it.

    ``where`` names the record in errors. Raises ``ImageDamaged`` when a field does not fit.
    """

    __slots__ = ("_at", "_data", "where")

    def __init__(self, data: bytes, where: str) -> None:
        self._data = data
        self._at = 0
        self.where = where

    @property
    def left(self) -> int:
        """Bytes not yet taken."""
        return len(self._data) - self._at

    def raw(self, length: int, what: str = "field") -> bytes:
        """The next ``length`` bytes."""
        if length > self.left:
            raise ImageDamaged(
                f"{self.where}: a {what} of {length} bytes at offset {self._at:#x} of the payload "
                f"does not fit; {self.left} bytes are left"
            )
        self._at += length
        return self._data[self._at - length : self._at]

    def take(self, layout: struct.Struct) -> tuple[Any, ...]:
        """The next fixed fields."""
        return layout.unpack(self.raw(layout.size))

    def u32(self) -> int:
        """The next 32-bit number."""
        number: int = U32.unpack(self.raw(4))[0]
        return number

    def count(self, row: int, what: str) -> int:
        """A count of things that take at least ``row`` bytes each, at most ``MAX_LISTED``."""
        number = self.u32()
        if number > MAX_LISTED:
            raise ImageDamaged(f"{self.where}: {number} {what}, expected at most {MAX_LISTED}")
        if number * row > self.left:
            raise ImageDamaged(f"{self.where}: {number} {what} do not fit in {self.left} bytes")
        return number

    def blob(self, align: int = 4) -> bytes:
        """The next length-prefixed byte string."""
        length = self.u32()
        data = self.raw(length, "byte string")
        if any(self.raw(-length % align, "padding")):
            raise ImageDamaged(
                f"{self.where}: padding before offset {self._at:#x} of the payload is not zero"
            )
        return data

    def text(self) -> str:
        """The next text."""
        return decode(whole_name(self.blob(), self.where))

    def u32s(self) -> tuple[int, ...]:
        """The next list of 32-bit numbers."""
        number = self.count(4, "numbers")
        return struct.unpack(f"<{number}I", self.raw(4 * number))
