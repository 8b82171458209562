"""Drop epochs of a chain; the others stay what they were.

An epoch that is kept and builds on dropped ones is written again, with all that they held, full or
on top of the next older one kept. New files stand beside the old ones until they have been read
back and compared; then a new ``chain.idx`` takes the place of the old in one step, and only then
are old files removed. Whatever happens, the chain is the old one or the new one.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from crtrace.errors import CrtraceError, UsageError
from crtrace.image.chaindir import ChainDir
from crtrace.image.chainindex import ChainIndex, IndexEntry, write_index
from crtrace.image.epoch import Epoch
from crtrace.image.filepool import FilePool
from crtrace.image.framing import Part
from crtrace.image.header import FULL, INCREMENTAL, NO_EPOCH, NO_ID, ImageHeader
from crtrace.image.imagefile import Image
from crtrace.image.imagewriter import ImageWriter
from crtrace.image.lineage import Lineage
from crtrace.image.pending import Entries
from crtrace.image.reader import Chain
from crtrace.image.store import ready_for_writing
from crtrace.image.summary import OwnRows, summaries
from crtrace.rewrite.check import check_copy, pages_of
from crtrace.rewrite.copy import copy_pages, copy_records
from crtrace.rewrite.progress import Meter, Progress
from crtrace.units import U64, Bools


@dataclass(frozen=True, slots=True)
class Pruned:
    """What was done: epochs, and the bytes of all images before and after."""

    kept: tuple[int, ...]
    dropped: tuple[int, ...]
    rewritten: tuple[int, ...]
    bytes_before: int
    bytes_after: int


def prune(
    path: str | os.PathLike[str], *, keep: int, every: int = 0, progress: Progress | None = None
) -> Pruned:
    """Keep the newest ``keep`` epochs, and of the older ones those whose number ``every`` divides.

    Raises ``CrtraceError`` when the chain is being written, ``ImageDamaged`` when what is kept
    cannot be read; the chain is then as it was.
    """
    if keep < 1:
        raise UsageError("at least one epoch must be kept")
    with ExitStack() as stack:
        directory = ChainDir.open(path)
        stack.callback(directory.close)
        Chain.check(directory)
        stack.callback(os.close, directory.lock())
        ready_for_writing(directory)
        with Chain.of(directory) as chain:
            entries = chain.entries
            old = entries[: max(len(entries) - keep, 0)]
            dropped = [entry for entry in old if not every or entry.epoch % every]
            work = _Pruning(directory, chain, dropped)
            return work.run(progress)


class _Step(NamedTuple):
    """An epoch to be written again: on top of ``parent`` (its old entry), which is
    ``lineage[above]``; None: full. ``pages``: about how many are written, at most."""

    entry: IndexEntry
    parent: IndexEntry | None
    above: int
    pages: int


class _Pruning:
    """Stands in for the chain for the images that are written again."""

    def __init__(self, directory: ChainDir, chain: Chain, dropped: Sequence[IndexEntry]) -> None:
        self._directory, self._chain = directory, chain
        self._dropped = {entry.epoch for entry in dropped}
        self._new = {
            entry.epoch: entry for entry in chain.entries if entry.epoch not in self._dropped
        }
        self._generation = chain.index.generation + 1
        self._files = FilePool(directory)
        self._written: list[str] = []

    def run(self, progress: Progress | None) -> Pruned:
        before = self._chain.entries
        steps = [step for entry in before if (step := self._step(entry))]
        compared = (pages_of(self._chain.lineage(step.entry)) for step in steps)
        meter = Meter(sum(2 * step.pages for step in steps) + sum(compared), progress)
        try:
            for step in steps:
                self._write(step, meter)
            for step in steps:
                self._compare(step, meter)
            after = list(self._new.values())
            if self._dropped:
                index = self._chain.index
                write_index(self._directory, index.chain_id, index.created_ns, after)
        except BaseException:
            self._take_back()
            raise
        finally:
            self._files.close()
        names = {entry.name for entry in after}
        for entry in before:
            if entry.name not in names:
                self._directory.remove(entry.name)
        return Pruned(
            tuple(self._new), tuple(sorted(self._dropped)),
            tuple(step.entry.epoch for step in steps),
            sum(entry.length for entry in before), sum(entry.length for entry in after),
        )  # fmt: skip

    def _step(self, entry: IndexEntry) -> _Step | None:
        """What is to be done for an epoch; nothing for one that is dropped or stays as it is."""
        parent = self._chain.parent(entry)
        if entry.epoch in self._dropped or parent is None or parent.epoch not in self._dropped:
            return None
        above, pages = 1, entry.pages_written + entry.pages_hole
        while parent and parent.epoch in self._dropped:
            pages += parent.pages_written + parent.pages_hole
            parent = self._chain.parent(parent)
            above += 1
        return _Step(entry, parent, above, pages)

    def _write(self, step: _Step, meter: Meter) -> None:
        epoch = self._chain.epoch(step.entry.epoch)
        parent = self._new[step.parent.epoch] if step.parent else None
        header = replace(
            epoch.header,
            parent_id=parent.image_id if parent else NO_ID,
            parent_hash=parent.image_hash if parent else NO_ID,
            parent_epoch=parent.epoch if parent else NO_EPOCH,
            kind=INCREMENTAL if parent else FULL,
            replaced_hash=self._hash_asked_for(step.entry),
        )
        known = {space: _Anything() for space in epoch.spaces} if parent else {}
        with (
            meter.step(step.pages) as done,
            ImageWriter(self._directory, header, known, self, self._generation) as image,
        ):
            copy_records(epoch, image)
            copy_pages(epoch, image, step.above, done.add)
            image.commit(dict(epoch.stats))

    def _hash_asked_for(self, entry: IndexEntry) -> bytes:
        """The hash that the image after this one, if it stays as it is, knows its parent by."""
        for other in self._new.values():
            if other.parent_id == entry.image_id and not other.full:
                return self._chain.image(other).header.parent_hash
        return entry.image_hash

    def _compare(self, step: _Step, meter: Meter) -> None:
        """Read back what was written, and see that it says the same as before."""
        entry = step.entry
        copy = Epoch(self._lineage(self._new[entry.epoch]))
        check_copy(copy, self._chain.epoch(entry.epoch), step.pages, meter)
        for other in self._new.values():
            if other.parent_id == entry.image_id and not other.full:
                self._read(other).check_parent(self._read(self._new[entry.epoch]))

    def _lineage(self, entry: IndexEntry) -> Lineage:
        entries = [entry]
        while not entries[-1].full:
            entries.append(self._new[entries[-1].parent_epoch])
        return Lineage(entries, self._read)

    def _read(self, entry: IndexEntry) -> Image:
        return Image(self._files, entry, self._chain.chain_id)

    def _take_back(self) -> None:
        """Remove what was written; but not when ``chain.idx``, as it is now, names it.

        What cannot be removed means nothing, and the next writer removes it.
        """
        with suppress(CrtraceError):
            named = {entry.name for entry in ChainIndex.read(self._directory).entries}
            for name in self._written if named.isdisjoint(self._written) else ():
                with suppress(CrtraceError):
                    self._directory.remove(name)

    def enter(self, entry: IndexEntry) -> None:
        """For ``ImageWriter``: the image is on disk."""
        self._new[entry.epoch] = entry
        self._written.append(entry.name)

    def learn(self, entry: IndexEntry, settled: Iterable[tuple[int, Iterable[Entries]]]) -> None:
        """For ``ImageWriter``."""

    def abandoned(self) -> None:
        """For ``ImageWriter``."""

    def summaries(self, header: ImageHeader, own: Iterable[OwnRows]) -> Iterable[list[Part]]:
        """For ``ImageWriter``: what the image repeats of earlier ones."""
        if header.parent_epoch in self._new:
            before = self._lineage(self._new[header.parent_epoch])
            yield from summaries(header, before, own)


class _Anything:
    """A parent that may have any page, so that no hole and no page is left out."""

    def lookup(self, pages: U64) -> tuple[Bools, U64]:
        """All are there, and none has contents that any page has."""
        return np.ones(len(pages), dtype=np.bool_), np.zeros((len(pages), 2), dtype=np.uint64)
