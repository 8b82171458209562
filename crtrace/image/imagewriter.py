"""The image of one epoch while it is being written."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Protocol, Self

import numpy as np

from crtrace.errors import CrtraceError
from crtrace.image.chaindir import ChainDir, image_name
from crtrace.image.chainindex import IS_FULL, IndexEntry
from crtrace.image.codec import ZERO_PAGE_HASH, compress, hash_pages
from crtrace.image.framing import CHUNK_HEAD, INDEX_HEAD, Record, RecordType
from crtrace.image.header import ImageHeader, Stats
from crtrace.image.losses import Unreadable, UnreadableRange, UnreadableReason
from crtrace.image.pagetable import PageTable
from crtrace.image.pending import (
    LAST_ROUND,
    Entries,
    PendingSpace,
    take_unreadable,
    unreadable,
)
from crtrace.image.places import SAME, PageKind, place, stored
from crtrace.image.recordfile import RecordFile
from crtrace.image.records import Mm
from crtrace.image.tables import Files, Vmas
from crtrace.units import CHUNK_PAGES, PAGE_SIZE, U64, Bools, Bytes


class Owner(Protocol):
    """The chain that the image is for."""

    def enter(self, entry: IndexEntry) -> None:
        """Make the epoch exist; the image is on disk."""

    def learn(self, entry: IndexEntry, settled: dict[int, Entries]) -> None:
        """Take over what the epoch, which now exists, says of the pages."""

    def abandoned(self) -> None:
        """The epoch will not be."""


@dataclass(frozen=True, slots=True)
class Origin:
    """What a space may refer to: another one in the parent image, and what this image has of it."""

    space: int
    parent: PageTable | None
    here: Entries

    def places(self, pages: U64, hashes: U64) -> tuple[U64, Bools]:
        """The place of each page that is the same there, ``(n,)``, and which those are."""
        places = np.full(len(pages), place(PageKind.INHERITED, self.space))
        found = _same(self.parent, pages, hashes)
        if len(self.here.pages):
            at = np.minimum(np.searchsorted(self.here.pages, pages), len(self.here.pages) - 1)
            same = (self.here.pages[at] == pages) & (self.here.hashes[at] == hashes).all(axis=1)
            places[same] = self.here.places[at[same]]
            found |= same
        return places, found


class ImageWriter:
    """Takes pages from any thread, records from one, and becomes an epoch at ``commit``.

    As a context manager it aborts when the block is left without a commit. Every method raises
    ``CrtraceError`` when the disk fails or is full; the only thing left to do then is ``abort``.
    """

    def __init__(
        self,
        directory: ChainDir,
        header: ImageHeader,
        parents: dict[int, PageTable],
        owner: Owner,
    ) -> None:
        self.header = header
        self._parents = parents
        self._owner = owner
        self._spaces: dict[int, PendingSpace] = {}
        self._origins: dict[int, Origin] = {}
        self._lock = threading.Lock()
        self._skipped = self._inherited = self._raw = self._stored = 0
        self.repeats = False
        """Whether many pages come again with the same contents. To find them takes memory."""
        self._open = True
        self._file = RecordFile(directory, image_name(header.epoch))
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
            self._space(space)
        return self._file.append(record.TYPE, [record.pack()], parent=parent)[0]

    def inherit(self, space: int, origin: int) -> None:
        """From now on, pages of ``space`` that equal those of ``origin`` refer to them.

        For a child and its parent: the same page as the parent image has it, or as it was written
        into this image until now; so write those of ``origin`` first.
        """
        written = self._spaces.get(origin, PendingSpace()).so_far()
        self._origins[space] = Origin(origin, self._parents.get(origin), written)

    def drop(self, space: int) -> None:
        """Forget what was written of a space: it is not in this epoch after all."""
        with self._lock:
            self._spaces.pop(space, None)

    def write_pages(self, space: int, pages: U64, data: Bytes, *, round: int = 0) -> None:
        """Store the contents, ``(n, 4096)``, of the pages ``(n,)``, each once, any order.

        Pages that the parent has with the same contents are passed over. A page that comes again
        in a higher ``round`` (they count from 0) supersedes what came before, in whatever order
        the threads get to it; with ``repeats``, and the same contents, it is not stored again.
        ``pages`` and ``data`` may be reused after the call.
        """
        if data.shape != (len(pages), PAGE_SIZE):
            raise ValueError(f"{len(pages)} pages, and contents of shape {data.shape}")
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
        zero = (hashes == ZERO_PAGE_HASH).all(axis=1) & ~same
        keep = ~(same | zero)
        if round:
            # It may have been stored in an earlier round, by a thread that is not there yet.
            places = np.full(int(same.sum()), place(SAME))
            pending.add(round, pages[same], places)
            if self.repeats:
                again, places = pending.stored_before(round, pages, hashes)
                again &= keep
                pending.add(round, pages[again], places[again], hashes[again])
                keep &= ~again
        places = np.full(int(zero.sum()), place(PageKind.ZERO))
        pending.add(round, pages[zero], places, hashes[zero])
        inherited = 0
        if origin := self._origins.get(space):
            places, there = origin.places(pages, hashes)
            there &= keep
            pending.add(round, pages[there], places[there], hashes[there])
            keep &= ~there
            inherited = int(there.sum())
        whole = bool(keep.all())
        if not whole:
            pages, data, hashes = pages[keep], data[keep], hashes[keep]
        size = 0
        if len(pages):
            chunk, size = self._store(space, pages, data)
            pending.add(round, pages, stored(chunk, len(pages)), hashes)
        with self._lock:
            self._skipped += int(same.sum())
            self._inherited += inherited
            self._raw += len(pages) * PAGE_SIZE
            self._stored += size

    def _store(self, space: int, pages: U64, data: Bytes) -> tuple[int, int]:
        codec, block = compress(np.ascontiguousarray(data))
        head = CHUNK_HEAD.pack(space, len(pages), codec, 0)
        return self._file.append(RecordType.CHUNK, [head, _bytes(pages), block])

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
        with self._lock:
            return self._spaces.setdefault(space, PendingSpace())

    def commit(self, stats: dict[str, Any]) -> IndexEntry:
        """Finish the image; when this returns, the epoch exists and survives a power failure.

        The page counts that only the writer knows are put into ``stats`` under the names of
        DESIGN.md. When it raises, the epoch does not exist and the chain is as it was.
        """
        if not self._open:
            raise CrtraceError(f"epoch {self.header.epoch} is already finished")
        try:
            settled = {
                space: pending.settle(self._parents.get(space))
                for space, pending in sorted(self._spaces.items())
            }
            entry = self._publish(settled, stats)
            self._owner.enter(entry)
        except BaseException:
            self.abort()
            raise
        self._open = False
        self._file.close()
        self._owner.learn(entry, settled)
        return entry

    def _publish(self, settled: dict[int, Entries], stats: dict[str, Any]) -> IndexEntry:
        losses: list[UnreadableRange] = []
        for space, entries in settled.items():
            losses += take_unreadable(space, entries)
            self._write_index(space, entries)
        if losses:
            self.add(Unreadable(tuple(losses)))
        counts = self._counts(settled)
        stats.update(counts)
        self.add(Stats(stats))
        image_hash, length = self._file.finish()
        self._file.publish()
        header = self.header
        return IndexEntry(
            epoch=header.epoch, image_id=header.image_id, parent_id=header.parent_id,
            parent_epoch=header.parent_epoch, flags=IS_FULL if header.full else 0,
            length=length, image_hash=image_hash, wall_ns=header.wall_ns,
            pages_written=counts["pages_written"], pages_hole=counts["pages_hole"],
            bytes_raw=counts["bytes_raw"], bytes_stored=counts["bytes_stored"],
        )  # fmt: skip

    def _write_index(self, space: int, entries: Entries) -> None:
        head = INDEX_HEAD.pack(space, 0, len(entries.pages))
        columns = (entries.pages, entries.places, entries.hashes)
        self._file.append(RecordType.PAGE_INDEX, [head, *map(_bytes, columns)])

    def _counts(self, settled: dict[int, Entries]) -> dict[str, int]:
        total = {
            kind: sum(entries.count(kind) for entries in settled.values()) for kind in PageKind
        }
        return {
            "pages_written": total[PageKind.STORED] + total[PageKind.ZERO],
            "pages_zero": total[PageKind.ZERO],
            "pages_hole": total[PageKind.HOLE],
            "pages_unreadable": total[PageKind.UNREADABLE],
            "pages_skipped_parent": self._skipped,
            "pages_inherited": self._inherited,
            "bytes_raw": self._raw,
            "bytes_stored": self._stored,
        }

    def abort(self) -> None:
        """Remove the unfinished image; the chain is as it was. Harmless after a commit."""
        if self._open:
            self._open = False
            self._spaces.clear()
            try:
                self._file.discard()
            finally:
                self._owner.abandoned()


def _same(known: PageTable | None, pages: U64, hashes: U64) -> Bools:
    """Which pages a table has with just these hashes."""
    if known is None:
        return np.zeros(len(pages), dtype=np.bool_)
    there, before = known.lookup(pages)
    same: Bools = there & (before == hashes).all(axis=1)
    return same


def _spaces_named(record: Record) -> list[int]:
    """The spaces that exist because this record names them."""
    if isinstance(record, Mm):
        return [record.space]
    if isinstance(record, Vmas | Files):
        return sorted({row.object_space for row in record.rows} - {0})
    return []


def _bytes(column: U64) -> memoryview:
    """The bytes of a column; an empty one cannot be cast."""
    return np.ascontiguousarray(column).reshape(-1).view(np.uint8).data
