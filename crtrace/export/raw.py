"""An epoch's memory as one sparse file, mapping after mapping, and a map of it."""

from __future__ import annotations

import json
import os
from typing import Any

from crtrace.export.core import find_task, pieces
from crtrace.export.sparsefile import SparseFile, sparse_file
from crtrace.image.epoch import Epoch, TaskView
from crtrace.image.tables import Vma

MAP_SUFFIX = ".map"


def export_raw(epoch: Epoch, path: str | os.PathLike[str], *, pid: int | None = None) -> int:
    """Write the memory of one task (by default the first); the number of mappings with bytes.

    The file has every mapping with something stored, page after page, sparse where nothing is;
    ``PATH.map`` has one JSON object a line: ``start``, ``end``, ``offset`` (in the file),
    ``perms``, ``file_offset``, ``name``. Both have mode 0600 and appear when they are complete.
    Raises as ``export_core`` does.
    """
    task = find_task(epoch, pid)
    rows = []
    with sparse_file(path) as out:
        end = 0
        for vma in task.vmas:
            if _write_mapping(out, epoch, task, vma, end):
                rows.append(_row(vma, end))
                end += vma.end - vma.start
        out.truncate(end)
        with sparse_file(os.fspath(path) + MAP_SUFFIX) as listing:
            lines = "".join(json.dumps(row) + "\n" for row in rows)
            listing.write(lines.encode(), 0)
    return len(rows)


def _write_mapping(out: SparseFile, epoch: Epoch, task: TaskView, vma: Vma, offset: int) -> bool:
    """Write what is stored of a mapping; whether there was anything."""
    found = False
    for addr, npages in pieces(epoch, task, vma, vma.start, vma.end):
        out.write(epoch.read_run(task, vma, addr, npages).data, offset + addr - vma.start)
        found = True
    return found


def _row(vma: Vma, offset: int) -> dict[str, Any]:
    return {
        "start": vma.start,
        "end": vma.end,
        "offset": offset,
        "perms": vma.perms,
        "file_offset": vma.pgoff,
        "name": vma.name,
    }
