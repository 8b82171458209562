"""Stop every thread of a process, or of several, and let them go as if nothing had been."""

from __future__ import annotations

import ctypes
import errno
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from crtrace.errors import AlreadyTraced, NotPermitted, TargetBusy, TargetGone
from crtrace.faults import pausing, point
from crtrace.linux.libc import ptrace
from crtrace.linux.procfs import PF_IO_WORKER, Process, Stat, comm_of, thread_stat, thread_status
from crtrace.linux.ptrace import (
    CONT,
    DETACH,
    EVENT_STOP,
    INTERRUPT,
    SEIZE,
    WALL,
    XSTATE_MAX,
    Tracee,
)
from crtrace.linux.registers import Registers
from crtrace.linux.waits import cut_short, started_again
from crtrace.units import Pid

PATIENCE = 1.0
"""Seconds that a thread may take to stop."""
SEIZE_TRIES = 5
SPINS = 200
"""Looks at threads that are to stop before we sleep in between."""
_ENDS = os.WEXITED | os.WNOHANG | WALL


class StoppedProcess:
    """All threads of a process in a ptrace stop, until :meth:`release`.

    ``stop`` interrupts all known threads first and waits after, and looks again until no thread is
    new: a stopped process makes no threads. If anything fails on the way, everything already
    stopped is let go.
    """

    def __init__(self, process: Process, patience: float = PATIENCE) -> None:
        self.process = process
        self.tracees: dict[Pid, Tracee] = {}
        self.waits_given_back = 0
        self._patience = patience
        self._looked_at: set[Pid] = set()
        self._spare = [ctypes.create_string_buffer(XSTATE_MAX) for _ in process.threads()]

    def __enter__(self) -> Self:
        self.stop()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.release()

    def stop(self) -> None:
        """Stop every thread. Raises ``TargetGone``, ``NotPermitted`` or ``TargetBusy``."""
        deadline = time.monotonic() + self._patience
        look_before([self], deadline)
        with reaping([self]):
            stop_all([self], deadline)
        if not self.tracees:
            raise self.process.gone()

    def look_before(self, deadline: float) -> None:
        """See, while all run, which threads are to be stopped; see the function of that name."""
        pid = self.process.pid
        threads = {tid: thread_stat(pid, tid) for tid in self.process.threads()}
        self._looked_at = {tid for tid, stat in threads.items() if not _is_io_worker(stat)}
        fixed = {tid: _switches(pid, tid) for tid, stat in threads.items() if _in_fixed_sleep(stat)}
        while fixed := {
            tid: count
            for tid, count in fixed.items()
            if _in_fixed_sleep(thread_stat(pid, tid)) and _switches(pid, tid) == count
        }:
            if time.monotonic() > deadline:
                raise _does_not_stop(next(iter(fixed)))
            time.sleep(0.001)

    def interrupt(self) -> list[Pid]:
        """Seize and interrupt the threads that are not held yet; those are to be waited for."""
        try:
            return [t for t in self.process.threads() if t not in self.tracees and self._seize(t)]
        except TargetGone:
            return []

    def wait(self, tids: list[Pid], deadline: float) -> None:
        """Wait until these threads have stopped, or ended."""
        for tid in _await_stops(tids, deadline):
            del self.tracees[tid]

    def _seize(self, tid: Pid) -> bool:
        if tid not in self._looked_at and _is_io_worker(thread_stat(self.process.pid, tid)):
            return False
        buffer = self._spare.pop() if self._spare else ctypes.create_string_buffer(XSTATE_MAX)
        self.tracees[tid] = Tracee(tid, buffer)  # before, so that nothing is held and forgotten
        for tries_left in reversed(range(SEIZE_TRIES)):
            try:
                ptrace(SEIZE, tid)
                break
            except OSError as error:
                if _is_ours(self.process.pid, tid):
                    break
                # EPERM: a thread that is ending, perhaps by an exec
                if error.errno != errno.EPERM or not tries_left:
                    del self.tracees[tid]
                    return _explain_refusal(error, self.process.pid, tid)
        try:
            ptrace(INTERRUPT, tid)
        except OSError as error:
            # It died since, or is going just now, by an exec for one: waiting for it will tell.
            if error.errno not in (errno.ESRCH, errno.EIO):
                raise
        return True

    def main(self) -> Tracee:
        """The thread group's leader, or any thread where the leader has exited."""
        leader = self.tracees.get(self.process.pid)
        return leader or next(iter(self.tracees.values()))

    def release(self) -> None:
        """Detach from every thread; see :func:`release_all`."""
        release_all([self])

    def restart_wait(self, tracee: Tracee) -> None:
        """Begin a wait again that our stop has ended."""
        self.waits_given_back += _give_back_wait(self.process.pid, tracee)

    def let_all_go(self) -> None:
        """Detach from all threads that have stopped."""
        all_of(self._let_go, list(self.tracees))

    def _let_go(self, tid: Pid) -> None:
        if _detach(tid):
            del self.tracees[tid]

    def let_rest_go(self) -> None:
        """Detach from threads that have not stopped yet, and forget those that are gone."""
        if self.tracees:
            # One that called exec has the number of the process now.
            _detach_running([*self.tracees, self.process.pid])
            self.tracees.clear()


