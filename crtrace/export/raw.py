"""An epoch's memory as one sparse file, mapping after mapping, and a map of it."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from typing import Any

from crtrace.export.core import find_task
from crtrace.export.placement import Placement, Progress, write_memory
from crtrace.export.sparsefile import sparse_file
from crtrace.image.epoch import Epoch, TaskView
from crtrace.image.resolve import Source
from crtrace.image.tables import Vma
from crtrace.units import PAGE_SIZE

MAP_SUFFIX = ".map"
HELD = Source.STORED, Source.OBJECT
MOST_MISSING = 1 << 10
"""Missing ranges listed for one mapping; beyond, the last one reaches to the end."""


def export_raw(
    epoch: Epoch,
    path: str | os.PathLike[str],
    *,
    pid: int | None = None,
    progress: Progress | None = None,
) -> int:
    """Write the memory of one task (by default the first); the number of mappings with bytes.

    The file has every mapping with something stored or lost, page after page, sparse where
    nothing is. ``PATH.map`` has one JSON object a line: ``start``, ``end``, ``offset`` (in the
    file), ``perms``, ``file_offset``, ``name`` and ``missing``: ranges of addresses that read as
    zeros in the file and had other contents, or unknown ones, since they are those of a file, or
    were unreadable, or are lost. Both have mode 0600 and appear when they are complete. Raises as
    ``export_core`` does.
    """
    task = find_task(epoch, pid)
    rows = []
    offset = total = 0
    for vma in task.vmas:
        stored, lost, missing = _look_through(epoch, task, vma)
        if stored or lost:
            rows.append(_row(vma, offset, missing))
            offset += vma.end - vma.start
            total += stored
    with sparse_file(path) as out:
        place = Placement(out, ((row["start"], row["end"], row["offset"]) for row in rows))
        write_memory(place, epoch, task, total, progress)
        out.truncate(offset)
        with sparse_file(os.fspath(path) + MAP_SUFFIX) as listing:
            lines = "".join(json.dumps(row) + "\n" for row in rows)
            listing.write(lines.encode(), 0)
    return len(rows)


def _look_through(
    epoch: Epoch, task: TaskView, vma: Vma
) -> tuple[int, bool, list[tuple[int, int]]]:
    """Bytes stored of a mapping, whether damage has some of it, and which ranges have contents that
    are not known."""
    stored, lost = 0, False
    missing: list[tuple[int, int]] = []
    for start, end, source in _runs(epoch, task, vma):
        if source in HELD:
            stored += end - start
        elif source is not Source.ZERO:
            first = missing.pop()[0] if len(missing) == MOST_MISSING else start
            missing.append((first, end))
            lost |= source is Source.LOST
    return stored, lost, missing


def _runs(epoch: Epoch, task: TaskView, vma: Vma) -> Iterator[tuple[int, int, Source]]:
    for run in epoch.memory_runs(task, vma):
        yield run.addr, run.addr + run.npages * PAGE_SIZE, run.source


def _row(vma: Vma, offset: int, missing: list[tuple[int, int]]) -> dict[str, Any]:
    return {
        "start": vma.start,
        "end": vma.end,
        "offset": offset,
        "perms": vma.perms,
        "file_offset": vma.pgoff,
        "name": vma.name,
        "missing": missing,
    }
