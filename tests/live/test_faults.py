"""Dying and failing at the numbered points of ``crtrace/faults.py``.

The points of a run are counted first. Those of the code that holds threads are all replayed. The
whole program has many that differ in nothing but the thread, mapping or record: of it, each run
replays every pair of names that follow each other, once, and of the others a share that a random
offset moves, so that over several runs each has its turn. A failure names the point.
"""

from __future__ import annotations

import os
import random
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest

from crtrace import faults
from crtrace.errors import CrtraceError
from crtrace.image.reader import Chain
from crtrace.linux.addrspace import AddressSpace
from crtrace.linux.procfs import Process
from crtrace.linux.stop import StoppedProcess
from crtrace.track.loader import Programs
from crtrace.track.userfaultfd import UserfaultfdArmer
from crtrace.units import Pid
from tests.live.conftest import Spawn
from tests.live.controllers import HEALING, control, forked, untraced
from tests.live.exactness import judged
from tests.live.harness import Target, Untouched, tasks, wait_until
from tests.live.runner import run, verified

QUIET = ("--mib", 1, "--rate", 40)
"""Little to copy, and a check that need not wait for the writer."""
INDEX_ENTRY = "pwrite of the index entry"
RAISED: dict[str, tuple[type[Exception], ...]] = {
    "memory": (MemoryError, CrtraceError),
    "enospc": (OSError, CrtraceError),
}


@dataclass(frozen=True, slots=True)
class Point:
    """A point that was passed: ``nth`` of those of its name."""

    paused: bool
    name: str
    nth: int

    def order(self, action: str) -> str:
        """What makes crtrace do this there."""
        return f"{self.name}#{self.nth}:{action}"


def _points(log: Path) -> list[Point]:
    seen: Counter[str] = Counter()
    points = []
    for line in log.read_text().splitlines():
        _, where, name = line.split(" ", 2)
        seen[name] += 1
        points.append(Point(where == "paused", name, seen[name]))
    return points


def _share(points: list[Point], one_in: int, offset: int) -> list[Point]:
    """Those to replay: see above."""
    chosen: list[Point] = []
    steps: set[tuple[str, str, bool]] = set()
    before = ""
    for at, point in enumerate(points):
        step = (before, point.name, point.paused)
        if step not in steps or at % one_in == offset % one_in:
            chosen.append(point)
        steps.add(step)
        before = point.name
    return chosen


@pytest.fixture
def no_faults() -> Iterator[None]:
    """Whatever a test plans, nothing fails after it."""
    yield
    faults.plan("")


def _counted(life: Callable[[], None], log: Path) -> list[Point]:
    """The points that a forked controller passes."""

    def counting() -> None:
        faults.plan(f"count:{log}")
        life()

    assert os.waitpid(forked(counting), 0)[1] == 0, "it fails without any fault"
    return _points(log)


def _die(life: Callable[[], None], order: str) -> bool:
    """Let a forked controller die as the order says; False if it does not get to that point."""

    def doomed() -> None:
        faults.plan(order)
        life()

    child = forked(doomed)
    _, how = os.waitpid(child, os.WUNTRACED)
    if os.WIFSTOPPED(how):
        os.kill(child, signal.SIGKILL)
        _, how = os.waitpid(child, 0)
    assert how in (0, signal.SIGKILL), f"{order}: the controller ended with {how:#x}"
    return how != 0


def _assert_well(target: Target, before: Untouched, patience: float = HEALING) -> None:
    """No trace of us, and the target's own check finds no fault."""
    wait_until(lambda: untraced(target.pid), "the kernel lets the target go")
    # Its main thread comes and goes; of the others, each checks itself.
    before.assert_same(ignore=["registers"], patience=patience)
    target.obey("check")


def _replay(target: Target, before: Untouched, life: Callable[[], None], order: str) -> bool:
    reached = _die(life, order)
    _assert_well(target, before)
    return reached


def _inject(pid: int) -> None:
    """The call that is injected to arm a process."""
    with closing(Process(Pid(pid))) as process:
        space = AddressSpace(process)
        with (
            closing(UserfaultfdArmer(process, space)) as armer,
            StoppedProcess(process) as stopped,
        ):
            armer.arm(stopped)


def _pause(pid: int) -> None:
    """All that a pause does to the threads of a process."""
    with closing(Process(Pid(pid))) as process, StoppedProcess(process) as stopped:
        for tracee in stopped.tracees.values():
            tracee.capture()


@pytest.mark.parametrize("life", [_inject, _pause])
def test_killed_before_any_call_to_one_of_many_threads(
    spawn: Spawn, tmp_path: Path, life: Callable[[int], None]
) -> None:
    target = spawn("tiny", *QUIET, "--sleepers", 28)
    assert len(tasks(target.pid)) == 32
    before = Untouched(target.pid)
    doing = partial(life, target.pid)
    # A thread that is slow to stop adds points that other runs do not have.
    points = min((_counted(doing, tmp_path / f"points{n}") for n in range(3)), key=len)
    held = [point for point in points if point.name.startswith("ptrace")]
    assert len(held) > 32 * 4
    assert all(point.paused for point in held)
    reached = sum(_replay(target, before, doing, point.order("kill")) for point in points)
    assert reached > len(points) * 0.9
    target.terminate_and_check()


