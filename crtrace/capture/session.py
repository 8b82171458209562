"""A target and the chain it is watched into: the loop from fault to file, as DESIGN.md draws it."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import numpy as np

from crtrace import __version__
from crtrace.capture import state
from crtrace.capture.copy import copy_pages
from crtrace.capture.objects import MappedObject, Still, mapped_objects
from crtrace.capture.pipeline import BUFFERS, Pipeline
from crtrace.capture.spaces import Spaces
from crtrace.capture.state import FileBook, Snapshot
from crtrace.capture.target import Target
from crtrace.capture.tree import ProgramChanged, StoppedTree, Tree
from crtrace.capture.work import Part, Work
from crtrace.errors import CrtraceError, LeaderGone, TargetBusy, TargetGone
from crtrace.image.chainindex import IndexEntry
from crtrace.image.imagewriter import ImageWriter
from crtrace.image.store import ChainWriter
from crtrace.linux.addrspace import EVERYTHING
from crtrace.linux.events import open_accounting
from crtrace.linux.procfs import Process
from crtrace.linux.ptrace import signals_held
from crtrace.linux.waits import guards_in_vain
from crtrace.track.armer import Scan
from crtrace.track.dirty import Coverage, WrittenPages, pages_under
from crtrace.units import (
    CHUNK_PAGES,
    U64,
    Pid,
    count_pages,
    distinct,
    expand,
    intersect,
    merge,
    no_pages,
    subtract,
)

LITTLE = 512
"""Pages that may be left for the pause: about 0.5 ms of copying."""
SCRAPS = 64
"""Pages that another round before the pause would not make fewer."""
AT_ONCE = BUFFERS * CHUNK_PAGES // 2
"""Pages that can be collected without waiting for the writers, and leave room for the pause."""
PAGES_PER_MS = 800
"""Scattered pages copied in a millisecond, with a reserve: one takes about 1 µs."""
ATTEMPTS = 5
"""Times that an epoch is begun again because a process of the tree ended in the middle of it."""

Witness = Callable[[list[Process]], None]
Progress = Callable[[int, int], None]


class Session:
    """``process`` and, with ``follow``, its descendants; and the chain they are watched into.

    ``progress(done, total)`` is told of pages copied while they run. ``witness``, for tests and
    the demo, is called while all are stopped, after everything was captured; what it takes is not
    counted as pause.
    """

    def __init__(
        self,
        process: Process,
        chain: ChainWriter,
        marks: WrittenPages,
        *,
        spaces: Spaces | None = None,
        follow: bool = False,
        max_pause_ms: float = 10.0,
        progress: Progress = lambda done, total: None,
        witness: Witness | None = None,
    ) -> None:
        self.process = process
        self.chain = chain
        self.exit_status: Callable[[Pid], int | None] = lambda pid: None
        """Asked for the wait status of a process that has ended, if somebody knows it."""
        self._marks = marks
        self._spaces = spaces or Spaces()
        self._progress = progress
        self._witness = witness
        self._most = max(1, int((max_pause_ms - 2) * PAGES_PER_MS))
        """Pages that a pause of that length can copy."""
        self._little = min(LITTLE, self._most)
        self._book = FileBook()
        self._looked_at: object = None
        """BPF's count of map changes when the objects were looked up."""
        self._steady: dict[int, Still] = {}
        with ExitStack() as undo:
            self._tree = Tree(process, marks, self._spaces, follow)
            undo.callback(self._tree.close)
            # Two walks of a scan at once take 0.6 of the time, where two processors are free.
            self._beside = ThreadPoolExecutor(1, "beside")
            undo.callback(self._beside.shutdown)
            with signals_held():
                self._pipeline = Pipeline()
                undo.callback(self._pipeline.close)
                self._beside.submit(int)  # so that the thread is there before the first pause
            self._accounting = open_accounting()
            if self._accounting:
                undo.callback(self._accounting.close)
            self._undo = undo.pop_all()

    def close(self) -> None:
        """Disarm the targets and end the worker threads; it may be called twice."""
        self._undo.close()

    @property
    def processes(self) -> list[Process]:
        """Those that were under watch when the last epoch was taken."""
        return [member.process for member in self._tree.members]

    @property
    def heals(self) -> bool:
        """Whether the targets would have put themselves right had we died while attaching."""
        return all(target.armer.heals for target in self._tree.targets())

    def program_changed(self) -> bool:
        """Whether the target has called ``execve`` since it was armed."""
        return self.process.alive() and not self._tree.root.settled()

    def checkpoint(
        self, reason: str = "", *, full: bool = False
    ) -> tuple[IndexEntry, dict[str, Any]]:
        """Take the next epoch; its index entry and statistics.

        When it raises, nothing was committed and the targets run; what was found written is
        carried into the next attempt. ``ProgramChanged``: the next epoch must be ``full``.
        ``TargetGone``: nobody is left. ``TargetBusy``: try again later.
        """
        for _ in range(ATTEMPTS):
            try:
                if not full and self.program_changed():
                    raise ProgramChanged(f"process {self.process.pid} called execve")
                return self._attempt(reason, full)
            except (TargetGone, LeaderGone) as error:  # of any in the tree
                if not full and self.program_changed():
                    raise ProgramChanged(f"process {self.process.pid} called execve") from error
                if self._tree.over or not any(process.alive() for process in self.processes):
                    raise self.process.gone() from error
                why = self.process.gone() if isinstance(error, LeaderGone) else None
                if isinstance(why, LeaderGone) and self._tree.root in self._tree.members:
                    raise why from error
        raise TargetBusy(
            f"process {self.process.pid} or one of its tree called execve or ended, "
            f"{ATTEMPTS} times while an epoch was taken",
            hint="try again",
        )

    def _attempt(self, reason: str, full: bool) -> tuple[IndexEntry, dict[str, Any]]:
        self._tree.update()
        if self._tree.over:
            raise self.process.gone()
        work = Work()
        try:
            return self._take(work, reason, full)
        finally:
            if not work.committed:
                self._failed(work)

    def _take(self, work: Work, reason: str, full: bool) -> tuple[IndexEntry, dict[str, Any]]:
        image = self._begin(reason, full)
        with image, self._pipeline.writing(image):
            self._precopy(work, image, full)
            with self._mapped_objects(work, full) as objects:
                self._come_close(work, image)
                snapshots = self._pause(work, image, objects)
            self._look_back(work)
            self._drain(work)
            self._describe(image, work, snapshots)
            self._pipeline.wait_idle()
            for space in work.parts.keys() - {target.space for target in self._tree.targets()}:
                image.drop(space)  # it ended while it was copied
            work.written_at = time.monotonic()
            stats = self._statistics(work)
            if self._accounting:
                stats["paid"] = self._accounting.totals(self.processes)
            entry = image.commit(stats)
            self._committed(work)
        stats["total_time"] = work.elapsed()
        return entry, stats

    def _statistics(self, work: Work) -> dict[str, Any]:
        return {**work.statistics(), "bpf_coverage": str(self._marks.coverage)}

    def _begin(self, reason: str, full: bool) -> ImageWriter:
        return self.chain.begin(
            full=full, reason=reason, armer=self._tree.root.target.armer.name,
            tool_version=__version__, boot_id=state.boot_id(), kernel=state.kernel(),
            hostname=state.hostname(),
        )  # fmt: skip

    def _failed(self, work: Work) -> None:
        for target in self._tree.targets():
            target.failed()
            if part := work.parts.get(target.space):
                target.carried = part.scanned
                target.doubted = merge(part.suspect, part.revisit_next)

    def _committed(self, work: Work) -> None:
        work.committed = True
        self._steady = work.steady
        self._tree.departed.clear()
        for target in self._tree.targets():
            target.fresh = False
            target.carried = target.doubted = no_pages()
            part = work.parts[target.space]
            target.recent = part.scanned if part.direct else part.suspect
            target.revisit = part.revisit_next

    # ---- while the targets run -----------------------------------------------------------------

    def _precopy(self, work: Work, image: ImageWriter, full: bool) -> None:
        """Copy and compress what was written, if it is much."""
        for target in self._tree.targets():
            work.parts[target.space] = _part(target, full or target.fresh)
        left, parts = self._uncopied(work), work.parts.values()
        revisit = sum(count_pages(part.revisit) for part in parts)
        much = left > self._little_enough() or revisit > self._bearable()
        if much or any(part.whole for part in parts):
            self._precopy_round(work, image)

    def _come_close(self, work: Work, image: ImageWriter) -> None:
        """Copy what was written meanwhile, again and again, until little is left for the pause.

        The last rounds are only collected, not yet compressed: they last as long as copying takes,
        so that the targets can write little meanwhile.
        """
        while (left := self._uncopied(work)) > self._bearable() and work.converging(left):
            self._precopy_round(work, image)
        self._pipeline.hold()
        if self._must_stand_still():
            if left > self._little_enough():
                self._collect(work, image)
                self._uncopied(work)  # by a look at everything, which the pause's scan can build on
        elif not self._all_compared():
            self._collect_last(work, image, left)

    def _collect_last(self, work: Work, image: ImageWriter, left: int) -> None:
        """Collect once in any case: what the pause does was done a moment ago then, and takes 0.9
        of the time. Again while that leaves much less."""
        while True:
            self._collect(work, image)
            before, left = left, self._uncopied(work)
            if not SCRAPS < left < before / 2:
                return

    def _little_enough(self) -> int:
        """Pages that may as well be left for the pause."""
        # Where a scan takes a stop of its own, that may be a little more.
        return self._bearable() if self._must_stand_still() else self._little

    def _bearable(self) -> int:
        """Pages that may be left at all."""
        return min(AT_ONCE, self._most)

    def _precopy_round(self, work: Work, image: ImageWriter) -> None:
        """Copy and compress what is written now."""
        self._collect(work, image)
        self._pipeline.wait_idle()

    def _uncopied(self, work: Work) -> int:
        """Pages that are written and not copied: as many as BPF has counted faults since the last
        round began, or as an armer knows better; and those of an epoch that failed."""
        known = 0
        for target in self._tree.targets():
            with _unless_it_ended(target):
                known += target.written_now(self._tree.tgids(target))
        written = max(0, self._tree.faults() - work.faults, known)
        if work.rounds:
            return written
        return written + sum(count_pages(part.carried) for part in work.parts.values())

    def _collect(self, work: Work, image: ImageWriter) -> None:
        work.faults = self._tree.faults()
        turned = work.rounds == 0
        if turned:
            self._marks.switch()
        found = {}
        with self._standing_still(work) as stopped:
            for target in self._tree.targets():
                # Who is met only now is read in the pause.
                if part := work.parts.get(target.space):
                    with _unless_it_ended(target):
                        found[target] = self._found(
                            target, part, stopped=stopped, ahead=True, turned=turned
                        )
        for target, (scan, again) in found.items():
            # What cannot be armed would have to be read again in the pause anyway.
            ranges = subtract(merge(scan.written, again), scan.unarmed)
            with _unless_it_ended(target):
                self._copy_ahead(work, image, target, ranges)
        if turned:
            self._drain(work)
        work.rounds += 1

    @contextmanager
    def _standing_still(self, work: Work) -> Iterator[bool]:
        """Stop all for a moment if there is an armer that cannot scan otherwise; whether they
        are stopped."""
        if not self._must_stand_still():
            yield False
            return
        with self._all_stopped(work) as stopped:
            for target in self._tree.targets():
                target.refresh(self._tree.tgids(target))
            yield True
            work.stood_still(time.monotonic() - stopped.stopping_at)

    def _must_stand_still(self) -> bool:
        return any(target.armer.stands_still for target in self._tree.targets())

    def _all_compared(self) -> bool:
        """Whether no round finds anything that need not be read again in the pause."""
        return all(target.compared for target in self._tree.targets())

    def _copy_ahead(self, work: Work, image: ImageWriter, target: Target, ranges: U64) -> None:
        part = work.parts[target.space]
        if target.fresh and not part.rounds:
            self._inherit(image, target)
        if part.whole and not part.rounds:
            target.refresh(self._tree.tgids(target))  # not every armer has
            target.advice.read(target.process)
            ranges = merge(ranges, target.armer.everything(), target.map.vdso)
        before, work.pages = work.pages, work.pages + count_pages(ranges)
        self._copy(target, part, ranges, self._reporter(work, before))

    def _found(
        self,
        target: Target,
        part: Part,
        *,
        stopped: bool,
        ahead: bool = False,
        turned: bool = False,
    ) -> tuple[Scan, U64]:
        """What a scan finds, kept at once, and pages to read besides."""
        tgids = self._tree.tgids(target)
        scan = target.scan(tgids, stopped=stopped, ahead=ahead, turned=turned, beside=self._beside)
        again = part.found(scan)
        if target.visited_before and not part.rounds:
            part.reread_next_epoch()
        if not target.visited():
            part.trust()
        return scan, again

    def _inherit(self, image: ImageWriter, target: Target) -> None:
        """A new process has most of its pages from its parent: refer to those."""
        parent = self._tree.of(target)[0].parent
        if parent and parent.target is not target:
            image.inherit(target.space, parent.target.space)

    def _reporter(self, work: Work, done: int) -> Callable[[int], None]:
        def report(pages: int) -> None:
            nonlocal done
            done += pages
            if work.rounds == 0:
                self._progress(done, work.pages)

        return report

    def _copy(self, target: Target, part: Part, ranges: U64, report: Callable[[int], None]) -> int:
        copied = copy_pages(
            target.reader.read, ranges, target.space, part.rounds, self._pipeline, report
        )
        part.copied(ranges, copied)
        return copied.pages

    @contextmanager
    def _mapped_objects(self, work: Work, full: bool) -> Iterator[list[MappedObject]]:
        """The objects that are mapped now; those that nobody writes are read right away."""
        self._looked_at = self._map_changes()
        for target in self._tree.targets():
            with suppress(TargetGone):
                target.refresh(self._tree.tgids(target))
        objects = self._find_objects()
        try:
            for each in objects:
                still = each.still()
                if still is None:
                    continue
                if full or self._steady.get(each.space) != still:
                    self._copy_object(work, each, 0)
                work.steady[each.space] = still
            yield objects
        finally:
            for each in objects:
                each.close()

    def _map_changes(self) -> object:
        """Equal as long as nobody has changed a map; of that not every kernel tells."""
        if self._marks.coverage is Coverage.ALONE:
            return object()
        return sum(self._tree.counts(member).map_changes for member in self._tree.members)

    def _find_objects(self, *, hurry: bool = False) -> list[MappedObject]:
        targets = self._tree.targets()
        self._book.update(targets, hurry=hurry)
        return mapped_objects(targets, self._spaces, self._book.facts)

    def _copy_object(self, work: Work, each: MappedObject, round: int) -> None:
        table = self.chain.known.get(each.space)
        known = table.absent_from(no_pages()) if table else np.empty(0, dtype=np.uint64)
        ranges = each.populated(known)
        copied = copy_pages(each.read, ranges, each.space, round, self._pipeline)
        work.object_copied(each.space, ranges, copied)

    # ---- while they are stopped ----------------------------------------------------------------

    @contextmanager
    def _all_stopped(self, work: Work) -> Iterator[StoppedTree]:
        """Nobody runs in here; signals to us wait, and garbage is not collected."""
        stopped = StoppedTree(self._tree)
        with signals_held(), _no_garbage_collection():
            try:
                stopped.get_ready()
                stopped.stop()
                yield stopped
            finally:
                work.waits_given_back += stopped.release()

    def _pause(self, work: Work, image: ImageWriter, objects: list[MappedObject]) -> list[Snapshot]:
        """Stop, scan, copy the residual, take the registers, go."""
        with self._all_stopped(work) as stopped:
            work.stopping_at, work.stopped_at = stopped.stopping_at, stopped.stopped_at
            snapshots = self._capture(work, stopped, objects)
            work.captured_at = time.monotonic()
            if self._witness:
                self._witness(self.processes)
            work.resuming_at = time.monotonic()
        work.resumed_at = stopped.resumed_at
        work.processes, work.limits = len(self._tree.members), self._tree.limits()
        for target in self._tree.targets():
            part = work.parts[target.space]
            part.gone = subtract(part.last.gone, target.map.vdso)
            if target.fresh and part.rounds == 1:
                self._inherit(image, target)
        work.overflowed = self._pipeline.release()
        for snapshot in snapshots:
            for address in guards_in_vain(thread.prstatus for thread in snapshot.threads):
                snapshot.target.armer.let_go(address)
        return snapshots

    def _capture(
        self, work: Work, stopped: StoppedTree, objects: list[MappedObject]
    ) -> list[Snapshot]:
        targets = self._tree.targets()
        # Maps that read as before may have been others meanwhile, when the objects were opened.
        if self._refresh(work, targets) or self._map_changes() != self._looked_at:
            _update_objects(objects, self._find_objects(hurry=True))
        for target in targets:
            self._scan(work, target, work.parts[target.space])
        self._marks.switch()
        for target in targets:
            target.paused(self._tree.tgids(target))
        for member in self._tree.members:
            before, member.counted = member.counted, self._tree.counts(member)
            work.count(before, member.counted)
        began = time.monotonic()
        for each in objects:
            if each.space not in work.steady or work.steady[each.space] != each.still():
                work.steady.pop(each.space, None)
                self._copy_object(work, each, 1)
        work.compared_in = time.monotonic() - began
        work.objects = {each.key: each.space for each in objects}
        return [
            Snapshot.take(member, list(stopped.threads(member).tracees.values()))
            for member in self._tree.members
        ]

    def _refresh(self, work: Work, targets: list[Target]) -> bool:
        """Read the maps again; whether anything is mapped otherwise than before the pause."""
        changed = len(targets) != len(work.parts)
        for target in targets:
            if target.space not in work.parts:
                work.parts[target.space] = _part(target, True)
            changed |= target.refresh(self._tree.tgids(target))
        return changed

    def _scan(self, work: Work, target: Target, part: Part) -> None:
        scan, again = self._found(target, part, stopped=True)
        part.last = scan
        residual, again = scan.written, merge(again, target.pinned(lambda: part.scanned))
        if len(again):
            residual = merge(residual, subtract(again, scan.gone))
        if part.whole and not part.rounds:
            residual = merge(residual, target.map.vdso)
        work.residual += self._copy(target, part, residual, lambda pages: None)

    # ---- after the pause -----------------------------------------------------------------------

    def _look_back(self, work: Work) -> None:
        """Look whether direct reads were under way; and where the pause's scan was bounded, whether
        that was right."""
        for target in self._tree.targets():
            part = work.parts[target.space]
            part.direct = target.reads_directly()
            if part.last.bounded:
                with suppress(CrtraceError):  # it ended, or calls exec: the epoch is complete
                    tgids = self._tree.tgids(target)
                    part.late = target.look_back(tgids, part.gone, self._beside)
            if part.late:
                work.limits.append(
                    f"process {target.process.pid}: {part.late} pages changed unnoticed, before "
                    "the pause or just after it"
                )

    def _drain(self, work: Work) -> None:
        """Which pages BPF has seen written in the generation before the last switch."""
        marked = self._marks.drain()
        for target in self._tree.targets():
            if not (part := work.parts.get(target.space)):
                continue  # it was met in the stop of a round
            tgids = self._tree.tgids(target)
            pages, again = pages_under(target.marked_under(tgids), marked)
            target.marked(pages, again, tgids)
            part.marked = distinct(np.concatenate([part.marked, pages]))

    def _describe(self, image: ImageWriter, work: Work, snapshots: list[Snapshot]) -> None:
        """Everything of the epoch but page contents and statistics."""
        work.threads = sum(len(snapshot.threads) for snapshot in snapshots)
        for space, populated in work.populated.items():
            self._mark_holes(image, space, subtract(EVERYTHING, populated), no_pages())
        for target in self._tree.targets():
            part = work.parts[target.space]
            self._mark_holes(image, target.space, part.gone, part.precopied)
        for (space, errno), pages in work.unreadable_pages().items():
            image.mark_unreadable(space, pages, errno)
        state.write_records(image, snapshots, self._book, work.objects)
        self._write_ends(image)

    def _write_ends(self, image: ImageWriter) -> None:
        for member in self._tree.departed:
            if member.status is None:
                member.status = self.exit_status(member.process.pid)
        state.write_ends(image, self._tree.departed)

    def conclude(self) -> tuple[IndexEntry, dict[str, Any]]:
        """When nobody is left: an epoch that only says how the last processes have ended."""
        self._tree.update()
        with self._begin("exit", full=False) as image:
            self._write_ends(image)
            stats = self._statistics(Work())
            entry = image.commit(stats)
        self._tree.departed.clear()
        return entry, stats

    def _mark_holes(self, image: ImageWriter, space: int, gone: U64, precopied: U64) -> None:
        """What the parent, or this epoch's pre-copy, has of ``gone`` is there no more."""
        known = self.chain.known.get(space)
        if known is not None:
            image.mark_holes(space, known.absent_from(subtract(EVERYTHING, gone)))
        image.mark_holes(space, expand(intersect(precopied, gone)))


def _part(target: Target, whole: bool) -> Part:
    carried, revisit = target.carried, target.revisit
    return Part(carried, whole, target.fresh, revisit, revisit_next=target.doubted)


@contextmanager
def _unless_it_ended(target: Target) -> Iterator[None]:
    """What of a target cannot be done because it has ended is left out."""
    try:
        yield
    except TargetGone:
        if target.lives():
            raise


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
