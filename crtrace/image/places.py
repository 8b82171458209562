"""Where a page is: one 64-bit number that is also the row of the page index's second column.

Low to high: record id of the chunk (32 bits), slot in it (16), kind (16). So one array, and one
comparison, does for the three.
"""

from __future__ import annotations

from enum import IntEnum

import numpy as np
import numpy.typing as npt

from crtrace.units import U64

U16 = npt.NDArray[np.uint16]
PAGE_LIMIT = 1 << 52


class PageKind(IntEnum):
    """What a page index says of a page."""

    STORED = 0
    ZERO = 1
    HOLE = 2
    UNREADABLE = 3
    INHERITED = 4
    """As the same page of another space in the parent image; the chunk is that space's number."""


LOST = 5
"""Reader only, never on disk: damage has it. What the page was is not known."""

SAME = 0xFFFF
"""Writer only, never on disk: the page equals the parent's again, so forget earlier rounds."""


def place(kind: int, chunk: int = 0, slot: int = 0) -> np.uint64:
    """One place."""
    return np.uint64(chunk | slot << 32 | kind << 48)


def kinds(places: U64) -> U16:
    """The kind of each place: a view of the high 16 bits, not a copy. ``places``: contiguous."""
    return places.view(np.uint16)[3::4]


def chunks(places: U64) -> U64:
    """The chunk of each place."""
    return places & np.uint64(0xFFFFFFFF)


def slots(places: U64) -> U64:
    """The slot of each place."""
    return places >> np.uint64(32) & np.uint64(0xFFFF)
