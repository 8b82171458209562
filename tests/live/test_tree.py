"""A whole process tree in one pause: every process exact, and nothing stored twice."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from crtrace.capture import tree
from crtrace.capture.target import Target as AddressSpaceTarget
from crtrace.capture.tree import StoppedTree, Tree
from crtrace.errors import LeaderGone, TargetBusy
from crtrace.linux.procfs import Process, parents
from crtrace.linux.ptrace import Tracee
from crtrace.track.armer import Scan
from crtrace.track.dirty import CHILD
from crtrace.units import PAGE_SIZE, Pid
from tests.live.conftest import Spawn, program_of_32_bits
from tests.live.exactness import Judged, acting, judged, reader, take_with
from tests.live.harness import Untouched, status, tasks, wait_until
from tests.live.runner import Watching, run, verified

FAMILIES = ["fork 4 64", "threads 3 64 4", "tree 4 64", "vfork 3 64", "clonevm 64"]


def pids_of(judge: Judged) -> set[int]:
    with judge.epoch() as epoch:
        return {view.task.pid for view in epoch.tasks if view.mm}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_that_is_there_already_is_captured_whole(
    spawn: Spawn, tmp_path: Path, family: str
) -> None:
    target = spawn("spawner")
    children = {child["pid"]: child for child in target.ask(family)}
    before = [Untouched(pid) for pid in (target.pid, *children)]
    with judged(target.pid, tmp_path / "chain", tree=True) as judge:
        for _ in range(3):
            judge.take()
            assert pids_of(judge) == {target.pid, *children}
        assert judge.stats[1]["bpf_missed"] == 0
        with judge.epoch() as epoch:
            for view in epoch.tasks:
                if view.task.pid in children:
                    assert view.task.ppid == children[view.task.pid]["ppid"]
                    assert view.parent == next(
                        up.id for up in epoch.tasks if up.task.pid == view.task.ppid
                    )
    for untouched in before:
        untouched.assert_same(ignore=["registers"])
    target.terminate_and_check()


@pytest.mark.parametrize("family", FAMILIES)
def test_children_that_come_between_epochs_are_captured(
    spawn: Spawn, tmp_path: Path, family: str
) -> None:
    target = spawn("spawner")
    with judged(target.pid, tmp_path / "chain", tree=True) as judge:
        judge.take()
        children = target.ask(family)
        judge.take()
        assert pids_of(judge) == {target.pid, *(child["pid"] for child in children)}
        judge.take()
        if family != "clonevm 64":
            assert judge.stats[2]["bpf_missed"] == 0
        assert target.command("reap").startswith("ok")
        judge.take()
        assert pids_of(judge) == {target.pid}
    target.terminate_and_check()


def test_a_child_is_stored_as_what_it_does_not_share(spawn: Spawn, tmp_path: Path) -> None:
    target = spawn("spawner")
    inherited = target.info["pages"]
    with judged(target.pid, tmp_path / "chain", tree=True) as judge:
        judge.take()
        target.ask("fork 4 8")
        judge.take()
        stats = judge.stats[1]
        assert stats["pages_inherited"] > 4 * (inherited - 8)
        assert stats["bytes_raw"] < 4 * inherited * PAGE_SIZE / 2
    target.terminate_and_check()


def test_a_family_shares_already_in_the_first_image(spawn: Spawn, tmp_path: Path) -> None:
    target = spawn("spawner")
    target.ask("fork 4 8")
    with judged(target.pid, tmp_path / "chain", tree=True) as judge:
        judge.take()
        stats = judge.stats[0]
        assert stats["pages_equal"] > 4 * (target.info["pages"] - 8)
        assert stats["bytes_raw"] < 3 * target.info["pages"] * PAGE_SIZE
        with judge.epoch() as epoch:
            assert reader(epoch)(target.info["inherited"], PAGE_SIZE) != bytes(PAGE_SIZE)
    target.terminate_and_check()


def test_one_that_shares_the_memory_stands_still_without_tree(spawn: Spawn, tmp_path: Path) -> None:
    target = spawn("spawner")
    (early,) = target.ask("clonevm 32")
    with judged(target.pid, tmp_path / "chain") as judge:
        judge.take()
        assert judge.stats[0]["processes"] == 2
        assert pids_of(judge) == {target.pid, early["pid"]}
        with judge.epoch() as epoch:
            assert len({view.mm.space for view in epoch.tasks if view.mm}) == 1
        target.ask("fork 1 8")
        target.ask("vfork 1 8")
        judge.take()
        assert judge.stats[1]["processes"] == 2
        assert target.command("reap").startswith("ok")
        judge.take()
        assert judge.stats[2]["processes"] == 1
        (late,) = target.ask("clonevm 32")
        judge.take()
        assert pids_of(judge) == {target.pid, late["pid"]}
    target.terminate_and_check()


@contextlib.contextmanager
def shell(script: str) -> Iterator[subprocess.Popen[bytes]]:
    """A shell that takes lines on its standard input; it is gone after the block."""
    with subprocess.Popen(
        ["bash", "-c", script], stdin=subprocess.PIPE, start_new_session=True
    ) as process:
        try:
            yield process
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def go(process: subprocess.Popen[bytes]) -> None:
    """Give a shell its next line."""
    assert process.stdin
    process.stdin.write(b"go\n")
    process.stdin.flush()


STORM = (
    "trap 'on=0' TERM; on=1; while ((on)); do (a=$(printf %05000d $RANDOM); : $a) & /bin/true;"
    " (exit 3) & cat /dev/null | cat; wait -n; done; wait; exit 7"
)
"""A shell whose children come and go all the time, some by fork alone, some by exec."""


def test_a_storm_of_children_is_followed_and_left_alone(tmp_path: Path) -> None:
    with shell(STORM) as storm:
        seen: set[int] = set()
        with judged(storm.pid, tmp_path / "chain", tree=True) as judge:
            for _ in range(25):
                judge.take()
                seen |= pids_of(judge)
            assert len(seen) > 1
        storm.terminate()
        assert storm.wait(30) == 7
    assert len(verified(tmp_path / "chain")) == 25
    ends = _ends(tmp_path / "chain")
    assert ends
    assert set(ends) <= seen


def _ends(path: Path) -> dict[int, int]:
    """The exit status of each process that has one, over all epochs."""
    (listed,) = run("list", path, "--json").expect(0).events
    found = {}
    for row in listed["epochs"]:
        (shown,) = run("show", path, "--epoch", row["epoch"], "--json").expect(0).events
        for task in shown["tasks"]:
            if task["state"] == "X":
                assert task["space"] is None
                found[task["pid"]] = task["exit_status"]
    return found


def await_event(watching: Watching, kind: str) -> dict[str, Any]:
    """The next event of a kind; others are passed over."""
    while (event := watching.event())["event"] != kind:
        pass
    return event


def test_watch_tells_of_forks_and_ends_and_concludes(spawn: Spawn, tmp_path: Path) -> None:
    target = spawn("spawner")
    path = tmp_path / "chain"
    with Watching(target.pid, path, "--tree", "--interval", 0.2) as watching:
        assert watching.event("checkpoint")["processes"] == 1
        first, second = (child["pid"] for child in target.ask("fork 2 16"))
        forks = [await_event(watching, "fork")["pid"] for _ in range(2)]
        assert forks == sorted([first, second])
        os.kill(first, signal.SIGKILL)
        event = await_event(watching, "exit")
        assert (event["pid"], event["status"]) == (first, -signal.SIGKILL)
        await_event(watching, "checkpoint")
        os.kill(target.pid, signal.SIGKILL)  # its children die of that, too
        result = watching.wait().expect(0)
    assert {event["pid"] for event in result.of("exit")} == {target.pid, first, second}
    assert result.of("checkpoint")[-1]["reason"] == "exit"
    verified(path)
    assert _ends(path)[first] == signal.SIGKILL
    assert _ends(path)[target.pid] == signal.SIGKILL
    run("export", path, "--format", "core", "-o", tmp_path / "core").expect(1, "had ended")
    run("export", path, "--epoch", -2, "--pid", second, "-o", tmp_path / "core").expect(0)


def test_what_outlives_the_target_is_followed_on(tmp_path: Path) -> None:
    script = "read -r line; (read -r line; exit 4) <&0 & exit 3"
    with shell(script) as parent:
        with Watching(parent.pid, tmp_path / "chain", "--tree", "--interval", 0.1) as watching:
            watching.event("checkpoint")
            go(parent)
            await_event(watching, "exit")
            await_event(watching, "checkpoint")
            go(parent)
            result = watching.wait().expect(0)
        assert parent.wait() == 3
    exits = {event["pid"]: event["status"] for event in result.of("exit")}
    assert exits[parent.pid] == 3
    assert sorted(exits.values()) == [3, 4]
    assert _ends(tmp_path / "chain")[parent.pid] == 3 << 8


def _family_untraced(pids: list[int]) -> bool:
    return all(status(p, t)["TracerPid"] == "0" for p in pids for t in tasks(p))


def test_a_whole_tree_goes_on_when_crtrace_is_killed(spawn: Spawn, tmp_path: Path) -> None:
    target = spawn("spawner")
    pids = [target.pid, *(child["pid"] for child in target.ask("threads 6 32 8"))]
    before = [Untouched(pid) for pid in pids]
    for at in range(6):
        with Watching(target.pid, tmp_path / "chain", "--tree", "--interval", 0) as watching:
            time.sleep(0.4 + 0.1 * at)
            os.kill(watching.pid, signal.SIGKILL)
        wait_until(lambda: _family_untraced(pids), "the kernel lets the tree go")
        for untouched in before:
            untouched.assert_same(ignore=["registers"], patience=5.0)
    target.terminate_and_check()


def test_a_child_whose_first_thread_has_exited_is_left_out(
    spawn: Spawn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = spawn("spawner")
    without, whole = (child["pid"] for child in target.ask("fork 2 16"))
    gone = LeaderGone("the first thread has exited")

    def look(process: Process) -> None:
        if process.pid == without:
            raise gone

    monkeypatch.setattr(tree, "refuse_unsuitable", look)
    with judged(target.pid, tmp_path / "chain", tree=True) as judge:
        for _ in range(2):
            judge.take()
            assert pids_of(judge) == {target.pid, whole}
            assert judge.stats[-1]["limits"] == [f"process {without} is left out: {gone}"]


def test_who_leaves_the_tree_alive_is_marked_no_longer(spawn: Spawn, tmp_path: Path) -> None:
    """Else every pause would stop it, to see again that it cannot be captured."""
    target = spawn("spawner")
    with judged(target.pid, tmp_path / "chain", tree=True) as judge:
        judge.take()
        (child,) = (child["pid"] for child in target.ask("fork 1 16"))
        judge.take()
        (member,) = (each for each in judge.session._tree.members if each.process.pid == child)
        assert judge.session._marks.targets()[member.tgid] & CHILD
        judge.session._tree.depart(member)
        assert member.tgid not in judge.session._marks.targets()


def test_who_is_left_out_is_not_forgotten_when_a_look_at_the_tree_fails(
    spawn: Spawn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = spawn("spawner")
    (traced,) = (child["pid"] for child in target.ask("fork 1 16"))

    def fail(self: Tree) -> None:
        raise TargetBusy("try again")

    with _traced(traced), judged(target.pid, tmp_path / "chain", tree=True) as judge:
        with monkeypatch.context() as patch:
            patch.setattr(Tree, "strangers", fail)
            with pytest.raises(TargetBusy):
                judge.take()
        judge.take()
        assert [str(traced) in limit for limit in judge.stats[-1]["limits"]] == [True]


def test_without_tree_a_program_of_its_own_is_no_member(spawn: Spawn, tmp_path: Path) -> None:
    """A child that had the target's memory when it was noticed, and has called exec since."""
    target, other = spawn("spawner"), spawn("layout")
    before = Untouched(other.pid)
    with judged(target.pid, tmp_path / "chain") as judge:
        assert judge.session._tree.take_in(Pid(other.pid), 0) is None
        judge.take()
        assert pids_of(judge) == {target.pid}
    before.assert_same()


