"""Compare an epoch with the process's memory, read independently.

While the process is stopped its whole memory is copied through ``/proc/PID/mem``, as ``maps`` and
``pagemap`` tell; nothing of the code that captures is used. Later the copy is compared with what
the chain says of that epoch, byte for byte, in both directions: a page that the image has and the
process had not must read as zeros.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from crtrace.image.epoch import Epoch, TaskView
from crtrace.image.resolve import Source
from crtrace.units import PAGE_SIZE, U64

_PRESENT, _SWAPPED, _OF_FILE = (np.uint64(1 << bit) for bit in (63, 62, 61))
_FILLED = ("Rss:", "Swap:", "Private_Hugetlb:", "Shared_Hugetlb:")
_LEFT_OUT = ("/[aio]", "anon_inode:", "[vvar", "[vsyscall]", "/dev/dri", "/dev/nvidia")


@dataclass(slots=True)
class Seen:
    """A copy of a process's memory: for each mapping its start, size and pages with contents."""

    pid: int
    mappings: list[tuple[int, int, bool]] = field(default_factory=list)
    """(start, end, private)."""
    pages: dict[int, bytes] = field(default_factory=dict)
    """Contents of runs of pages, by the address of the first."""
    unreadable: list[int] = field(default_factory=list)
    """Pages that /proc/PID/mem refuses."""


@dataclass(slots=True)
class Verdict:
    """What the comparison found; ``wrong`` are addresses of pages that differ."""

    compared: int = 0
    wrong: list[int] = field(default_factory=list)


def observe(pid: int) -> Seen:
    """Copy the memory of a process, which must be stopped."""
    seen = Seen(pid)
    memory = os.open(f"/proc/{pid}/mem", os.O_RDONLY)
    pagemap = os.open(f"/proc/{pid}/pagemap", os.O_RDONLY)
    try:
        for line in _populated(pid):
            span, perms, _, _, inode, *name = line.split(maxsplit=5)
            if name and name[0].startswith(_LEFT_OUT):
                continue
            start, end = (int(part, 16) for part in span.split("-"))
            private = "p" in perms
            if not private and "w" not in perms and inode != "0" and not _in_memory(name):
                continue  # a shared file that is only read: it is referred to, not copied
            seen.mappings.append((start, end, private))
            entries = np.frombuffer(
                os.pread(pagemap, (end - start) // PAGE_SIZE * 8, start // PAGE_SIZE * 8), np.uint64
            )
            owned = _owned(entries, private)
            if private and inode != "0":
                # A file's page that is just being reclaimed looks like one of its own for a moment.
                owned = owned[(entries[owned] & _SWAPPED) == 0]
            _copy_runs(seen, memory, start, owned)
    finally:
        os.close(memory)
        os.close(pagemap)
    return seen


def _populated(pid: int) -> list[str]:
    """The lines of ``smaps`` that begin a mapping with anything in it; reserves can be huge."""
    found: list[str] = []
    head = ""
    with open(f"/proc/{pid}/smaps", encoding="utf-8", errors="replace") as smaps:
        for line in smaps:
            word, _, rest = line.partition(" ")
            if not word.endswith(":"):
                head = line.rstrip("\n")
            elif word in _FILLED and rest.split()[0] != "0" and head not in found[-1:]:
                found.append(head)
    return found


def _in_memory(name: list[str]) -> bool:
    return bool(name) and name[0].startswith(("/dev/shm/", "/memfd:", "/dev/zero", "/SYSV"))


def _owned(entries: U64, private: bool) -> U64:
    """Positions of the pages whose contents are neither absent nor a file's."""
    there = (entries & (_PRESENT | _SWAPPED)) != 0
    if private:
        there &= (entries & _OF_FILE) == 0
    return np.flatnonzero(there).astype(np.uint64)


def _copy_runs(seen: Seen, memory: int, start: int, positions: U64) -> None:
    for run in np.split(positions, np.flatnonzero(np.diff(positions) != 1) + 1):
        if len(run):
            _read_run(seen, memory, start + int(run[0]) * PAGE_SIZE, len(run) * PAGE_SIZE)


def _read_run(seen: Seen, memory: int, address: int, size: int) -> None:
    """Copy a run of pages; what the kernel gives to nobody (guard pages, secrets) is left out."""
    while size > 0:
        try:
            part = os.pread(memory, size, address)
            seen.pages[address] = part
            done = len(part)
        except OSError:
            seen.unreadable.append(address)
            done = PAGE_SIZE
        address, size = address + done, size - done


def compare(seen: Seen, epoch: Epoch) -> Verdict:
    """Judge an epoch by what was seen during its pause."""
    task = next(view for view in epoch.tasks if view.task.pid == seen.pid)
    verdict = Verdict()
    for address, contents in seen.pages.items():
        _compare_run(verdict, epoch.read_memory(task, address, len(contents)), contents, address)
    _find_surplus(verdict, epoch, task, seen)
    return verdict


def _compare_run(verdict: Verdict, ours: bytes, theirs: bytes, address: int) -> None:
    verdict.compared += len(theirs) // PAGE_SIZE
    if ours != theirs:
        a, b = (np.frombuffer(x, np.uint8).reshape(-1, PAGE_SIZE) for x in (ours, theirs))
        bad = np.flatnonzero((a != b).any(axis=1))
        verdict.wrong += [address + int(at) * PAGE_SIZE for at in bad]


def _find_surplus(verdict: Verdict, epoch: Epoch, task: TaskView, seen: Seen) -> None:
    """Pages that only the image has must be zeros: that is what the process would read there."""
    spans = [(start, start + len(data)) for start, data in seen.pages.items()]
    for vma in task.vmas:
        if vma.file or vma.name.startswith(_LEFT_OUT) or vma.name == "[vdso]":
            continue
        for run in epoch.memory_runs(task, vma):
            if run.source is Source.STORED:
                _check_zero(verdict, epoch, task, _outside(run.addr, run.npages, spans))


def _outside(address: int, npages: int, spans: list[tuple[int, int]]) -> list[int]:
    every = np.arange(address, address + npages * PAGE_SIZE, PAGE_SIZE)
    for start, end in spans:
        if start < address + npages * PAGE_SIZE and address < end:
            every = every[(every < start) | (every >= end)]
    return [int(at) for at in every]


def _check_zero(verdict: Verdict, epoch: Epoch, task: TaskView, addresses: list[int]) -> None:
    for address in addresses:
        verdict.compared += 1
        if any(epoch.read_memory(task, address, PAGE_SIZE)):
            verdict.wrong.append(address)


class HasPid(Protocol):
    """A process, as far as the judge cares."""

    @property
    def pid(self) -> int:
        """Its number."""


class Judge:
    """A witness for a session: remembers what it saw of all processes in the last pause."""

    def __init__(self) -> None:
        self.seen: list[Seen] = []

    def __call__(self, processes: Iterable[HasPid]) -> None:
        self.seen = [observe(process.pid) for process in processes]

    def judge(self, epoch: Epoch) -> Verdict:
        """Compare what was seen last with the epoch that was taken in that pause."""
        if not self.seen:
            raise ValueError("nothing was seen yet")
        verdict = Verdict()
        for seen in self.seen:
            found = compare(seen, epoch)
            verdict.compared += found.compared
            verdict.wrong += found.wrong
        return verdict