def look_before(processes: Iterable[StoppedProcess], deadline: float) -> None:
    """See, while all run, which threads are to be stopped, and wait for those that cannot.

    Who waits for a vfork child or a file server may do so for long; stopping the others meanwhile
    would be in vain, and seen. Raises ``TargetBusy`` at the ``deadline`` of the monotonic clock.
    """
    for each in processes:
        with suppress(TargetGone):
            each.look_before(deadline)


def stop_all(processes: list[StoppedProcess], deadline: float) -> None:
    """Stop every thread of several processes, all interrupted first and waited for after.

    To be called after ``look_before``, within ``reaping``. A process that is gone ends with no
    ``tracees``. If anything fails on the way, every thread already stopped is let go. Raises
    ``NotPermitted`` or ``TargetBusy``.
    """
    pausing(True)
    try:
        while fresh := [(each, tids) for each in processes if (tids := each.interrupt())]:
            for each, tids in fresh:
                each.wait(tids, deadline)
    except BaseException:
        release_all(processes)
        raise


def release_all(processes: Iterable[StoppedProcess]) -> None:
    """Detach from every thread of several processes; those that died meanwhile are no error.

    Waits that our stop has ended with EINTR are begun again. Threads that could not be stopped come
    last: one in a vfork is to be let go only after it, and the others may not wait. If something
    fails twice, the others are let go nevertheless, and then it is raised.
    """
    with ExitStack() as steps:  # which all are taken, the last one first
        steps.callback(pausing, False)
        for each in processes:
            steps.callback(twice, each.let_rest_go)
        for each in processes:
            steps.callback(twice, each.let_all_go)
        for each in processes:
            steps.callback(all_of, each.restart_wait, each.tracees.values())


def all_of(step: Callable[[Any], object], items: Iterable[Any]) -> None:
    """Take a step of clearing up for each, twice should it fail, and then raise the first failure.

    An entry in an ``ExitStack`` for each would take longer than the step.
    """
    failure = None
    for item in items:
        try:
            twice(step, item)
        except BaseException as error:
            failure = failure or error
    if failure:
        raise failure


def twice(step: Callable[..., object], *args: object) -> None:
    """Take a step of clearing up, and once more should it fail: memory may be short anywhere."""
    try:
        step(*args)
    except Exception:
        step(*args)


@contextmanager
def reaping(processes: list[StoppedProcess]) -> Iterator[None]:
    """Reap threads that end, from a thread of our own, as long as the block runs.

    To seize a thread that calls ``execve`` we sleep in the kernel until that is through, and it
    waits until those that it ended, our tracees, are reaped. ``processes`` may grow meanwhile.
    """
    done = threading.Event()
    threading.Thread(target=_reap_until, args=(processes, done), daemon=True).start()
    try:
        yield
    finally:
        done.set()


def _reap_until(processes: list[StoppedProcess], done: threading.Event) -> None:
    while not done.wait(0.01):
        for each in list(processes):
            for tid in [tid for tid in list(each.tracees) if tid != each.process.pid]:
                with suppress(ChildProcessError):
                    # A stop would be reported too, and is left for whoever waits for it.
                    seen = os.waitid(os.P_PID, tid, _ENDS | os.WNOWAIT)
                    if seen and seen.si_code in (os.CLD_EXITED, os.CLD_KILLED, os.CLD_DUMPED):
                        os.waitid(os.P_PID, tid, _ENDS)


def _is_ours(pid: Pid, tid: Pid) -> bool:
    """Whether we trace a thread already: one that called exec takes the first one's number."""
    return thread_status(pid, tid).get("TracerPid") == str(threading.get_native_id())


def _explain_refusal(error: OSError, pid: Pid, tid: Pid) -> bool:
    """False for a thread that is gone; otherwise raise why it could not be seized."""
    if error.errno == errno.ESRCH:
        return False
    status = thread_status(pid, tid)
    if not status or status["State"][0] in "ZX":
        return False
    tracer = int(status["TracerPid"])
    if tracer:
        raise AlreadyTraced(
            f"process {pid} is already traced by process {tracer} ({comm_of(Pid(tracer))})",
            hint="end that debugger or tracer first",
        ) from error
    raise NotPermitted(
        f"not allowed to trace thread {tid} of process {pid}: {error.strerror}",
        hint="run as root; a security module may still forbid it (Yama's ptrace_scope 3 does)",
    ) from error


