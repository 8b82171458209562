"""An epoch written again, full or on top of another than before: the same in every page."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait

import numpy as np

from crtrace.image.epoch import Epoch
from crtrace.image.framing import RecordType
from crtrace.image.imagefile import RECORDS
from crtrace.image.imagewriter import ImageWriter
from crtrace.image.layers import LayerRows
from crtrace.image.merged import together
from crtrace.image.places import PageKind, kinds
from crtrace.units import CHUNK_PAGES, U64, Bytes

Progress = Callable[[int], None]
"""Called with the number of pages copied since the last call."""

WORKERS = min(4, os.cpu_count() or 1)
"""Threads that compress; each takes some MiB, and reading is one thread."""

COPIED = RECORDS.keys() - {RecordType.IMAGE, RecordType.UNREADABLE, RecordType.STATS}


def copy_records(epoch: Epoch, image: ImageWriter) -> None:
    """Everything but pages and statistics, as it is."""
    epoch.image.check_parents()
    numbers = {0: 0}
    for row in epoch.image.directory:
        if row["type"] in COPIED:
            number = int(row["id"])
            record = epoch.image.record(number)
            numbers[number] = image.add(record, parent=numbers[int(row["parent"])])


def copy_pages(epoch: Epoch, image: ImageWriter, above: int, progress: Progress) -> None:
    """What the newest images of the lineage say, before ``lineage[above]``, on which ``image`` is
    built; all of them for a full image.
    """
    with _Writers(image) as writers:
        for space in epoch.spaces:
            for rows in together(_rows(epoch, space, above)):
                _copy_marks(epoch, image, space, rows)
                for pages, data in _arrays(epoch.contents_of(space, rows)):
                    writers.write(space, pages, data)
                writers.finish()
                image.settle(space)
                progress(len(rows.pages))
            image.finish(space)


def _rows(epoch: Epoch, space: int, above: int) -> Iterator[LayerRows]:
    """The entries of a space, in the order of the pages; with holes in an incremental image."""
    if above >= len(epoch.lineage):
        return epoch.index_parts(space)
    return epoch.changes(space, above)


def _copy_marks(epoch: Epoch, image: ImageWriter, space: int, rows: LayerRows) -> None:
    kind = kinds(rows.places)
    image.mark_zeros(space, rows.pages[kind == PageKind.ZERO])
    image.mark_holes(space, rows.pages[kind == PageKind.HOLE])
    for loss in epoch.losses_in(space, rows):
        pages = np.arange(loss.first, loss.first + loss.count, dtype=np.uint64)
        image.mark_unreadable(space, pages, loss.errno, reason=loss.reason)


def _arrays(parts: Iterable[tuple[U64, Bytes]]) -> Iterator[tuple[U64, Bytes]]:
    """The same pages in arrays of ``CHUNK_PAGES``: chunks with few pages compress less well."""
    pages, data = np.empty(CHUNK_PAGES, np.uint64), np.empty((CHUNK_PAGES, 4096), np.uint8)
    held = 0
    for numbers, contents in parts:
        done = 0
        while done < len(numbers):
            take = min(CHUNK_PAGES - held, len(numbers) - done)
            pages[held : held + take] = numbers[done : done + take]
            data[held : held + take] = contents[done : done + take]
            held, done = held + take, done + take
            if held == CHUNK_PAGES:
                yield pages, data
                pages, data, held = np.empty_like(pages), np.empty_like(data), 0
    if held:
        yield pages[:held], data[:held]


class _Writers:
    """Threads that compress and write, with little waiting for them."""

    def __init__(self, image: ImageWriter) -> None:
        self._image = image
        self._pool = ThreadPoolExecutor(WORKERS)
        self._todo: set[Future[None]] = set()

    def __enter__(self) -> _Writers:
        return self

    def write(self, space: int, pages: U64, data: Bytes) -> None:
        """Raises what an earlier call failed with."""
        if len(self._todo) > WORKERS:
            done, self._todo = wait(self._todo, return_when=FIRST_COMPLETED)
            for each in done:
                each.result()
        self._todo.add(self._pool.submit(self._image.write_pages, space, pages, data))

    def finish(self) -> None:
        """Wait until all is written. Raises what failed."""
        for each in self._todo:
            each.result()
        self._todo.clear()

    def __exit__(self, *error: object) -> None:
        self._pool.shutdown()
        if error[0] is None:
            self.finish()