def test_a_process_that_is_killed_late_in_a_pause_is_no_failure(
    spawn: Spawn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = spawn("spawner")
    victim, other = (child["pid"] for child in target.ask("fork 2 16"))
    capture = Tracee.capture

    def too_late(self: Tracee) -> None:
        if self.tid == victim:
            os.kill(victim, signal.SIGKILL)
            wait_until(lambda: status(victim)["State"][0] in "ZX", "it is dead")
        capture(self)

    with judged(target.pid, tmp_path / "chain", tree=True) as judge:
        judge.take()
        with monkeypatch.context() as patch:
            patch.setattr(Tracee, "capture", too_late)
            judge.take()
        assert pids_of(judge) == {target.pid, other}


def test_a_traced_descendant_is_left_out_aloud(spawn: Spawn, tmp_path: Path) -> None:
    target = spawn("spawner")
    traced, free = (child["pid"] for child in target.ask("fork 2 16"))
    with _traced(traced):
        with judged(target.pid, tmp_path / "chain", tree=True) as judge:
            judge.take()
            assert pids_of(judge) == {target.pid, free}
            assert [str(traced) in limit for limit in judge.stats[0]["limits"]] == [True]
        result = run("watch", target.pid, "-o", tmp_path / "other", "--tree", "--count", 1)
        result.expect(3, f"process {traced} is left out")
    (shown,) = run("show", tmp_path / "chain", "--json").expect(0).events
    assert shown["stats"]["limits"] == judge.stats[0]["limits"]
    assert f"process {traced} is left out" in run("show", tmp_path / "chain").stdout
    target.terminate_and_check()


@contextlib.contextmanager
def _traced(pid: int) -> Iterator[None]:
    """Another tracer holds a process."""
    code = (
        "import ctypes, sys, time; libc = ctypes.CDLL(None);"
        "libc.ptrace(0x4206, int(sys.argv[1]), 0, 0); print('held', flush=True); time.sleep(60)"
    )
    command = [sys.executable, "-c", code, str(pid)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as tracer:
        assert tracer.stdout
        assert tracer.stdout.readline() == b"held\n"
        yield
        tracer.kill()


def test_a_member_that_execs_is_a_new_program(spawn: Spawn, tmp_path: Path) -> None:
    script = "exec 3<&0; (read -r line <&3; exec sleep 60) & wait"
    with shell(script) as parent:
        with judged(parent.pid, tmp_path / "chain", tree=True) as judge:
            judge.take()
            child = max(pids_of(judge))
            assert len(pids_of(judge)) == 2
            go(parent)
            wait_until(
                lambda: Path(f"/proc/{child}/comm").read_text() == "sleep\n", "it is sleep now"
            )
            judge.take()
            judge.take()
            with judge.epoch() as epoch:
                view = next(view for view in epoch.tasks if view.task.pid == child)
                assert view.task.comm == "sleep"
                assert not epoch.header.full
        os.kill(child, signal.SIGTERM)
        parent.wait(10)


def test_a_32_bit_child_is_left_out_and_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = program_of_32_bits(tmp_path)
    stopped: list[Pid] = []
    stop = StoppedTree._stop_stranger

    def counted(self: StoppedTree, process: Process) -> None:
        stopped.append(process.pid)
        stop(self, process)

    monkeypatch.setattr(StoppedTree, "_stop_stranger", counted)
    with shell(f"read -r line; {program} & wait") as parent:
        with judged(parent.pid, tmp_path / "chain", tree=True) as judge:
            judge.take()
            take_with(judge, lambda: _begin(parent), "_pause")
            (child,) = children_of(parent.pid)
            for _ in range(2):
                judge.take()
                assert pids_of(judge) == {parent.pid}
                assert any(f"process {child} is left out" in x for x in judge.stats[-1]["limits"])
            assert stopped.count(child) <= 1
            assert status(child)["State"][0] == "S"
        os.kill(child, signal.SIGKILL)


def _begin(parent: subprocess.Popen[bytes]) -> None:
    go(parent)

    def runs() -> bool:
        return any(status(pid)["Name"] == "pause" for pid in children_of(parent.pid))

    wait_until(runs, "it runs")


def children_of(pid: int) -> list[Pid]:
    """The children of a process."""
    return [child for child, parent in parents().items() if parent == pid]


def test_a_child_that_is_met_in_the_stop_of_a_round_is_no_failure(
    spawn: Spawn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where scans need all stopped: then rounds meet new members, too."""
    target = spawn("spawner")
    with judged(target.pid, tmp_path / "chain", tree=True) as judge:
        judge.take()
        root = judge.session._tree.root.target
        monkeypatch.setattr(type(root.armer), "stands_still", True)
        monkeypatch.setattr(judge.session, "_bearable", lambda: -1)
        children: list[int] = []

        def fork_once() -> None:
            if not children:
                children.extend(child["pid"] for child in target.ask("fork 1 16"))

        with acting(judge.session, "_standing_still", fork_once):
            judge.take()
        assert pids_of(judge) == {target.pid, *children}
        judge.take()


def test_a_child_whose_leader_ends_in_a_round_has_the_epoch_begun_again(
    spawn: Spawn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = spawn("spawner")
    (child,) = (each["pid"] for each in target.ask("fork 1 16"))
    scan = AddressSpaceTarget.scan
    gone: list[int] = []

    def without_leader(self: AddressSpaceTarget, *args: Any, **how: Any) -> Scan:
        if self.process.pid == child and not gone:
            gone.append(child)
            raise LeaderGone(f"the first thread of process {child} has exited")
        return scan(self, *args, **how)

    with judged(target.pid, tmp_path / "chain", tree=True) as judge:
        judge.take()
        monkeypatch.setattr(AddressSpaceTarget, "scan", without_leader)
        judge.take()
    assert gone == [child]


LEADER_LEAVES = """
import ctypes, os, sys, threading, time
if os.fork():
    threading.Thread(target=time.sleep, args=(1000,), daemon=True).start()
    sys.stdin.readline()
    ctypes.CDLL(None).pthread_exit(None)
time.sleep(1000)
"""


def test_a_target_whose_leader_ends_is_told_though_a_child_lives(tmp_path: Path) -> None:
    command = [sys.executable, "-c", LEADER_LEAVES]
    target = subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)
    try:
        wait_until(lambda: bool(children_of(target.pid)) and len(tasks(target.pid)) == 2, "it runs")
        with judged(target.pid, tmp_path / "chain", tree=True) as judge:
            judge.take()
            go(target)
            wait_until(lambda: status(target.pid)["State"][0] == "Z", "its leader has ended")
            with pytest.raises(LeaderGone):
                judge.session.checkpoint()
    finally:
        os.killpg(target.pid, signal.SIGKILL)
        target.wait()
