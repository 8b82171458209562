"""What the memory of a ``shared`` target must hold, by what its processes were asked to do."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from uuid import uuid4

from crtrace.image.epoch import Epoch
from crtrace.units import PAGE_SIZE
from tests.live.exactness import Judged, reader
from tests.live.harness import MemoryReader, Target, expected_page

PAGES = 16
"""Of the views that are made here, of "anon", and of what a busy thread works on."""
KINDS = ("anon", "memfd", "shm", "sysv", "file")


@dataclass(slots=True)
class View:
    """A mapping of ``count`` pages of an object from page ``first``, at address ``at``."""

    object: str
    at: int
    first: int
    count: int
    private: bool = False
    own: dict[int, int] = field(default_factory=dict)
    """Seeds of the pages that a private mapping has for itself, by their number in the object."""


def reader_of(epoch: Epoch, pid: int) -> MemoryReader:
    """``read(address, length)`` of one process of an epoch; not of what is left to files."""
    task = next(view for view in epoch.tasks if view.task.pid == pid)
    return lambda address, length: epoch.read_memory(task, address, length)


class Shared:
    """A ``shared`` target, and the seed of every page of its objects (0: zeros)."""

    def __init__(self, target: Target) -> None:
        self.target = target
        self.pid: int = target.info["pid"]
        self.child = 0
        self.path = Path()
        self.objects = {"anon": [0] * PAGES}
        self._views = {("target", "anon"): View("anon", target.info["anon"], 0, PAGES)}

    @property
    def views(self) -> dict[str, View]:
        """The target's, by name."""
        return self._views_of("target")

    def view(self, who: str, name: str) -> View:
        """A view of one of the processes."""
        return self._views[who, name]

    def _views_of(self, role: str) -> dict[str, View]:
        return {name: view for (who, name), view in self._views.items() if who == role}

    def do(self, line: str) -> int:
        """Have a process do something, and note what follows; the number that it answered."""
        answer = int(self.target.obey(line))
        who, verb, *words = line.split()
        names = [word for word in words if not word.isdigit()]
        self._note(who, verb, names, [int(word) for word in words if word.isdigit()], answer)
        return answer

    def _note(self, who: str, verb: str, names: list[str], numbers: list[int], answer: int) -> None:
        match verb:
            case "fork":
                self.child = answer
                for name, view in self.views.items():
                    self._views["child", name] = replace(view, own=dict(view.own))
            case "memfd" | "file" | "sysv":
                self.objects[names[0]] = [0] * numbers[0]
            case "map":
                first, count = numbers
                private = names[2] == "private"
                self._views[who, names[0]] = View(names[1], answer, first, count, private)
            case "unmap":
                del self._views[who, names[0]]
            case "truncate":
                self._truncate(names[0], numbers[0])
            case "pwrite" | "punch":
                self._set(self.objects[names[0]], *numbers)
            case "store" | "remove":
                self._write(who, names[0], *numbers)

    def _truncate(self, name: str, pages: int) -> None:
        now = self.objects[name][:pages]
        self.objects[name] = now + [0] * (pages - len(now))
        for view in self._views.values():
            if view.object == name:
                view.own = {page: seed for page, seed in view.own.items() if page < pages}

    def _set(self, seeds: list[int], page: int, count: int, seed: int = 0) -> None:
        seeds[page : page + count] = [seed] * count

    def _write(self, who: str, name: str, page: int, count: int, seed: int = 0) -> None:
        view = self._views.get((who, name), View("anon", 0, 0, PAGES))  # which all have
        if view.private:
            view.own |= dict.fromkeys(range(page, page + count), seed)
        else:
            self._set(self.objects[view.object], page, count, seed)

    def wrong(self, epoch: Epoch, who: str = "target") -> list[str]:
        """Pages of the views that an epoch has otherwise; those past an end are none."""
        read = reader(epoch) if who == "target" else reader_of(epoch, self.child)
        return [
            f"{name} page {page}"
            for name, view in self._views_of(who).items()
            for page, seed in self._expected(view)
            if read(view.at + (page - view.first) * PAGE_SIZE, PAGE_SIZE)
            != expected_page(seed, page)
        ]

    def _expected(self, view: View) -> Iterator[tuple[int, int]]:
        seeds = self.objects[view.object]
        for page in range(view.first, min(view.first + view.count, len(seeds))):
            yield page, view.own.get(page, seeds[page])

    def take(self, run: Judged, *, full: bool = False) -> dict[str, int]:
        """An epoch that is what the judge saw and what was asked for; its statistics."""
        run.take(full=full)
        with run.epoch() as epoch:
            assert self.wrong(epoch) == []
        return run.stats[-1]

    def share(self, kind: str, directory: Path, pages: int = PAGES) -> None:
        """An object of a kind, mapped as "it" by the target and as "out" by the outsider.

        Anonymous memory is "anon" to both. ``path`` is that of a file.
        """
        if kind == "anon":
            return
        if kind == "sysv":
            number = self.do(f"target sysv it {pages}")
            self.do(f"target map it it 0 {pages} rw")
            self.do(f"outsider attach it {number}")
        else:
            path = self.path = directory / uuid4().hex
            what = f"memfd it {pages}" if kind == "memfd" else f"file it {path} {pages}"
            fd = self.do(f"target {what}")
            self.do(f"target map it it 0 {pages} rw")
            self.do(f"outsider open it /proc/{self.pid}/fd/{fd}")
        self.do(f"outsider map out it 0 {pages} rw")

    def forget(self, kind: str) -> None:
        """Let go of what :meth:`share` made, so that it ends."""
        if kind in ("shm", "file"):
            self.path.unlink(missing_ok=True)
        for line in ("target unmap it", "outsider unmap out", "target close it"):
            self.do(line)
        self.do("outsider close it")
