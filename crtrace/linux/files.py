"""What identifies the files and memory objects that a process maps."""

from __future__ import annotations

import ctypes
import fcntl
import os
import signal
import stat
import struct
from contextlib import suppress
from dataclasses import dataclass, replace

from crtrace.linux.addrspace import open_mapped
from crtrace.linux.procfs import Process, Vma

TMPFS_MAGIC, HUGETLBFS_MAGIC = 0x01021994, 0x958458F6
_fstatfs = ctypes.CDLL(None, use_errno=True).fstatfs


@dataclass(frozen=True, slots=True)
class FileFacts:
    """A mapped inode. ``memory``: it lives in memory only; ``links`` 0: it was deleted."""

    size: int
    mtime_ns: int
    links: int
    regular: bool
    memory: bool = False
    hugetlb: bool = False
    build_id: bytes = b""
    ctime_ns: int = 0


def file_facts(process: Process, vma: Vma, before: FileFacts | None) -> FileFacts | None:
    """Facts of what a VMA maps, or None where they cannot be had.

    ``before``, what was known of that inode number, is right still if nothing of it changed.

    Read through ``map_files``, which reaches the inode itself: right also for a file that was
    deleted, replaced or lies in another mount namespace. Only regular files are opened, since
    to open a device can do anything.
    """
    try:
        info = os.stat(f"map_files/{vma.map_files_name}", dir_fd=process.dirfd)
        facts = FileFacts(
            info.st_size, info.st_mtime_ns, info.st_nlink, stat.S_ISREG(info.st_mode),
            ctime_ns=info.st_ctime_ns,
        )  # fmt: skip
        if before and replace(facts, build_id=before.build_id) == before:
            return before  # the rest of memory objects differs; they are asked each time
        return _look_inside(process, vma, facts) if facts.regular else facts
    except OSError:
        return None


def _look_inside(process: Process, vma: Vma, facts: FileFacts) -> FileFacts:
    fd = open_mapped(process, vma)
    try:
        magic = _filesystem_magic(fd)
        memory = magic in (TMPFS_MAGIC, HUGETLBFS_MAGIC)
        return FileFacts(
            facts.size, facts.mtime_ns, facts.links, True, memory, magic == HUGETLBFS_MAGIC,
            b"" if memory else read_build_id(fd), facts.ctime_ns,
        )  # fmt: skip
    finally:
        os.close(fd)


def _filesystem_magic(fd: int) -> int:
    buffer = (ctypes.c_long * 32)()
    return int(buffer[0]) if _fstatfs(fd, ctypes.byref(buffer)) == 0 else 0


def nobody_writes(fd: int) -> bool:
    """Whether nobody has the file, open here for reading, open for writing; False if unknown.

    The kernel gives a read lease under just that condition. It is given back at once.
    """
    try:
        fcntl.fcntl(fd, fcntl.F_SETSIG, signal.SIGURG)  # of an open in this moment; it is ignored
        fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_RDLCK)
        fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_UNLCK)
    except OSError:
        return False
    return True


def read_build_id(fd: int) -> bytes:
    """The GNU build id of an ELF file; empty when it has none or is no ELF file."""
    with suppress(OSError, OverflowError, struct.error):  # whatever the file says
        head = os.pread(fd, 64, 0)
        if head[:5] != b"\x7fELF\x02":
            return b""
        (offset,) = struct.unpack_from("<Q", head, 32)
        size, count = struct.unpack_from("<HH", head, 54)
        table = os.pread(fd, size * min(count, 64), offset)
        for at in range(0, len(table) - 55, size or 56):
            kind, _, note_at, _, _, length = struct.unpack_from("<IIQQQQ", table, at)
            if kind == 4 and (found := _gnu_build_id(os.pread(fd, min(length, 4096), note_at))):
                return found
    return b""


def _gnu_build_id(notes: bytes) -> bytes:
    at = 0
    while at + 12 <= len(notes):
        name_size, desc_size, kind = struct.unpack_from("<III", notes, at)
        desc = at + 12 + (name_size + 3 & ~3)
        if kind == 3 and notes[at + 12 : at + 16] == b"GNU\0":
            return notes[desc : desc + desc_size][:64]
        at = desc + (desc_size + 3 & ~3)
    return b""
