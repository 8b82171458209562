"""What is known of pages while it is too long for memory: columns in files without a name."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Iterator, Sequence

import numpy as np

from crtrace.faults import point
from crtrace.image.chaindir import PART, ChainDir, explained, no_space
from crtrace.image.codec import as_bytes
from crtrace.image.framing import INDEX_HEAD
from crtrace.image.pending import Entries
from crtrace.image.places import PageKind, kinds
from crtrace.units import U64

PIECE = 1 << 20
"""Bytes read back at a time."""
SIZES = 8, 8, 16
"""Bytes a row in each column."""


class Spool:
    """Entries of a space in ascending order, piece by piece; then the payload of its index.

    As that it may be gone through more than once. ``counts``: entries of each kind.
    """

    def __init__(self, directory: ChainDir, space: int) -> None:
        self._space = space
        self._path = directory.path
        self._files: list[int] = []
        self.counts = dict.fromkeys(PageKind, 0)
        try:
            for column in range(3):
                self._files.append(_nameless(directory, f"spool-{column}{PART}"))
        except BaseException:
            self.close()
            raise

    def append(self, entries: Entries) -> None:
        """Add entries, whose pages follow those that are there."""
        columns = entries.pages, entries.places, entries.hashes
        rows = sum(self.counts.values())
        with explained("writing", self._path):
            for fd, size, column in zip(self._files, SIZES, columns, strict=True):
                _write(fd, as_bytes(column), rows * size)
        found, counts = np.unique(kinds(entries.places), return_counts=True)
        for kind, count in zip(found.tolist(), counts.tolist(), strict=True):
            self.counts[PageKind(kind)] += count

    @property
    def nbytes(self) -> int:
        """The length of the payload."""
        return INDEX_HEAD.size + 32 * sum(self.counts.values())

    def __iter__(self) -> Iterator[bytes]:
        """The payload in pieces."""
        rows = sum(self.counts.values())
        yield INDEX_HEAD.pack(self._space, 0, rows)
        for fd, size in zip(self._files, SIZES, strict=True):
            for at in range(0, rows * size, PIECE):
                with explained("reading", self._path):
                    piece = _read(fd, min(PIECE, rows * size - at), at)
                yield piece

    def close(self) -> None:
        """Forget everything."""
        while self._files:
            os.close(self._files.pop())


class PiecesFile:
    """Columns of many pieces, in the order in which threads come with them."""

    def __init__(self, directory: ChainDir) -> None:
        self._path = directory.path
        self._lock = threading.Lock()
        self._end = 0
        self._file = _nameless(directory, f"spool-3{PART}")

    def write(self, columns: Sequence[U64]) -> int:
        """Keep the columns, one after the other; where they are. For several threads."""
        data = np.concatenate([column.reshape(-1) for column in columns])
        with self._lock:
            at = self._end
            self._end += data.nbytes
        with explained("writing", self._path):
            _write(self._file, as_bytes(data), at)
        return at

    def read(self, at: int, length: int) -> bytes:
        """So many bytes from there."""
        with explained("reading", self._path):
            return _read(self._file, length, at)

    def close(self) -> None:
        """Forget everything."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1


def _nameless(directory: ChainDir, name: str) -> int:
    """A descriptor of a new file, which is gone when that is closed."""
    fd = directory.create(name)
    try:
        directory.remove(name)
    except BaseException:
        os.close(fd)
        directory.remove(name)  # left there, it would be in the next one's way
        raise
    return fd


def _write(fd: int, left: memoryview, at: int) -> None:
    while left.nbytes:
        point("pwrite of a spool")
        done = os.pwrite(fd, left, at)
        if not done:
            raise no_space()
        left, at = left[done:], at + done


def _read(fd: int, length: int, at: int) -> bytes:
    point("pread of a spool")
    piece = os.pread(fd, length, at)
    if len(piece) != length:
        raise OSError(errno.EIO, os.strerror(errno.EIO))
    return piece