def _await_stops(tids: list[Pid], deadline: float) -> list[Pid]:
    """Wait for the interrupt to take in all threads; those that ended instead.

    All are asked in turn: in an ``execve`` the kernel waits until those that it ended were waited
    for, and only then the thread that calls it can stop.
    """
    spins, waiting, ended = 0, tids, []
    for _ in tids:
        point("waitpid for a stop")
    while waiting:
        states = {tid: _has_stopped(tid) for tid in waiting}
        ended += [tid for tid, state in states.items() if state is False]
        left = [tid for tid, state in states.items() if state is None]
        if len(left) == len(waiting):
            spins = _pause_a_little(left, spins, deadline)
        if spins > SPINS:
            ended += [tid for tid in left if not _interrupted_again(tid)]
            left = [tid for tid in left if tid not in ended]
        waiting = left
    return ended


def _interrupted_again(tid: Pid) -> bool:
    """Interrupt whoever has this number now; False when that is no tracee of ours.

    By an exec a thread of ours may have got it before it was interrupted, or one that is not ours.
    """
    try:
        ptrace(INTERRUPT, tid)
    except OSError as error:
        return error.errno != errno.ESRCH
    return True


def _has_stopped(tid: Pid) -> bool | None:
    """Whether the interrupt has taken; False when the thread ended, None while it runs.

    A signal that arrives first is passed on: the interrupt stays pending and follows before the
    thread runs another instruction.
    """
    try:
        got, status = os.waitpid(tid, WALL | os.WNOHANG)
    except ChildProcessError:
        return False
    if not got:
        return None
    if not os.WIFSTOPPED(status):
        return False
    if status >> 16 == EVENT_STOP:
        return True
    with suppress(ProcessLookupError):  # killed since
        twice(ptrace, CONT, tid, 0, os.WSTOPSIG(status))  # else the signal would be lost
    return None


def _pause_a_little(tids: list[Pid], spins: int, deadline: float) -> int:
    if time.monotonic() > deadline:
        raise _does_not_stop(tids[0])
    if spins > SPINS:
        time.sleep(0.00005)
    else:
        os.sched_yield()
    return spins + 1


def _does_not_stop(tid: Pid) -> TargetBusy:
    function = ""
    with suppress(OSError):  # where the kernel tells, it is worth knowing
        function = Path(f"/proc/{tid}/wchan").read_text().strip("0")
    where = f" ({function})" if function else ""
    return TargetBusy(
        f"thread {tid} does not stop: it waits where the kernel cannot interrupt it{where}",
        hint="a vfork parent or a thread in state D; try again when that wait is over",
    )


def _is_io_worker(stat: Stat | None) -> bool:
    """Whether a thread is one of io_uring's that carry out what would block.

    It runs no code of the program, and a stop would make its I/O fail. The thread that polls a
    submission queue never blocks, and stops like any other.
    """
    return bool(stat and stat.flags & PF_IO_WORKER and not stat.comm.startswith("iou-sqp-"))


def _in_fixed_sleep(stat: Stat | None) -> bool:
    return stat is not None and stat.state == "D"


def _switches(pid: Pid, tid: Pid) -> str:
    """How often a thread has gone to sleep, so that one long sleep can be told from many."""
    return thread_status(pid, tid).get("voluntary_ctxt_switches", "")


def _give_back_wait(pid: Pid, tracee: Tracee) -> bool:
    """Rewind a wait that our stop ended, unless a signal of its own is there to end it."""
    try:
        # What a pause has read of it holds as long as that lasts.
        state = tracee.prstatus or tracee.read_general()
        if not cut_short(state):
            return False
        status = thread_status(pid, tracee.tid)
        pending = int(status.get("SigPnd", "0"), 16) | int(status.get("ShdPnd", "0"), 16)
        if pending & ~int(status.get("SigBlk", "0"), 16):
            return False
        tracee.set_registers(started_again(Registers(state)))
    except ProcessLookupError:
        return False  # it died, or has not reached its stop
    return True


def _detach(tid: Pid) -> bool:
    """False for a thread that is gone, or has not reached its stop."""
    try:
        ptrace(DETACH, tid)
    except OSError as error:
        if error.errno != errno.ESRCH:
            raise
        return False
    return True


def _detach_running(tids: list[Pid]) -> None:
    """Detach from threads that have not reached their stop: only a stopped one can be let go.

    There is no giving up: left alone, it would stop later with nobody to resume it. Should this
    process be killed while it waits here, the kernel detaches for it.
    """
    while tids := [tid for tid in tids if not _detached(tid) and _interrupted_again(tid)]:
        time.sleep(0.0001)


def _detached(tid: Pid) -> bool:
    """Detach if the thread has stopped; True as well when it is not ours any more."""
    before = thread_stat(tid, tid)
    try:
        got, status = os.waitpid(tid, WALL | os.WNOHANG)
    except ChildProcessError:
        return True
    if got and os.WIFSTOPPED(status):
        with suppress(ProcessLookupError):  # killed since
            ptrace(DETACH, tid, 0, 0 if status >> 16 == EVENT_STOP else os.WSTOPSIG(status))
    if not got and before and before.state == "t":
        return _detach(tid)  # its stop was reported before
    return bool(got)
