"""What is gathered while one epoch is taken, and the statistics that come of it."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from crtrace.capture.copy import Copied, Failures
from crtrace.capture.objects import Still
from crtrace.linux.procfs import FileKey
from crtrace.track.armer import Scan
from crtrace.track.dirty import Counts
from crtrace.units import U64, contains, count_pages, merge, no_pages, subtract, to_ranges

MAX_ROUNDS = 12
NOTHING_FOUND = Scan(no_pages(), no_pages, no_pages())


@dataclass(slots=True)
class Part:
    """What one attempt at an epoch finds of one address space.

    ``carried`` is what an attempt that failed had found written; ``whole``: everything is to be
    read, and not only what was written. ``revisit``: what the last epoch was in doubt about.
    """

    carried: U64
    whole: bool = False
    fresh: bool = False
    """It is the first epoch of this address space."""
    revisit: U64 = field(default_factory=no_pages)
    rounds: int = 0
    last: Scan = NOTHING_FOUND
    """That of the pause."""
    gone: U64 = field(default_factory=no_pages)
    """Where the target had nothing then."""
    marked: U64 = field(default_factory=lambda: np.empty(0, dtype=np.uint64))
    """Written page numbers as BPF saw them."""
    unarmed: U64 = field(default_factory=no_pages)
    """What could not be armed, and so counts as written."""
    not_rearmed: U64 = field(default_factory=no_pages)
    """What was not armed since the last epoch found it."""
    suspect: U64 = field(default_factory=no_pages)
    """What the last scan found while somebody else was in that memory: to be read again."""
    revisit_next: U64 = field(default_factory=no_pages)
    """What was suspect, and what somebody else may have had in hand since before the first scan. He
    may be slow, so the next epoch reads it once more."""
    direct: bool = False
    """Direct reads may have been under way into what was found written."""
    late: int = 0
    """Pages that turned out after a bounded scan to have changed without a mark."""
    failed: Failures = field(default_factory=list)
    _scanned: list[U64] = field(default_factory=list)
    """As the scans had it: the pause has no time to join it."""
    _copied: list[U64] = field(default_factory=list)

    @property
    def scanned(self) -> U64:
        """Everything found written since the last committed epoch."""
        self._scanned = [merge(self.carried, *self._scanned)]
        return self._scanned[0]

    @property
    def precopied(self) -> U64:
        """Everything that was copied."""
        self._copied = [merge(*self._copied)]
        return self._copied[0]

    def found(self, scan: Scan) -> U64:
        """Keep what a scan reported.

        What it found written is suspect until :meth:`trust`. Returns pages to read besides: carried
        over, not readable before, or suspect.
        """
        failed = np.array(sorted(page for page, _ in self.failed), dtype=np.uint64)
        carried = no_pages() if self.rounds else merge(self.carried, self.revisit)
        again = merge(carried, to_ranges(failed), self.suspect)
        self.reread_next_epoch()
        self._scanned.append(scan.written)
        self.suspect = subtract(scan.written, scan.unarmed)
        self.unarmed = scan.unarmed
        if len(scan.not_rearmed):
            self.not_rearmed = merge(self.not_rearmed, scan.not_rearmed)
        return again

    def reread_next_epoch(self) -> None:
        """Have the next epoch, too, read what is suspect."""
        if len(self.suspect):
            self.revisit_next = merge(self.revisit_next, self.suspect)

    def trust(self) -> None:
        """Nobody else was in that memory when the last scan armed it."""
        self.suspect = no_pages()

    def copied(self, ranges: U64, copied: Copied) -> None:
        """Pages were copied; those that failed before were among them."""
        self._copied.append(ranges)
        self.failed = copied.unreadable
        self.rounds += 1


@dataclass(slots=True)
class Work:
    """One attempt at an epoch: its ``parts`` by space, and what is common to them."""

    parts: dict[int, Part] = field(default_factory=dict)
    processes: int = 0
    threads: int = 0
    rounds: int = 0
    faults: int = 0
    """Write faults since the last pause when the last round began."""
    converged: bool = True
    pages: int = 0
    """Copied while the targets ran, or about to be."""
    residual: int = 0
    waits_given_back: int = 0
    stops: int = 0
    """Stops before the pause, for scans that want one."""
    stopped_for: float = 0.0
    """Seconds that these took together."""
    overflowed: bool = False
    lost_events: int = 0
    map_changes: int = 0
    limits: list[str] = field(default_factory=list)
    objects: dict[FileKey, int] = field(default_factory=dict)
    steady: dict[int, Still] = field(default_factory=dict)
    """Objects that nobody writes, by space, as they were when they were read."""
    populated: dict[int, U64] = field(default_factory=dict)
    """What objects hold, by space."""
    pages_compared: int = 0
    compared_in: float = 0.0
    """Seconds of the pause that reading objects took."""
    committed: bool = False
    began_at: float = field(default_factory=time.monotonic)
    stopping_at: float = 0.0
    stopped_at: float = 0.0
    captured_at: float = 0.0
    resuming_at: float = 0.0
    resumed_at: float = 0.0
    written_at: float = 0.0
    _failed_in_objects: dict[int, Failures] = field(default_factory=dict)
    _uncopied: list[int] = field(default_factory=list)

    def count(self, before: Counts, after: Counts) -> None:
        """What BPF counted of one process since the last epoch."""
        self.lost_events += after.lost - before.lost
        self.map_changes += after.map_changes - before.map_changes

    def object_copied(self, space: int, ranges: U64, copied: Copied) -> None:
        """An object was read: all that it holds within ``ranges``, and nothing beyond."""
        self.populated[space] = ranges
        self.pages_compared += copied.pages
        self._failed_in_objects[space] = copied.unreadable

    def stood_still(self, seconds: float) -> None:
        """All were stopped for a scan of pre-copy."""
        self.stops += 1
        self.stopped_for += seconds

    def converging(self, left: int) -> bool:
        """Whether one more round of pre-copy is worth while; ``left``: pages to be copied in it.

        It is not when the target writes as fast as it is copied: then more rounds would go on for
        ever, and the pause is as long as copying what is left takes.
        """
        self._uncopied.append(left)
        recent = self._uncopied[-3:]
        stuck = len(recent) == 3 and min(recent[1:]) > 0.8 * recent[0]
        stuck |= len(recent) > 1 and recent[-1] > 0.95 * recent[-2]  # each costs the target, too
        self.converged = not stuck and len(self._uncopied) < MAX_ROUNDS
        return self.converged

    def unreadable_pages(self) -> dict[tuple[int, int], U64]:
        """Ascending page numbers that could not be read, by space and errno."""
        groups: dict[tuple[int, int], list[int]] = {}
        private = {space: part.failed for space, part in self.parts.items()}
        for space, failed in {**private, **self._failed_in_objects}.items():
            for page, errno in failed:
                groups.setdefault((space, errno), []).append(page)
        return {key: np.array(sorted(pages), dtype=np.uint64) for key, pages in groups.items()}

    def elapsed(self) -> int:
        """Microseconds since the epoch began."""
        return _us(self.began_at, time.monotonic())

    def statistics(self) -> dict[str, Any]:
        """Times in µs, counts in pages; DESIGN.md says which names are CRIU's."""
        return {
            "freezing_time": _us(self.stopping_at, self.stopped_at),
            "frozen_time": _us(self.stopped_at, self.captured_at)
            + _us(self.resuming_at, self.resumed_at),
            "witness_time": _us(self.captured_at, self.resuming_at),
            "memdump_time": _us(self.began_at, self.captured_at),
            "memwrite_time": _us(self.resumed_at, self.written_at),
            "compare_time": round(self.compared_in * 1e6),
            "processes": self.processes,
            "threads": self.threads,
            "precopy_rounds": self.rounds,
            "precopy_converged": self.converged,
            "precopy_stops": self.stops,
            "precopy_stopped_time": round(self.stopped_for * 1e6),
            "pages_scanned": sum(count_pages(part.scanned) for part in self.parts.values()),
            "pages_residual": self.residual,
            "pages_unarmed": sum(count_pages(part.unarmed) for part in self.parts.values()),
            "pages_late": sum(part.late for part in self.parts.values()),
            "scans_bounded": sum(part.last.bounded for part in self.parts.values()),
            "pages_compared": self.pages_compared,
            "map_changes": self.map_changes,
            "waits_given_back": self.waits_given_back,
            "pause_overflow": self.overflowed,
            "limits": self.limits,
            **self._bpf_statistics(),
        }

    def _bpf_statistics(self) -> dict[str, Any]:
        """BPF's pages beside the scans': ``bpf_missed`` are those that only the scans saw. Just
        after a target was armed that cannot be told, since BPF did not see how it came to be."""
        parts = self.parts.values()
        marked = sum(len(part.marked) for part in parts)
        both = sum(int(contains(part.scanned, part.marked).sum()) for part in parts)
        missed = 0
        for part in parts:
            armed = subtract(part.scanned, merge(part.unarmed, part.not_rearmed))
            if not part.fresh:
                missed += count_pages(armed) - int(contains(armed, part.marked).sum())
        return {
            "bpf_pages": marked,
            "bpf_only": marked - both,
            "bpf_missed": None if all(part.fresh for part in parts) else missed,
            "bpf_lost_events": self.lost_events,
        }


def _us(start: float, end: float) -> int:
    return max(0, round((end - start) * 1e6))
