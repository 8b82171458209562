"""The first pages of mapped ELF files, by which debuggers find out what is mapped.

The kernel writes them into its cores for that: they hold the program headers and the build id. An
image has no such page unless somebody wrote it.
"""

from __future__ import annotations

import os
import stat
from contextlib import suppress

from crtrace.image.tables import FileFlag, FileInfo
from crtrace.units import PAGE_SIZE


def elf_head(file: FileInfo | None) -> bytes:
    """The first page of a file that is still as it was when it was mapped; else nothing.

    Nothing also for what is no ELF file. Only a regular file is opened: to open a device can do
    anything.
    """
    if file is None or file.flags & FileFlag.DELETED:
        return b""
    with suppress(OSError, ValueError):
        if not _same(os.stat(file.path), file):
            return b""
        fd = os.open(file.path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
        try:
            head = os.pread(fd, PAGE_SIZE, 0)
            if _same(os.fstat(fd), file) and head.startswith(b"\x7fELF"):
                return head.ljust(PAGE_SIZE, b"\0")
        finally:
            os.close(fd)
    return b""


def _same(found: os.stat_result, file: FileInfo) -> bool:
    """Whether this is the file: by size and time, which a copy on another machine has too."""
    known = (file.size, file.mtime_ns)
    return stat.S_ISREG(found.st_mode) and (found.st_size, found.st_mtime_ns) == known
