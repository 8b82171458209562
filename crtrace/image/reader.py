"""Reading a chain: its epochs, and for each the lineage of images that it needs."""

from __future__ import annotations

import os
from types import TracebackType
from typing import Self

from crtrace.errors import ChainIncomplete, ImageDamaged, UsageError
from crtrace.image.chaindir import INDEX_NAME, ChainDir
from crtrace.image.chainindex import ChainIndex, IndexEntry
from crtrace.image.epoch import Epoch
from crtrace.image.filepool import FilePool
from crtrace.image.imagefile import Image
from crtrace.image.lineage import Lineage
from crtrace.image.salvage import Salvage

__all__ = ["Chain", "Epoch", "Image"]


class Chain:
    """A chain open for reading, as its index was at that moment. It may be written meanwhile.

    ``entries`` are the committed epochs; ``faults`` what is wrong with the index: an epoch whose
    entry is damaged is in there and not in ``entries``.
    """

    def __init__(self, directory: ChainDir, *, owned: bool = True, salvage: bool = False) -> None:
        self._directory = directory
        self._owned = owned
        self._index = ChainIndex.read(directory)
        if self._index.header_fault and not salvage:
            raise ImageDamaged(
                f"{directory.path / INDEX_NAME}: {self._index.header_fault.message}",
                hint="crtrace verify and export --salvage read the epochs all the same",
            )
        self.path = directory.path
        self._files = FilePool(directory)
        self._images: dict[int, Image] = {}
        self._by_epoch = {entry.epoch: entry for entry in self.entries}

    @classmethod
    def open(cls, path: str | os.PathLike[str], *, salvage: bool = False) -> Self:
        """Raises ``UsageError`` when there is no chain, ``ImageDamaged`` or ``FormatTooNew``.

        With ``salvage``, a damaged header of the index is no reason.
        """
        directory = ChainDir.open(path)
        try:
            cls.check(directory)
            return cls(directory, salvage=salvage)
        except BaseException:
            directory.close()
            raise

    @classmethod
    def of(cls, directory: ChainDir) -> Self:
        """Read the chain in a directory that stays the caller's."""
        return cls(directory, owned=False)

    @staticmethod
    def check(directory: ChainDir) -> None:
        """Raise ``UsageError`` when the directory has no index."""
        if INDEX_NAME not in directory.names():
            raise UsageError(
                f"{directory.path} is no chain: it has no {INDEX_NAME}",
                hint="name the directory that was given to watch or dump with -o",
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close every file; harmless when repeated."""
        self._files.close()
        if self._owned:
            self._directory.close()

    @property
    def chain_id(self) -> bytes:
        """The 16 bytes that name the chain."""
        return self._index.chain_id

    @property
    def index(self) -> ChainIndex:
        """The index as it was read."""
        return self._index

    @property
    def entries(self) -> tuple[IndexEntry, ...]:
        """The committed epochs, ascending."""
        return self._index.entries

    def names(self) -> list[str]:
        """The names in the directory."""
        return self._directory.names()

    def entry(self, number: int) -> IndexEntry:
        """The entry of an epoch; negative numbers count from the end. Raises ``UsageError``."""
        if not self.entries:
            raise UsageError(f"chain {self.path} has no epoch yet")
        if number < 0 and -number <= len(self.entries):
            return self.entries[number]
        if number in self._by_epoch:
            return self._by_epoch[number]
        first, last = self.entries[0].epoch, self.entries[-1].epoch
        raise UsageError(
            f"chain {self.path} has no epoch {number}; it has {first} to {last}",
            hint=f"its index is damaged: crtrace verify {self.path}" if self._index.broken else "",
        )

    def image(self, entry: IndexEntry) -> Image:
        """The image of an entry alone, without its parents."""
        if entry.epoch not in self._images:
            self._images[entry.epoch] = Image(self._files, entry, self.chain_id)
        return self._images[entry.epoch]

    def parent(self, entry: IndexEntry) -> IndexEntry | None:
        """The entry that this one builds on; None when full. Raises ``ChainIncomplete``."""
        if entry.full:
            return None
        other = self._by_epoch.get(entry.parent_epoch)
        if other is None:
            raise ChainIncomplete(
                f"chain {self.path} lacks epoch {entry.parent_epoch}, which epoch {entry.epoch} "
                "needs"
            )
        if other.image_id != entry.parent_id:
            raise ImageDamaged(
                f"{self.path / INDEX_NAME}: epoch {entry.epoch} was made on top of another epoch "
                f"{other.epoch}"
            )
        return other

    def lineage(self, entry: IndexEntry, *, salvage: bool = False) -> Lineage:
        """The image of an entry, its parent's, and so on to a full one, opened when used.

        Raises ``ChainIncomplete`` when the index lacks one, ``ImageDamaged`` when one is not the
        one that was built upon; with ``salvage`` the lineage ends there.
        """
        entries = [entry]
        try:
            while parent := self.parent(entries[-1]):
                entries.append(parent)
        except (ChainIncomplete, ImageDamaged):
            if not salvage:
                raise
        return Lineage(entries, self.image)

    def epoch(self, number: int = -1, salvage: Salvage | None = None) -> Epoch:
        """An epoch with everything it needs; negative numbers count from the end.

        With ``salvage``, the damage that ``verify`` found, pages that cannot be known are marked so
        and everything else is read.
        """
        lineage = self.lineage(self.entry(number), salvage=salvage is not None)
        return Epoch(lineage, salvage)
