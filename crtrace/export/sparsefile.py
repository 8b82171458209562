"""An output file that is written sparsely and appears whole or not at all."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from crtrace.image.chaindir import explained


class SparseFile:
    """A file open for writing at any offset; what is never written reads as zeros."""

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def write(self, data: bytes | memoryview, offset: int) -> None:
        """Write all of ``data`` at ``offset``."""
        left = memoryview(data).cast("B")
        while left.nbytes:
            done = os.pwrite(self._fd, left, offset)
            left, offset = left[done:], offset + done

    def truncate(self, length: int) -> None:
        """Set the length."""
        os.ftruncate(self._fd, length)


@contextmanager
def sparse_file(path: str | os.PathLike[str]) -> Iterator[SparseFile]:
    """A new file, mode 0600, that replaces ``path`` when the block is left without an error.

    Raises ``CrtraceError`` naming ``path`` when the disk is full or fails.
    """
    where = Path(path)
    part = where.with_name(f".{where.name}.{secrets.token_hex(4)}.part")
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    with explained("writing", where):
        fd = os.open(part, flags, 0o600)
        try:
            yield SparseFile(fd)
            os.fdatasync(fd)
            os.rename(part, where)
        except BaseException:
            os.unlink(part)
            raise
        finally:
            os.close(fd)
