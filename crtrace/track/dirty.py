"""The sets of written pages that BPF keeps, seen from the controller."""

from __future__ import annotations

import itertools
import logging
import mmap
import os
import time
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field
from enum import StrEnum
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from crtrace.errors import TargetGone
from crtrace.linux import bpf
from crtrace.linux.addrspace import EVERYTHING
from crtrace.linux.bpf import Array
from crtrace.linux.procfs import Process
from crtrace.linux.ptrace import signals_held
from crtrace.linux.stop import StoppedProcess
from crtrace.track.loader import KEY, MIGRATIONS, TARGETS, Programs
from crtrace.units import PAGE_SIZE, REGION_PAGES, U64, Bools, distinct, merge, no_pages, pairs

log = logging.getLogger("crtrace")

BITS = np.dtype([("word", "<u8", (8,))])
TARGET = np.dtype(
    [
        ("faults", "<u8"),
        ("lost", "<u8"),
        ("map_changes", "<u8"),
        ("threads", "<u4"),
        ("flags", "<u4"),
    ]
)
VISITS = np.dtype(
    [
        ("all", "<u8"),
        ("faulted", "<u8"),
        ("foreign", "<u8"),
        ("written", "<u8"),
        ("begun", "<u8"),
        ("plain", "<u8"),
        ("writer", "<u8"),
        ("replaced", "<u8"),
        ("grown", "<u8"),
        ("remade", "<u8"),
        ("number", "<u4"),
        ("reserved", "<u4"),
    ]
)
assert [each.itemsize for each in (KEY, BITS, TARGET, VISITS)] == [16, 64, 32, 88], "bpf/track.h"
FOLLOW, CHILD, SHARES = 1, 2, 4
"""Flags of a target, as in bpf/track.h."""
_LOST_CHILDREN, _CHILDREN, _UNTOLD, _MIGRATIONS = range(4)
"""Indices of ``totals``, as in bpf/track.h."""
_OWN_TGID, _OWN_MM, _VISITED, _COVERS = range(4)
"""Indices of ``controller``, as in bpf/track.h."""
NO_PROCESS = 1 << 31
"""From here on numbers are those of address spaces: no process has such a one."""
MARKED_AGAIN = 1 << 30
"""In the number of a process or address space, as in bpf/track.h: pages marked more than once."""
_COUNTED = b"pglazyfreed", b"thp_underused_split_page", b"thp_split_pmd", b"thp_split_page"


class Coverage(StrEnum):
    """Which writes BPF marks."""

    FAULTS = "page faults"
    """Those of the targets' threads, by themselves or in the kernel."""
    ALONE = "page faults, and nobody tells of visits by others"
    """The same, where the kernel does not tell who takes the lock of an address space."""
    OTHERS = "page faults, writes by others"
    """Those of everybody else, too: other processes, and what is read past the page cache."""


@dataclass(frozen=True, slots=True)
class Counts:
    """What BPF has counted for one process since it was added."""

    faults: int
    """Write faults: pages that were written since they were armed, or for the first time."""
    lost: int
    map_changes: int


class Visits(NamedTuple):
    """What BPF has counted of one address space; see ``struct visits`` in bpf/track.h."""

    all: int
    faulted: int
    foreign: int
    written: int
    begun: int
    plain: int
    writer: int
    replaced: int
    grown: int
    remade: int
    number: int
    reserved: int


assert VISITS.names == Visits._fields
_NO_VISITS = (0,) * len(Visits._fields)
_LAYOUT: dict[str, tuple[npt.DTypeLike, npt.DTypeLike]] = {
    "targets": ("<u4", TARGET), "visits": ("<u8", VISITS), "generation": ("<u4", "<u4"),
    "totals": ("<u4", "<u8"), "question": ("<u4", "<u8"), "controller": ("<u4", "<u8"),
}  # fmt: skip
"""The types of key and value of the maps of which single elements are read."""


