"""Whatever condition a target is in, it cannot tell that it was watched, nor can anybody else.

The target looks from inside (``corners.c``, ``sleepers.c``): signals, timers, waits, stacks. What
can be seen of it from outside is compared by ``Untouched``. And every epoch must be exact.
"""

from __future__ import annotations

import errno
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from crtrace.capture.session import Session
from crtrace.capture.tree import ProgramChanged
from crtrace.demo.judge import Judge
from crtrace.errors import CrtraceError, TargetBusy, TargetGone
from crtrace.image.store import ChainWriter
from crtrace.linux import ptrace, stop
from crtrace.linux.libc import kernel_version
from crtrace.linux.procfs import Process
from crtrace.linux.ptrace import INTERRUPT, Tracee
from crtrace.linux.stop import StoppedProcess
from crtrace.track.dirty import WrittenPages
from crtrace.track.loader import Programs
from crtrace.track.userfaultfd import UserfaultfdArmer
from crtrace.units import Pid
from tests.live.conftest import Spawn
from tests.live.exactness import Judged
from tests.live.harness import Target, Untouched, compile_target, status, stopped, tasks, wait_until
from tests.live.runner import SLOWNESS, Watching, run, verified

EPOCHS = 3
CAP_SYS_RESOURCE = 24
THREADS_CHANGE = ["threads", "states", "masks", "tracers", "sandboxes", "children", "registers"]
MAPPINGS_CHANGE = ["mappings", "vma_flags"]
WATCHED = {"vma_flags"}
"""What says that memory is write-protected by userfaultfd, while it is."""


def nothing() -> None:
    """What usually happens during a pause."""


@contextmanager
def watched(
    pid: int, path: Path, programs: Programs, during: Callable[[], None] = nothing
) -> Iterator[Judged]:
    """Like ``judged``, with BPF that is loaded already; ``during`` is called in every pause."""
    judge = Judge()

    def witness(*seen: object) -> None:
        judge(*seen)
        during()

    with (
        Process(Pid(pid)) as process,
        ChainWriter.open(path, create=True) as chain,
        closing(Session(process, chain, WrittenPages(programs), witness=witness)) as session,
    ):
        yield Judged(session, judge, path)


def end(target: Target) -> None:
    """End a target by command; its own check must find no fault."""
    target.obey("quit")
    code = target.process.wait(60)
    assert code == 0, f"exit status {code}; stderr: {target.stderr}"


def corner(spawn: Spawn, condition: str) -> Target:
    """A target in a condition; the threads that the kernel makes in it have their names."""
    target = spawn("corners", "--in", condition)
    if condition.startswith("uring_"):
        named = f"-{target.pid}"
        wait_until(
            lambda: any(each["Name"].endswith(named) for each in map_status(target.pid)),
            "io_uring has a thread",
        )
    if condition == "code32" and target.command("check") != "ok":
        pytest.skip("cannot run here: 32-bit code does not run in a 64-bit program (seen emulated)")
    return target


def inner_pid(target: Target) -> int:
    """The process to watch: in a PID namespace of its own it is the target's child."""
    if target.info["pid"] != 1:
        return target.pid
    return int(Path(f"/proc/{target.pid}/task/{target.pid}/children").read_text())


# --- conditions of the process ---


@pytest.mark.parametrize(
    ("condition", "changes"),
    [
        ("plain", []),
        ("seccomp_errno", []),
        ("seccomp_kill", []),
        ("seccomp_trap", []),
        ("mount_namespace", []),
        ("user_namespace", []),
        ("pid_namespace", []),
        ("nobody", []),
        ("full_table", []),
        ("full_table_nobody", []),
        ("handler", []),
        ("alternate_stack", []),
        ("pending", []),
        ("tiny_stack", []),
        ("coroutine", []),
        ("code32", ["registers"]),
        ("short_threads", [*THREADS_CHANGE, *MAPPINGS_CHANGE, "Threads"]),
        ("parent", []),
        ("uring_worker", []),
        ("uring_polled", []),
    ],
)
def test_a_target_in_a_corner(
    spawn: Spawn, tmp_path: Path, programs: Programs, condition: str, changes: list[str]
) -> None:
    target = corner(spawn, condition)
    pid = inner_pid(target)
    before = Untouched(pid)
    with watched(pid, tmp_path / "chain", programs) as judged:
        for _ in range(EPOCHS):
            judged.take()
        before.assert_same(ignore={*changes, *WATCHED})
    before.assert_same(ignore=changes)
    target.obey("check")
    end(target)


