"""What is gathered while one epoch is taken, and the statistics that come of it."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from crtrace.capture.copy import Copied
from crtrace.linux.files import FileFacts
from crtrace.track.dirty import Counts
from crtrace.units import U64, contains, count_pages, merge, no_pages, to_ranges

MAX_ROUNDS = 12


@dataclass(slots=True)
class Work:
    """One attempt at an epoch. ``carried`` is what an attempt that failed had found written."""

    before: Counts
    carried: U64
    whole: bool = False
    """Everything is to be read, and not only what was written."""
    rounds: int = 0
    converged: bool = True
    scanned: U64 = field(default_factory=no_pages)
    """Everything found written since the last committed epoch."""
    precopied: U64 = field(default_factory=no_pages)
    gone: U64 = field(default_factory=no_pages)
    residual: int = 0
    unarmed: int = 0
    waits_given_back: int = 0
    overflowed: bool = False
    marked: U64 = field(default_factory=lambda: np.empty(0, dtype=np.uint64))
    """Written page numbers as BPF saw them."""
    objects: dict[tuple[int, int], int] = field(default_factory=dict)
    steady: dict[int, FileFacts] = field(default_factory=dict)
    """Objects that nobody writes, by space, as they were when they were read."""
    populated: dict[int, U64] = field(default_factory=dict)
    pages_compared: int = 0
    committed: bool = False
    began_at: float = field(default_factory=time.monotonic)
    stopping_at: float = 0.0
    stopped_at: float = 0.0
    captured_at: float = 0.0
    resuming_at: float = 0.0
    resumed_at: float = 0.0
    written_at: float = 0.0
    _failed: list[tuple[int, int]] = field(default_factory=list)
    _failed_in_objects: dict[int, list[tuple[int, int]]] = field(default_factory=dict)
    _left: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.scanned = self.carried

    @property
    def faults(self) -> int:
        """BPF's count of write faults when the epoch began."""
        return self.before.faults

    def found(self, written: U64) -> None:
        """A scan reported these pages written, and has armed them again."""
        self.scanned = merge(self.scanned, written)

    def retry(self) -> U64:
        """Pages to read besides what the scan says: carried over, or not readable before."""
        failed = np.array(sorted(page for page, _ in self._failed), dtype=np.uint64)
        return merge(no_pages() if self.rounds else self.carried, to_ranges(failed))

    def copied(self, ranges: U64, copied: Copied) -> None:
        """Private pages were copied; those that failed before were among them."""
        self.precopied = merge(self.precopied, ranges)
        self._failed = copied.unreadable

    def object_copied(self, space: int, ranges: U64, copied: Copied) -> None:
        """An object was read: all that it holds within ``ranges``, and nothing beyond."""
        self.populated[space] = ranges
        self.pages_compared += copied.pages
        self._failed_in_objects[space] = copied.unreadable

    def converging(self, left: int) -> bool:
        """Whether one more round of pre-copy is worth while; ``left``: pages to be copied in it.

        It is not when the target writes as fast as it is copied: then more rounds would go on for
        ever, and the pause is as long as copying what is left takes.
        """
        self._left.append(left)
        recent = self._left[-3:]
        stuck = len(recent) == 3 and min(recent[1:]) > 0.8 * recent[0]
        self.converged = not stuck and len(self._left) < MAX_ROUNDS
        return self.converged

    def unreadable_pages(self, mm_space: int) -> dict[tuple[int, int], U64]:
        """Ascending page numbers that could not be read, by space and errno."""
        groups: dict[tuple[int, int], list[int]] = {}
        for space, failed in {mm_space: self._failed, **self._failed_in_objects}.items():
            for page, errno in failed:
                groups.setdefault((space, errno), []).append(page)
        return {key: np.array(sorted(pages), dtype=np.uint64) for key, pages in groups.items()}

    def elapsed(self) -> int:
        """Microseconds since the epoch began."""
        return _us(self.began_at, time.monotonic())

    def statistics(self, after: Counts, first: bool) -> dict[str, Any]:
        """Times in µs, counts in pages; DESIGN.md says which names are CRIU's.

        ``first``: this is the first epoch since the target was armed, so that BPF cannot have seen
        what was written.
        """
        return {
            "freezing_time": _us(self.stopping_at, self.stopped_at),
            "frozen_time": _us(self.stopped_at, self.captured_at)
            + _us(self.resuming_at, self.resumed_at),
            "witness_time": _us(self.captured_at, self.resuming_at),
            "memdump_time": _us(self.began_at, self.captured_at),
            "memwrite_time": _us(self.resumed_at, self.written_at),
            "precopy_rounds": self.rounds,
            "precopy_converged": self.converged,
            "pages_scanned": count_pages(self.scanned),
            "pages_residual": self.residual,
            "pages_unarmed": self.unarmed,
            "pages_compared": self.pages_compared,
            "map_changes": after.map_changes - self.before.map_changes,
            "waits_given_back": self.waits_given_back,
            "pause_overflow": self.overflowed,
            **self._bpf_statistics(after, first),
        }

    def _bpf_statistics(self, after: Counts, first: bool) -> dict[str, Any]:
        """BPF's pages beside the scans': ``bpf_missed`` are those that only the scans saw."""
        both = int(contains(self.scanned, self.marked).sum())
        return {
            "bpf_pages": len(self.marked),
            "bpf_only": len(self.marked) - both,
            "bpf_missed": None if first else count_pages(self.scanned) - both,
            "bpf_lost_events": after.lost - self.before.lost,
        }


def _us(start: float, end: float) -> int:
    return max(0, round((end - start) * 1e6))