@dataclass(frozen=True, slots=True)
class Evidence:
    """Equal while nothing changes an address space but what is marked."""

    counts: tuple[int, ...]
    begun: int = field(compare=False)
    """Plain visits until then."""
    faults: int = field(compare=False)
    """Write faults of who runs in it, until then."""
    splits: int = field(compare=False)
    """Of huge pages, anybody's, until then: the zeros among what one is split into go, and what was
    dirty can get soft-dirty bits."""


class WrittenPages:
    """The BPF side of tracking. Processes are named by their number in the initial namespace."""

    def __init__(self, programs: Programs) -> None:
        self._maps = programs.maps
        self._resolver, self._migrating = programs.resolver, programs.migrating
        self._attachments = programs.attachments
        self._counts_migrations: bool | None = None
        self._written = [bpf.Elements(self._maps[f"written{n}"], KEY, BITS) for n in (0, 1)]
        self._ring = programs.ring
        self._elements: dict[tuple[str, int], bpf.Element] = {}
        """To read those that were read before, by map and key."""
        self._targets = bpf.Elements(self._maps["targets"], *_LAYOUT["targets"], batch=TARGETS)
        self._generation: int = self._read("generation", 0)
        self._drained = True
        self._undrained: list[tuple[Array, Array]] = []
        """Taken out of a map that nobody had drained."""
        self._covering = programs.covering
        self._numbers = itertools.count(NO_PROCESS)
        self._never = itertools.count(1)
        self._heard: list[U64] = []
        """By whom and where regions were marked first since the last switch."""
        self._heard_before: list[U64] = []
        """The same between the last two switches."""
        self._introduce_ourselves()
        self.coverage = self._covered(programs.locks)
        self.spares_plain = self.coverage is Coverage.OTHERS and bpf.misses_are_counted()
        """Whether visits that change memory by marked faults only are no evidence."""
        self._set("controller", _COVERS, self.spares_plain)
        log.debug("BPF marks %s", self.coverage)

    def _introduce_ourselves(self) -> None:
        """Tell BPF who we are: what we do with a target's address space changes nothing in it."""
        own, namespace = 0, os.stat("/proc/self/ns/pid")
        for _ in range(100):  # an emulated processor can be late in taking notice of a probe
            own = own or self._resolve(os.getpid(), namespace, _blink)
        self._set("controller", _OWN_TGID, own)
        self._set("controller", _OWN_MM, 0)  # somebody may have been here before
        mmap.mmap(-1, PAGE_SIZE).close()  # takes the lock of our own space
        self._set("controller", _OWN_MM, self._get("controller", _VISITED))

    def _covered(self, locks: bool) -> Coverage:
        if self._covers_others():
            return Coverage.OTHERS
        return Coverage.FAULTS if locks else Coverage.ALONE

    def _covers_others(self) -> bool:
        """Whether a write that is no page fault of the writer's is marked where it ought to be:
        tried on ourselves, since names and layouts can mislead."""
        own = self._get("controller", _OWN_MM)
        if self._covering < 0 or not own:
            return False
        number = self._count_visits(own)
        page = mmap.mmap(-1, PAGE_SIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        address = np.frombuffer(page, dtype=np.uint8).ctypes.data
        try:
            with open("/proc/self/mem", "r+b", buffering=0) as memory:
                memory.seek(address)
                memory.write(b"x")
        except OSError:  # it can be forbidden
            return False
        finally:
            self.leave_mm(own)
        marked = self.marked_now().get(number, np.empty(0, dtype=np.uint64))
        return np.uint64(address // PAGE_SIZE) in marked

    def add(self, process: Process, *, follow: bool = False) -> int:
        """Begin to mark a process's writes, with its children if ``follow``; its number here.

        Stops the process for a moment: that is how BPF learns of the number, whatever namespaces
        lie between.
        """
        tgid = self.resolve(process)
        value = np.zeros(1, dtype=TARGET)
        value["flags"] = FOLLOW if follow else 0
        bpf.update(self._maps["targets"], _u32(tgid), value)
        return tgid

    def resolve(self, process: Process) -> int:
        """The number of a process in BPF's maps."""
        number = process.status()["NSpid"].split()[-1]

        def stop() -> None:
            with signals_held(), StoppedProcess(process):
                pass

        found = self._resolve(int(number), process.namespace("pid"), stop)
        if not found:
            raise TargetGone(f"process {process.pid} never ran on a CPU while it was looked for")
        return found

    def _resolve(self, number: int, namespace: os.stat_result, leave: Callable[[], None]) -> int:
        """What a process of a PID namespace is in the initial one; 0 if it does not leave its CPU
        while ``leave`` runs."""
        for index, word in enumerate((namespace.st_dev, namespace.st_ino, number, 0)):
            self._set("question", index, word)
        link = bpf.attach_raw_tracepoint(self._resolver, "sched_switch")
        try:
            leave()
        finally:
            os.close(link)
        return self._get("question", 3)

    def _set(self, table: str, index: int, word: int) -> None:
        bpf.update(self._maps[table], _u32(index), _u64(word))

    def _get(self, table: str, index: int) -> int:
        return self._read(table, index) or 0

    def _read(self, table: str, key: int) -> Any:
        """An element of a map, an int or a tuple of them; None when there is no such element."""
        element = self._elements.get((table, key))
        if not element:
            kind, value = _LAYOUT[table]
            element = bpf.Element(self._maps[table], np.array([key], dtype=kind), value)
            self._elements[table, key] = element
        return element.read()

    def remove(self, tgid: int, *, ended: bool = False) -> None:
        """Mark it no longer. Of a child that has ended, BPF has seen to that, and its number may be
        another child's by now."""
        element = self._read("targets", tgid)
        self._elements.pop(("targets", tgid), None)
        if element and not (ended and element[-1] & CHILD):
            bpf.delete(self._maps["targets"], _u32(tgid))
        bpf.delete(self._maps["homes"], _u32(tgid))

    def sharers(self) -> list[int]:
        """Processes that have the address space of the one that made them."""
        return [tgid for tgid, flags in self.targets().items() if flags & SHARES]

    def targets(self) -> dict[int, int]:
        """The flags of all processes that are marked now, followed children included."""
        keys, values = self._targets.peek()
        return dict(zip(keys.tolist(), values["flags"].tolist(), strict=True))

    def counts(self, tgid: int) -> Counts:
        """The live counters; zeros once the process is not marked any more."""
        return Counts(*(self._read("targets", tgid) or (0, 0, 0))[:3])

    def lost_children(self) -> int:
        """Forks that were not followed because the target map was full."""
        return self._get("totals", _LOST_CHILDREN)

    def children(self) -> int:
        """Forks that were followed."""
        return self._get("totals", _CHILDREN)

    # ---- what bounds a scan --------------------------------------------------------------------

    def mm_behind(self, look: Callable[[], object]) -> tuple[int, int]:
        """BPF's name of the address space whose lock ``look`` takes, its mm, and the number that
        writes of others to it are marked under; its visits are counted from now on. Zeros where
        that cannot be had."""
        self._set("controller", _VISITED, 0)
        look()
        mm = self._get("controller", _VISITED)
        try:
            return (mm, self._count_visits(mm)) if mm else (0, 0)
        except OSError:  # there are too many
            return 0, 0

    def _count_visits(self, mm: int) -> int:
        value = np.zeros(1, dtype=VISITS)
        value["number"] = number = next(self._numbers)
        bpf.update(self._maps["visits"], _u64(mm), value)
        return number

    def leave_mm(self, mm: int) -> None:
        """Count its visits no longer."""
        self._elements.pop(("visits", mm), None)
        bpf.delete(self._maps["visits"], _u64(mm))

    def live_in(self, mm: int, tgid: int) -> None:
        """The visits of a process are those of somebody who runs in it, from now on."""
        bpf.update(self._maps["homes"], _u32(tgid), _u64(mm))

    def evidence(self, mm: int, tgids: Iterable[int]) -> Evidence:
        """What must stay as it is for the marks of the processes in an address space to tell all
        that has changed in it."""
        visits, (taken, splits) = self.visits(mm), taken_and_split()
        found = [self._get("totals", _UNTOLD), taken, visits.all, self._missed()]
        found.append(self._open(visits))
        faults = 0
        for tgid in sorted(tgids):
            counts = self.counts(tgid)
            found += [tgid, counts.lost]
            faults += counts.faults
        return Evidence(tuple(found), visits.begun, faults, splits)

    def _open(self, visits: Visits) -> int:
        """What a plain visit has marked may still be to come: nothing equals that."""
        return next(self._never) if visits.plain else 0

    def lost(self, counts: Iterable[Counts]) -> int:
        """How many marks found no room, or were not told of."""
        return self._get("totals", _UNTOLD) + sum(each.lost for each in counts)

    def map_evidence(self, mm: int, tgids: Iterable[int]) -> tuple[int, ...]:
        """What must stay as it is for the map of an address space to be the same."""
        visits = self.visits(mm)
        return (
            visits.all,
            visits.faulted,
            *(number for t in sorted(tgids) for number in (t, self.counts(t).map_changes)),
        )

    def written_meanwhile(self, mm: int, tgids: Iterable[int]) -> tuple[int, ...]:
        """What stays the same while nobody writes in an address space. ``tgids`` run in it, and are
        stopped, but for workers that the kernel gives them."""
        visits = self.visits(mm)
        known: tuple[int, ...] = (visits.foreign,)
        if self.spares_plain:
            known = visits.all, visits.written, visits.begun, self._missed(), self._open(visits)
        return (
            *known,
            self._get("totals", _UNTOLD),
            *(self.counts(tgid).faults for tgid in sorted(tgids)),
        )

    def foreign_visits(self, mm: int) -> int:
        """How often somebody who does not run in it took the lock of an address space, or who does
        but writes in such a way that the data may come after a scan has armed the page again."""
        return self.visits(mm).foreign

    def unlike_bits(self, mm: int) -> tuple[int, int, int]:
        """How often somebody may have done to an mm what soft-dirty bits do not tell: put other
        pages in place, or moved some; joined a new mapping with an old one; joined two old ones."""
        visits = self.visits(mm)
        return visits.replaced, visits.grown, visits.remade

    def migrations(self) -> object:
        """What stays the same while no page, of anybody's, sets out for other memory."""
        if self._counts_migrations is None:
            self._counts_migrations = self._count_migrations()
        return self._get("totals", _MIGRATIONS) if self._counts_migrations else object()

    def _count_migrations(self) -> bool:
        try:
            for event in MIGRATIONS:
                self._attachments.append(bpf.attach_raw_tracepoint(self._migrating, event))
        except OSError as error:
            log.debug("nobody tells of pages that move: %s", error)
            return False
        return True

    def written_by_others(self, mm: int) -> int:
        """Write faults in it that are not in the counts of the processes that run in it."""
        return self.visits(mm).written

    def visits(self, mm: int) -> Visits:
        """All that is counted of it; zeros once it is not any more."""
        return Visits(*(self._read("visits", mm) or _NO_VISITS))

    def _missed(self) -> int:
        """Faults at which the program that marks the writes of others could not run."""
        return bpf.missed(self._covering) if self.spares_plain else 0

    def regions(self, tgids: Iterable[int], *, before: bool = False) -> U64:
        """Page ranges of the regions marked since the last :meth:`switch`; with ``before``, since
        the one before that."""
        self._hear()
        if self._ring.unfinished:  # there may be others behind it
            return EVERYTHING
        heard = [*self._heard, *(self._heard_before if before else ())]
        if not heard:
            return no_pages()
        marked_by, region = np.concatenate(heard).T
        ours = np.logical_or.reduce([marked_by == tgid for tgid in tgids])
        first = region[ours] * np.uint64(REGION_PAGES)
        return merge(pairs(first, first + np.uint64(REGION_PAGES)))

    def _hear(self) -> None:
        if len(keys := self._ring.take()):
            self._heard.append(keys)

    def switch(self) -> None:
        """Send marks to the other map from now on."""
        self._hear()
        self._heard_before, self._heard = self._heard, []
        following = self._generation ^ 1
        if not self._drained:  # what is in the map already would not be told again
            self._undrained.append(self._written[following].take())
        bpf.update(self._maps["generation"], _u32(0), _u32(following))
        self._generation = following
        self._drained = False

    def drain(self) -> dict[int, U64]:
        """Take what the generation before the last :meth:`switch` marked.

        Written page numbers, ascending, by process; those at which it marked more than one fault
        are under its number and MARKED_AGAIN as well. Targets may run meanwhile.
        """
        taken = [*self._undrained, self._written[self._generation ^ 1].take()]
        self._undrained, self._drained = [], True
        keys, values = (np.concatenate(column) for column in zip(*taken, strict=True))
        return _by_number(keys, values)

    def marked_now(self) -> dict[int, U64]:
        """What has been marked since the last :meth:`switch`, in the same form."""
        return _by_number(*self._written[self._generation].peek())


def pages_under(numbers: Collection[int], marked: dict[int, U64]) -> tuple[U64, U64]:
    """Of what was drained, what is marked under any of the numbers, and what of it more than once:
    under one of them, or under two. Page numbers, ascending."""
    once = [marked[number] for number in numbers if number in marked]
    pages = np.sort(np.concatenate([np.empty(0, dtype=np.uint64), *once]))
    more = [marked[n | MARKED_AGAIN] for n in numbers if n | MARKED_AGAIN in marked]
    again = np.concatenate([pages[1:][pages[1:] == pages[:-1]], *more])
    return distinct(pages), distinct(again)


def _by_number(keys: Array, values: Array) -> dict[int, U64]:
    order = np.lexsort((keys["region"], keys["number"]))
    keys, values = keys[order], values[order]
    borders = np.flatnonzero(np.diff(keys["number"])) + 1
    groups = np.split(np.arange(len(keys)), borders) if len(keys) else []
    return {
        int(keys["number"][group[0]]): decode(keys["region"][group], values["word"][group])
        for group in groups
    }


def taken_and_split() -> tuple[int, int]:
    """What the kernel does without a lock, of any process, for it tells nobody whose. Pages taken:
    given up with MADV_FREE, or of huge pages that were split since they hardly had contents. And
    huge pages split, or mapped as small ones: these can set out from there without a trace."""
    free, underused, *splits = vmstat(*_COUNTED)
    return free + underused, sum(splits)


def vmstat(*names: bytes) -> list[int]:
    """Counters of the kernel as of now; those that it has not got are 0."""
    lines, fd = b"\n", _vmstat()
    while part := os.pread(fd, 1 << 16, len(lines) - 1):
        lines += part
    ends = (lines.partition(b"\n" + name + b" ")[2] for name in names)
    return [int(end.partition(b"\n")[0] or 0) for end in ends]


@cache
def _vmstat() -> int:
    return os.open("/proc/vmstat", os.O_RDONLY | os.O_CLOEXEC)


def decode(regions: U64, words: U64) -> U64:
    """Page numbers from ascending ``(n,)`` region numbers and their ``(n, 8)`` bitmaps."""
    region, word = np.nonzero(words)  # most are empty where writes are scattered
    some = np.ascontiguousarray(words[region, word]).view(np.uint8).reshape(-1, 8)
    bits: Bools = np.unpackbits(some, axis=1, bitorder="little").view(np.bool_)
    row, column = np.nonzero(bits)
    first = regions[region] * np.uint64(REGION_PAGES) + word.astype(np.uint64) * np.uint64(64)
    return first[row] + column.astype(np.uint64)


def _u32(value: int) -> npt.NDArray[np.uint32]:
    return np.array([value], dtype=np.uint32)


def _u64(value: int) -> U64:
    return np.array([value], dtype=np.uint64)


def _blink() -> None:
    time.sleep(0.001)
