"""Both readers of chains on the same chain: crtrace's own, and the one written from FORMAT.md."""

from __future__ import annotations

from contextlib import closing
from dataclasses import astuple
from pathlib import Path

import numpy as np

from crtrace.image.epoch import Epoch, TaskView
from crtrace.image.places import PageKind
from crtrace.image.reader import Chain
from crtrace.image.resolve import Source
from crtrace.image.tables import Vma
from crtrace.units import PAGE_SIZE
from tests.image import independent_reader as second

MOST_PAGES = 2048
"""Pages looked at in a run of one source, half of them at either end."""

SOURCES = {
    Source.STORED: {"bytes"}, Source.OBJECT: {"bytes"}, Source.ZERO: {"bytes", "zeros"},
    Source.FILE: {"file"}, Source.UNREADABLE: {"unreadable", "unknown"},
}  # fmt: skip


def assert_same(path: Path) -> dict[int, dict[int, second.Pages]]:
    """Both say the same of every epoch; all pages of each.

    The second reader reads every epoch twice: with the summaries, and without.
    """
    found = {}
    with (
        Chain.open(path) as chain,
        closing(second.Chain(path)) as other,
        closing(second.Chain(path, summaries=True)) as quick,
    ):
        assert [entry.epoch for entry in chain.entries] == [*other.entries]
        lost = sum(fault.entries for fault in chain.index.faults if not fault.harmless)
        assert lost == other.lost
        for number in other.entries:
            found[number] = other.epoch(number)
            assert quick.epoch(number) == found[number]
            assert_same_epoch(chain.epoch(number), other.image(number), found[number])
    return found


def assert_same_epoch(view: Epoch, image: second.Image, pages: dict[int, second.Pages]) -> None:
    """Both say the same of one epoch."""
    assert {space: _pages(view, space) for space in view.spaces} == pages
    lost = {(row.space, row.first + at) for row in view.losses() for at in range(row.count)}
    unread = {(at, n) for at, each in pages.items() for n, data in each.items() if data is None}
    assert lost == unread
    assert view.stats == (image.stats[0] if image.stats else {})
    assert ({**vars_of(view.arch)} if view.arch else {}) == image.arch
    header, head = view.header, image.head
    texts = header.reason, header.kernel, header.hostname, header.tool_version, header.armer
    times = header.wall_ns, header.boottime_ns, header.boot_id
    assert (texts, times) == (head["texts"], (head["wall"], head["boot"], head["boot_id"]))
    assert [astuple(file) for file in view.files.values()] == [
        tuple(row.values()) for row in image.files.values()
    ]
    assert [task.id for task in view.tasks] == [*image.tasks]
    for task, row in zip(view.tasks, image.tasks.values(), strict=True):
        assert_same_task(view, task, row, pages)


def vars_of(arch: object) -> dict[str, object]:
    """What ARCH says, as the document names it."""
    names = {"page_size": "page_size", "xstate_size": "xsave_size", "xfeatures": "xcr0",
             "clock_ticks": "ticks", "machine": "machine"}  # fmt: skip
    return {name: getattr(arch, own) for own, name in names.items()}


def _pages(view: Epoch, space: int) -> second.Pages:
    """Every page of a space as crtrace's reader has it."""
    numbers = view.index(space).pages
    data = view.read_pages(space, numbers)
    there = view.page_kinds(space, numbers) != PageKind.UNREADABLE
    rows = zip(numbers.tolist(), data, there.tolist(), strict=True)
    return {number: row.tobytes() if known else None for number, row, known in rows}


def assert_same_task(
    view: Epoch, task: TaskView, row: second.Row, pages: dict[int, second.Pages]
) -> None:
    """Both say the same of a task, its threads, its mappings and their contents."""
    mm = row["mm"]
    own = {key: value for key, value in row.items() if key not in {"parent", "mm", "threads"}}
    assert (task.parent, *astuple(task.task)) == (row["parent"], *own.values())
    threads = [
        (*astuple(thread.thread), thread.cpu.sets if thread.cpu else ())
        for thread in view.threads(task)
    ]
    assert threads == [tuple(thread.values()) for thread in row["threads"]]
    if task.mm is None:
        assert mm is None
        return
    assert (*astuple(task.mm), len(task.vmas)) == (*list(mm.values())[:-1], len(mm["vmas"]))
    for vma, other in zip(task.vmas, mm["vmas"], strict=True):
        assert astuple(vma) == tuple(other.values())
        _assert_same_memory(view, task, vma, mm, pages)


def _assert_same_memory(
    view: Epoch, task: TaskView, vma: Vma, mm: second.Row, pages: dict[int, second.Pages]
) -> None:
    for run in view.memory_runs(task, vma):
        half = min(run.npages, MOST_PAGES // 2)
        for addr in {run.addr, run.addr + (run.npages - half) * PAGE_SIZE}:
            data = view.read_run(task, vma, addr, half)
            for at, contents in enumerate(np.split(data, half)):
                where = addr + at * PAGE_SIZE
                what, *more = second.reads_as(pages, mm, where)
                assert what in SOURCES[run.source]
                if what == "bytes":
                    assert more == [contents.tobytes()]
                if what == "file":
                    assert more == [vma.file, vma.pgoff + where - vma.start]
