"""What the images of a lineage say of one space, newest first, each layer in one or many images.

A layer is the page index of one image, or the summary of several. FORMAT.md, "SUMMARY", tells
which images have one; with them there are few layers however long the lineage is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from crtrace.errors import ChainIncomplete, ImageDamaged
from crtrace.image.header import NO_EPOCH
from crtrace.image.lineage import Levels, Lineage
from crtrace.image.pageindex import PageIndex, SummaryPart
from crtrace.image.places import LOST, PAGE_LIMIT, place
from crtrace.image.salvage import Salvage
from crtrace.units import U64, Bools

Positions = np.ndarray[tuple[int], np.dtype[np.intp]]


@dataclass(frozen=True, slots=True)
class LayerRows:
    """Pages ``(n,)`` ascending, the level of the image that has each, places, hashes ``(n, 2)``."""

    pages: U64
    levels: Levels
    places: U64
    hashes: U64

    def select(self, which: Bools | Positions) -> LayerRows:
        """Some of the rows."""
        return LayerRows(
            self.pages[which], self.levels[which], self.places[which], self.hashes[which]
        )

    def equals(self, other: LayerRows) -> bool:
        """Whether they are the same rows."""
        columns = zip(
            (self.pages, self.levels, self.places, self.hashes),
            (other.pages, other.levels, other.places, other.hashes),
            strict=True,
        )
        return all(np.array_equal(one, another) for one, another in columns)


def joined(parts: Sequence[LayerRows]) -> LayerRows:
    """One set of rows after the other."""
    return LayerRows(
        np.concatenate([part.pages for part in parts]),
        np.concatenate([part.levels for part in parts]),
        np.concatenate([part.places for part in parts]),
        np.concatenate([part.hashes for part in parts]),
    )


class Rows(Protocol):
    """Rows by page."""

    @property
    def fences(self) -> U64:
        """Page numbers between two of which are about 1024 rows."""

    def between(self, first: int, end: int) -> LayerRows:
        """The rows of the pages ``[first, end)``."""


class Layer(Rows, Protocol):
    """Rows by page that can be searched."""

    def find(self, pages: U64) -> tuple[Bools, Levels, U64]:
        """Which of ``pages`` (ascending) have a row; level and place of those that do."""

    def at_or_after(self, page: int) -> int:
        """The first page with a row that is not below ``page``; ``PAGE_LIMIT`` for none.

        All pages between two rows are alike.
        """


class OwnLayer:
    """The page index of one image."""

    def __init__(self, index: PageIndex, level: int) -> None:
        self._index = index
        self._level = level
        self.fences = index.fences
        self.at_or_after = index.at_or_after

    def find(self, pages: U64) -> tuple[Bools, Levels, U64]:
        found, places, _ = self._index.find(pages)
        return found, np.full(len(places), self._level, dtype=np.int64), places

    def between(self, first: int, end: int) -> LayerRows:
        rows = self._index.between(first, end)
        levels = np.full(len(rows.pages), self._level, dtype=np.int64)
        return LayerRows(rows.pages, levels, rows.places, rows.hashes)


class SummaryLayer:
    """The parts of a summary; ``level`` is where the lineage goes on, at its end for nowhere, and
    ``end`` is just behind the images that are summed up."""

    def __init__(
        self, parts: tuple[SummaryPart, ...], lineage: Lineage, level: int, end: int
    ) -> None:
        self._parts = parts
        self._lineage = lineage
        self._ends = np.array([part.end for part in parts], dtype=np.uint64)
        self.fences = np.concatenate([part.fences for part in parts])
        self.level = level
        self.end = end

    def find(self, pages: U64) -> tuple[Bools, Levels, U64]:
        none = np.empty(0, dtype=np.uint64)
        pieces: list[tuple[Bools, Levels, U64]] = []
        cuts = np.searchsorted(pages, self._ends).tolist()
        for part, start, end in zip(self._parts, [0, *cuts[:-1]], cuts, strict=True):
            if start < end:
                found, places, rows = part.find(pages[start:end])
                epochs = part.epochs(int(rows[0]), int(rows[-1]) + 1) if len(rows) else rows
                levels = self._lineage.levels(epochs[rows - rows[:1]])
                pieces.append((found, levels, places))
        if len(pieces) == 1:
            return pieces[0]
        pieces.append((none.astype(np.bool_), none.astype(np.int64), none))
        found, levels, places = (np.concatenate(column) for column in zip(*pieces, strict=True))
        return found, levels, places

    def between(self, first: int, end: int) -> LayerRows:
        pieces = []
        for part in self._parts:
            if part.first < end and part.end > first:
                start, stop = part.rows_between(first, end)
                rows = part.rows(start, stop)
                levels = self._lineage.levels(part.epochs(start, stop))
                pieces.append(LayerRows(rows.pages, levels, rows.places, rows.hashes))
        return joined(pieces)

    def at_or_after(self, page: int) -> int:
        found = (part.at_or_after(page) for part in self._parts if part.end > page)
        return next((each for each in found if each < PAGE_LIMIT), PAGE_LIMIT)


class LostLayer:
    """An image of which nothing is known: any page may have been written in it."""

    fences = np.empty(0, dtype=np.uint64)

    def __init__(self, level: int) -> None:
        self._level = level

    def find(self, pages: U64) -> tuple[Bools, Levels, U64]:
        levels = np.full(len(pages), self._level, dtype=np.int64)
        return np.ones(len(pages), dtype=np.bool_), levels, np.full(len(pages), place(LOST))

    def between(self, first: int, end: int) -> LayerRows:
        none = np.empty(0, dtype=np.uint64)
        return LayerRows(none, none.astype(np.int64), none, none.reshape(0, 2))

    def at_or_after(self, page: int) -> int:
        return PAGE_LIMIT  # it has no rows; what is in none of the layers before it is all alike


def gather(
    lineage: Lineage, space: int, first: int, end: int, *, salvage: Salvage | None = None
) -> tuple[list[Layer], int, bool]:
    """The layers of a space from ``lineage[first]`` back to before ``lineage[end]``; the level
    that was reached, and whether the space has not existed further back.

    With ``salvage``, an image or page index that cannot be read ends them with a ``LostLayer`` and
    raises no error.
    """
    found: list[Layer] = []
    level = first
    while level < end:
        try:
            if summary := summary_layer(lineage, space, level, salvage):
                found.append(summary)
                level = summary.level
                continue
            index = _index(lineage, space, level, salvage)
        except (ImageDamaged, ChainIncomplete):
            if salvage is None:
                raise
            return [*found, LostLayer(level)], len(lineage), True
        if index is None:
            return found, len(lineage), True
        found.append(OwnLayer(index, level))
        level += 1
    if salvage is not None and level >= len(lineage) and not lineage.entries[-1].full:
        found.append(LostLayer(len(lineage) - 1))  # the rest of the lineage is
    return found, level, level >= len(lineage)


def _index(lineage: Lineage, space: int, level: int, salvage: Salvage | None) -> PageIndex | None:
    """What an image says of a space; None: nothing. Raises ``ImageDamaged``."""
    image = lineage[level]
    index = image.page_index(space)
    if index is not None and salvage and salvage.lacks(image.entry.epoch, image.index_id(space)):
        raise ImageDamaged(f"{image.where(image.index_id(space))}: is damaged")
    return index


def summary_layer(
    lineage: Lineage, space: int, level: int, salvage: Salvage | None = None
) -> SummaryLayer | None:
    """The summary of a space in an image, if it has one and it is of use.

    A damaged one is of none: what it sums up is in the images as well.
    """
    image = lineage[level]
    numbers = image.summary_ids.get(space, ()) if salvage else ()
    if salvage and any(salvage.lacks(image.entry.epoch, number) for number in numbers):
        return None
    try:
        parts = image.summary(space)
    except ImageDamaged:
        return None
    if not parts:
        return None
    newest, oldest = _extent(parts, lineage, level)
    if parts[0].base == NO_EPOCH:
        # It says all there is. What is older may be written again: that adds holes at most.
        go_on, end = len(lineage), oldest + 1
    else:
        go_on = end = int(lineage.levels(np.array([parts[0].base], dtype=np.uint64))[0])
    there = level <= newest and oldest < end and lineage.seen_by(level, end)
    return SummaryLayer(parts, lineage, go_on, end) if there else None


def _extent(parts: tuple[SummaryPart, ...], lineage: Lineage, level: int) -> tuple[int, int]:
    """The levels of the newest and the oldest image that a summary names; with no row: its own.

    -1 is newer than all: an image that is not there.
    """
    levels = [lineage.levels(part.epochs(0, len(part))) for part in parts if len(part)]
    newest = min((int(each.min()) for each in levels), default=level)
    oldest = max((int(each.max()) for each in levels), default=level)
    return newest, oldest
