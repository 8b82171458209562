"""Writing a chain: one writer at a time, one epoch at a time."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator
from types import TracebackType
from typing import Self

from crtrace.errors import CrtraceError, ImageDamaged
from crtrace.image.chaindir import INDEX_NAME, ChainDir, is_image_name
from crtrace.image.chainindex import ChainIndex, EntryMayExist, IndexEntry, IndexFile, write_index
from crtrace.image.framing import Part
from crtrace.image.header import FULL, INCREMENTAL, NO_EPOCH, NO_ID, ImageHeader
from crtrace.image.imagewriter import ImageWriter
from crtrace.image.pagetable import PageTable
from crtrace.image.pending import Entries
from crtrace.image.places import PageKind, kinds
from crtrace.image.reader import Chain
from crtrace.image.summary import OwnRows, images_summed_up, summaries

__all__ = ["ChainWriter", "ImageWriter"]


class ChainWriter:
    """A chain open for writing, and locked against other writers until it is closed.

    ``known`` has, for every space of the newest epoch, what the chain holds of it; an epoch under
    way changes nothing in there before it is committed. ``entries`` are the committed epochs.
    """

    def __init__(self, directory: ChainDir) -> None:
        self._directory = directory
        self._writing: ImageWriter | None = None
        self._complete = False
        """After the epoch under way there are no more."""
        self._index: IndexFile | None = None
        self.known: dict[int, PageTable] = {}
        self._lock = directory.lock()
        try:
            index = ready_for_writing(directory)
            self.chain_id = index.chain_id
            self._generation = index.generation
            self.entries = list(index.entries)
            if self.entries:
                self.known = _known(directory)
            self._index = IndexFile(directory, index)
        except BaseException:
            os.close(self._lock)
            raise

    @classmethod
    def open(cls, path: str | os.PathLike[str], *, create: bool = False) -> Self:
        """Open the chain at ``path``; with ``create``, make the directory or fill an empty one.

        What a writer that was killed left unfinished is removed. Raises ``UsageError`` when the
        path cannot be a chain, ``CrtraceError`` when another process is writing it,
        ``ImageDamaged`` when the newest epoch cannot be built upon.
        """
        directory = ChainDir.make(path) if create else ChainDir.open(path)
        try:
            if not create:
                Chain.check(directory)
            return cls(directory)
        except BaseException:
            directory.close()
            raise

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
        """Abort an epoch under way and let other writers in; harmless when repeated."""
        if self._writing:
            self._writing.abort()
        if self._index:
            self._index.close()
            self._index = None
            os.close(self._lock)
            self._directory.close()

    def begin(
        self,
        *,
        full: bool = False,
        reason: str = "",
        wall_ns: int | None = None,
        boottime_ns: int | None = None,
        boot_id: bytes = NO_ID,
        kernel: str = "",
        hostname: str = "",
        tool_version: str = "",
        armer: str = "",
    ) -> ImageWriter:
        """Begin the next epoch. The first of a chain is full whatever is asked.

        Times default to now. A full epoch knows nothing of earlier ones: every page is stored.
        """
        if self._index is None or self._writing:
            state = "closed" if self._index is None else "already writing an epoch"
            raise CrtraceError(f"chain {self._directory.path} is {state}")
        parent = self.entries[-1] if self.entries and not full else None
        header = ImageHeader(
            chain_id=self.chain_id,
            image_id=os.urandom(16),
            parent_id=parent.image_id if parent else NO_ID,
            parent_hash=parent.image_hash if parent else NO_ID,
            parent_epoch=parent.epoch if parent else NO_EPOCH,
            epoch=self.entries[-1].epoch + 1 if self.entries else 0,
            kind=INCREMENTAL if parent else FULL,
            wall_ns=time.time_ns() if wall_ns is None else wall_ns,
            boottime_ns=_boottime() if boottime_ns is None else boottime_ns,
            boot_id=boot_id, reason=reason, kernel=kernel, hostname=hostname,
            tool_version=tool_version, armer=armer,
        )  # fmt: skip
        return self._begin(header, self.known if parent else {})

    def begin_as(self, header: ImageHeader) -> ImageWriter:
        """Begin the first and last epoch of a chain, with that header, of a full image."""
        if self.entries or not header.full:
            raise CrtraceError(f"chain {self._directory.path} has its first epoch already")
        self._complete = True
        return self._begin(header, {})

    def _begin(self, header: ImageHeader, parents: dict[int, PageTable]) -> ImageWriter:
        self._writing = ImageWriter(self._directory, header, parents, self, self._generation)
        return self._writing

    def enter(self, entry: IndexEntry) -> None:
        """For ``ImageWriter``: make the epoch exist."""
        if self._index is None:
            raise CrtraceError(f"chain {self._directory.path} is closed")
        try:
            self._index.append(entry)
        except EntryMayExist:
            self._writing = None
            self.close()  # opening again tells whether it does
            raise
        self.entries.append(entry)
        self._writing = None

    def learn(self, entry: IndexEntry, settled: Iterable[tuple[int, Iterable[Entries]]]) -> None:
        """For ``ImageWriter``: bring ``known`` up to the epoch; other spaces are gone."""
        if self._complete:
            self.close()
            return
        before = {} if entry.full else self.known
        self.known = {}
        try:
            for space, parts in settled:
                self.known[space] = table = before.get(space, PageTable())
                for part in parts:
                    _learn(table, part)
        except BaseException:
            # With half of it learnt, the next epoch would miss holes. Opening again reads it all.
            self.close()
            raise

    def summaries(self, header: ImageHeader, own: Iterable[OwnRows]) -> Iterator[list[Part]]:
        """For ``ImageWriter``: what the epoch under way repeats of earlier ones."""
        depth = 0 if header.full else self._depth + 1
        if images_summed_up(depth):
            # Nothing of it is kept: in a long session that would be much.
            with Chain.of(self._directory) as chain:
                before = chain.lineage(chain.entry(header.parent_epoch))
                yield from summaries(header, before, own)

    @property
    def _depth(self) -> int:
        """How many images the newest one builds on."""
        entries = reversed(self.entries)
        return next(at for at, entry in enumerate(entries) if entry.full)

    def abandoned(self) -> None:
        """For ``ImageWriter``: the epoch under way is none."""
        self._writing = None


def _learn(table: PageTable, entries: Entries) -> None:
    """Bring a table up to some entries of a committed epoch."""
    holes = kinds(entries.places) == PageKind.HOLE
    table.drop(entries.pages[holes])
    stored = entries.select(~holes)
    table.store(stored.pages, stored.hashes)


def _known(directory: ChainDir) -> dict[int, PageTable]:
    """What the newest epoch of an existing chain holds."""
    known = {}
    with Chain.of(directory) as chain:
        epoch = chain.epoch(-1)
        for space in epoch.spaces:
            table = known[space] = PageTable()
            for part in epoch.index_parts(space):
                table.store(part.pages, part.hashes)
    return known


def ready_for_writing(directory: ChainDir) -> ChainIndex:
    """The index of a locked chain, made if need be; what earlier writers left behind is removed.

    Raises ``ImageDamaged`` when the index is.
    """
    directory.remove_parts()
    if INDEX_NAME not in directory.names():
        write_index(directory, os.urandom(16), time.time_ns())
    index = ChainIndex.read(directory)
    _refuse_damage(index, directory)
    names = {entry.name for entry in index.entries}
    for name in directory.names():
        if is_image_name(name) and name not in names:
            directory.remove(name)
    return index


def _refuse_damage(index: ChainIndex, directory: ChainDir) -> None:
    """What no writer that was cut short has left: to go on would be to lose what is still there."""
    where, lost = directory.path / INDEX_NAME, index.lost(directory.names())
    if index.broken:
        fault = next(each for each in index.faults if not each.harmless)
        what = f"{where}, at offset {fault.offset:#x}: {fault.message}"
    elif lost:
        what = f"{where} has no entries for {', '.join(lost[:3])}{', …' if lost[3:] else ''}"
    else:
        return
    raise ImageDamaged(
        what, hint=f"crtrace verify {directory.path} tells what is lost; begin a new chain"
    )


def _boottime() -> int:
    return time.clock_gettime_ns(time.CLOCK_BOOTTIME)
