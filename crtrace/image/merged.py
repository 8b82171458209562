"""The pages of an epoch through its lineage: where each is, what it holds."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from itertools import pairwise

import numpy as np

from crtrace.errors import ImageDamaged
from crtrace.image.chunk import Chunk
from crtrace.image.imagefile import Image
from crtrace.image.pageindex import IndexRows, PageIndex
from crtrace.image.places import U16, PageKind, chunks, kinds, place, slots
from crtrace.units import PAGE_SIZE, U64, Bytes

CACHED_CHUNKS = 16
"""Decompressed chunks kept: 32 MiB at most."""
MERGE_FENCES = 128
"""Fences of the page indexes between two cuts of a merge: about 128 * 1024 rows at a time."""
NOWHERE = -1

Levels = np.ndarray[tuple[int], np.dtype[np.int64]]
Positions = np.ndarray[tuple[int], np.dtype[np.intp]]


class MergedPages:
    """The pages of an image and of those it builds on: ``lineage`` is the image, its parent, …

    Memory stays bounded whatever the size of the target. Not for several threads at once. Methods
    raise ``ImageDamaged``.
    """

    def __init__(self, lineage: Sequence[Image]) -> None:
        self.lineage = tuple(lineage)
        self.image = lineage[0]
        self._chunks: OrderedDict[tuple[int, int], Chunk] = OrderedDict()
        self._spaces: dict[tuple[int, int], tuple[PageIndex, ...]] = {}

    @property
    def spaces(self) -> list[int]:
        """The spaces that exist in this epoch, ascending."""
        return self.image.spaces

    def _indexes(self, space: int, level: int = 0) -> tuple[PageIndex, ...]:
        """The page indexes of a space from ``lineage[level]`` back, as far as it has existed."""
        if (space, level) not in self._spaces:
            found: list[PageIndex] = []
            for image in self.lineage[level:]:
                index = image.page_index(space)
                if index is None:
                    break
                found.append(index)
            if not found:
                raise ImageDamaged(f"{self.image.path}: space {space} has no page index")
            self._spaces[space, level] = tuple(found)
        return self._spaces[space, level]

    def locate(self, space: int, pages: U64) -> tuple[Levels, U64]:
        """Where ``pages`` (ascending) are: index into ``lineage``, and place in that image.

        The level is -1 for pages that the epoch has no contents of; their place is a hole.
        """
        return self._locate(space, pages, 0)

    def _locate(self, space: int, pages: U64, first: int) -> tuple[Levels, U64]:
        """``locate`` as it was when ``lineage[first]`` was the newest image."""
        levels = np.full(len(pages), NOWHERE, dtype=np.int64)
        places = np.full(len(pages), place(PageKind.HOLE))
        todo = np.arange(len(pages))
        for level, index in enumerate(self._indexes(space, first), first):
            found, where, _ = index.find(pages[todo])
            levels[todo[found]], places[todo[found]] = level, where
            todo = todo[~found]
            if not len(todo):
                break
        kind = kinds(places)
        levels[kind == PageKind.HOLE] = NOWHERE
        inherited = np.flatnonzero(kind == PageKind.INHERITED)
        if len(inherited):
            self._follow(pages, levels, places, inherited)
        return levels, places

    def _follow(self, pages: U64, levels: Levels, places: U64, inherited: Positions) -> None:
        """Replace inherited places by those they stand for. Each step is one image further back,
        so that it ends."""
        keys = levels[inherited] << 32 | chunks(places[inherited]).astype(np.int64)
        for key in np.unique(keys):
            at = inherited[keys == key]
            level, origin = int(key) >> 32, int(key) & 0xFFFFFFFF
            if level + 1 >= len(self.lineage):
                raise ImageDamaged(f"{self.lineage[level].path}: inherits pages from no parent")
            levels[at], places[at] = self._locate(origin, pages[at], level + 1)
            if (levels[at] == NOWHERE).any():
                raise ImageDamaged(
                    f"{self.lineage[level].path}: inherits pages that space {origin} has not"
                )

    def at_or_after(self, space: int, page: int) -> int:
        """A page not below ``page`` before which nothing is listed; far away if nothing follows."""
        return min(index.at_or_after(page) for index in self._indexes(space))

    def page_kinds(self, space: int, pages: U64) -> U16:
        """The ``PageKind`` of each of ``pages`` (ascending); ``HOLE``: no contents here."""
        return kinds(self.locate(space, pages)[1])

    def read_pages(self, space: int, pages: U64) -> Bytes:
        """The contents, ``(n, 4096)``, of ``pages`` (ascending); zeros where there are none.

        Ask for some thousand pages at a time: the result is as large as it sounds.
        """
        levels, places = self.locate(space, pages)
        data = np.zeros((len(pages), PAGE_SIZE), dtype=np.uint8)
        held = np.flatnonzero((levels >= 0) & (kinds(places) == PageKind.STORED))
        keys = levels[held] << 32 | chunks(places[held]).astype(np.int64)
        for key in np.unique(keys):
            at = held[keys == key]
            level, number = int(key) >> 32, int(key) & 0xFFFFFFFF
            data[at] = self._from_chunk(level, number, slots(places[at]))
        return data

    def _from_chunk(self, level: int, number: int, at: U64) -> Bytes:
        chunk = self._chunk(level, number)
        image = self.lineage[level]
        if at.max() >= len(chunk.pages):
            raise ImageDamaged(f"{image.where(number)}: has no slot {at.max()}")
        return chunk.data[at]

    def _chunk(self, level: int, number: int) -> Chunk:
        key = level, number
        if key not in self._chunks:
            image = self.lineage[level]
            if not 1 <= number <= len(image.directory):
                raise ImageDamaged(f"{image.path}: a page index names record {number}")
            self._chunks[key] = image.chunk(number)
            if len(self._chunks) > CACHED_CHUNKS:
                self._chunks.popitem(last=False)
        self._chunks.move_to_end(key)
        return self._chunks[key]

    def index_parts(self, space: int) -> Iterator[IndexRows]:
        """The merged page index of a space, ascending, in parts of some 100,000 rows.

        Newest entries win; holes are left out. The places are only good for their kind: they name
        chunks of different images.
        """
        indexes = self._indexes(space)
        fences = np.unique(np.concatenate([index.fences for index in indexes]))
        cuts = [*fences[::MERGE_FENCES].tolist(), 1 << 53]
        for first, end in pairwise(cuts):
            rows = _newest([index.between(first, end) for index in indexes])
            if len(rows.pages):
                yield rows

    def index(self, space: int) -> IndexRows:
        """The merged page index of a space as a whole: 32 bytes a page."""
        none = np.empty(0, dtype=np.uint64)
        parts = [IndexRows(none, none, none.reshape(0, 2)), *self.index_parts(space)]
        return IndexRows(
            np.concatenate([part.pages for part in parts]),
            np.concatenate([part.places for part in parts]),
            np.concatenate([part.hashes for part in parts]),
        )


def _newest(parts: list[IndexRows]) -> IndexRows:
    """One set of rows from several, newest first, without holes."""
    pages = np.concatenate([part.pages for part in parts])
    order = np.argsort(pages, kind="stable")
    ranked = pages[order]
    first = np.ones(len(ranked), dtype=np.bool_)
    first[1:] = ranked[1:] != ranked[:-1]
    order = order[first]
    places = np.concatenate([part.places for part in parts])[order]
    keep = kinds(places) != PageKind.HOLE
    hashes = np.concatenate([part.hashes for part in parts])[order[keep]]
    return IndexRows(pages[order][keep], places[keep], hashes)
