"""Programs that were not made for this: Redis, CPython with numpy, SQLite."""

from __future__ import annotations

import random
import signal
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from crtrace.image.reader import Chain
from crtrace.units import PAGE_SIZE, to_ranges
from tests.live.harness import (
    Redis,
    Target,
    Untouched,
    maps,
    python_numpy_target,
    read_mem,
    redis_server,
    resident_private_pages,
    sqlite_target,
    stopped,
)
from tests.live.runner import Watching, verified

EPOCHS = 10
ITS_OWN_DOING = (
    "fds", "mappings", "vma_flags", "registers", "threads", "Threads", "states", "masks",
)  # fmt: skip
"""What Redis changes by itself under load: its allocator starts threads and names them."""


def compare_private_pages(pid: int, path: Path) -> int:
    """Every private page of a process that stands still, against the newest epoch; how many."""
    names = {vma.name: vma for vma in maps(pid)}
    left_out = [names[name] for name in ("[vvar]", "[vvar_vclock]") if name in names]
    compared = 0
    with Chain.open(path) as chain:
        epoch = chain.epoch(-1)
        task = epoch.tasks[0]
        for first, end in to_ranges(resident_private_pages(pid)).tolist():
            address, size = first * PAGE_SIZE, (end - first) * PAGE_SIZE
            if any(vma.start <= address < vma.end for vma in left_out):
                continue
            ours, theirs = epoch.read_memory(task, address, size), read_mem(pid, address, size)
            wrong = np.flatnonzero(np.frombuffer(ours, np.uint8) != np.frombuffer(theirs, np.uint8))
            assert not len(wrong), f"differs at {address + int(wrong[0]):#x}"
            compared += end - first
    return compared


def watch_at_work(pid: int, path: Path) -> list[dict[str, object]]:
    """Ten epochs of a busy process, and one while it stands still, which is compared."""
    with Watching(pid, path, "--interval", 0.2) as watching:
        events = [watching.event("checkpoint") for _ in range(EPOCHS)]
        with stopped(pid):
            # One may have been under way when it was stopped; the one after it is of now.
            events += [watching.event("checkpoint") for _ in range(2)]
            assert compare_private_pages(pid, path) > 500
        watching.signal(signal.SIGINT)
        watching.wait().expect(0)
    assert len(verified(path)) >= EPOCHS + 2
    return events


class Load:
    """SETs from a thread of its own, until the block ends; knows every key that must be there."""

    def __init__(self, redis: Redis) -> None:
        self._redis = Redis(redis.process, redis.port)
        self._stop = threading.Event()
        self._rng = random.Random(1)
        self.expected: dict[str, bytes] = {}
        self._thread = threading.Thread(target=self._work)

    def _work(self) -> None:
        while not self._stop.is_set():
            batch = {
                f"key:{self._rng.randrange(30_000)}": self._rng.randbytes(self._rng.randrange(2000))
                for _ in range(200)
            }
            self._redis.set_many(batch)
            self.expected.update(batch)

    def __enter__(self) -> Load:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self._redis.close()


def test_redis_under_load_is_captured_exactly_and_loses_nothing(tmp_path: Path) -> None:
    with redis_server(tmp_path) as redis:
        before = Untouched(redis.pid)
        with Load(redis) as load:
            events = watch_at_work(redis.pid, tmp_path / "chain")
        assert redis.dbsize() == len(load.expected)
        for key, value in load.expected.items():
            assert redis.get(key) == value
        before.assert_same(ignore=ITS_OWN_DOING)
    assert all(event["bpf_lost_events"] == 0 for event in events)
    later = events[1:EPOCHS]
    assert sum(int(str(event["pages_written"])) for event in later) > 1000
    # What the scan saw and BPF did not: whole huge pages and writes by the kernel; a small part.
    missed = sum(int(str(event["bpf_missed"])) for event in later)
    scanned = sum(int(str(event["pages_scanned"])) for event in later)
    assert missed <= scanned // 10


@pytest.mark.parametrize("start", [python_numpy_target, sqlite_target])
def test_python_programs_are_captured_exactly_and_stay_right(
    tmp_path: Path, start: Callable[[], Target]
) -> None:
    with start() as target:
        watch_at_work(target.pid, tmp_path / "chain")
        target.obey("check")
        target.terminate_and_check()
