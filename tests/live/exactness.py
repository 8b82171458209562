"""Take epochs of a target in this process, and judge each by the target's own memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from crtrace.capture.attach import attached
from crtrace.capture.session import Session
from crtrace.demo.judge import Judge, Verdict
from crtrace.image.epoch import Epoch
from crtrace.image.reader import Chain
from crtrace.image.resolve import Run, Source
from crtrace.image.tables import Vma
from crtrace.units import PAGE_SIZE, Pid
from tests.live.harness import MemoryReader


@dataclass
class Judged:
    """A session whose epochs are all compared with what ``/proc/PID/mem`` gave in the pause."""

    session: Session
    judge: Judge
    path: Path
    stats: list[dict[str, Any]] = field(default_factory=list)
    verdict: Verdict = field(default_factory=Verdict)

    def take(self, reason: str = "test", *, full: bool = False) -> Verdict:
        """One more epoch, which must be exact."""
        entry, stats = self.session.checkpoint(reason, full=full)
        self.stats.append(stats)
        with self.epoch(entry.epoch) as epoch:
            self.verdict = self.judge.judge(epoch)
        wrong = [hex(address) for address in self.verdict.wrong[:10]]
        assert not wrong, f"epoch {entry.epoch}: {len(self.verdict.wrong)} pages differ: {wrong}"
        assert self.verdict.compared > 10
        return self.verdict

    @contextmanager
    def epoch(self, number: int = -1) -> Iterator[Epoch]:
        """An epoch of the chain, open."""
        with Chain.open(self.path) as chain:
            yield chain.epoch(number)


@contextmanager
def judged(pid: int, path: Path, **options: Any) -> Iterator[Judged]:
    """Attach to a process; every epoch taken through it must be exact."""
    judge = Judge()
    with attached(Pid(pid), path, witness=judge, **options) as session:
        yield Judged(session, judge, path)


def reader(epoch: Epoch) -> MemoryReader:
    """``read(address, length)`` of an epoch's first process, within one mapping.

    What the chain leaves to a mapped file is read from that file, as its users would.
    """
    task = epoch.tasks[0]

    def read(address: int, length: int) -> bytes:
        vma = next(v for v in task.vmas if v.start <= address < v.end)
        first, end = address & -PAGE_SIZE, -(-(address + length) // PAGE_SIZE) * PAGE_SIZE
        part = replace(vma, start=first, end=end, pgoff=vma.pgoff + first - vma.start)
        pages = b"".join(_contents(epoch, part, run) for run in epoch.memory_runs(task, part))
        return pages[address - first : address - first + length]

    return read


def _contents(epoch: Epoch, vma: Vma, run: Run) -> bytes:
    size = run.npages * PAGE_SIZE
    if run.source is not Source.FILE:
        return epoch.read_memory(epoch.tasks[0], run.addr, size)
    with open(epoch.files[vma.file].path, "rb") as file:
        file.seek(vma.pgoff + run.addr - vma.start)
        return file.read(size).ljust(size, b"\0")


@contextmanager
def acting(session: Session, before: str, action: Callable[[], object]) -> Iterator[None]:
    """In each epoch taken inside the block, ``action`` runs before a step of the session."""
    step = getattr(session, before)

    def with_action(*args: Any) -> Any:
        action()
        return step(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(session, before, with_action)
        yield


def take_with(judge: Judged, action: Callable[[], object], before: str) -> None:
    """An exact epoch, in which ``action`` runs before a step of the session."""
    with acting(judge.session, before, action):
        judge.take()
