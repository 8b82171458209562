"""Where a scan has to look, so that a pause follows what was written and not the target's size.

BPF marks the writes that are page faults. Everything else that changes armed memory takes the lock
of the address space, and is counted: what the kernel writes for somebody, what is discarded, mapped
or moved, and by whomever. As long as no count has changed since all was last looked at, only what
is marked can differ.

Where BPF marks the writes of others as well, visits that change memory in no other way are *plain*,
and are not among these counts. Others do not stand still in the pause, so such a visit counts after
all if it was under way when the pause looked, or began before marks went to the next generation.

This is never taken on trust for long: after a pause in which only marked regions were looked at,
everything is, while the target runs again. What turns up then without a mark and without a count is
told as late, and that address space is not guided any more.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import numpy as np

from crtrace.linux.addrspace import EVERYTHING
from crtrace.track.armer import Look, Told
from crtrace.track.dirty import MARKED_AGAIN, Evidence, WrittenPages, taken_and_split
from crtrace.units import (
    REGION_PAGES,
    U64,
    contains,
    count_pages,
    distinct,
    intersect,
    merge,
    no_pages,
    pairs,
    subtract,
    to_ranges,
)


@dataclass(frozen=True, slots=True)
class Basis:
    """What a look at everything is based on: equal as long as only marks tell of changes."""

    map_changes: int
    evidence: Evidence
    moved: object = field(compare=False)
    """Stays the same while no huge page is split and, where soft-dirty bits are used, none moves:
    that can set some."""


class Unexplained(NamedTuple):
    """Pages that have changed without a mark: written, or without contents any more."""

    written: int
    gone: int


class Guide:
    """Bounds the scans of one address space; ``mm`` is BPF's name of it, ``number`` what the
    writes of others to it are marked under; ``by_bits``: soft-dirty bits tell what is written."""

    def __init__(self, marks: WrittenPages, mm: int, number: int, *, by_bits: bool = False) -> None:
        self._marks = marks
        self._mm = mm
        self._by_bits = by_bits
        self.number = number
        self._since: Basis | None = None
        """From before everything was last looked at; None: look at everything."""
        self._found: U64 | None = None
        self._in_flight = no_pages()
        """Where faults may be under way that are marked in an earlier generation."""
        self._lost = 0
        """Marks that found no room, as of the last pause."""
        self._blind = False
        self._tgids: set[int] = set()
        self._foreign = 0
        self._begun = 0
        """Plain visits when the counts were looked at last."""
        self._faults = 0
        """Of who runs in it, likewise."""
        self._written_by_others = 0
        """As of the last pause."""

    def close(self) -> None:
        """Count no longer."""
        self._marks.leave_mm(self._mm)

    def settle(self, tgids: Collection[int]) -> None:
        """Who runs in it is no visitor."""
        for tgid in set(tgids) - self._tgids - {0}:
            self._marks.live_in(self._mm, tgid)
        self._tgids = set(tgids)

    def basis(self, tgids: Collection[int], changes: int) -> Basis:
        """The counts now; ``tgids``: who runs in it, ``changes``: of its map."""
        found = self._marks.evidence(self._mm, tgids)
        self._begun, self._faults = found.begun, found.faults
        migrations = self._marks.migrations() if self._by_bits else 0
        return Basis(changes, found, (migrations, found.splits))

    def _moved(self) -> object:
        return self._marks.migrations(), taken_and_split()[1]

    def map_evidence(self, tgids: Collection[int]) -> tuple[int, ...]:
        """Counts that stay the same while nobody changes what is mapped."""
        self.settle(tgids)
        return self._marks.map_evidence(self._mm, tgids)

    def visited(self) -> bool:
        """Whether somebody from outside has been in the space since this was asked last, or wrote
        as if he were. What he pinned there he may write to later."""
        before, self._foreign = self._foreign, self._marks.foreign_visits(self._mm)
        return before != self._foreign

    def told(self, tgids: Collection[int]) -> Told:
        """What an armer can ask that needs to know more."""
        return Told(
            partial(self._marks.written_meanwhile, self._mm, tgids),
            self._moved,
            partial(self._marks.unlike_bits, self._mm),
        )

    def holds(self, basis: Basis) -> bool:
        """Whether nothing has happened but what is marked since everything was looked at."""
        return basis == self._since and not self._blind

    def paused(self, tgids: Collection[int]) -> None:
        """Marks go to the next generation since the last scan, that of a pause. What was marked in
        between, by who does not stand still, is in neither."""
        visits = self._marks.visits(self._mm)
        counts = [self._marks.counts(tgid) for tgid in tgids]
        faults = sum(each.faults for each in counts)
        if (visits.begun, faults) != (self._begun, self._faults):
            self.doubt()
        self._lost = self._marks.lost(counts)
        self._written_by_others = visits.written

    def written_by_others(self) -> int:
        """Write faults since the last pause that are not in the counts of who runs in it."""
        return self._marks.written_by_others(self._mm) - self._written_by_others

    def bounds(self, tgids: Collection[int], *, turned: bool) -> U64:
        """Page ranges outside which nothing was written or discarded since everything was looked
        at, or the last scan.

        ``turned``: that was before the last switch of generations, and this one follows it.
        """
        numbers = [*tgids, self.number]
        numbers += [number | MARKED_AGAIN for number in numbers]  # a switch may have parted the two
        regions = self._marks.regions(numbers, before=turned)
        return merge(regions, self._in_flight)

    def everything_seen(self, basis: Basis) -> None:
        """A scan has looked at all, after the counts were as in ``basis``."""
        self._since = basis

    def looked_ahead(self, basis: Basis) -> None:
        """All was looked at by no scan: what is in doubt remains so."""
        if self._since is not None:
            self._since = basis

    def doubt(self) -> None:
        """Look at everything next time."""
        self._since = None

    def scanned(self, written: U64, *, turned: bool, stopped: bool) -> None:
        """A scan has found ``written``; ``turned``: right after a switch of generations. If that
        is not what was written since the scan before, but more, it tells nothing: ``no_pages()``.
        """
        self._found = written if turned and not stopped else None
        if stopped:
            self._in_flight = no_pages()

    def await_faults(self, pages: U64, again: U64, tgids: Collection[int]) -> None:
        """BPF has marked ``pages``, page numbers in order, before its last switch of generations,
        and ``again`` more than once; of who runs in it.

        A fault marks its page before it changes it: what was marked and not found by the scan that
        followed may still be to come, and a huge page with it. So may the other one of two faults
        on one page; or on a huge page, which is found as a whole when one of them has made it.
        """
        if self._found is not None:
            coming = np.concatenate((pages[~contains(self._found, pages)], again))
            unmarked = subtract(self._found, to_ranges(pages))
            huge = intersect(_marked_twice(pages), _regions_of(unmarked))
            regions = merge(to_ranges(distinct(coming // np.uint64(REGION_PAGES))), huge)
            self._in_flight = merge(self._in_flight, regions * np.uint64(REGION_PAGES))
            if self._marks.lost(map(self._marks.counts, tgids)) != self._lost:
                self._in_flight = EVERYTHING
        self._found = None

    def unexplained(self, look: Look, tgids: Collection[int], gone: U64) -> Unexplained:
        """Pages that have changed since the pause without a mark; ``look`` was taken after it, and
        ``gone`` had no contents in it."""
        numbers = [*tgids, self.number, *self._marks.sharers()]  # children that nobody has met yet
        marked = self._marks.marked_now()
        ours = merge(*(to_ranges(marked[each]) for each in numbers if each in marked))
        # A fault can bring more than its own page where there was none, and set the soft-dirty bits
        # of all of a huge page.
        more = merge(gone, _whole_regions(look.written)) if self._by_bits else gone
        ours = merge(ours, intersect(self._marks.regions(numbers), more))
        written = subtract(look.written, ours)
        return Unexplained(count_pages(written), count_pages(subtract(look.absent, gone)))

    def judge(self, unexplained: Unexplained, before: Basis, after: Basis) -> int:
        """How many of these pages are late: they have changed although no count has. ``before`` and
        ``after`` that look at everything.

        Where huge pages are split, zeros go; but only soft-dirty bits say then that something was
        written.
        """
        late = 0
        if self.holds(after):
            moved = not self._since or self._since.moved != after.moved
            late += 0 if moved and self._by_bits else unexplained.written
            late += 0 if moved else unexplained.gone
        self._blind |= late > 0
        if any(unexplained):
            self.doubt()
        self.looked_ahead(before)
        return late


def _marked_twice(pages: U64) -> U64:
    """Ranges of regions that have more than one of the pages, which are in order."""
    regions = pages // np.uint64(REGION_PAGES)
    return to_ranges(distinct(regions[1:][regions[1:] == regions[:-1]]))


def _regions_of(ranges: U64) -> U64:
    """Ranges of the regions that page ranges touch."""
    end = (ranges[:, 1] + np.uint64(REGION_PAGES - 1)) // np.uint64(REGION_PAGES)
    return merge(pairs(ranges[:, 0] // np.uint64(REGION_PAGES), end))


def _whole_regions(ranges: U64) -> U64:
    """Of page ranges, what is whole regions."""
    first = (ranges[:, 0] + np.uint64(REGION_PAGES - 1)) // np.uint64(REGION_PAGES)
    end = ranges[:, 1] // np.uint64(REGION_PAGES)
    whole = first < end
    return pairs(first[whole], end[whole]) * np.uint64(REGION_PAGES)
