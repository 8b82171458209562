"""Summaries: every so often an image repeats what several before it say, as one index.

So that a page is found after a few searches, however long the chain is. FORMAT.md, "SUMMARY".
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np

from crtrace.errors import ChainIncomplete, ImageDamaged
from crtrace.image.codec import as_bytes
from crtrace.image.framing import SUMMARY_HEAD, Part
from crtrace.image.header import NO_EPOCH, ImageHeader
from crtrace.image.layers import LayerRows, Rows, gather
from crtrace.image.lineage import Lineage
from crtrace.image.merged import merge_layers
from crtrace.image.pageindex import FENCE_ROWS, SUMMARY_ROWS
from crtrace.image.pending import Entries
from crtrace.image.places import PAGE_LIMIT

FAN_OUT = 8
"""A page written once is repeated in log8 of the chain's length summaries, of 40 bytes each; a
search takes up to 7 times that many steps."""
PENDING = -1
"""The level of an image that is being written."""
OwnRows = tuple[int, Rows]
"""A space, and what such an image says of it."""


def images_summed_up(depth: int) -> int:
    """How many images the one ``depth`` steps from its full image sums up, itself included.

    The largest power of 8 that divides the depth; 0 where that is 1.
    """
    count = 1
    while depth and depth % (FAN_OUT * count) == 0:
        count *= FAN_OUT
    return count if count > 1 else 0


class PendingLayer:
    """Entries, in memory, of an image that is being written."""

    def __init__(self, entries: Entries) -> None:
        self._entries = entries
        self.fences = entries.pages[::FENCE_ROWS]

    def between(self, first: int, end: int) -> LayerRows:
        start, stop = np.searchsorted(self._entries.pages, np.array([first, end], dtype=np.uint64))
        part = self._entries.part(start, stop)
        levels = np.full(len(part.pages), PENDING, dtype=np.int64)
        return LayerRows(part.pages, levels, part.places, part.hashes)


def summaries(header: ImageHeader, before: Lineage, own: Iterable[OwnRows]) -> Iterator[list[Part]]:
    """The payloads of the SUMMARY records of an image: it sums up itself, with its ``own`` rows,
    and the first ones of ``before``.

    A space that cannot be read back has none.
    """
    end = images_summed_up(len(before)) - 1
    epochs = np.array([*(entry.epoch for entry in before.entries), header.epoch], dtype=np.uint64)
    for space, newest in own if end > 0 else ():
        try:
            older, level, ended = gather(before, space, 0, end)
        except (ImageDamaged, ChainIncomplete):
            continue
        base = NO_EPOCH if ended else int(epochs[level])
        first = 0
        for last, rows in _parts([newest, *older]):
            head = SUMMARY_HEAD.pack(space, 0, base, first, last, len(rows.pages))
            columns = rows.pages, rows.places, rows.hashes, epochs[rows.levels]
            yield [head, *map(as_bytes, columns)]
            first = last


def _parts(every: list[Rows]) -> Iterator[tuple[int, LayerRows]]:
    """The merged rows in parts that fit a record, each with the page that it ends before."""
    held = every[0].between(0, 0)
    for rows in merge_layers(every):
        for start in range(0, len(rows.pages), SUMMARY_ROWS):
            if len(held.pages):
                yield int(held.pages[-1]) + 1, held
            held = rows.select(np.arange(start, min(start + SUMMARY_ROWS, len(rows.pages))))
    yield PAGE_LIMIT, held