@pytest.mark.parametrize(("action", "one_in"), [("kill", 40), ("stop", 0)])
def test_killed_anywhere_leaves_a_target_and_a_chain(
    spawn: Spawn, tmp_path: Path, programs: Programs, action: str, one_in: int
) -> None:
    target = spawn("tiny", *QUIET)
    before = Untouched(target.pid)
    path, log = tmp_path / "chain", tmp_path / "log"
    life = partial(control, target.pid, path, programs, 2)
    _counted(life, tmp_path / "first")
    points = _counted(life, tmp_path / "points")  # with a chain to go on with
    offset = random.randrange(1000)
    chosen = _share(points, one_in, offset) if one_in else points[offset % 24 :: 24]
    reached = sum(_replay(target, before, life, point.order(f"{action}:{log}")) for point in chosen)
    assert reached > len(chosen) * 0.9, f"offset {offset}"
    missed = {point.name for point in chosen} - {point.name for point in _points(log)}
    assert not missed, f"never at {missed}, offset {offset}"
    # What the last one left unfinished may still lie there.
    (report,) = run("verify", path, "--json").expect(0).events
    assert len(report["epochs"]) > 4
    with judged(target.pid, path) as after:
        after.take()
        after.take()
    assert verified(path)
    target.terminate_and_check()


BEGINNING = ("mkdir", "create", "pwrite of", "fdatasync", "fsync", "rename", "unlink")
"""Points that matter to the directory, its index and the first entry."""


def test_killed_while_a_chain_begins(spawn: Spawn, tmp_path: Path, programs: Programs) -> None:
    target = spawn("tiny", *QUIET)

    def life(path: Path) -> Callable[[], None]:
        return partial(control, target.pid, path, programs, 1)

    points = _counted(life(tmp_path / "chain"), tmp_path / "points")
    chosen = [point for point in points if point.name.startswith(BEGINNING)]
    assert len(chosen) > 8
    for at, point in enumerate(chosen):
        path = tmp_path / f"chain{at}"
        assert _die(life(path), point.order("kill"))
        assert os.waitpid(forked(life(path)), 0)[1] == 0, f"not after {point}"
        with Chain.open(path) as chain:
            assert [entry.epoch for entry in chain.entries] in ([0], [0, 1])
    assert verified(path)
    target.terminate_and_check()


@pytest.mark.usefixtures("no_faults")
@pytest.mark.parametrize("action", RAISED)
@pytest.mark.parametrize("life", [_inject, _pause])
def test_failing_while_threads_are_held(
    spawn: Spawn, tmp_path: Path, action: str, life: Callable[[int], None]
) -> None:
    target = spawn("tiny", *QUIET)
    before = Untouched(target.pid)
    points = _counted(partial(life, target.pid), tmp_path / "points")
    ours = len(os.listdir("/proc/self/fd"))
    raised = 0
    for point in points:
        faults.plan(point.order(action))
        try:
            life(target.pid)
        except RAISED[action]:
            raised += 1
        faults.plan("")
        assert untraced(target.pid), point
        assert len(os.listdir("/proc/self/fd")) == ours, f"a descriptor is left open by {point}"
        _assert_well(target, before, 0.0)
    assert raised > len({point.name for point in points}) / 2
    target.terminate_and_check()


@pytest.mark.usefixtures("no_faults")
@pytest.mark.parametrize("action", RAISED)
def test_an_epoch_that_fails_anywhere_carries_its_pages_on(
    spawn: Spawn, tmp_path: Path, action: str
) -> None:
    target = spawn("tiny", *QUIET)
    log = tmp_path / "points"
    with judged(target.pid, tmp_path / "chain") as run:
        run.take()
        run.take()
        before = Untouched(target.pid)
        target.obey("write 9")
        faults.plan(f"count:{log}")
        run.session.checkpoint()
        faults.plan("")
        points = _points(log)
        raised = 0
        chosen = _share(points, 20, random.randrange(1000))
        for at, point in enumerate(chosen):
            target.obey(f"write {at % 50 + 1}")  # what a lost set would miss
            faults.plan(point.order(action))
            try:
                run.session.checkpoint()
            except RAISED[action]:
                raised += 1
            faults.plan("")
            assert untraced(target.pid), point
            _assert_well(target, before, 0.0)
            run.take(f"after {point}")
        assert raised > len(chosen) / 2
    assert verified(tmp_path / "chain")
    target.terminate_and_check()


@pytest.mark.parametrize("where", ["create", "pwritev", INDEX_ENTRY])
def test_a_full_disk_is_said_plainly(spawn: Spawn, tmp_path: Path, where: str) -> None:
    target = spawn("tiny", *QUIET)
    before = Untouched(target.pid)
    path = tmp_path / "chain"
    failing = run("dump", target.pid, "-o", path, env={"CRTRACE_FAULT": f"{where}#1:enospc"})
    failing.expect(1, "no space left on device")
    before.assert_same(ignore=["registers"])
    run("dump", target.pid, "-o", path).expect(0)
    assert verified(path) == [0]
    target.terminate_and_check()


@pytest.mark.parametrize("where", ["ptrace 0x4206", "pwritev"])
def test_running_out_of_memory_is_said_plainly(spawn: Spawn, tmp_path: Path, where: str) -> None:
    target = spawn("tiny", *QUIET)
    path = tmp_path / "chain"
    fault = {"CRTRACE_FAULT": f"{where}#2:memory"}
    run("dump", target.pid, "-o", path, env=fault).expect(1, "out of memory")
    assert untraced(target.pid)
    run("dump", target.pid, "-o", path).expect(0)
    assert verified(path) == [0]
    target.terminate_and_check()
