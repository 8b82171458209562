"""What the running kernel says of its own types: the BTF that it shows in ``/sys/kernel/btf``.

Types follow one another, each as long as its kind says, so all are walked through once.
"""

from __future__ import annotations

import struct
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Self

KERNEL = Path("/sys/kernel/btf/vmlinux")
_MAGIC = 0xEB9F
_HEADER = struct.Struct("<HBBIIIII")
_TYPE = struct.Struct("<III")
_MEMBER = struct.Struct("<III")
_POINTER, _STRUCT, _TYPEDEF, _FUNCTION_TYPE = 2, 4, 8, 13
_EXTRA = {
    1: (4, 0), 2: (0, 0), 3: (12, 0), 4: (0, 12), 5: (0, 12), 6: (0, 8), 7: (0, 0), 8: (0, 0),
    9: (0, 0), 10: (0, 0), 11: (0, 0), 12: (0, 0), 13: (0, 8), 14: (4, 0), 15: (0, 12), 16: (0, 0),
    17: (4, 0), 18: (0, 0), 19: (0, 12),
}  # fmt: skip
"""Bytes that follow a type of each kind: so many, and so many for each of its parts."""


@dataclass(frozen=True, slots=True)
class _Type:
    """``at``: where its parts begin; ``refers``: its size, or the type that it is made from."""

    kind: int
    parts: int
    bitfields: bool
    refers: int
    at: int


class Btf:
    """Types by name. ``ValueError`` for what is no BTF, or has a kind that is not known here."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        if len(data) < _HEADER.size:
            raise ValueError("BTF is cut off")
        magic, version, _, header, types, types_size, names, names_size = _HEADER.unpack_from(data)
        if (magic, version) != (_MAGIC, 1):
            raise ValueError("not BTF of this byte order and version")
        if header + max(types + types_size, names + names_size) > len(data):
            raise ValueError("BTF is cut off")
        self._names = data[header + names : header + names + names_size]
        self._places: list[int] = []
        """Of types, by number less one."""
        self._by_name: dict[tuple[int, int], list[int]] = {}
        """Of structs and typedefs, by kind and name."""
        self._walk(header + types, header + types + types_size)

    @classmethod
    def of_kernel(cls) -> Self | None:
        """That of the running kernel, if it has any that can be read here."""
        with suppress(OSError, ValueError):
            return cls(KERNEL.read_bytes())
        return None

    def _walk(self, at: int, end: int) -> None:
        while at < end:
            if at + _TYPE.size > end:
                raise ValueError("a type is cut off")
            name, info, _ = _TYPE.unpack_from(self._data, at)
            kind = info >> 24 & 0x1F
            if kind not in _EXTRA:
                raise ValueError(f"types of kind {kind} are not known")
            self._places.append(at)
            if kind in (_STRUCT, _TYPEDEF):
                self._by_name.setdefault((kind, name), []).append(at)
            fixed, each = _EXTRA[kind]
            at += _TYPE.size + fixed + each * (info & 0xFFFF)
        if at > end:
            raise ValueError("a type is cut off")

    def _type_at(self, at: int) -> _Type:
        _, info, refers = _TYPE.unpack_from(self._data, at)
        kind, parts = info >> 24 & 0x1F, info & 0xFFFF
        return _Type(kind, parts, bool(info >> 31), refers, at + _TYPE.size)

    def _named(self, name: str, kind: int) -> list[_Type]:
        at = self._names.find(b"\0" + name.encode() + b"\0") + 1
        return [self._type_at(each) for each in self._by_name.get((kind, at), ()) if at]

    def _numbered(self, number: int, kind: int) -> _Type | None:
        if not 0 < number <= len(self._places):
            return None
        found = self._type_at(self._places[number - 1])
        return found if found.kind == kind else None

    def offset(self, struct_name: str, member: str) -> int | None:
        """Where a member of a struct lies, in bytes from its beginning.

        None where there is no such struct or member, where it is a bitfield or lies within an
        anonymous part, or where structs of that name differ.
        """
        found = {self._offset_in(each, member) for each in self._named(struct_name, _STRUCT)}
        return found.pop() if len(found) == 1 else None

    def _offset_in(self, of: _Type, member: str) -> int | None:
        wanted = member.encode() + b"\0"
        for number in range(of.parts):
            name, _, bits = _MEMBER.unpack_from(self._data, of.at + number * _MEMBER.size)
            if not name or self._names[name : name + len(wanted)] != wanted:
                continue
            width, bits = (bits >> 24, bits & 0xFFFFFF) if of.bitfields else (0, bits)
            return None if width or bits % 8 else bits // 8
        return None

    def tracepoint_arguments(self, name: str) -> int | None:
        """How many arguments raw tracepoint programs are given at a tracepoint; None if unknown."""
        counts = {self._parameters(each) for each in self._named(f"btf_trace_{name}", _TYPEDEF)}
        count = counts.pop() if len(counts) == 1 else None
        return count - 1 if count else None  # the first is the kernel's own

    def _parameters(self, typedef: _Type) -> int | None:
        pointer = self._numbered(typedef.refers, _POINTER)
        function = self._numbered(pointer.refers, _FUNCTION_TYPE) if pointer else None
        return function.parts if function else None
