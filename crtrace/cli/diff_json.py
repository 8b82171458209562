"""What ``crtrace diff --json`` prints, piece by piece."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from crtrace.analyze.diff import Diff, MappingDiff, contents
from crtrace.analyze.pagediff import Verdict, changed_ranges
from crtrace.cli.hexview import changed_lines
from crtrace.cli.output import SCHEMA_VERSION, begun, dumps
from crtrace.image.epoch import Epoch
from crtrace.image.tables import Vma
from crtrace.units import PAGE_SIZE


def summary(diff: Diff, path: Path) -> Iterator[str]:
    """One object, written while it is found."""
    head = {"chain": str(path), "a": _epoch_json(diff.a), "b": _epoch_json(diff.b)}
    yield begun({"schema_version": SCHEMA_VERSION, **head, "files": diff.files()}, "processes")
    for number, process in enumerate(diff.processes()):
        task = process.task.task
        about = {
            "pid": task.pid, "comm": task.comm, "start_ticks": task.start_ticks,
            "change": process.change, "shares_memory_with": process.shares,
            "threads": process.threads(), **process.sizes(),
        }  # fmt: skip
        yield "," * bool(number) + begun(about, "mappings")
        comma = ""
        for mapping in process.mappings():
            parts = _mapping_json(mapping)
            if first := next(parts, None):
                yield comma + first
                yield from parts
                comma = ","
        yield "]}"
    yield "]}\n"


def _epoch_json(epoch: Epoch) -> dict[str, Any]:
    return {"epoch": epoch.header.epoch, "wall_ns": epoch.header.wall_ns}


def _mapping_json(mapping: MappingDiff) -> Iterator[str]:
    """The pieces of a mapping's object; none if nothing of it has changed."""
    runs = mapping.runs()
    first = next(runs, None)
    if first is None and not mapping.mapping.altered:
        return
    yield begun(_mapping_facts(mapping), "ranges")
    comma = ""
    for part in changed_ranges(runs for _, runs in chain([first] if first else [], runs)):
        if len(part):
            yield comma + dumps((part * np.uint64(PAGE_SIZE)).tolist())[1:-1]
            comma = ","
    counts = {
        "pages_changed": mapping.pages(Verdict.CHANGED),
        "pages_unknown": mapping.pages(Verdict.UNKNOWN),
        "pages_unreadable": mapping.pages(Verdict.UNREADABLE),
        "changed": mapping.how(Verdict.CHANGED),
        "unknown": mapping.how(Verdict.UNKNOWN),
    }
    yield "]," + dumps(counts)[1:]


def _mapping_facts(mapping: MappingDiff) -> dict[str, Any]:
    about = mapping.mapping
    return {
        **_vma_json(about.vma), "change": about.change,
        "before": [_vma_json(vma) for vma in about.before],
        "alone": {
            "parts": [[vma.start, vma.end] for vma in about.alone], "bytes": mapping.alone,
        },
    }  # fmt: skip


def _vma_json(vma: Vma) -> dict[str, Any]:
    return {
        "start": vma.start, "end": vma.end, "perms": vma.perms, "offset": vma.pgoff,
        "name": vma.name,
    }  # fmt: skip


def changed_bytes(diff: Diff) -> Iterator[str]:
    """An object a line for neighbouring lines of 16 bytes that differ; null: not kept."""
    for process in diff.processes():
        for mapping in process.mappings():
            for part in contents(diff, process, mapping):
                for start, old, new in changed_lines(part.addr, part.old, part.new):
                    size = len(old or new or b"") or part.npages * PAGE_SIZE
                    row = {
                        "schema_version": SCHEMA_VERSION, "pid": process.task.task.pid,
                        "start": start, "end": start + size,
                        "old": None if old is None else old.hex(),
                        "new": None if new is None else new.hex(),
                    }  # fmt: skip
                    yield dumps(row) + "\n"
