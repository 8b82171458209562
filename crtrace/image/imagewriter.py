"""The image of one epoch while it is being written."""

from __future__ import annotations

import threading
from array import array
from collections.abc import Iterable, Iterator, Mapping
from types import TracebackType
from typing import Any, Protocol, Self

import numpy as np

from crtrace.errors import CrtraceError
from crtrace.image.chaindir import ChainDir, image_name
from crtrace.image.chainindex import IS_FULL, EntryMayExist, IndexEntry
from crtrace.image.codec import ZERO_PAGE_HASH, as_bytes, compress, equal_hashes, hash_pages
from crtrace.image.contents import StoredContents
from crtrace.image.framing import CHUNK_HEAD, INDEX_HEAD, OPTIONAL, Part, Record, RecordType
from crtrace.image.header import ImageHeader, Stats
from crtrace.image.layers import OwnLayer
from crtrace.image.losses import Unreadable, UnreadableRange, UnreadableReason
from crtrace.image.pageindex import PageIndex
from crtrace.image.pagetable import KnownPages
from crtrace.image.pending import (
    LAST_ROUND,
    STEP,
    Entries,
    PendingSpace,
    take_unreadable,
    unreadable,
)
from crtrace.image.places import SAME, PageKind, place
from crtrace.image.recordfile import RecordFile
from crtrace.image.records import Mm
from crtrace.image.spool import PiecesFile, Spool
from crtrace.image.summary import PENDING, OwnRows, PendingLayer
from crtrace.image.tables import Files, Vmas
from crtrace.units import CHUNK_PAGES, PAGE_SIZE, U64, Bools, Bytes


class Owner(Protocol):
    """The chain that the image is for."""

    def enter(self, entry: IndexEntry) -> None:
        """Make the epoch exist; the image is on disk."""

    def learn(self, entry: IndexEntry, settled: Iterable[tuple[int, Iterable[Entries]]]) -> None:
        """Take over what the epoch, which now exists, says of the pages of each space."""

    def abandoned(self) -> None:
        """The epoch will not be."""

    def summaries(self, header: ImageHeader, own: Iterable[OwnRows]) -> Iterable[list[Part]]:
        """What the image, which has ``own`` rows, repeats of earlier ones: payloads of SUMMARY
        records."""


