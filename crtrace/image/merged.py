"""The pages of an epoch through its lineage: where each is, what it holds."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence, Set
from itertools import pairwise

import numpy as np

from crtrace.errors import ImageDamaged
from crtrace.image.chunk import Chunk
from crtrace.image.imagefile import Image
from crtrace.image.layers import Layer, LayerRows, LostLayer, Rows, gather, joined
from crtrace.image.lineage import Levels, Lineage
from crtrace.image.places import LOST, PAGE_LIMIT, U16, PageKind, chunks, kinds, place, slots
from crtrace.image.salvage import Salvage
from crtrace.units import PAGE_SIZE, U64, Bytes, contains

CACHED_CHUNKS = 8
"""Decompressed chunks kept: 16 MiB at most."""
MERGE_FENCES = 24
"""Fences of the layers between two cuts of a merge: about 24 * 1024 rows at a time."""
STORED_ROWS = 1 << 16
"""Rows of which the contents are read together: 256 MiB of pages."""
NOWHERE = -1

Positions = np.ndarray[tuple[int], np.dtype[np.intp]]


class MergedPages:
    """The pages of an image and of those it builds on: ``lineage`` is the image, its parent, …

    Memory stays bounded whatever the size of the target. Not for several threads at once. Methods
    raise ``ImageDamaged`` and ``ChainIncomplete``; with ``salvage`` the pages that cannot be
    known are of the kind ``LOST`` instead.
    """

    def __init__(self, lineage: Lineage, salvage: Salvage | None = None) -> None:
        self.lineage = lineage
        self.image: Image = lineage[0]
        self._salvage = salvage
        self._chunks: OrderedDict[tuple[int, int], Chunk] = OrderedDict()
        self._spaces: dict[tuple[int, int], list[Layer]] = {}

    @property
    def damaged(self) -> Set[int]:
        """The records of the newest image that are passed over."""
        return self._damaged(0)

    def _damaged(self, level: int) -> Set[int]:
        """The records of ``lineage[level]`` that are passed over."""
        records = self._salvage.records if self._salvage else {}
        return records.get(self.lineage.entries[level].epoch, frozenset())

    @property
    def spaces(self) -> list[int]:
        """The spaces that exist in this epoch, ascending."""
        return self.image.spaces

    def layers(self, space: int, level: int = 0) -> list[Layer]:
        """What the images from ``lineage[level]`` back say of a space, the newest first."""
        if (space, level) not in self._spaces:
            end = len(self.lineage)
            found, _, _ = gather(self.lineage, space, level, end, salvage=self._salvage)
            if not found and self._salvage is None:
                raise ImageDamaged(f"{self.image.path}: space {space} has no page index")
            found = found or [LostLayer(level)]
            self._spaces[space, level] = found
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
        for layer in self.layers(space, first):
            found, where, what = layer.find(pages[todo])
            levels[todo[found]], places[todo[found]] = where, what
            todo = todo[~found]
            if not len(todo):
                break
        return self._settle(space, pages, levels, places)

    def _settle(self, space: int, pages: U64, levels: Levels, places: U64) -> tuple[Levels, U64]:
        """Levels and places with those inherited followed, and those that damage has lost."""
        if self._salvage:
            self._distrust(space, pages, levels, places, self._salvage)
        kind = kinds(places)
        levels[kind == PageKind.HOLE] = NOWHERE
        inherited = np.flatnonzero(kind == PageKind.INHERITED)
        if len(inherited):
            self._follow(pages, levels, places, inherited)
        if self._salvage:
            self._lose(levels, places, self._salvage)
        return levels, places

    def _follow(self, pages: U64, levels: Levels, places: U64, inherited: Positions) -> None:
        """Replace inherited places by those they stand for. Each step is one image further back,
        so that it ends."""
        for at, level, origin in _groups(levels, places, inherited):
            where = self.lineage.entries[level].name
            if level + 1 < len(self.lineage):
                levels[at], places[at] = self._locate(origin, pages[at], level + 1)
            else:
                levels[at] = NOWHERE
            nowhere = at[levels[at] == NOWHERE]
            if len(nowhere) and self._salvage is None:
                raise ImageDamaged(f"{where} inherits pages that space {origin} has not")
            places[nowhere] = place(LOST)

    def _distrust(
        self, space: int, pages: U64, levels: Levels, places: U64, salvage: Salvage
    ) -> None:
        """Lose the pages of which the page index that has them says what is not so."""
        for level in np.unique(levels[levels >= 0]).tolist() if salvage.entries else ():
            wrong = salvage.entries.get((self.lineage.entries[level].epoch, space))
            if wrong is not None:
                places[(levels == level) & contains(wrong, pages)] = place(LOST)

    def _lose(self, levels: Levels, places: U64, salvage: Salvage) -> None:
        """Lose the pages in damaged chunks."""
        stored = np.flatnonzero(kinds(places) == PageKind.STORED)
        for at, level, number in _groups(levels, places, stored):
            if salvage.lacks(self.lineage.entries[level].epoch, number):
                places[at] = place(LOST)

    def at_or_after(self, space: int, page: int) -> int:
        """A page not below ``page`` before which nothing is listed, so that all pages until there
        are of one kind; far away if nothing follows."""
        return min(layer.at_or_after(page) for layer in self.layers(space))

    def page_kinds(self, space: int, pages: U64) -> U16:
        """The ``PageKind`` of each of ``pages`` (ascending); ``HOLE``: no contents here."""
        return kinds(self.locate(space, pages)[1])

    def read_pages(self, space: int, pages: U64) -> Bytes:
        """The contents, ``(n, 4096)``, of ``pages`` (ascending); zeros where there are none.

        Ask for some thousand pages at a time: the result is as large as it sounds.
        """
        levels, places = self.locate(space, pages)
        data = np.zeros((len(pages), PAGE_SIZE), dtype=np.uint8)
        for at, part in self._contents(levels, places):
            data[at] = part
        return data

    def stored(
        self, space: int, first: int = 0, end: int = PAGE_LIMIT
    ) -> Iterator[tuple[U64, Bytes]]:
        """Pages of ``[first, end)`` with bytes, and these, ``(n, 4096)``, n up to 512.

        In the order in which they lie in the images, so that each chunk is decompressed about
        once, however the pages of many epochs are mixed in the address space.
        """
        for rows in together(self.index_parts(space, first, end)):
            yield from self.contents_of(space, rows)

    def contents_of(self, space: int, rows: LayerRows) -> Iterator[tuple[U64, Bytes]]:
        """The pages of some rows that have bytes, and these, as ``stored`` gives them."""
        levels, places = self._settle(space, rows.pages, rows.levels.copy(), rows.places.copy())
        for at, part in self._contents(levels, places):
            yield rows.pages[at], part

    def _contents(self, levels: Levels, places: U64) -> Iterator[tuple[Positions, Bytes]]:
        """Positions and contents of what is stored, chunk by chunk."""
        stored = np.flatnonzero((levels >= 0) & (kinds(places) == PageKind.STORED))
        for at, level, number in _groups(levels, places, stored):
            chunk = self._chunk(level, number)
            slot = slots(places[at])
            if slot.max() >= len(chunk.pages):
                where = self.lineage[level].where(number)
                raise ImageDamaged(f"{where}: has no slot {slot.max()}")
            yield at, chunk.data[slot]

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

    def index_parts(self, space: int, first: int = 0, end: int = PAGE_LIMIT) -> Iterator[LayerRows]:
        """The merged page index of a space, ascending, in parts of some 10,000 rows.

        Newest entries win; holes are left out.
        """
        for part in merge_layers(self.layers(space), first, end):
            keep = kinds(part.places) != PageKind.HOLE
            if keep.any():
                yield part.select(keep)

    def changes(self, space: int, end: int) -> Iterator[LayerRows]:
        """What the images before ``lineage[end]`` say of a space, with holes: also for what that
        one has of an older space of the same number."""
        found, _, ended = gather(self.lineage, space, 0, end)
        layers: list[Rows] = [*found]
        before = MergedPages(self.lineage.part(end))
        if ended and space in before.spaces:
            layers.append(_Gone(before.layers(space)))
        for part in merge_layers(layers):
            # The last summary may sum up older images, too.
            yield part.select(part.levels < end)

    def index(self, space: int) -> LayerRows:
        """The merged page index of a space as a whole: 40 bytes a page."""
        none = np.empty(0, dtype=np.uint64)
        empty = LayerRows(none, none.astype(np.int64), none, none.reshape(0, 2))
        return joined([empty, *self.index_parts(space)])


class _Gone:
    """Holes where some layers, the newest first, have pages."""

    def __init__(self, layers: Sequence[Rows]) -> None:
        self._layers = layers
        self.fences = np.concatenate([layer.fences for layer in layers])

    def between(self, first: int, end: int) -> LayerRows:
        """The rows of the pages ``[first, end)``."""
        rows = _newest([layer.between(first, end) for layer in self._layers])
        rows = rows.select(kinds(rows.places) != PageKind.HOLE)
        holes = np.full(len(rows.pages), place(PageKind.HOLE))
        return LayerRows(rows.pages, np.zeros_like(rows.levels), holes, np.zeros_like(rows.hashes))


def merge_layers(
    every: Sequence[Rows], first: int = 0, end: int = PAGE_LIMIT
) -> Iterator[LayerRows]:
    """The rows of ``[first, end)`` of several layers, the newest first, as one, with holes."""
    fences = np.unique(np.concatenate([layer.fences for layer in every]))
    inside = fences[(fences > first) & (fences < end)]
    for start, stop in pairwise([first, *inside[::MERGE_FENCES].tolist(), end]):
        parts = [layer.between(start, stop) for layer in every]
        if any(len(part.pages) for part in parts):
            yield _newest(parts)


def _newest(parts: list[LayerRows]) -> LayerRows:
    """One set of rows from several, newest first."""
    if len(parts) == 1:
        return parts[0]
    every = joined(parts)
    order = np.argsort(every.pages, kind="stable")
    ranked = every.pages[order]
    first = np.ones(len(ranked), dtype=np.bool_)
    first[1:] = ranked[1:] != ranked[:-1]
    return every.select(order[first])


def together(parts: Iterable[LayerRows]) -> Iterator[LayerRows]:
    """The same rows in fewer parts."""
    held: list[LayerRows] = []
    for part in parts:
        held.append(part)
        if sum(len(each.pages) for each in held) >= STORED_ROWS:
            yield joined(held)
            held = []
    if held:
        yield joined(held)


def _groups(levels: Levels, places: U64, which: Positions) -> Iterator[tuple[Positions, int, int]]:
    """``which``, grouped by level and chunk: positions, level, chunk; in the order of both."""
    keys = levels[which] << 32 | chunks(places[which]).astype(np.int64)
    order = np.argsort(keys, kind="stable")
    ranked = keys[order]
    cuts = np.flatnonzero(np.diff(ranked)) + 1
    for at in np.split(which[order], cuts) if len(which) else ():
        key = int(levels[at[0]]) << 32 | int(chunks(places[at[0]]))
        yield at, key >> 32, key & 0xFFFFFFFF