@pytest.mark.parametrize("condition", ["seccomp_errno", "seccomp_kill", "seccomp_trap"])
def test_the_sandbox_of_a_corner_is_one(spawn: Spawn, condition: str) -> None:
    """Without it the tests above would be about nothing."""
    target = spawn("corners", "--in", condition)
    assert status(target.pid)["Seccomp"] == "2"


@pytest.mark.parametrize("condition", ["uring_worker", "uring_polled"])
def test_io_of_io_uring_ends_well_after_all_pauses(
    spawn: Spawn, tmp_path: Path, programs: Programs, condition: str
) -> None:
    target = corner(spawn, condition)
    with watched(target.pid, tmp_path / "chain", programs) as judged:
        for _ in range(EPOCHS):
            judged.take()
    target.obey("go")
    end(target)


def test_an_io_worker_is_left_alone_during_the_pause(
    spawn: Spawn, tmp_path: Path, programs: Programs
) -> None:
    target = corner(spawn, "uring_worker")
    seen: list[dict[str, str]] = []

    def look() -> None:
        seen.append({s["Name"]: s["State"][0] for s in map_status(target.pid)})

    with watched(target.pid, tmp_path / "chain", programs, look) as judged:
        judged.take()
        with judged.epoch() as epoch:
            assert [view.thread.tid for view in epoch.tasks[0].threads] == [target.pid]
    assert seen == [{"corners": "t", f"iou-wrk-{target.pid}": "S"}]


def map_status(pid: int) -> list[dict[str, str]]:
    """The status of every thread."""
    return [status(pid, tid) for tid in tasks(pid)]


def test_a_child_that_is_watched_gives_its_parent_no_sign(
    spawn: Spawn, tmp_path: Path, programs: Programs
) -> None:
    target = spawn("corners", "--in", "parent")
    child, parent = target.info["other"], Untouched(target.pid)
    before = Untouched(child)
    with watched(child, tmp_path / "chain", programs) as judged:
        for _ in range(EPOCHS):
            judged.take()
    before.assert_same()
    parent.assert_same()
    target.obey("check")
    end(target)


# --- a full descriptor table ---


@pytest.mark.parametrize("condition", ["full_table", "full_table_nobody"])
def test_the_limit_is_what_it_was_at_every_step(
    spawn: Spawn, tmp_path: Path, programs: Programs, condition: str
) -> None:
    target = spawn("corners", "--in", condition)
    before = Untouched(target.pid).fields["limits"]
    with watched(target.pid, tmp_path / "chain", programs) as judged:
        assert Untouched(target.pid).fields["limits"] == before
        judged.take()
    end(target)


def test_a_hard_limit_is_raised_for_a_moment_by_who_may(
    spawn: Spawn, tmp_path: Path, programs: Programs
) -> None:
    if not int(status(os.getpid())["CapEff"], 16) >> CAP_SYS_RESOURCE & 1:
        pytest.skip("cannot run here: root may not raise the limits of others")
    target = spawn("corners", "--in", "full_table_hard")
    before = Untouched(target.pid)
    with watched(target.pid, tmp_path / "chain", programs) as judged:
        judged.take()
    before.assert_same()
    end(target)


@pytest.mark.usefixtures("userfaultfd")
def test_without_the_privilege_to_raise_the_limit_the_target_is_busy(
    spawn: Spawn, tmp_path: Path
) -> None:
    target = spawn("corners", "--in", "full_table_hard")
    before = Untouched(target.pid)
    less = ["setpriv", "--bounding-set=-sys_resource", "--inh-caps=-sys_resource"]
    result = run("watch", target.pid, "-o", tmp_path / "chain", "--count", 1, before=less)
    result.expect(13, "has no free descriptor", "RLIMIT_NOFILE")
    before.assert_same()
    end(target)


# --- waits ---


def test_waits_go_on_through_every_pause(spawn: Spawn, tmp_path: Path, programs: Programs) -> None:
    target = spawn("sleepers")
    before = Untouched(target.pid)
    with watched(target.pid, tmp_path / "chain", programs) as judged:
        for _ in range(5):
            judged.take()
        assert judged.stats[-1]["waits_given_back"] > 0
    report = target.ask("report")
    assert {name: each["errno"] for name, each in report.items() if each["returns"]} == {}
    before.assert_same(ignore=["registers"])  # its main thread has just answered
    target.terminate_and_check()


