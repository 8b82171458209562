"""Cut page ranges into chunks, and have each read into a buffer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial

import numpy as np

from crtrace.capture.pipeline import Fill, Job, Pipeline
from crtrace.units import CHUNK_PAGES, PAGE_SIZE, U64, Bytes, count_pages, expand, to_ranges

Failures = list[tuple[int, int]]


@dataclass(slots=True)
class Copied:
    """What one copying did. ``unreadable`` pairs a page with the errno of its last attempt."""

    pages: int = 0
    unreadable: Failures = field(default_factory=list)


def chunks(ranges: U64) -> Iterator[U64]:
    """A range array cut into range arrays of ``CHUNK_PAGES`` each; the last may have fewer."""
    if 0 < count_pages(ranges) <= CHUNK_PAGES:
        yield ranges
        return
    ends = np.cumsum(ranges[:, 1] - ranges[:, 0])
    starts = ends - (ranges[:, 1] - ranges[:, 0])
    for at in range(0, int(ends[-1]) if len(ends) else 0, CHUNK_PAGES):
        to = min(at + CHUNK_PAGES, int(ends[-1]))
        first = int(np.searchsorted(ends, np.uint64(at), side="right"))
        last = int(np.searchsorted(starts, np.uint64(to), side="left"))
        part = ranges[first:last].copy()
        part[0, 0] += np.uint64(at) - starts[first]
        part[-1, 1] -= ends[last - 1] - np.uint64(to)
        yield part


def copy_pages(
    read: Callable[[U64, Bytes], Failures],
    ranges: U64,
    space: int,
    round: int,
    pipeline: Pipeline,
    progress: Callable[[int], None] = lambda pages: None,
) -> Copied:
    """Have ``read`` fill buffers with the pages of ``ranges``, and ``pipeline`` write them.

    ``read(part, buffer)`` returns (position of the page in ``buffer``, errno) of what it could not
    read; several threads may call it at the same time. Raises what it raises, or what a worker met.
    """
    if not len(ranges):
        return Copied()
    unreadable: Failures = []

    def fill(part: U64, buffer: Bytes) -> Job:
        if failures := read(part, buffer):
            pages = expand(part)
            unreadable.extend((int(pages[at]), errno) for at, errno in failures)
            part = to_ranges(_without(pages, buffer, failures))
        return Job(space, part, buffer, round)

    def fills() -> Iterator[Fill]:
        for part in chunks(ranges):
            yield partial(fill, part)
            progress(count_pages(part))

    pipeline.copy(fills())
    return Copied(count_pages(ranges) - len(unreadable), unreadable)


def _without(pages: U64, buffer: Bytes, failures: Failures) -> U64:
    """Close the gaps that unreadable pages left in the buffer; the pages that remain."""
    keep = np.ones(len(pages), dtype=np.bool_)
    keep[[at for at, _ in failures]] = False
    rows = buffer[: len(pages) * PAGE_SIZE].reshape(-1, PAGE_SIZE)
    rows[: int(keep.sum())] = rows[keep]
    return pages[keep]
