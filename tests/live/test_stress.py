"""stress-ng as a judge from outside: its workers are watched while they check their own work."""

from __future__ import annotations

import os
import re
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from crtrace.errors import TargetGone
from tests.live.conftest import Spawn
from tests.live.exactness import judged
from tests.live.harness import tasks, wait_until

STRESSORS = {
    "vm": "--vm 1 --vm-bytes 16M --vm-method all",
    "vm in huge pages": "--vm 1 --vm-bytes 16M --vm-madvise hugepage",
    "vm kept": "--vm 1 --vm-bytes 16M --vm-keep --vm-populate",
    "vm locked": "--vm 1 --vm-bytes 16M --vm-locked",
    "vm merged": "--vm 1 --vm-bytes 16M --vm-madvise mergeable",
    "vm-splice": "--vm-splice 1",
    "mremap": "--mremap 1 --mremap-bytes 8M",
    "madvise": "--madvise 1",
    "memfd": "--memfd 1 --memfd-bytes 8M --memfd-fds 8",
    "shm": "--shm 1 --shm-bytes 4M",
    "shm-sysv": "--shm-sysv 1 --shm-sysv-bytes 4M",
    "fork": "--fork 1",
    "fork with memory": "--fork 1 --fork-vm",
    "mmap": "--mmap 1 --mmap-bytes 8M",
    "mmap of a file": "--mmap 1 --mmap-bytes 4M --mmap-file",
    "mmapaddr": "--mmapaddr 1",
    "mmapfixed": "--mmapfixed 1",
    "stack with gaps": "--stack 1 --stack-unmap",
    "bigheap": "--bigheap 1 --bigheap-growth 64K",
    "malloc": "--malloc 1 --malloc-bytes 64K --malloc-max 1024",
    "malloc in threads": "--malloc 1 --malloc-bytes 64K --malloc-max 1024 --malloc-pthreads 4",
    "msync": "--msync 1 --msync-bytes 4M",
    "remap": "--remap 1",
    "pagemove": "--pagemove 1 --pagemove-bytes 4M",
    "aio": "--aio 1",
    "aio of the kernel": "--aiol 1",
    "io-uring": "--io-uring 1",
}
FAMILIES = {
    "brk": "--brk 1",
    "vm-rw": "--vm-rw 1 --vm-rw-bytes 8M",
    "mprotect": "--mprotect 1",
    "rmap": "--rmap 1",
    "stackmmap": "--stackmmap 1",
    "userfaultfd": "--userfaultfd 1 --userfaultfd-bytes 4M",
}
"""Stressors of several processes that write the same memory, or each other's."""
WITHDRAWN = r"userfaultfd: read failed, errno=11 "
"""Any signal to a thread that waits in a fault takes the fault back, until it is met again: poll(2)
announced it, and read(2) finds none. Stopping is no exception. stress-ng does not expect it."""
EPOCHS = int(os.environ.get("CRTRACE_STRESS_EPOCHS", "4"))
WORKERS = 10
"""How many may end under watch, one after another, before that is a failure."""
SOME = 100_000
"""Nanoseconds of CPU: what the stressor of stacks uses between two naps of a second."""
SETTLED = 30
"""How often a process must have been seen to be one that stays."""
LIMITS = "ulimit -d 262144; ulimit -s 8192; "
"""In KiB: heaps and stacks that grow for as long as they may."""


