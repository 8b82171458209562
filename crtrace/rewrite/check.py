"""A copy against what it was made from, read back from disk."""

from __future__ import annotations

import numpy as np

from crtrace.analyze.imagecheck import check_image
from crtrace.errors import ImageDamaged
from crtrace.image.epoch import Epoch
from crtrace.image.layers import LayerRows, joined
from crtrace.image.lineage import Lineage
from crtrace.image.places import PageKind, kinds
from crtrace.rewrite.progress import Meter, Step

Reasons = np.ndarray[tuple[int, int], np.dtype[np.int64]]


def check_copy(copy: Epoch, original: Epoch, pages: int, meter: Meter) -> None:
    """Raise ``ImageDamaged`` unless the newest image of ``copy`` is sound and says all that the
    original does: machine, tasks, mappings, files, hashes of pages, why one could not be read.

    For ``meter`` these are two steps: of ``pages``, which the image has, and of ``pages_of``.
    """
    image = copy.image
    with meter.step(pages, image.entry.length) as step:
        for found in check_image(image, step.reach):
            raise ImageDamaged(f"the copy is wrong: {found.message}")
    same = copy.tasks_alike(original) and copy.files == original.files
    if not same or copy.spaces != original.spaces:
        raise ImageDamaged(f"{image.path}: the copy has other tasks than the original")
    if copy.arch != original.arch:
        raise ImageDamaged(f"{image.path}: the copy is of another machine than the original")
    with meter.step(pages_of(original.lineage)) as step:
        for space in original.spaces:
            _check_space(copy, original, space, step)


def pages_of(lineage: Lineage) -> int:
    """About how many pages an epoch has, at most."""
    return sum(entry.pages_written for entry in lineage.entries)


def _check_space(copy: Epoch, original: Epoch, space: int, step: Step) -> None:
    """Walk both page indexes side by side."""
    where = f"{copy.image.path}: pages of space {space}"
    others = copy.index_parts(space)
    held = next(others, None)
    for rows in original.index_parts(space):
        last = rows.pages[-1]
        while held is not None and held.pages[-1] < last and (more := next(others, None)):
            held = joined([held, more])
        count = 0 if held is None else int(np.searchsorted(held.pages, last, side="right"))
        if held is None or not _alike(found := held.select(np.arange(count)), rows):
            raise ImageDamaged(f"{where} are not the same")
        if not np.array_equal(_reasons(copy, space, found), _reasons(original, space, rows)):
            raise ImageDamaged(f"{where} are lost for other reasons")
        held = held.select(np.arange(count, len(held.pages)))
        held = held if len(held.pages) else next(others, None)
        step.add(len(rows.pages))
    if held is not None:
        raise ImageDamaged(f"{copy.image.path}: has more pages of space {space}")


def _alike(one: LayerRows, other: LayerRows) -> bool:
    """Whether they have the same pages with the same contents, wherever these are."""
    return (
        np.array_equal(one.pages, other.pages)
        and np.array_equal(one.hashes, other.hashes)
        and np.array_equal(_kinds(one), _kinds(other))
    )


def _reasons(epoch: Epoch, space: int, rows: LayerRows) -> Reasons:
    """Error number and reason for each row; -1 for what could be read."""
    found = np.full((len(rows.pages), 2), -1, dtype=np.int64)
    for loss in epoch.losses_in(space, rows):
        ends = np.array([loss.first, loss.first + loss.count], dtype=np.uint64)
        start, end = np.searchsorted(rows.pages, ends)
        found[start:end] = loss.errno, loss.reason
    return found


def _kinds(rows: LayerRows) -> np.ndarray[tuple[int], np.dtype[np.uint16]]:
    kind = kinds(rows.places).copy()
    kind[kind == PageKind.INHERITED] = PageKind.STORED
    return kind