class ImageWriter:
    """Takes pages from any thread, records from one, and becomes an epoch at ``commit``.

    As a context manager it aborts when the block is left without a commit. Every method raises
    ``CrtraceError`` when the disk fails or is full; the only thing left to do then is ``abort``.
    """

    def __init__(
        self,
        directory: ChainDir,
        header: ImageHeader,
        parents: Mapping[int, KnownPages],
        owner: Owner,
        generation: int,
    ) -> None:
        self.header = header
        self._parents = parents
        self._owner = owner
        self._generation = generation
        self._spaces: dict[int, PendingSpace] = {}
        self._origins: dict[int, int] = {}
        self._lock = threading.Lock()
        self._contents = StoredContents()
        self._chunks = array("I")
        """The record of each chunk. Until all are written, places name chunks by their turn."""
        self._skipped = self._inherited = self._equal = self._raw = self._stored = 0
        self._open = True
        self._directory = directory
        self._spools: dict[int, Spool] = {}
        self._pieces: PiecesFile | None = None
        self._finished: dict[int, int] = {}
        """Space -> the record that is its page index."""
        self._totals = dict.fromkeys(PageKind, 0)
        self._losses: list[UnreadableRange] = []
        self._file = RecordFile(directory, image_name(header.epoch, generation))
        try:
            self.add(header)
        except BaseException:
            self._file.discard()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.abort()

    def add(self, record: Record, *, parent: int = 0) -> int:
        """Write a record; its id, for records that belong to it to name as their parent."""
        for space in _spaces_named(record):
            if space not in self._finished:
                self._space(space)
        return self._file.append(record.TYPE, [record.pack()], parent=parent)[0]

    def inherit(self, space: int, origin: int) -> None:
        """From now on, pages of ``space`` that the parent image has in ``origin`` refer to that.

        For a child and its parent process.
        """
        self._origins[space] = origin

    def drop(self, space: int) -> None:
        """Forget what was written of a space: it is not in this epoch after all."""
        with self._lock:
            self._spaces.pop(space, None)

    def write_pages(self, space: int, pages: U64, data: Bytes, *, round: int = 0) -> None:
        """Store the contents, ``(n, 4096)``, of the pages ``(n,)``, each once, any order.

        Pages that the parent has with the same contents are passed over. A page that comes again
        in a higher ``round`` (they count from 0) supersedes what came before, in whatever order
        the threads get to it. Contents that this image has already are not stored again.
        ``pages`` and ``data`` may be reused after the call.
        """
        if data.shape != (len(pages), PAGE_SIZE):
            raise ValueError(f"{len(pages)} pages, and contents of shape {data.shape}")
        self._must_be_open()
        if (pages[1:] <= pages[:-1]).any():
            order = np.argsort(pages)
            pages, data = pages[order], data[order]
            if (pages[1:] == pages[:-1]).any():
                raise ValueError("a page is given twice in one call")
        for at in range(0, len(pages), CHUNK_PAGES):
            part = slice(at, at + CHUNK_PAGES)
            self._write_chunk(space, pages[part].copy(), data[part], round)

    def _write_chunk(self, space: int, pages: U64, data: Bytes, round: int) -> None:
        pending = self._space(space)
        hashes = hash_pages(data)
        same = _same(self._parents.get(space), pages, hashes)
        zero = equal_hashes(hashes, ZERO_PAGE_HASH[None]) & ~same
        keep = ~(same | zero)
        if round:
            # It may have been stored in an earlier round, by a thread that is not there yet.
            pending.add(round, pages[same], np.full(int(same.sum()), place(SAME)))
        places = np.full(int(zero.sum()), place(PageKind.ZERO))
        pending.add(round, pages[zero], places, hashes[zero])
        inherited = self._inherit_pages(space, pending, round, pages, hashes, keep)
        if not keep.all():
            pages, data, hashes = pages[keep], data[keep], hashes[keep]
        new, size = self._store(space, pages, data, hashes, pending, round)
        with self._lock:
            self._skipped += int(same.sum())
            self._inherited += inherited
            self._equal += len(pages) - new
            self._raw += new * PAGE_SIZE
            self._stored += size

    def _inherit_pages(
        self, space: int, pending: PendingSpace, round: int, pages: U64, hashes: U64, keep: Bools
    ) -> int:
        """Enter those of ``keep`` that the parent image has in another space, and unmark them."""
        origin = self._origins.get(space)
        if origin is None:
            return 0
        there = keep & _same(self._parents.get(origin), pages, hashes)
        count = int(there.sum())
        places = np.full(count, place(PageKind.INHERITED, origin))
        pending.add(round, pages[there], places, hashes[there])
        keep &= ~there
        return count

    def _store(
        self, space: int, pages: U64, data: Bytes, hashes: U64, pending: PendingSpace, round: int
    ) -> tuple[int, int]:
        """Enter pages, and store contents that are new: how many, and the bytes they take."""
        if not len(pages):
            return 0, 0
        with self._lock:
            turn = len(self._chunks)
            self._chunks.append(0)
        places, new = self._contents.claim(hashes, turn)
        size = 0
        if new.any():
            numbers = pages
            if not new.all():
                numbers, data = pages[new], data[new]
            self._chunks[turn], size = self._write_block(space, numbers, data)
        pending.add(round, pages, places, hashes)
        return int(new.sum()), size

    def _write_block(self, space: int, pages: U64, data: Bytes) -> tuple[int, int]:
        codec, block = compress(np.ascontiguousarray(data))
        head = CHUNK_HEAD.pack(space, len(pages), codec, 0)
        return self._file.append(RecordType.CHUNK, [head, as_bytes(pages), block])

    def mark_zeros(self, space: int, pages: U64) -> None:
        """Say that the pages (ascending) are zeros."""
        hashes = np.tile(ZERO_PAGE_HASH, (len(pages), 1))
        places = np.full(len(pages), place(PageKind.ZERO))
        self._space(space).add(0, pages.copy(), places, hashes)

    def mark_holes(self, space: int, pages: U64, *, round: int = LAST_ROUND) -> None:
        """Say that the pages (ascending) have no contents of their own any more.

        By default this holds whatever was written in this epoch, in any round. Pages that the
        parent has nothing of need not be left out; they leave no trace.
        """
        self._mark(space, pages, place(PageKind.HOLE), round)

    def mark_unreadable(
        self,
        space: int,
        pages: U64,
        errno: int,
        *,
        reason: int = UnreadableReason.READ_FAILED,
        round: int = LAST_ROUND,
    ) -> None:
        """Say that the pages (ascending) are there and could not be read, and why."""
        self._mark(space, pages, unreadable(errno, reason), round)

    def _mark(self, space: int, pages: U64, where: np.uint64, round: int) -> None:
        self._space(space).add(round, pages.copy(), np.full(len(pages), where))

    def _space(self, space: int) -> PendingSpace:
        if space in self._finished:
            raise CrtraceError(f"{self._file.where(self._finished[space])} is written already")
        with self._lock:
            return self._spaces.setdefault(space, PendingSpace(self._overflow))

    def _overflow(self) -> PiecesFile:
        """Where pieces of large spaces go."""
        with self._lock:
            self._pieces = self._pieces or PiecesFile(self._directory)
            return self._pieces

    def settle(self, space: int) -> None:
        """What was said of ``space`` until now holds, and what follows is about later pages.

        So that a page index need not be in memory as a whole. No thread may be writing.
        """
        if space not in self._spools:
            self._spools[space] = Spool(self._directory, space)
        for entries in self._space(space).windows(self._parents.get(space)):
            self._number(entries)
            self._losses += take_unreadable(space, entries)
            self._spools[space].append(entries)

    def finish(self, space: int) -> None:
        """Nothing follows about ``space``: write its page index. No thread may be writing.

        So that many spaces take no more memory and files than one.
        """
        self.settle(space)
        self._spaces.pop(space)
        spool = self._spools.pop(space)
        try:
            self._finished[space] = self._file.append(RecordType.PAGE_INDEX, spool)[0]
        finally:
            spool.close()
        for kind, count in spool.counts.items():
            self._totals[kind] += count

    def _settled(self, space: int) -> Entries:
        entries = self._space(space).settle(self._parents.get(space))
        self._number(entries)
        return entries

    def _number(self, entries: Entries) -> None:
        entries.number_chunks(np.array(self._chunks, dtype=np.uint64))

    def commit(self, stats: dict[str, Any]) -> IndexEntry:
        """Finish the image; when this returns, the epoch exists and survives a power failure.

        The page counts that only the writer knows are put into ``stats`` under the names of
        DESIGN.md. When it raises, the epoch does not exist and the chain is as it was.
        """
        self._must_be_open()
        self._contents = StoredContents()  # it takes as much memory as what comes now
        try:
            for space, pending in sorted(self._spaces.items()):
                if space in self._spools or pending.large:
                    self.finish(space)
            settled = {space: self._settled(space) for space in sorted(self._spaces)}
            entry = self._publish(settled, stats)
            self._owner.enter(entry)
        except EntryMayExist:
            self._close()
            raise
        except BaseException:
            self.abort()
            raise
        try:
            self._owner.learn(entry, self._said(settled))
        finally:
            self._close()
        return entry

    def _said(self, settled: dict[int, Entries]) -> Iterator[tuple[int, Iterable[Entries]]]:
        """What the image says of each space, in parts."""
        for space, entries in settled.items():
            yield space, (entries.part(at, at + STEP) for at in range(0, len(entries.pages), STEP))
        for space, number in self._finished.items():
            yield space, _parts_of(PageIndex(self._file, number))

    def _close(self) -> None:
        self._open = False
        for spool in self._spools.values():
            spool.close()
        if self._pieces:
            self._pieces.close()
        self._file.close()

    def _must_be_open(self) -> None:
        if not self._open:
            raise CrtraceError(f"epoch {self.header.epoch} is already finished")

    def _publish(self, settled: dict[int, Entries], stats: dict[str, Any]) -> IndexEntry:
        for space, entries in settled.items():
            self._losses += take_unreadable(space, entries)
            self._write_index(space, entries)
        for payload in self._owner.summaries(self.header, self._own(settled)):
            self._file.append(RecordType.SUMMARY, payload, flags=OPTIONAL)
        if self._losses:
            self.add(Unreadable(tuple(sorted(self._losses, key=lambda row: row.space))))
        counts = self._counts()
        stats.update(counts)
        self.add(Stats(stats))
        image_hash, length = self._file.finish()
        self._file.publish()
        header = self.header
        return IndexEntry(
            epoch=header.epoch, image_id=header.image_id, parent_id=header.parent_id,
            parent_epoch=header.parent_epoch, flags=IS_FULL if header.full else 0,
            generation=self._generation,
            length=length, image_hash=image_hash, wall_ns=header.wall_ns,
            pages_written=counts["pages_written"], pages_hole=counts["pages_hole"],
            bytes_raw=counts["bytes_raw"], bytes_stored=counts["bytes_stored"],
        )  # fmt: skip

    def _write_index(self, space: int, entries: Entries) -> None:
        head = INDEX_HEAD.pack(space, 0, len(entries.pages))
        columns = (entries.pages, entries.places, entries.hashes)
        self._file.append(RecordType.PAGE_INDEX, [head, *map(as_bytes, columns)])
        for kind in PageKind:
            self._totals[kind] += entries.count(kind)

    def _own(self, settled: dict[int, Entries]) -> Iterator[OwnRows]:
        """All that the image says; from disk, if it is there."""
        for space in sorted(settled.keys() | self._finished.keys()):
            if space in settled:
                yield space, PendingLayer(settled[space])
            else:
                index = PageIndex(self._file, self._finished[space])
                yield space, OwnLayer(index, PENDING)

    def _counts(self) -> dict[str, int]:
        total = self._totals
        return {
            "pages_written": total[PageKind.STORED] + total[PageKind.ZERO],
            "pages_zero": total[PageKind.ZERO],
            "pages_hole": total[PageKind.HOLE],
            "pages_unreadable": total[PageKind.UNREADABLE],
            "pages_skipped_parent": self._skipped,
            "pages_inherited": self._inherited,
            "pages_equal": self._equal,
            "bytes_raw": self._raw,
            "bytes_stored": self._stored,
        }

    def abort(self) -> None:
        """Remove the unfinished image; the chain is as it was. Harmless after a commit."""
        if self._open:
            self._open = False
            self._spaces.clear()
            try:
                self._close()
                self._file.discard()
            finally:
                self._owner.abandoned()


def _parts_of(index: PageIndex) -> Iterator[Entries]:
    for at in range(0, len(index), STEP):
        rows = index.rows(at, min(at + STEP, len(index)))
        yield Entries(rows.pages, rows.places, rows.hashes)


def _same(known: KnownPages | None, pages: U64, hashes: U64) -> Bools:
    """Which pages a table has with just these hashes."""
    if known is None:
        return np.zeros(len(pages), dtype=np.bool_)
    there, before = known.lookup(pages)
    return there & equal_hashes(before, hashes)


def _spaces_named(record: Record) -> list[int]:
    """The spaces that exist because this record names them."""
    if isinstance(record, Mm):
        return [record.space]
    if isinstance(record, Vmas | Files):
        return sorted({row.object_space for row in record.rows} - {0})
    return []
