"""The units every layer speaks: pages, regions, half-open ranges and process numbers.

A *range array* is an ``(n, 2)`` ``uint64`` array of half-open ``[start, end)`` page numbers,
sorted, disjoint and non-empty. It is how sets of pages travel through the code: the sets are
large, their ranges few.
"""

from __future__ import annotations

from typing import NewType, TypeVar

import numpy as np
import numpy.typing as npt

Pid = NewType("Pid", int)
"""A process or thread number as seen from crtrace's own PID namespace."""

Addr = NewType("Addr", int)
"""An address in a target, in bytes."""

PAGE_SHIFT = 12
PAGE_SIZE = 1 << PAGE_SHIFT
REGION_PAGES = 512
"""Pages in a region, the aligned 2 MiB that one bitmap of the BPF map covers."""
CHUNK_PAGES = 512
"""Most pages that one chunk of an image holds: a page array of the original patch."""
CHUNK_BYTES = CHUNK_PAGES * PAGE_SIZE

U64 = npt.NDArray[np.uint64]
Bytes = npt.NDArray[np.uint8]
Bools = npt.NDArray[np.bool_]
Number = TypeVar("Number", np.uint64, np.int64)

FEW = 32
"""Ranges for which a loop takes less time than numpy's calls, each of which takes as long for one
as for a hundred. A pause makes a dozen unions and the like, of a few ranges each."""


def no_pages() -> U64:
    """An empty range array."""
    return np.empty((0, 2), dtype=np.uint64)


def count_pages(ranges: U64) -> int:
    """Pages in a range array."""
    return int((ranges[:, 1] - ranges[:, 0]).sum())


def expand(ranges: U64) -> U64:
    """Every page number of a range array, ascending."""
    if not len(ranges):
        return np.empty(0, dtype=np.uint64)
    lengths = (ranges[:, 1] - ranges[:, 0]).astype(np.int64)
    firsts = np.cumsum(lengths) - lengths
    base: U64 = np.repeat(ranges[:, 0] - firsts.astype(np.uint64), lengths)
    base += np.arange(len(base), dtype=np.uint64)
    return base


def distinct(values: npt.NDArray[Number]) -> npt.NDArray[Number]:
    """The different ones, ascending; ``np.unique`` is far slower on what is nearly sorted."""
    ordered = np.sort(values)
    new = np.ones(len(ordered), dtype=np.bool_)
    np.not_equal(ordered[1:], ordered[:-1], out=new[1:])
    return ordered[new]


def to_ranges(pages: U64) -> U64:
    """The range array of sorted page numbers without repeats."""
    if not len(pages):
        return no_pages()
    breaks = np.flatnonzero(np.diff(pages) != 1)
    starts = pages[np.concatenate(([0], breaks + 1))]
    ends = pages[np.concatenate((breaks, [len(pages) - 1]))] + np.uint64(1)
    return pairs(starts, ends)


def merge(*arrays: U64) -> U64:
    """The union of ranges that may overlap and come in any order. It may be one of ``arrays``."""
    some = [array for array in arrays if len(array)]
    if not some:
        return no_pages()
    every = some[0] if len(some) == 1 else np.concatenate(some)
    if len(every) <= FEW:
        return _few(_union(sorted(every.tolist())))
    if (every[1:, 0] > every[:-1, 1]).all():
        return every
    every = every[every[:, 0].argsort(kind="stable")]
    reach = np.maximum.accumulate(every[:, 1])
    first = np.ones(len(every), dtype=np.bool_)
    np.greater(every[1:, 0], reach[:-1], out=first[1:])
    last = np.ones_like(first)
    last[:-1] = first[1:]
    return pairs(every[first, 0], reach[last])


def pairs(starts: U64, ends: U64) -> U64:
    """The range array of these; ``np.stack`` takes three times as long for a few."""
    ranges = np.empty((len(starts), 2), dtype=np.uint64)
    ranges[:, 0], ranges[:, 1] = starts, ends
    return ranges


def contains(ranges: U64, pages: U64) -> Bools:
    """Which of ``pages`` (any order) lie in the range array."""
    if not len(ranges):
        return np.zeros(len(pages), dtype=np.bool_)
    at = np.searchsorted(ranges[:, 0], pages, side="right") - 1
    inside: Bools = (at >= 0) & (pages < ranges[np.maximum(at, 0), 1])
    return inside


def intersect(a: U64, b: U64) -> U64:
    """The pages that are in both range arrays."""
    if not len(a) or not len(b):
        return no_pages()
    if len(a) + len(b) <= FEW:
        return _few(_common(a.tolist(), b.tolist()))
    first = b[:, 1].searchsorted(a[:, 0], side="right")
    last = b[:, 0].searchsorted(a[:, 1], side="left")
    hits = np.maximum(last - first, 0)
    left = np.arange(len(a)).repeat(hits)
    right = np.arange(len(left)) + (first - hits.cumsum() + hits)[left]
    return pairs(np.maximum(a[left, 0], b[right, 0]), np.minimum(a[left, 1], b[right, 1]))


def subtract(a: U64, b: U64) -> U64:
    """The pages of ``a`` that are not in ``b``."""
    if not len(a) or not len(b):
        return a
    if len(a) + len(b) <= FEW:
        return _few(_rest(a.tolist(), b.tolist()))
    gaps = np.empty((len(b) + 1, 2), dtype=np.uint64)
    gaps[0, 0], gaps[1:, 0] = 0, b[:, 1]
    gaps[:-1, 1], gaps[-1, 1] = b[:, 0], np.iinfo(np.uint64).max
    return intersect(a, gaps[gaps[:, 0] < gaps[:, 1]])


def _few(rows: list[list[int]]) -> U64:
    return np.array(rows, dtype=np.uint64) if rows else no_pages()


def _union(rows: list[list[int]]) -> list[list[int]]:
    found = rows[:1]
    for row in rows[1:]:
        if row[0] > found[-1][1]:
            found.append(row)
        elif row[1] > found[-1][1]:
            found[-1][1] = row[1]
    return found


def _common(a: list[list[int]], b: list[list[int]]) -> list[list[int]]:
    return [
        [max(start, first), min(end, last)]
        for start, end in a
        for first, last in b
        if first < end and last > start
    ]


def _rest(a: list[list[int]], b: list[list[int]]) -> list[list[int]]:
    found = []
    for start, end in a:
        at = start
        for first, last in b:
            if first < end and last > at:
                if first > at:
                    found.append([at, first])
                at = last
        if at < end:
            found.append([at, end])
    return found


def human_bytes(count: float) -> str:
    """``count`` bytes with a binary unit, for people."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"
