"""One process under watch: the loop from fault to file, as DESIGN.md draws it."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from crtrace import __version__
from crtrace.capture import state
from crtrace.capture.copy import copy_pages
from crtrace.capture.objects import MappedObject, ObjectTable
from crtrace.capture.pipeline import BUFFERS, Pipeline
from crtrace.capture.state import Snapshot
from crtrace.capture.target import Target
from crtrace.capture.work import Work
from crtrace.errors import TargetGone
from crtrace.image.chainindex import IndexEntry
from crtrace.image.imagewriter import ImageWriter
from crtrace.image.store import ChainWriter
from crtrace.linux.addrspace import AddressSpace
from crtrace.linux.events import open_accounting
from crtrace.linux.files import FileFacts
from crtrace.linux.procfs import Process
from crtrace.linux.ptrace import StoppedProcess, signals_held
from crtrace.track.dirty import Counts, WrittenPages
from crtrace.track.userfaultfd import EVERYTHING
from crtrace.units import (
    CHUNK_PAGES,
    U64,
    count_pages,
    expand,
    intersect,
    merge,
    no_pages,
    subtract,
)

MM_SPACE = 1
"""The space of the target's private memory; objects are numbered from the next on."""
LITTLE = 512
"""Pages that may be left for the pause: about 0.5 ms of copying."""
AT_ONCE = BUFFERS * CHUNK_PAGES // 2
"""Pages that can be collected without waiting for the writers, and leave room for the pause."""
PAGES_PER_MS = 800
"""Scattered pages copied in a millisecond: 1 µs each (DESIGN.md), and a reserve."""

Witness = Callable[[Process, AddressSpace], None]
Progress = Callable[[int, int], None]


class ProgramChanged(TargetGone):
    """The target called ``execve``: the address space under watch is no more."""


