"""What an epoch lacks besides memory, because the records that had it are damaged."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from crtrace.image.epoch import Epoch
from crtrace.image.framing import RecordType, type_name
from crtrace.image.records import Task, Thread

WHAT: dict[int, tuple[str, str]] = {
    RecordType.ARCH: ("machine", "the description of the machine"),
    RecordType.TASK: ("process", "a process, with all that belongs to it"),
    RecordType.MM: ("address space", "the address space{whose}"),
    RecordType.VMAS: ("memory map", "the memory map{whose}"),
    RecordType.FILES: ("mapped files", "the table of mapped files"),
    RecordType.THREAD: ("thread", "a thread{whose}, with its registers"),
    RecordType.CPU: ("registers", "the registers of thread {tid}{whose}"),
    RecordType.UNREADABLE: ("unreadable", "the reasons why pages could not be read"),
    RecordType.STATS: ("statistics", "the statistics"),
}
"""What the records of a type say, in a word or two and in a sentence; with the others, nothing is
lost but pages."""


@dataclass(frozen=True, slots=True)
class StateLoss:
    """A record that an epoch lacks: ``what`` it had, and whose, where that is known.

    ``pid`` is 0 for what is of no process, or of one that is lost itself; ``tid`` is that of the
    thread whose registers are.
    """

    what: str
    text: str
    record: str
    offset: int
    pid: int = 0
    comm: str = ""
    tid: int = 0


def lost_state(epoch: Epoch) -> Iterator[StateLoss]:
    """What an epoch lacks because of the damaged records of its image, in their order.

    What belongs to a record that is lost is not told again.
    """
    directory = epoch.image.directory
    tasks = {view.id: view.task for view in epoch.tasks}
    for number in sorted(epoch.damaged):
        kind = int(directory[number - 1]["type"])
        owners = [] if kind == RecordType.TASK else list(_owners(epoch, number))
        if kind in WHAT and epoch.damaged.isdisjoint(owners):
            task = tasks[owners[-1]] if owners else None
            tid = _tid(epoch, owners[0]) if kind == RecordType.CPU else 0
            yield _loss(epoch, number, task, tid)


def _owners(epoch: Epoch, number: int) -> Iterator[int]:
    """The record that one belongs to, the one that that belongs to, up to a task."""
    rows = epoch.image.directory
    while number := int(rows[number - 1]["parent"]):
        yield number
        if rows[number - 1]["type"] == RecordType.TASK:
            return


def _tid(epoch: Epoch, number: int) -> int:
    thread = epoch.image.record(number)
    return thread.tid if isinstance(thread, Thread) else 0


def _loss(epoch: Epoch, number: int, task: Task | None, tid: int) -> StateLoss:
    row = epoch.image.directory[number - 1]
    kind, offset = int(row["type"]), int(row["offset"])
    what, text = WHAT[kind]
    whose = f" of process {task.pid} ({task.comm})" if task else ""
    pid, comm = (task.pid, task.comm) if task else (0, "")
    # A name may have braces, so it is put in and nothing is put into it.
    text = text.replace("{tid}", str(tid)).replace("{whose}", whose)
    return StateLoss(what, text, f"{type_name(kind)} {number}", offset, pid, comm, tid)
