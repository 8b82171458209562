"""Where memory goes in an output file, and putting it there."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import pairwise

import numpy as np

from crtrace.export.sparsefile import SparseFile
from crtrace.image.epoch import Epoch, TaskView
from crtrace.image.places import PageKind
from crtrace.image.tables import Vma
from crtrace.units import PAGE_SHIFT, PAGE_SIZE, U64, Bytes

Progress = Callable[[int, int], None]
"""Called with the bytes done and the bytes there are."""


class Placement:
    """Ranges of addresses ``(start, end, offset)``, ascending, and their offsets in the file."""

    def __init__(self, out: SparseFile, ranges: Iterable[tuple[int, int, int]]) -> None:
        self._out = out
        rows = np.array(list(ranges), dtype=np.uint64).reshape(-1, 3)
        self._starts, self._ends = rows[:, 0], rows[:, 1]
        self._shifts = rows[:, 2] - rows[:, 0]  # modulo 2^64

    def write(self, pages: U64, data: Bytes) -> None:
        """Write pages (ascending) with their contents, ``(n, 4096)``; those in no range are not
        wanted."""
        addresses = pages << np.uint64(PAGE_SHIFT)
        at = np.searchsorted(self._starts, addresses, side="right") - 1
        inside = at >= 0
        inside[inside] = addresses[inside] < self._ends[at[inside]]
        if not inside.all():
            addresses, data, at = addresses[inside], data[inside], at[inside]
        if len(addresses):
            offsets = addresses + self._shifts[at]
            breaks = np.flatnonzero(np.diff(offsets) != PAGE_SIZE) + 1
            edges = [0, *breaks.tolist(), len(offsets)]
            for first, end in pairwise(edges):
                self._out.write(data[first:end].data, int(offsets[first]))


def write_memory(
    place: Placement, epoch: Epoch, task: TaskView, total: int, progress: Progress | None
) -> None:
    """Write everything that is stored of a task's memory, ``total`` bytes, where it belongs.

    In the order in which it lies in the images; pages of zeros are not stored anywhere.
    """
    done = 0
    for pages, data in _stored(epoch, task):
        place.write(pages, data)
        done += data.nbytes
        if progress:
            progress(min(done, total), total)


def _stored(epoch: Epoch, task: TaskView) -> Iterator[tuple[U64, Bytes]]:
    """Pages of the address space with their contents."""
    if task.mm is None or not task.vmas:
        return
    first, end = task.vmas[0].start >> PAGE_SHIFT, task.vmas[-1].end >> PAGE_SHIFT
    yield from epoch.stored(task.mm.space, first, end)
    for vma in task.vmas:
        if vma.object_space:
            yield from _of_object(epoch, task.mm.space, vma)


def _of_object(epoch: Epoch, space: int, vma: Vma) -> Iterator[tuple[U64, Bytes]]:
    """What a mapping shows of its object: pages that the process has not made its own."""
    first = vma.pgoff >> PAGE_SHIFT
    shift = np.uint64(((vma.start >> PAGE_SHIFT) - first) % 2**64)
    for numbers, data in epoch.stored(vma.object_space, first, first + vma.pages):
        pages = numbers + shift
        shown = epoch.page_kinds(space, pages) == PageKind.HOLE
        yield (pages, data) if shown.all() else (pages[shown], data[shown])