class StressNg:
    """stress-ng with one stressor, in a directory of its own."""

    def __init__(self, options: str, directory: Path) -> None:
        self._log, self._report = directory / "log", directory / "report"
        command = ["stress-ng", *options.split(), "--verify", "--metrics", "--timeout", "10m"]
        with open(self._log, "wb") as log:
            self.process = subprocess.Popen(
                ["sh", "-c", LIMITS + 'exec "$@"', "sh", *command, "--yaml", str(self._report)],
                cwd=directory,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self._first: dict[int, int] = {}
        self._looks: dict[int, int] = {}

    @property
    def log(self) -> str:
        """What it said so far."""
        return self._log.read_text(errors="replace")

    def worker(self) -> int:
        """The process that does the work: the busiest one below stress-ng.

        A parent does not count once it has a child that stays: then it mostly waits.
        """
        wait_until(lambda: self._busy() > 0, "a worker at work")
        return self._busy()

    def _busy(self) -> int:
        assert self.process.poll() is None, self.log
        below = {pid: set(descendants(pid)) for pid in descendants(self.process.pid)}
        self._looks = {pid: self._looks.get(pid, 0) + 1 for pid in below}
        self._first = {pid: self._first.get(pid, cpu_time(pid)) for pid in below}
        children = {pid for pid in below if self._looks[pid] >= SETTLED}
        work = {
            pid: cpu_time(pid) - self._first[pid]
            for pid in below
            if self._looks[pid] >= 3 * SETTLED and children.isdisjoint(below[pid])
        }
        busiest = max(work, key=lambda pid: work[pid], default=0)
        return busiest if work.get(busiest, 0) >= SOME else 0

    def end(self) -> None:
        """Have it finish; it must have done something, and found nothing wrong."""
        self.process.send_signal(signal.SIGINT)
        assert self.process.wait(60) == 0, self.log
        complaints = [line for line in self.log.splitlines() if re.search("fail|error|EINTR", line)]
        assert not [line for line in complaints if not re.search(WITHDRAWN, line)], self.log
        assert sum(map(int, re.findall(r"bogo-ops: (\d+)", self._report.read_text()))) > 0

    def kill(self) -> None:
        """End it and all below it at once, if it still runs."""
        if self.process.poll() is None:
            for pid in [*descendants(self.process.pid), self.process.pid]:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            self.process.wait()


def of_threads(pid: int, name: str) -> list[str]:
    """A file of ``/proc`` for each thread; nothing of those that are gone."""
    found = []
    with suppress(FileNotFoundError, ProcessLookupError):
        for tid in tasks(pid):
            with suppress(FileNotFoundError, ProcessLookupError):
                found.append(Path(f"/proc/{pid}/task/{tid}/{name}").read_text())
    return found


def descendants(pid: int) -> list[int]:
    """The children of a process, theirs, and so on."""
    children = [int(child) for line in of_threads(pid, "children") for child in line.split()]
    return children + [each for child in children for each in descendants(child)]


def cpu_time(pid: int) -> int:
    """Nanoseconds of CPU that the threads of a process have used; 0 if it is gone."""
    return sum(int(line.split()[0]) for line in of_threads(pid, "schedstat"))


def let_work(pid: int) -> None:
    """Return once a process, or one below it, has used some more CPU, or it has ended."""

    def used() -> int:
        return sum(map(cpu_time, [pid, *descendants(pid)]))

    before = used()
    wait_until(lambda: not cpu_time(pid) or abs(used() - before) > SOME, f"{pid} goes on working")


@contextmanager
def stress_ng(options: str, directory: Path) -> Iterator[StressNg]:
    """stress-ng at work within the block, which must end without a complaint of its own."""
    stress = StressNg(options, directory)
    try:
        yield stress
        stress.end()
    finally:
        stress.kill()


def take_epochs(stress: StressNg, path: Path) -> None:
    """Exact epochs of whichever worker there is: stressors end some and begin others."""
    taken = 0
    for number in range(WORKERS):
        pid = stress.worker()
        with suppress(TargetGone), judged(pid, path / f"chain-{number}") as run:
            while taken < EPOCHS:
                run.take()
                taken += 1
                let_work(pid)
            return
    pytest.fail(f"{WORKERS} workers have ended, after {taken} epochs")


@pytest.mark.parametrize("stressor", STRESSORS)
def test_epochs_of_stressors_are_exact_and_disturb_nothing(stressor: str, tmp_path: Path) -> None:
    with stress_ng(STRESSORS[stressor], tmp_path) as stress:
        take_epochs(stress, tmp_path)


@pytest.mark.parametrize("stressor", FAMILIES)
def test_epochs_of_workers_that_share_memory_are_exact(stressor: str, tmp_path: Path) -> None:
    with stress_ng(FAMILIES[stressor], tmp_path) as stress:
        stress.worker()
        with judged(stress.process.pid, tmp_path / "chain", tree=True) as run:
            for _ in range(EPOCHS):
                run.take()
                let_work(stress.process.pid)
            assert max(stats["processes"] for stats in run.stats) > 1


def test_memory_that_is_filled_on_demand_is_read_without_a_fault(
    spawn: Spawn, tmp_path: Path
) -> None:
    target = spawn("lazy", "--pages", 8192)
    with judged(target.pid, tmp_path / "chain") as run:
        for number in range(6):
            run.take(full=number % 2 == 0)
        assert sum(stats["pages_unarmed"] for stats in run.stats) > 0
    target.terminate_and_check()