def test_the_wait_of_the_thread_that_makes_the_userfaultfd_goes_on(
    spawn: Spawn, tmp_path: Path, programs: Programs
) -> None:
    """Every sleeper in turn is the first thread, which carries out what is injected."""
    for name in spawn("sleepers").info:
        with Target("sleepers", "--main", name) as target:
            before = Untouched(target.pid)
            with watched(target.pid, tmp_path / name, programs) as judged:
                judged.take()
                judged.take()
            (report,) = target.ask("report").values()
            assert (name, report["returns"], report["errno"]) == (name, 0, 0)
            before.assert_same(ignore=["registers"])  # another thread has just answered
            if report["can_wake"]:
                target.obey(f"wake {name}")
            target.terminate_and_check()


# --- stop and continue ---


def is_stopped(pid: int) -> bool:
    """Every thread is stopped by a signal."""
    return all(each["State"][0] == "T" for each in map_status(pid))


@pytest.mark.parametrize("condition", ["plain", "tiny_stack"])
def test_a_stopped_target_stays_stopped(
    spawn: Spawn, tmp_path: Path, programs: Programs, condition: str
) -> None:
    target = spawn("corners", "--in", condition)
    running = Untouched(target.pid)
    with stopped(target.pid):
        before = Untouched(target.pid)
        with watched(target.pid, tmp_path / "chain", programs) as judged:
            judged.take()
            judged.take()
        assert judged.stats[1]["pages_written"] == 0
        wait_until(lambda: is_stopped(target.pid), "it is stopped again")
        before.assert_same()
    running.assert_same(ignore=["registers"], patience=10.0)  # SIGCONT is to be handled first
    end_after_continuing(target)


def end_after_continuing(target: Target) -> None:
    """End a target that was stopped by its tests: its one stray signal is that SIGCONT."""
    assert target.terminate() == 1
    assert f"1 stray signals, the last {signal.SIGCONT.value}" in target.stderr


@pytest.mark.parametrize("condition", ["plain", "tiny_stack"])
def test_a_stop_that_comes_in_the_pause_is_obeyed_after_it(
    spawn: Spawn, tmp_path: Path, programs: Programs, condition: str
) -> None:
    target = spawn("corners", "--in", condition)
    before = Untouched(target.pid)
    signals: list[signal.Signals] = []

    def during() -> None:
        if signals:
            os.kill(target.pid, signals.pop())

    with watched(target.pid, tmp_path / "chain", programs, during) as judged:
        for _ in range(3):
            signals.append(signal.SIGSTOP)
            judged.take()
            wait_until(lambda: is_stopped(target.pid), "it is stopped")
            judged.take()
            wait_until(lambda: is_stopped(target.pid), "it is still stopped")
            signals.append(signal.SIGCONT)
            judged.take()
            wait_until(lambda: not is_stopped(target.pid), "it runs again")
            assert target.command("check") == "bad"  # for the SIGCONT
    before.assert_same(ignore=["registers"])  # after a handler they are others
    assert target.terminate() == 1
    assert f"3 stray signals, the last {signal.SIGCONT.value}" in target.stderr


# --- guard regions ---


@pytest.mark.usefixtures("userfaultfd")
def test_guard_regions_take_the_place_of_armed_pages_of_a_file(
    spawn: Spawn, tmp_path: Path, programs: Programs
) -> None:
    """The kernel begins again and again until the page is armed no more."""
    target = spawn("layout")
    target.obey("write file_private 0 4 5")
    with watched(target.pid, tmp_path / "chain", programs) as judged:
        judged.take()
        judged.take()
        target.send("guard file_private 1 2")
        for _ in range(20):  # it may begin only after a pause
            judged.take()
            if target.has_answered(1):
                break
        if target.answer(timeout=1) != "ok":
            pytest.skip("cannot run here: no guard regions there (before Linux 6.15)")
        target.obey("write file_private 0 1 6")
        for _ in range(2):
            judged.take()


# --- vfork ---


def test_a_vfork_delays_the_epoch_and_disturbs_nobody(spawn: Spawn, tmp_path: Path) -> None:
    target = spawn("corners", "--in", "vfork")
    with Watching(target.pid, tmp_path / "chain", "--interval", 0) as watching:
        watching.event("checkpoint")
        before = Untouched(target.pid)
        target.obey("go")
        in_vfork = Untouched(target.pid)
        watching.signal(signal.SIGUSR1)
        for _ in range(2):
            event = watching.event("delayed")
            assert f"thread {target.pid} does not stop" in event["reason"]
            assert "vfork" in event["hint"]
            in_vfork.assert_same(ignore=["registers"])  # one thread obeys
            target.obey("check")  # by another thread
        target.obey("go")
        watching.event("checkpoint", timeout=60)
        watching.signal(signal.SIGINT)
        watching.wait().expect(0)
    before.assert_same(ignore=["registers", "vma_flags"])  # it waits elsewhere now
    assert verified(tmp_path / "chain") == [0, 1]
    end(target)


