"""The sets of written pages that BPF keeps, seen from the controller."""

from __future__ import annotations

import os
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from crtrace.errors import TargetGone
from crtrace.linux import bpf
from crtrace.linux.procfs import Process
from crtrace.linux.ptrace import signals_held
from crtrace.linux.stop import StoppedProcess
from crtrace.track.loader import Programs
from crtrace.units import REGION_PAGES, U64, Bools

KEY = np.dtype([("tgid", "<u4"), ("reserved", "<u4"), ("region", "<u8")])
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
assert (KEY.itemsize, BITS.itemsize, TARGET.itemsize) == (16, 64, 32), "see bpf/track.h"
FOLLOW, CHILD, SHARES = 1, 2, 4
"""Flags of a target, as in bpf/track.h."""


@dataclass(frozen=True, slots=True)
class Counts:
    """What BPF has counted for one process since it was added."""

    faults: int
    """Write faults: pages that were written since they were armed, or for the first time."""
    lost: int
    map_changes: int


class WrittenPages:
    """The BPF side of tracking. Processes are named by their number in the initial namespace."""

    def __init__(self, programs: Programs) -> None:
        self._maps = programs.maps
        self._resolver = programs.resolver
        self._drains = [bpf.Drain(self._maps[f"written{n}"], KEY, BITS) for n in (0, 1)]
        self._generation = 0

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
        space = process.namespace("pid")
        for index, word in enumerate((space.st_dev, space.st_ino, int(number), 0)):
            bpf.update(self._maps["question"], _u32(index), np.array([word], dtype=np.uint64))
        link = bpf.attach_raw_tracepoint(self._resolver, "sched_switch")
        try:
            with signals_held(), StoppedProcess(process):
                pass
        finally:
            os.close(link)
        answer = np.zeros(1, dtype=np.uint64)
        bpf.lookup(self._maps["question"], _u32(3), answer)
        if not answer[0]:
            raise TargetGone(f"process {process.pid} never ran on a CPU while it was looked for")
        return int(answer[0])

    def remove(self, tgid: int) -> None:
        """Mark it no longer."""
        bpf.delete(self._maps["targets"], _u32(tgid))

    def targets(self) -> dict[int, int]:
        """The flags of all processes that are marked now, followed children included."""
        found: dict[int, int] = {}
        key, after = _u32(0), np.zeros(1, dtype=np.uint32)
        value = np.zeros(1, dtype=TARGET)
        # Where the key before is deleted meanwhile, the kernel begins again at the first.
        while bpf.next_key(self._maps["targets"], key if found else None, after):
            key[0] = after[0]
            if bpf.lookup(self._maps["targets"], key, value):
                found[int(key[0])] = int(value["flags"][0])
        return found

    def counts(self, tgid: int) -> Counts:
        """The live counters; zeros once the process is not marked any more."""
        value = np.zeros(1, dtype=TARGET)
        bpf.lookup(self._maps["targets"], _u32(tgid), value)
        row = value[0]
        return Counts(int(row["faults"]), int(row["lost"]), int(row["map_changes"]))

    def lost_children(self) -> int:
        """Forks that were not followed because the target map was full."""
        value = np.zeros(1, dtype=np.uint64)
        bpf.lookup(self._maps["totals"], _u32(0), value)
        return int(value[0])

    def switch(self) -> None:
        """Send marks to the other map from now on; while all targets are stopped."""
        following = self._generation ^ 1
        bpf.update(self._maps["generation"], _u32(0), _u32(following))
        self._generation = following

    def drain(self) -> dict[int, U64]:
        """Take what the generation before the last :meth:`switch` marked.

        Written page numbers, ascending, by process. Targets may run meanwhile.
        """
        keys, values = self._drains[self._generation ^ 1].take()
        order = np.lexsort((keys["region"], keys["tgid"]))
        keys, values = keys[order], values[order]
        borders = np.flatnonzero(np.diff(keys["tgid"])) + 1
        groups = np.split(np.arange(len(keys)), borders) if len(keys) else []
        return {
            int(keys["tgid"][group[0]]): decode(keys["region"][group], values["word"][group])
            for group in groups
        }


def decode(regions: U64, words: U64) -> U64:
    """Page numbers from ascending ``(n,)`` region numbers and their ``(n, 8)`` bitmaps."""
    bits: Bools = np.unpackbits(
        np.ascontiguousarray(words).view(np.uint8), axis=1, bitorder="little"
    ).view(np.bool_)
    row, column = np.nonzero(bits)
    return regions[row] * np.uint64(REGION_PAGES) + column.astype(np.uint64)


def _u32(value: int) -> npt.NDArray[np.uint32]:
    return np.array([value], dtype=np.uint32)
