"""The page index of a space while it is too long for memory: columns in files without a name."""

from __future__ import annotations

import os
from collections.abc import Iterator

import numpy as np

from crtrace.image.chaindir import PART, ChainDir, explained
from crtrace.image.codec import as_bytes
from crtrace.image.framing import INDEX_HEAD
from crtrace.image.pending import Entries
from crtrace.image.places import PageKind, kinds

PIECE = 1 << 20
"""Bytes read back at a time."""


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
                name = f"spool-{column}{PART}"
                self._files.append(directory.create(name))
                directory.remove(name)
        except BaseException:
            self.close()
            raise

    def append(self, entries: Entries) -> None:
        """Add entries, whose pages follow those that are there."""
        columns = entries.pages, entries.places, entries.hashes
        with explained("writing", self._path):
            for fd, column in zip(self._files, columns, strict=True):
                left = as_bytes(column)
                while left.nbytes:
                    left = left[os.write(fd, left) :]
        found, counts = np.unique(kinds(entries.places), return_counts=True)
        for kind, count in zip(found.tolist(), counts.tolist(), strict=True):
            self.counts[PageKind(kind)] += count

    @property
    def nbytes(self) -> int:
        """The length of the payload."""
        return INDEX_HEAD.size + 32 * sum(self.counts.values())

    def __iter__(self) -> Iterator[bytes]:
        """The payload in pieces."""
        yield INDEX_HEAD.pack(self._space, 0, sum(self.counts.values()))
        for fd in self._files:
            at = 0
            while piece := os.pread(fd, PIECE, at):
                yield piece
                at += len(piece)

    def close(self) -> None:
        """Forget everything."""
        while self._files:
            os.close(self._files.pop())
