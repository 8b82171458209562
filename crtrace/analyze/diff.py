"""What is different between two epochs: processes, threads, mappings, files, and pages.

Everything is found as it is asked for, process by process and mapping by mapping. Of a mapping no
more than a window of its page indexes is in memory, however large it is.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from crtrace.analyze.mapdiff import (
    IN_MEMORY,
    MappingChange,
    file_changed,
    map_changes,
    mapped_bytes,
    same_file,
)
from crtrace.analyze.pagediff import PageComparer, Pair, Runs, Verdict, meaning
from crtrace.analyze.summary import held_bytes
from crtrace.errors import UsageError
from crtrace.image.epoch import Epoch, TaskView
from crtrace.image.resolve import Source
from crtrace.image.tables import FileFlag, Vma
from crtrace.units import PAGE_SIZE, Bytes

READ_PAGES = 256
"""Pages whose contents are read at a time: 1 MiB of each epoch."""

Progress = Callable[[float, float], None]
"""Called with the processes done, which may be a fraction, and how many there are."""


@dataclass(slots=True)
class MappingDiff:
    """What became of one mapping. ``counts``, pages by code, are complete when ``runs`` ended."""

    mapping: MappingChange
    alone: dict[str, int]
    """Bytes by source of the parts that only one of the epochs has."""
    _runs: Callable[[Pair], Iterator[tuple[int, Runs]]]
    _progress: Callable[[float], None]
    counts: Counter[int] = field(default_factory=Counter)

    def runs(self) -> Iterator[tuple[Pair, Runs]]:
        """The pages that are not the same, ascending, some 100,000 at a time. Once only."""
        for number, pair in enumerate(self.mapping.pairs):
            for reached, runs in self._runs(pair):
                done = (reached - pair.start) / (pair.end - pair.start)
                self._progress((number + done) / len(self.mapping.pairs))
                if len(runs.codes):
                    self.counts.update(runs.count())
                    yield pair, runs

    def pages(self, verdict: Verdict) -> int:
        """How many pages had that fate."""
        return sum(n for code, n in self.counts.items() if meaning(code)[0] is verdict)

    def how(self, verdict: Verdict) -> dict[str, int]:
        """Those pages by what they were and are, as ``zero to stored``."""
        found = {}
        for code, pages in sorted(self.counts.items()):
            fate, before, after = meaning(code)
            if fate is verdict:
                found[f"{before.value} to {after.value}"] = pages
        return found


@dataclass(slots=True)
class ProcessDiff:
    """What became of one process.

    ``change``: kept, came, went, ended (it is there, without memory) or exec (another program: the
    whole map was replaced, and nothing in it is compared). ``a`` and ``b`` are its two sides.
    ``shares``: the pid under which the memory that it shares has been told already.
    """

    change: str
    a: TaskView | None
    b: TaskView | None
    shares: int | None
    _number: int
    _diff: Diff

    @property
    def task(self) -> TaskView:
        """The later side, or the only one."""
        view = self.b or self.a
        assert view is not None
        return view

    def mappings(self) -> Iterator[MappingDiff]:
        """All mappings of a process that runs the same program in both epochs, else none."""
        if self.change == "kept" and self.shares is None:
            yield from self._diff.mappings(self, self._number)

    def sizes(self) -> dict[str, dict[str, int] | None]:
        """Number and bytes of the mappings, before and after."""
        return {
            name: {"mappings": len(view.vmas), "bytes": mapped_bytes(view.vmas)} if view else None
            for name, view in (("before", self.a), ("after", self.b))
        }

    def threads(self) -> dict[str, list[int]]:
        """Which threads came and went, and which of the others have other registers."""
        cpus = [
            {each.thread.tid: each.cpu for each in view.threads} if view else {}
            for view in (self.a, self.b)
        ]
        before, after = cpus
        both = before.keys() & after.keys()
        return {
            "came": sorted(after.keys() - both),
            "went": sorted(before.keys() - both),
            "registers": sorted(tid for tid in both if before[tid] != after[tid]),
        }


class Diff:
    """Two epochs of a chain, ``a`` before ``b`` or the other way round; ``pid``: only that process.

    Methods raise ``ImageDamaged`` and the like; the constructor ``UsageError`` when neither epoch
    has the process.
    """

    def __init__(
        self, a: Epoch, b: Epoch, *, pid: int | None = None, progress: Progress | None = None
    ) -> None:
        self.a, self.b = a, b
        self._progress = progress or (lambda done, total: None)
        self._comparer = PageComparer(a, b)
        views = ({_key(view): view for view in epoch.tasks} for epoch in (a, b))
        self._before, self._after = views
        keys = [*self._after, *(key for key in self._before if key not in self._after)]
        self._keys = [key for key in keys if pid in (None, key[0])]
        if pid is not None and not self._keys:
            known = ", ".join(str(number) for number, _ in keys) or "none"
            raise UsageError(f"neither epoch has pid {pid}; they have: {known}")

    def files(self) -> list[dict[str, Any]]:
        """The files on disk that were changed or deleted meanwhile, though they stayed mapped."""
        found = []
        before = {(file.dev, file.inode): file for file in self.a.files.values()}
        for file in self.b.files.values():
            was = before.get((file.dev, file.inode))
            if was is None or not same_file(was, file) or file.flags & IN_MEMORY:
                continue
            deleted = bool(~was.flags & file.flags & FileFlag.DELETED)
            if file_changed(was, file) or deleted:
                found.append(
                    {
                        "path": file.path, "changed": file_changed(was, file), "deleted": deleted,
                        "size_before": was.size, "size": file.size,
                        "mtime_ns_before": was.mtime_ns, "mtime_ns": file.mtime_ns,
                    }
                )  # fmt: skip
        return found

    def processes(self) -> Iterator[ProcessDiff]:
        """Those of the later epoch, then those that are gone."""
        told: dict[tuple[int, int], int] = {}
        for number, key in enumerate(self._keys):
            a, b = self._before.get(key), self._after.get(key)
            change = _process_change(a, b)
            shares = None
            if a and b and a.mm and b.mm and change == "kept":
                spaces = a.mm.space, b.mm.space
                shares = told.get(spaces)
                told.setdefault(spaces, key[0])
            yield ProcessDiff(change, a, b, shares, number, self)
            self._progress(number + 1, len(self._keys))

    def mappings(self, process: ProcessDiff, number: int) -> Iterator[MappingDiff]:
        """What became of the mappings of the process of that number."""
        a, b = process.a, process.b
        if not (a and b and a.mm and b.mm):
            return
        spaces = a.mm.space, b.mm.space
        changes = map_changes(self.a, self.b, a.vmas, b.vmas)
        for at, mapping in enumerate(changes):

            def progress(done: float, at: int = at) -> None:
                self._progress(number + (at + done) / len(changes), len(self._keys))

            side = (self.a, a) if mapping.change == "went" else (self.b, b)
            alone = _held(*side, mapping.alone)
            yield MappingDiff(mapping, alone, lambda p: self._comparer.runs(spaces, p), progress)


def _held(epoch: Epoch, task: TaskView, parts: list[Vma]) -> dict[str, int]:
    total = Counter[str]()
    for vma in parts:
        total.update(held_bytes(epoch, task, vma))
    return dict(total)


def _key(view: TaskView) -> tuple[int, int]:
    return view.task.pid, view.task.start_ticks


def _process_change(a: TaskView | None, b: TaskView | None) -> str:
    if a is None or b is None:
        return "came" if a is None else "went"
    if a.mm is None or b.mm is None:
        return "ended" if a.mm else "kept"
    # Between two dumps nobody sees an exec; but it makes a new auxiliary vector.
    vectors = {view.mm.auxv for view in (a, b) if view.mm and view.mm.auxv}
    return "exec" if a.mm.space != b.mm.space or len(vectors) > 1 else "kept"


class ChangedPages(NamedTuple):
    """``npages`` changed pages from address ``addr``: what they read as in either epoch,
    ``(npages, 4096)``; None where that is a file's, which is not kept.
    """

    addr: int
    npages: int
    old: Bytes | None
    new: Bytes | None


def contents(diff: Diff, process: ProcessDiff, mapping: MappingDiff) -> Iterator[ChangedPages]:
    """The changed pages of a mapping, some hundred at a time."""
    if process.a is None or process.b is None:
        return
    for pair, runs in mapping.runs():
        for (start, end), code in zip(runs.ranges.tolist(), runs.codes.tolist(), strict=True):
            verdict, before, after = meaning(code)
            if verdict is not Verdict.CHANGED:
                continue
            if Source.FILE is before is after:
                yield ChangedPages(start * PAGE_SIZE, end - start, None, None)
                continue
            for first in range(start, end, READ_PAGES):
                at = first * PAGE_SIZE, min(READ_PAGES, end - first)
                old = diff.a.read_run(process.a, pair.a, *at) if before != Source.FILE else None
                new = diff.b.read_run(process.b, pair.b, *at) if after != Source.FILE else None
                yield ChangedPages(*at, old, new)
