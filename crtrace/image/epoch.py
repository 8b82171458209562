"""One epoch of a chain, for reading: its tasks, their mappings, and any byte of their memory."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from crtrace.errors import CrtraceError
from crtrace.image.framing import RecordType
from crtrace.image.header import ImageHeader, Stats
from crtrace.image.layers import LayerRows
from crtrace.image.losses import Unreadable, UnreadableRange, narrowed
from crtrace.image.merged import MergedPages
from crtrace.image.places import PageKind, kinds
from crtrace.image.records import Arch, Cpu, Mm, Task, Thread
from crtrace.image.resolve import Run, Source, memory_runs, read_run
from crtrace.image.tables import FileInfo, Files, Vma, Vmas
from crtrace.units import PAGE_SIZE, Bytes, to_ranges


@dataclass(frozen=True, slots=True)
class ThreadView:
    """A thread with its registers, if they are known."""

    thread: Thread
    cpu: Cpu | None


@dataclass(frozen=True, slots=True)
class TaskView:
    """A task with what belongs to it. ``mm`` is None for one without memory, like a zombie.

    ``id`` and ``parent`` are record ids; the parent is 0 for a task without one in the image.
    """

    id: int
    parent: int
    task: Task
    mm: Mm | None
    vmas: tuple[Vma, ...]
    threads: tuple[ThreadView, ...]


class Epoch(MergedPages):
    """An epoch with everything it needs from its lineage.

    Records and pages are read when asked for, and checked then.
    """

    @property
    def header(self) -> ImageHeader:
        """What the image says of itself."""
        return self.image.header

    @cached_property
    def arch(self) -> Arch | None:
        """The machine, if it was recorded."""
        return next((record for _, _, record in self.image.records(Arch, self.damaged)), None)

    @cached_property
    def stats(self) -> dict[str, Any]:
        """The statistics of the checkpoint."""
        return next((record.fields for _, _, record in self.image.records(Stats, self.damaged)), {})

    @cached_property
    def files(self) -> dict[int, FileInfo]:
        """The mapped files by id."""
        tables = (record for _, _, record in self.image.records(Files, self.damaged))
        return {row.id: row for table in tables for row in table.rows}

    @cached_property
    def tasks(self) -> tuple[TaskView, ...]:
        """Every task with its threads and mappings, in the order they were written."""
        cpus = {parent: cpu for _, parent, cpu in self.image.records(Cpu, self.damaged)}
        threads: dict[int, list[ThreadView]] = defaultdict(list)
        for number, parent, thread in self.image.records(Thread, self.damaged):
            threads[parent].append(ThreadView(thread, cpus.get(number)))
        vmas = {parent: table.rows for _, parent, table in self.image.records(Vmas, self.damaged)}
        mms = {parent: (number, mm) for number, parent, mm in self.image.records(Mm, self.damaged)}
        views = []
        for number, parent, task in self.image.records(Task, self.damaged):
            mm_id, mm = mms.get(number, (0, None))
            own = vmas.get(mm_id, ()) if mm else ()
            views.append(TaskView(number, parent, task, mm, own, tuple(threads[number])))
        return tuple(views)

    def passed_over(self, kind: RecordType, parent: int | None = None) -> list[int]:
        """The damaged records of a type that are passed over; of one parent, if it is given."""
        rows = self.image.directory
        return [
            number
            for number in sorted(self.damaged)
            if rows[number - 1]["type"] == kind and parent in (None, rows[number - 1]["parent"])
        ]

    def tasks_alike(self, other: Epoch) -> bool:
        """Whether both have the same tasks, wherever their records are."""
        return [replace(view, id=0, parent=0) for view in self.tasks] == [
            replace(view, id=0, parent=0) for view in other.tasks
        ]

    def threads(self, task: TaskView) -> tuple[ThreadView, ...]:
        """The threads of a task, in the order they were written."""
        return task.threads

    def vmas(self, task: TaskView) -> tuple[Vma, ...]:
        """The mappings of a task, ascending."""
        return task.vmas

    def memory_runs(self, task: TaskView, vma: Vma) -> Iterator[Run]:
        """A mapping from start to end as runs ``(addr, npages, source)``, streaming."""
        return memory_runs(self, _space(task), vma)

    def read_run(self, task: TaskView, vma: Vma, addr: int, npages: int) -> Bytes:
        """The contents, ``(npages, 4096)``, of pages of a mapping; zeros where there are none."""
        return read_run(self, _space(task), vma, addr, npages)

    def read_memory(self, task: TaskView, addr: int, length: int) -> bytes:
        """``length`` bytes from ``addr``, which may span mappings.

        Raises ``CrtraceError`` where nothing is mapped, where a page was unreadable, and where the
        contents are in a file that the chain does not keep. All at once: for much, ``memory_runs``.
        """
        parts = []
        end = addr + length
        while addr < end:
            vma = next((vma for vma in task.vmas if vma.start <= addr < vma.end), None)
            if vma is None:
                raise CrtraceError(f"nothing is mapped at {addr:#x} of pid {task.task.pid}")
            stop = min(end, vma.end)
            parts.append(self._read_within(task, vma, addr, stop))
            addr = stop
        return b"".join(parts)

    def _read_within(self, task: TaskView, vma: Vma, addr: int, end: int) -> bytes:
        first, last = addr & -PAGE_SIZE, (end + PAGE_SIZE - 1) & -PAGE_SIZE
        part = replace(vma, start=first, end=last, pgoff=vma.pgoff + first - vma.start)
        for run in self.memory_runs(task, part):
            if run.source is Source.FILE:
                path = self.files[vma.file].path if vma.file in self.files else vma.name
                raise CrtraceError(
                    f"the contents at {run.addr:#x} are in {path}, which the chain does not keep",
                    hint="read that file at the same offset",
                )
            if run.source is Source.UNREADABLE:
                raise CrtraceError(
                    f"the page at {run.addr:#x} could not be read when the epoch was taken"
                )
        data = self.read_run(task, part, first, part.pages).tobytes()
        return data[addr - first : end - first]

    def losses(self) -> list[UnreadableRange]:
        """The pages that are there, could not be read, and have not been read since, by address."""
        return [
            loss
            for space in self.spaces
            for rows in self.index_parts(space)
            for loss in self.losses_in(space, rows)
        ]

    def losses_in(self, space: int, rows: LayerRows) -> Iterator[UnreadableRange]:
        """Those among some rows of the merged index of a space."""
        lost = rows.select(kinds(rows.places) == PageKind.UNREADABLE)
        for level in np.unique(lost.levels).tolist():
            tables = (
                table
                for _, _, table in self.lineage[level].records(Unreadable, self._damaged(level))
            )
            reasons = [row for table in tables for row in table.rows if row.space == space]
            yield from narrowed(reasons, to_ranges(lost.pages[lost.levels == level]))


def _space(task: TaskView) -> int:
    if task.mm is None:
        raise CrtraceError(f"pid {task.task.pid} has no memory in this epoch")
    return task.mm.space