def test_a_process_in_a_vfork_is_busy_at_first(spawn: Spawn, tmp_path: Path) -> None:
    target = spawn("corners", "--in", "vfork")
    target.obey("go")
    before = Untouched(target.pid)
    result = run("watch", target.pid, "-o", tmp_path / "chain", "--count", 1)
    # Before Linux 5.16 the kernel cannot tell where it waits.
    where = Path(f"/proc/{target.pid}/wchan").read_text().strip("0")
    result.expect(13, f"thread {target.pid} does not stop", where, "vfork")
    assert where == "kernel_clone" or kernel_version() < (5, 16)
    before.assert_same()
    target.obey("go")
    run("watch", target.pid, "-o", tmp_path / "chain", "--count", 1).expect(0)
    end(target)


def test_a_vfork_that_begins_before_the_stop_keeps_only_its_own_thread(spawn: Spawn) -> None:
    """The look before the stop comes too early for it; then the others must be let go at once."""
    target = spawn("corners", "--in", "vfork")
    target.obey("go")
    tracer = os.fork()
    if tracer == 0:
        try:
            stop = StoppedProcess(Process(Pid(target.pid)), patience=0.05)
            stop.look_before = lambda deadline: None  # type: ignore[method-assign]
            stop.stop()
        finally:
            os._exit(0)
    wait_until(lambda: status(target.pid)["TracerPid"] == str(tracer), "the first thread is held")
    wait_until(
        lambda: [each["TracerPid"] for each in map_status(target.pid)] == [str(tracer), "0"],
        "the other is free",
    )
    target.obey("check")
    target.obey("go")
    assert os.waitpid(tracer, 0)[1] == 0
    end(target)


# --- signals to us ---


def test_signals_to_crtrace_wait_for_the_end_of_a_pause(spawn: Spawn, tmp_path: Path) -> None:
    """The first thread holds them in a pause, so no other may take them."""
    held = {signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGTSTP}
    with Watching(spawn("threads").pid, tmp_path / "chain", "--interval", 0) as watching:
        watching.event("checkpoint")
        blocked = [
            int(status(tid)["SigBlk"], 16) for tid in tasks(watching.pid) if tid != watching.pid
        ]
    assert len(blocked) > 1
    assert all(mask >> number - 1 & 1 for mask in blocked for number in held)


