"""Cut page ranges into chunks, read each into a buffer, hand it on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np

from crtrace.capture.pipeline import Job, Pipeline
from crtrace.units import CHUNK_PAGES, PAGE_SIZE, U64, Bytes, expand

Failures = list[tuple[int, int]]


@dataclass(slots=True)
class Copied:
    """What one copying did. ``unreadable`` pairs a page with the errno of its last attempt."""

    pages: int = 0
    unreadable: Failures = field(default_factory=list)


def chunks(ranges: U64) -> Iterator[U64]:
    """A range array cut into range arrays of ``CHUNK_PAGES`` each; the last may have fewer."""
    ends = np.cumsum(ranges[:, 1] - ranges[:, 0])
    starts = ends - (ranges[:, 1] - ranges[:, 0])
    for at in range(0, int(ends[-1]) if len(ends) else 0, CHUNK_PAGES):
        to = min(at + CHUNK_PAGES, int(ends[-1]))
        first = int(np.searchsorted(ends, at, side="right"))
        last = int(np.searchsorted(starts, to, side="left"))
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
    """Have ``read`` fill buffers with the pages of ``ranges``, and submit them as ``round``.

    ``read(part, buffer)`` returns (position of the page in ``buffer``, errno) of what it could not
    read. Raises what it raises, or what a worker met.
    """
    copied = Copied()
    for part in chunks(ranges):
        buffer = pipeline.buffer()
        try:
            failures = read(part, buffer)
        except BaseException:
            pipeline.give_back(buffer)
            raise
        pages = expand(part)
        good = _without(pages, buffer, failures) if failures else pages
        copied.unreadable += [(int(pages[at]), errno) for at, errno in failures]
        copied.pages += len(good)
        pipeline.submit(Job(space, good, buffer, round))
        progress(len(pages))
    return copied


def _without(pages: U64, buffer: Bytes, failures: Failures) -> U64:
    """Close the gaps that unreadable pages left in the buffer; the pages that remain."""
    keep = np.ones(len(pages), dtype=np.bool_)
    keep[[at for at, _ in failures]] = False
    rows = buffer[: len(pages) * PAGE_SIZE].reshape(-1, PAGE_SIZE)
    rows[: int(keep.sum())] = rows[keep]
    return pages[keep]
