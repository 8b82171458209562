"""A copy against what it was made from, read back from disk."""

from __future__ import annotations

import numpy as np

from crtrace.analyze.imagecheck import check_image
from crtrace.errors import ImageDamaged
from crtrace.image.epoch import Epoch
from crtrace.image.layers import LayerRows, joined
from crtrace.image.places import PageKind, kinds


def check_copy(copy: Epoch, original: Epoch) -> None:
    """Raise ``ImageDamaged`` unless the newest image of ``copy`` is sound and says all that the
    original does: tasks, mappings, files, and the hash of every page."""
    for found in check_image(copy.image, lambda done: None):
        raise ImageDamaged(f"the copy is wrong: {found.message}")
    same = copy.tasks_alike(original) and copy.files == original.files
    if not same or copy.spaces != original.spaces:
        raise ImageDamaged(f"{copy.image.path}: the copy has other tasks than the original")
    for space in original.spaces:
        _check_space(copy, original, space)


def _check_space(copy: Epoch, original: Epoch, space: int) -> None:
    """Walk both page indexes side by side."""
    others = copy.index_parts(space)
    held = next(others, None)
    for rows in original.index_parts(space):
        last = rows.pages[-1]
        while held is not None and held.pages[-1] < last and (more := next(others, None)):
            held = joined([held, more])
        count = 0 if held is None else int(np.searchsorted(held.pages, last, side="right"))
        if held is None or not _alike(held.select(np.arange(count)), rows):
            raise ImageDamaged(f"{copy.image.path}: pages of space {space} are not the same")
        held = held.select(np.arange(count, len(held.pages)))
        held = held if len(held.pages) else next(others, None)
    if held is not None:
        raise ImageDamaged(f"{copy.image.path}: has more pages of space {space}")


def _alike(one: LayerRows, other: LayerRows) -> bool:
    """Whether they have the same pages with the same contents, wherever these are."""
    return (
        np.array_equal(one.pages, other.pages)
        and np.array_equal(one.hashes, other.hashes)
        and np.array_equal(_kinds(one), _kinds(other))
    )


def _kinds(rows: LayerRows) -> np.ndarray[tuple[int], np.dtype[np.uint16]]:
    kind = kinds(rows.places).copy()
    kind[kind == PageKind.INHERITED] = PageKind.STORED
    return kind
