"""The tables of what is mapped: mappings and files."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from enum import IntEnum, IntFlag
from typing import ClassVar, Self

from crtrace.errors import ImageDamaged
from crtrace.image.fields import encode, must_be_zero
from crtrace.image.framing import RecordType
from crtrace.image.heap import Heap, pack_table, unpack_table
from crtrace.units import PAGE_SHIFT, PAGE_SIZE

MAX_BUILD_ID = 64
USER_END = 1 << 56
"""Where the user's half of 57-bit addresses ends: an x86-64 process has nothing above it but the
page of ``vsyscall``."""
VSYSCALL = 0xFFFF_FFFF_FF60_0000
OBJECT_END = 1 << 63
"""Where the largest object that the kernel makes ends."""


class VmaFlag(IntFlag):
    """Protection and advice of a mapping."""

    READ = 1
    WRITE = 2
    EXEC = 4
    SHARED = 8
    GROWS_DOWN = 0x10
    LOCKED = 0x20
    DONT_DUMP = 0x40
    DONT_FORK = 0x80
    WIPE_ON_FORK = 0x100
    NO_RESERVE = 0x200
    HUGE_PAGE = 0x400
    NO_HUGE_PAGE = 0x800
    MERGEABLE = 0x1000
    SHADOW_STACK = 0x2000
    FILE_BEHIND = 0x4000


class VmaKind(IntEnum):
    """What a mapping is of."""

    ANON = 0
    HEAP = 1
    STACK = 2
    VDSO = 3
    VVAR = 4
    VSYSCALL = 5
    FILE = 6
    SHM = 7
    HUGETLB = 8
    DEVICE = 9


class FileFlag(IntFlag):
    """What is unusual about a mapped file."""

    DELETED = 1
    MEMFD = 2
    SHM = 4
    SYSV = 8
    HUGETLB = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Vma:
    """A mapping: ``[start, end)`` bytes; ``pgoff`` is the offset in the file or object, in bytes.

    ``file`` is an id of ``Files``, ``object_space`` the space of the contents; 0: none.
    """

    start: int
    end: int
    pgoff: int = 0
    flags: int = 0
    kind: int = VmaKind.ANON
    file: int = 0
    object_space: int = 0
    name: str = ""

    @property
    def pages(self) -> int:
        """Its size in pages."""
        return (self.end - self.start) >> PAGE_SHIFT

    @property
    def perms(self) -> str:
        """As in ``/proc/PID/maps``: ``rwxp``."""
        bits = zip("rwx", (VmaFlag.READ, VmaFlag.WRITE, VmaFlag.EXEC), strict=True)
        shown = "".join(name if self.flags & bit else "-" for name, bit in bits)
        return shown + ("s" if self.flags & VmaFlag.SHARED else "p")


@dataclass(frozen=True, slots=True, kw_only=True)
class FileInfo:
    """A mapped file. ``object_space``: where its contents are kept; 0: they are not."""

    id: int
    flags: int = 0
    dev: int = 0
    inode: int = 0
    size: int = 0
    mtime_ns: int = 0
    object_space: int = 0
    path: str = ""
    build_id: bytes = b""


VMA_ROW = struct.Struct("<QQQIIIIII")
FILE_ROW = struct.Struct("<IIQQQqIIIIII")


@dataclass(frozen=True, slots=True)
class Vmas:
    """The mappings of an ``Mm``, ascending and disjoint."""

    TYPE: ClassVar = RecordType.VMAS

    rows: tuple[Vma, ...]

    def pack(self) -> bytes:
        """The payload. Raises ``ValueError`` for what no reader would take."""
        if wrong := _misplaced(self.rows):
            raise ValueError(wrong)
        heap = Heap()
        rows = [
            (
                v.start, v.end, v.pgoff, v.flags, v.kind, v.file, v.object_space,
                *heap.put(encode(v.name)),
            )
            for v in self.rows
        ]  # fmt: skip
        return pack_table(VMA_ROW, rows, heap)

    @classmethod
    def unpack(cls, data: bytes, where: str) -> Self:
        """Raises ``ImageDamaged`` when a mapping is empty, unaligned or overlaps the next."""
        rows, strings = unpack_table(data, where, VMA_ROW)
        vmas = tuple(
            Vma(
                start=start, end=end, pgoff=pgoff, flags=flags, kind=kind, file=file,
                object_space=space, name=strings.text(at, length),
            )
            for start, end, pgoff, flags, kind, file, space, at, length in rows
        )  # fmt: skip
        strings.check_apart()
        if wrong := _misplaced(vmas):
            raise ImageDamaged(f"{where}: {wrong}")
        return cls(vmas)


def _misplaced(vmas: tuple[Vma, ...]) -> str:
    """What is wrong with the order of mappings; nothing: an empty text."""
    reach = 0
    for vma in vmas:
        unaligned = (vma.start | vma.end | vma.pgoff) % PAGE_SIZE
        if unaligned or vma.start < reach or vma.end <= vma.start:
            return (
                f"mapping {vma.start:#x}-{vma.end:#x} at {vma.pgoff:#x} is unaligned, "
                f"empty or begins before {reach:#x}"
            )
        if vma.end > USER_END and (vma.start, vma.pages) != (VSYSCALL, 1):
            return f"mapping {vma.start:#x}-{vma.end:#x} is where no x86-64 process has one"
        if vma.object_space and vma.pgoff + vma.end - vma.start > OBJECT_END:
            return f"mapping {vma.start:#x}-{vma.end:#x} at {vma.pgoff:#x} is beyond its object"
        reach = vma.end
    return ""


@dataclass(frozen=True, slots=True)
class Files:
    """Every file that a mapping or an ``Mm`` of the image refers to."""

    TYPE: ClassVar = RecordType.FILES

    rows: tuple[FileInfo, ...]

    def pack(self) -> bytes:
        """The payload. Raises ``ValueError`` for what no reader would take."""
        if wrong := _unfit(self.rows):
            raise ValueError(wrong)
        heap = Heap()
        rows = [
            (
                f.id, f.flags, f.dev, f.inode, f.size, f.mtime_ns, f.object_space,
                *heap.put(encode(f.path)), *heap.put(f.build_id), 0,
            )
            for f in self.rows
        ]  # fmt: skip
        return pack_table(FILE_ROW, rows, heap)

    @classmethod
    def unpack(cls, data: bytes, where: str) -> Self:
        """Raises ``ImageDamaged`` when an id is 0 or there twice, or a build id too long."""
        rows, strings = unpack_table(data, where, FILE_ROW)
        files = tuple(
            FileInfo(
                id=r[0], flags=r[1], dev=r[2], inode=r[3], size=r[4], mtime_ns=r[5],
                object_space=r[6], path=strings.text(r[7], r[8]), build_id=strings.get(r[9], r[10]),
            )
            for r in rows
        )  # fmt: skip
        strings.check_apart()
        must_be_zero(max((r[11] for r in rows), default=0), where)
        if wrong := _unfit(files):
            raise ImageDamaged(f"{where}: {wrong}")
        return cls(files)


def _unfit(files: tuple[FileInfo, ...]) -> str:
    """What is wrong with a table of files; nothing: an empty text."""
    ids = {file.id for file in files}
    if 0 in ids or len(ids) != len(files):
        return "a file id is 0 or there twice"
    if any(len(file.build_id) > MAX_BUILD_ID for file in files):
        return f"a build id is longer than {MAX_BUILD_ID} bytes"
    return ""