def test_a_release_that_was_cut_short_is_brought_to_its_end(
    spawn: Spawn, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = spawn("threads")
    let_go = StoppedProcess._let_go
    cut_short = [target.pid]

    def interrupted(self: StoppedProcess, tid: Pid) -> None:
        if tid in cut_short:
            cut_short.remove(tid)
            raise KeyboardInterrupt
        let_go(self, tid)

    monkeypatch.setattr(StoppedProcess, "_let_go", interrupted)
    with (
        Process(Pid(target.pid)) as process,
        pytest.raises(KeyboardInterrupt),
        StoppedProcess(process),
    ):
        pass
    assert {status(target.pid, tid)["TracerPid"] for tid in tasks(target.pid)} == {"0"}
    target.terminate_and_check()


# --- being killed ---


@pytest.mark.usefixtures("userfaultfd")
@pytest.mark.parametrize("step", ["ptrace", "waitpid"])
def test_who_is_killed_in_an_injected_call_is_gone(
    spawn: Spawn, tmp_path: Path, programs: Programs, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    """Its first thread is reported only when the others, which we hold, have been reaped."""
    target = spawn("threads")
    resume, act = Tracee.resume, getattr(ptrace, step)

    def after_a_kill(*arguments: Any) -> Any:
        os.kill(target.pid, signal.SIGKILL)
        return act(*arguments)

    def resume_once(self: Tracee, request: int, sig: int = 0) -> int:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(ptrace, step, after_a_kill)
            return resume(self, request, sig)

    monkeypatch.setattr(Tracee, "resume", resume_once)
    with pytest.raises(TargetGone), watched(target.pid, tmp_path / "chain", programs):
        pass


# --- exec ---


@pytest.mark.usefixtures("userfaultfd")
def test_an_exec_before_marks_are_cleared_is_told_as_one(
    spawn: Spawn, tmp_path: Path, programs: Programs, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = spawn("layout")
    clear_marks = UserfaultfdArmer._clear_marks

    def after_an_exec(*arguments: Any) -> None:
        monkeypatch.undo()
        target.obey(f"exec {compile_target('layout')}")
        target.await_ready()
        clear_marks(*arguments)

    with watched(target.pid, tmp_path / "chain", programs) as judged:
        monkeypatch.setattr(UserfaultfdArmer, "_clear_marks", after_an_exec)
        with pytest.raises(ProgramChanged):
            judged.session.checkpoint()
    target.terminate_and_check()


@pytest.mark.parametrize("condition", ["exec", "exec_thread"])
def test_a_stop_at_the_edge_of_exec_leaves_nothing_stopped(spawn: Spawn, condition: str) -> None:
    target = spawn("corners", "--in", condition, "--times", int(2000 / min(SLOWNESS, 10)))
    target.obey("go")
    stops = 0
    with Process(Pid(target.pid)) as process:
        while target_is_busy(target):
            with suppress(TargetBusy), StoppedProcess(process) as held:  # busy: it is let go
                assert held.tracees
                stops += 1
    assert stops > 10
    target.await_ready()
    Untouched(target.pid).assert_same()
    end(target)


def test_a_thread_that_is_just_being_released_is_no_failure(
    spawn: Spawn, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To interrupt it is then an input/output error, as the kernel has it."""
    real = stop.ptrace

    def ptrace(request: int, tid: int, *rest: int) -> int:
        result = real(request, tid, *rest)
        if request == INTERRUPT:
            raise OSError(errno.EIO, "made to fail", f"thread {tid}")
        return result

    monkeypatch.setattr(stop, "ptrace", ptrace)
    target = spawn("layout")
    with Process(Pid(target.pid)) as process, StoppedProcess(process) as stopped:
        assert stopped.tracees
    target.obey("write anon_written 0 8 5")


def target_is_busy(target: Target) -> bool:
    """Whether it still execs: after the last time it is ready, and has one thread only."""
    return "--left\x000\x00" not in Path(f"/proc/{target.pid}/cmdline").read_text()


# --- the first thread has exited ---


def test_a_process_without_its_first_thread_is_refused(spawn: Spawn, tmp_path: Path) -> None:
    target = spawn("corners", "--in", "without_leader")
    # On its way out the first thread still maps and unmaps a library.
    wait_until(lambda: status(target.pid)["State"][0] == "Z", "the first thread has exited")
    before = Untouched(target.info["tid"])
    result = run("watch", target.pid, "-o", tmp_path / "chain", "--count", 1)
    result.expect(1, "the first thread", "others run on")
    before.assert_same()
    target.obey("check")
    end(target)


def test_the_exit_of_the_first_thread_ends_the_watch_loudly(
    spawn: Spawn, tmp_path: Path, programs: Programs
) -> None:
    target = spawn("corners", "--in", "leader_leaves")
    path = tmp_path / "chain"
    with watched(target.pid, path, programs) as judged:
        judged.take()
        target.obey("go")
        before = Untouched(target.info["tid"])
        with pytest.raises(CrtraceError, match="the first thread of process") as raised:
            judged.take()
        assert not isinstance(raised.value, TargetGone)
    before.assert_same(ignore=WATCHED)
    target.obey("check")
    assert verified(path) == [0]
    end(target)


@pytest.mark.parametrize("condition", ["exec", "exec_thread"])
def test_a_target_that_execs_all_the_time_is_never_taken_for_ended(
    spawn: Spawn, tmp_path: Path, condition: str
) -> None:
    target = spawn("corners", "--in", condition, "--times", 500)
    before = Untouched(target.pid)
    with Watching(target.pid, tmp_path / "chain", "--interval", 0.005) as watching:
        watching.event("checkpoint")
        target.obey("go")
        target.await_ready(180)  # an emulated machine takes a minute for it
        calm = 0
        while calm < 3:
            calm = calm + 1 if watching.event().get("reason") == "interval" else 0
        watching.signal(signal.SIGINT)
        result = watching.wait().expect(0)
    assert result.of("exec")
    assert not result.of("exit")
    before.assert_same(ignore=[*MAPPINGS_CHANGE, "registers", "comm", "threads", "timers"])
    assert verified(tmp_path / "chain") == [event["epoch"] for event in result.of("checkpoint")]
    end(target)
