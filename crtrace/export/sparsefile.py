"""An output file that is written sparsely and appears whole or not at all."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from crtrace.errors import CrtraceError, UsageError
from crtrace.image.chaindir import explained
from crtrace.units import human_bytes

MAX_LENGTH = 1 << 47
"""The whole address space of most processes: 128 TiB. A longer file would be nothing but a hole
that the next program to read it would not come out of."""


def check_length(length: int) -> None:
    """Raise ``CrtraceError`` for a file that would be too long."""
    if length > MAX_LENGTH:
        raise CrtraceError(
            f"the file would have {human_bytes(length)}, most of it empty; "
            f"{human_bytes(MAX_LENGTH)} is the limit"
        )


class SparseFile:
    """A file open for writing at any offset; what is never written reads as zeros."""

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def write(self, data: bytes | memoryview, offset: int) -> None:
        """Write all of ``data`` at ``offset``. Raises as ``truncate`` does."""
        left = memoryview(data).cast("B")
        check_length(offset + left.nbytes)
        while left.nbytes:
            done = os.pwrite(self._fd, left, offset)
            left, offset = left[done:], offset + done

    def truncate(self, length: int) -> None:
        """Set the length. Raises ``CrtraceError`` beyond ``MAX_LENGTH``."""
        check_length(length)
        os.ftruncate(self._fd, length)


@contextmanager
def sparse_file(path: str | os.PathLike[str]) -> Iterator[SparseFile]:
    """A new file, mode 0600, that replaces ``path`` when the block is left without an error.

    Raises ``CrtraceError`` naming ``path`` when the disk is full or fails.
    """
    where = Path(path)
    if not where.name:
        raise UsageError(f"{where} is a directory, expected a file")
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
