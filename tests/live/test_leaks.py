"""A thousand epochs, and hundreds of attachments, leave nothing behind in controller and kernel."""

from __future__ import annotations

import ctypes
import gc
import os
import re
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from crtrace.capture.attach import attached
from crtrace.capture.session import Session
from crtrace.image.store import ChainWriter
from crtrace.linux import bpf
from crtrace.linux.procfs import Process
from crtrace.track.dirty import BITS, KEY, WrittenPages
from crtrace.track.loader import Loading, Programs
from crtrace.units import Pid
from tests.live.conftest import Spawn
from tests.live.harness import Untouched, status

EPOCHS, WARM_UP = 1000, 200
ATTACHMENTS, LOADS = 200, 10
RESIDENT, DATA = 4 << 20, 8 << 20
"""Bytes that 800 epochs may add. Their index entries are 400 bytes each, and the allocator's arenas
have gaps; that makes 1 to 2 MiB. A page kept of each epoch would be another 3."""


def held() -> Counter[str]:
    """Our descriptors, by kind: ``anon_inode:bpf-map``, ``socket:``, or the path of a file."""
    gc.collect()
    fds = (Path("/proc/self/fd") / fd for fd in os.listdir("/proc/self/fd"))
    # The descriptor of the listing itself is closed by now.
    links = [os.readlink(fd) for fd in fds if os.path.lexists(fd)]
    return Counter(re.sub(r":?\[.*", "", link) for link in links)


def tasks() -> int:
    """Our threads as the kernel counts them."""
    assert len(os.listdir("/proc/self/task")) >= threading.active_count()
    return len(os.listdir("/proc/self/task"))


def memory() -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """Bytes of our memory: resident, and of writable private mappings."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what is free is no leak
    fields = status(os.getpid())
    return np.array([int(fields[name].split()[0]) << 10 for name in ("VmRSS", "VmData")])


def entries(fd: int) -> int:
    """How many elements a BPF map of regions has."""
    keys, _ = bpf.Elements(fd, KEY, BITS).peek()
    return len(keys)


class Marks(WrittenPages):
    """What a session uses, with a look into the maps."""

    def __init__(self, programs: Programs) -> None:
        super().__init__(programs)
        self.regions = [programs.maps["written0"], programs.maps["written1"]]

    def left(self) -> list[int]:
        """Elements in the map that was drained last, and in the other one."""
        counts = [entries(fd) for fd in self.regions]
        return counts if self._generation else counts[::-1]


@contextmanager
def chain_of(pid: int, path: Path) -> Iterator[tuple[Process, ChainWriter]]:
    """A process and a chain to watch it into."""
    with Process(Pid(pid)) as process, ChainWriter.open(path, create=True) as chain:
        yield process, chain


@pytest.mark.timeout(600)
def test_a_thousand_epochs_leave_nothing_behind(spawn: Spawn, tmp_path: Path) -> None:
    target = spawn("tiny")
    before, fds_before, tasks_before = Untouched(target.pid), held(), tasks()
    with Loading().result() as programs, chain_of(target.pid, tmp_path / "chain") as (it, chain):
        marks = Marks(programs)
        session = Session(it, chain, marks)
        for _ in range(WARM_UP):
            session.checkpoint()
        fds, threads, start = held(), tasks(), memory()
        written = 0
        for _ in range(EPOCHS - WARM_UP):
            _, stats = session.checkpoint()
            written += stats["pages_written"]
            assert stats["bpf_lost_events"] == 0
            drained, current = marks.left()
            assert drained == 0
            assert current <= 64
        assert len(marks.targets()) == 1
        assert (held(), tasks()) == (fds, threads)
        assert written > EPOCHS
        resident, data = memory() - start
        assert resident < RESIDENT
        assert data < DATA
        session.close()
        assert marks.targets() == {}
    assert len(list((tmp_path / "chain").glob("*.img"))) == EPOCHS
    assert (held(), tasks()) == (fds_before, tasks_before)
    before.assert_same()
    target.terminate_and_check()


@pytest.mark.timeout(600)
def test_many_attachments_leave_nothing_behind(spawn: Spawn, tmp_path: Path) -> None:
    target = spawn("tiny")
    before = Untouched(target.pid)
    with Loading().result() as programs, chain_of(target.pid, tmp_path / "chain") as (it, chain):
        marks = Marks(programs)
        fds, threads = held(), tasks()
        for number in range(ATTACHMENTS):
            session = Session(it, chain, marks)
            try:
                if number % 10 == 0:
                    session.checkpoint()
            finally:
                session.close()
            assert marks.targets() == {}
        assert (held(), tasks()) == (fds, threads)
        before.assert_same()
    target.terminate_and_check()


def test_many_loads_of_the_programs_leave_nothing_behind(spawn: Spawn, tmp_path: Path) -> None:
    target = spawn("tiny")
    before, fds, threads = Untouched(target.pid), held(), tasks()
    for _ in range(LOADS):
        with attached(Pid(target.pid), tmp_path / "chain") as session:
            session.checkpoint()
            assert held()["anon_inode:bpf-map"] > 0
        assert (held(), tasks()) == (fds, threads)
    before.assert_same()
    target.terminate_and_check()
