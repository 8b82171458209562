"""An image and those it builds on, opened when they are needed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np

from crtrace.image.chainindex import IndexEntry
from crtrace.image.imagefile import Image
from crtrace.units import U64

Levels = np.ndarray[tuple[int], np.dtype[np.int64]]


class Lineage:
    """Index entries of an image, its parent, and so on to a full one: ``lineage[level]``.

    Each image is checked against its entry, and against its parent's, when it is first used.
    """

    def __init__(self, entries: Sequence[IndexEntry], read: Callable[[IndexEntry], Image]) -> None:
        self.entries = tuple(entries)
        self._read = read
        self._linked: set[int] = set()
        self._epochs = np.array([entry.epoch for entry in reversed(entries)], dtype=np.uint64)
        self._generations = np.array([entry.generation for entry in entries], dtype=np.int64)

    def __len__(self) -> int:
        """Images."""
        return len(self.entries)

    def __iter__(self) -> Iterator[Image]:
        """All images, the newest first."""
        return (self[level] for level in range(len(self)))

    def __getitem__(self, level: int) -> Image:
        """An image. Raises ``ImageDamaged`` and ``ChainIncomplete``."""
        image = self._read(self.entries[level])
        if level not in self._linked and level + 1 < len(self):
            above = self.entries[level + 1]
            header = image.header
            if (header.parent_id, header.parent_hash) != (above.image_id, above.image_hash):
                # It may have been written again: it then knows the hash that it had.
                image.check_parent(self._read(above))
        self._linked.add(level)
        return image

    def part(self, first: int) -> Lineage:
        """The lineage of ``lineage[first]``."""
        return Lineage(self.entries[first:], self._read)

    def levels(self, epochs: U64) -> Levels:
        """The level of each epoch, -1 for those that are not here."""
        at = np.minimum(np.searchsorted(self._epochs, epochs), len(self._epochs) - 1)
        return np.where(self._epochs[at] == epochs, len(self._epochs) - 1 - at, -1)

    def seen_by(self, first: int, end: int) -> bool:
        """Whether the images ``[first, end)`` are those that were there when the first was made,
        none written again or dropped since."""
        return bool(self._generations[first:end].max() <= self._generations[first])
