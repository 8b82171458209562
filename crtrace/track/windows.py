"""Where a bounded scan looks: page ranges, and whether that is shorter than looking everywhere."""

from __future__ import annotations

import numpy as np

from crtrace.units import U64, count_pages, pairs

LARGE = 65_536
"""Pages from which on a bounded scan may be worth it."""
A_CALL, A_MAPPING = 2_048, 512
"""Pages that a scan passes over while another would be begun, and while it begins with a VMA. They
only decide which of two exact ways is taken."""
HELP = 2
"""About how many times as fast everything is looked at with a second thread."""


def effort(pages: int, mappings: int) -> int:
    """How much a scan of everything has to do, in pages."""
    return pages + A_MAPPING * mappings


def large(effort: int) -> bool:
    """Whether bounds can make so much shorter."""
    return effort >= LARGE


def joined(ranges: U64, gap: int) -> U64:
    """Ranges joined over gaps of no more pages: a system call less for each."""
    if not len(ranges):
        return ranges
    far = np.flatnonzero(ranges[1:, 0] - ranges[:-1, 1] > gap) + 1
    starts, ends = np.concatenate(([0], far)), np.concatenate((far, [len(ranges)])) - 1
    return pairs(ranges[starts, 0], ranges[ends, 1])


def worth_while(within: U64, effort: int, *, beside: bool) -> U64 | None:
    """Where to look so that ``within`` is covered; None: everywhere, for that is as short.

    ``beside``: a second thread would help with everything. With places it could not: there are
    too many short calls.
    """
    windows = joined(within, A_CALL)
    least = effort // HELP if beside else effort
    return windows if count_pages(windows) + A_CALL * len(windows) < least else None


def middle(ranges: U64) -> int:
    """The page that as many pages of a range array are below as are not; 0 if there are none."""
    if not len(ranges):
        return 0
    counted = (ranges[:, 1] - ranges[:, 0]).cumsum()
    half = counted[-1] // np.uint64(2)
    at = counted.searchsorted(half)
    return int(ranges[at, 1] - (counted[at] - half))