class Session:
    """A target and the chain that it is watched into.

    ``progress(done, total)`` is told of pages copied while the target runs. ``witness``, for
    tests and the demo, is called while the target is stopped, after everything was captured; what
    it takes is not counted as pause.
    """

    def __init__(
        self,
        process: Process,
        chain: ChainWriter,
        marks: WrittenPages,
        *,
        max_pause_ms: float = 10.0,
        progress: Progress = lambda done, total: None,
        witness: Witness | None = None,
    ) -> None:
        self.process = process
        self.chain = chain
        self._marks = marks
        self._progress = progress
        self._witness = witness
        self._little = max(1, min(LITTLE, int((max_pause_ms - 2) * PAGES_PER_MS)))
        self._objects = ObjectTable(MM_SPACE + 1)
        self._steady: dict[int, FileFacts] = {}
        self._carried = no_pages()
        self._fresh = True
        self._counted = Counts(0, 0, 0)
        with ExitStack() as undo:
            self._tgid = marks.add(process)
            undo.callback(marks.remove, self._tgid)
            self._target = Target(process)
            undo.callback(self._disarm)
            self._pipeline = Pipeline()
            undo.callback(self._pipeline.close)
            self._accounting = open_accounting()
            if self._accounting:
                undo.callback(self._accounting.close)
            self._undo = undo.pop_all()

    def close(self) -> None:
        """Disarm the target and end the worker threads; it may be called twice."""
        self._undo.close()

    def _disarm(self) -> None:
        self._target.close()  # which target that is changes with an exec

    def adopt(self, objects: dict[tuple[int, int], int]) -> None:
        """Go on with the object spaces of an existing chain, by device and inode."""
        for key, space in objects.items():
            self._objects.remember(key, space)

    def checkpoint(
        self, reason: str = "", *, full: bool = False
    ) -> tuple[IndexEntry, dict[str, Any]]:
        """Take the next epoch; its index entry and statistics.

        When it raises, nothing was committed and the target runs; what was found written is
        carried into the next attempt. ``ProgramChanged``: begin again with :meth:`follow_exec`.
        """
        work = Work(self._counted, self._carried, whole=full or self._fresh)
        try:
            return self._take(work, reason, full)
        except TargetGone as error:
            if self.program_changed():
                raise ProgramChanged(f"process {self.process.pid} called execve") from error
            raise
        finally:
            self._carried = no_pages() if work.committed else work.scanned

    def _take(self, work: Work, reason: str, full: bool) -> tuple[IndexEntry, dict[str, Any]]:
        image = self.chain.begin(
            full=full, reason=reason, armer=self._target.armer.name, tool_version=__version__,
            boot_id=state.boot_id(), kernel=state.kernel(), hostname=state.hostname(),
        )  # fmt: skip
        with image, self._pipeline.writing(image):
            self._precopy(work)
            with self._mapped_objects(work) as objects:
                snapshot = self._pause(work, objects)
            work.marked = self._marks.drain().get(self._tgid, work.marked)
            self._describe(image, work, snapshot)
            self._pipeline.wait_idle()
            work.written_at = time.monotonic()
            stats = work.statistics(self._counted, self._fresh)
            if self._accounting:
                stats["paid"] = self._accounting.totals(self.process)
            entry = image.commit(stats)
            work.committed, self._fresh = True, False
            self._steady = work.steady
        stats["total_time"] = work.elapsed()
        return entry, stats

    @property
    def heals(self) -> bool:
        """Whether the target would have put itself right had we died while attaching."""
        return self._target.armer.heals

    def program_changed(self) -> bool:
        """Whether the process has called ``execve`` since it was armed."""
        return self.process.alive() and not self._target.same_program()

    def follow_exec(self) -> None:
        """Arm the new program of the process, if it is a new one; the next epoch must be full."""
        if not self.program_changed():
            return
        self._target.close()
        self._target = Target(self.process)
        self._carried, self._steady, self._fresh = no_pages(), {}, True

    # ---- while the target runs -----------------------------------------------------------------

    def _precopy(self, work: Work) -> None:
        """Copy what was written, again and again, until little is left for the pause.

        The last round is only collected, not yet compressed: it lasts as long as copying takes, so
        that the target can write little meanwhile.
        """
        left = self._written_since(work.faults)
        if work.whole or left > self._little:
            left = self._precopy_round(work)
            while left > AT_ONCE and work.converging(left):
                left = self._precopy_round(work)
        self._pipeline.hold()
        if left > self._little:
            self._collect(work)

    def _written_since(self, faults: int) -> int:
        return self._marks.counts(self._tgid).faults - faults

    def _precopy_round(self, work: Work) -> int:
        """Copy and compress what is written now; the pages written meanwhile, as BPF counts."""
        faults = self._marks.counts(self._tgid).faults
        self._collect(work)
        self._pipeline.wait_idle()
        return self._written_since(faults)

    def _collect(self, work: Work) -> None:
        scan = self._target.armer.scan(self._target.space)
        work.found(scan.written)
        # What cannot be armed would have to be read again in the pause anyway.
        ranges = subtract(merge(scan.written, work.retry()), scan.unarmed)
        if work.whole and not work.rounds:
            self._target.book.read_advice(self.process)
            ranges = merge(ranges, self._target.armer.everything(), self._target.vdso())
        self._copy(work, ranges, work.rounds, self._reporter(work, count_pages(ranges)))
        work.rounds += 1

    def _reporter(self, work: Work, total: int) -> Callable[[int], None]:
        done = 0

        def report(pages: int) -> None:
            nonlocal done
            done += pages
            if work.rounds == 0:
                self._progress(done, total)

        return report

    def _copy(self, work: Work, ranges: U64, round: int, report: Callable[[int], None]) -> int:
        read = self._target.reader.read
        copied = copy_pages(read, ranges, MM_SPACE, round, self._pipeline, report)
        work.copied(ranges, copied)
        return copied.pages

    @contextmanager
    def _mapped_objects(self, work: Work) -> Iterator[list[MappedObject]]:
        """The objects that the target maps now; those that nobody writes are read right away."""
        self._target.space.refresh()
        objects = self._target.objects(self._objects)
        try:
            for each in objects:
                if not each.steady:
                    continue
                if work.whole or self._steady.get(each.space) != each.facts:
                    self._copy_object(work, each)
                work.steady[each.space] = each.facts
            yield objects
        finally:
            for each in objects:
                each.close()

    def _copy_object(self, work: Work, each: MappedObject) -> None:
        table = self.chain.known.get(each.space)
        known = table.absent_from(no_pages()) if table else work.marked[:0]
        ranges = each.populated(self._target.scanner, known)
        copied = copy_pages(each.read, ranges, each.space, work.rounds, self._pipeline)
        work.object_copied(each.space, ranges, copied)

    # ---- while the target is stopped -----------------------------------------------------------

    def _pause(self, work: Work, objects: list[MappedObject]) -> Snapshot:
        """Stop, scan, copy the residual, take the registers, go."""
        stopped = StoppedProcess(self.process)
        with signals_held(), _no_garbage_collection():
            work.stopping_at = time.monotonic()
            try:
                stopped.stop()
                work.stopped_at = time.monotonic()
                snapshot = self._capture(work, stopped, objects)
                work.captured_at = time.monotonic()
                if self._witness:
                    self._witness(self.process, self._target.space)
                work.resuming_at = time.monotonic()
            finally:
                stopped.release()
                work.resumed_at = time.monotonic()
        work.waits_given_back = stopped.waits_given_back
        work.overflowed = self._pipeline.release()
        return snapshot

    def _capture(
        self, work: Work, stopped: StoppedProcess, objects: list[MappedObject]
    ) -> Snapshot:
        target = self._target
        if not target.same_program():
            raise ProgramChanged(f"process {self.process.pid} called execve")
        if target.space.refresh():
            _update_objects(objects, target.objects(self._objects))
        scan = target.armer.scan(target.space)
        self._marks.switch()
        self._counted = self._marks.counts(self._tgid)
        work.found(scan.written)
        work.gone = subtract(scan.gone, target.vdso())
        work.unarmed = count_pages(scan.unarmed)
        residual = subtract(merge(scan.written, work.retry()), work.gone)
        work.residual = self._copy(work, residual, work.rounds, lambda pages: None)
        for each in objects:
            if work.steady.get(each.space) != each.facts:
                self._copy_object(work, each)
        work.objects = {each.key: each.space for each in objects}
        return self._snapshot(work, stopped)

    def _snapshot(self, work: Work, stopped: StoppedProcess) -> Snapshot:
        pid = self.process.pid
        threads = state.leader_first(pid, list(stopped.tracees.values()))
        for tracee in threads:
            tracee.capture()
        return Snapshot(
            self.process.stat(), self._target.space.vmas, threads,
            threads[0].read_pending(shared=True),
        )  # fmt: skip

    # ---- after the pause -----------------------------------------------------------------------

    def _describe(self, image: ImageWriter, work: Work, snapshot: Snapshot) -> None:
        """Everything of the epoch but page contents and statistics."""
        for space, populated in work.populated.items():
            self._mark_holes(image, space, subtract(EVERYTHING, populated), no_pages())
        self._mark_holes(image, MM_SPACE, work.gone, work.precopied)
        for (space, errno), pages in work.unreadable_pages(MM_SPACE).items():
            image.mark_unreadable(space, pages, errno)
        state.write_records(
            image, self.process, snapshot, self._target.book, work.objects, MM_SPACE,
            self._target.armer.ldt,
        )  # fmt: skip

    def _mark_holes(self, image: ImageWriter, space: int, gone: U64, precopied: U64) -> None:
        """What the parent, or this epoch's pre-copy, has of ``gone`` is there no more."""
        known = self.chain.known.get(space)
        if known is not None:
            image.mark_holes(space, known.absent_from(subtract(EVERYTHING, gone)))
        image.mark_holes(space, expand(intersect(precopied, gone)))


def _update_objects(objects: list[MappedObject], now: list[MappedObject]) -> None:
    for each in objects:
        each.close()
    objects[:] = now


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
