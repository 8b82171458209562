"""Stop every thread of a process, look at its registers, and let it go as if nothing had been."""

from __future__ import annotations

import ctypes
import errno
import os
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from crtrace.errors import AlreadyTraced, NotPermitted, TargetBusy, TargetGone
from crtrace.faults import pausing, point
from crtrace.linux.libc import ptrace, waitpid
from crtrace.linux.procfs import Process, comm_of, thread_status
from crtrace.linux.registers import REGS_SIZE, Registers
from crtrace.linux.waits import cut_short, started_again
from crtrace.units import Pid

CONT, SYSCALL, DETACH = 7, 24, 17
SETOPTIONS, GETREGSET, SETREGSET = 0x4200, 0x4204, 0x4205
SEIZE, INTERRUPT = 0x4206, 0x4207
PEEKSIGINFO, GETSIGMASK, SETSIGMASK = 0x4209, 0x420A, 0x420B
_PEEKED = 64
O_TRACESYSGOOD, O_SUSPEND_SECCOMP = 1, 1 << 21
EVENT_STOP = 128
WALL = 0x40000000

NT_PRSTATUS, NT_PRFPREG, NT_X86_XSTATE = 1, 2, 0x202
PATIENCE = 1.0
"""Seconds that a thread may take to stop."""
XSTATE_MAX = 16384
"""Bytes kept ready for one thread's xstate: AMX, the largest today, needs 11,008."""


@dataclass(slots=True)
class Tracee:
    """A stopped thread. ``state`` holds what was read of it; the buffers outlive the pause."""

    tid: Pid
    buffer: ctypes.Array[ctypes.c_char]
    prstatus: bytes = b""
    xstate: bytes = b""
    sigmask: int = 0
    pending: int = 0

    def read_regset(self, note: int, size: int) -> bytes:
        """One register set, at most ``size`` bytes; empty where the machine has none."""
        iov = (ctypes.c_ulong * 2)(ctypes.addressof(self.buffer), size)
        try:
            ptrace(GETREGSET, self.tid, note, ctypes.addressof(iov))
        except OSError as error:
            if error.errno in (errno.EINVAL, errno.ENODEV, errno.EIO):
                return b""
            raise
        return ctypes.string_at(self.buffer, iov[1])

    def registers(self) -> Registers:
        """The general registers now."""
        return Registers(self.read_regset(NT_PRSTATUS, REGS_SIZE))

    def set_registers(self, registers: Registers) -> None:
        """Replace the general registers in one step."""
        raw = ctypes.create_string_buffer(registers.pack(), REGS_SIZE)
        iov = (ctypes.c_ulong * 2)(ctypes.addressof(raw), REGS_SIZE)
        ptrace(SETREGSET, self.tid, NT_PRSTATUS, ctypes.addressof(iov))

    def read_sigmask(self) -> int:
        """The blocked signals, bit 0 for signal 1."""
        mask = ctypes.c_uint64()
        ptrace(GETSIGMASK, self.tid, 8, ctypes.addressof(mask))
        return mask.value

    def set_sigmask(self, mask: int) -> None:
        """Replace the blocked signals."""
        ptrace(SETSIGMASK, self.tid, 8, ctypes.addressof(ctypes.c_uint64(mask)))

    def read_pending(self, *, shared: bool = False) -> int:
        """The signals that wait for this thread (or its process), bit 0 for signal 1."""
        asked = (ctypes.c_uint32 * 4)(0, 0, int(shared), _PEEKED)
        count = ptrace(
            PEEKSIGINFO, self.tid, ctypes.addressof(asked), ctypes.addressof(self.buffer)
        )
        numbers = [self.buffer[at * 128][0] for at in range(count)]
        return sum({1 << (number - 1) for number in numbers})

    def capture(self) -> None:
        """Read registers, extended state and signals into this object."""
        self.prstatus = self.read_regset(NT_PRSTATUS, REGS_SIZE)
        self.xstate = self.read_regset(NT_X86_XSTATE, XSTATE_MAX)
        self.sigmask = self.read_sigmask()
        self.pending = self.read_pending()

    @property
    def fpregs(self) -> bytes:
        """The x87 and SSE part of the extended state: what NT_PRFPREG holds."""
        return self.xstate[:512]

    def resume(self, request: int, sig: int = 0) -> int:
        """Let the thread run to its next ptrace stop; the raw wait status of that."""
        ptrace(request, self.tid, 0, sig)
        try:
            _, status = waitpid(self.tid, WALL)
        except (MemoryError, OSError):
            _, status = waitpid(self.tid, WALL)  # only a stopped thread can be put right
        if os.WIFEXITED(status) or os.WIFSIGNALED(status):
            raise TargetGone(f"thread {self.tid} ended while crtrace held it")
        return status


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
        stop_all([self], self._patience)
        if not self.tracees:
            raise TargetGone(f"process {self.process.pid} has no living thread")

    def interrupt(self) -> list[Pid]:
        """Seize and interrupt the threads that are not held yet; those are to be waited for."""
        try:
            return [t for t in self.process.threads() if t not in self.tracees and self._seize(t)]
        except TargetGone:
            return []

    def wait(self, tids: list[Pid], deadline: float) -> None:
        """Wait until these threads have stopped, or ended."""
        for tid in tids:
            if not _await_stop(tid, deadline):
                del self.tracees[tid]

    def _seize(self, tid: Pid) -> bool:
        buffer = self._spare.pop() if self._spare else ctypes.create_string_buffer(XSTATE_MAX)
        self.tracees[tid] = Tracee(tid, buffer)  # before, so that nothing is held and forgotten
        try:
            ptrace(SEIZE, tid)
        except OSError as error:
            del self.tracees[tid]
            return _explain_refusal(error, self.process.pid, tid)
        with suppress(ProcessLookupError):  # it died since; waiting for it will tell
            ptrace(INTERRUPT, tid)
        return True

    def main(self) -> Tracee:
        """The thread group's leader, or any thread where the leader has exited."""
        leader = self.tracees.get(self.process.pid)
        return leader or next(iter(self.tracees.values()))

    def release(self) -> None:
        """Detach from every thread; those that died meanwhile are no error.

        Waits that our stop has ended with EINTR are begun again. If something fails twice, the
        others are let go nevertheless, and then it is raised.
        """
        with ExitStack() as steps:  # which all are taken, the last one first
            steps.callback(pausing, False)
            for tid in self.tracees:
                steps.callback(twice, self._let_go, tid)
            for tracee in self.tracees.values():
                steps.callback(twice, self._restart_wait, tracee)

    def _restart_wait(self, tracee: Tracee) -> None:
        self.waits_given_back += _give_back_wait(self.process.pid, tracee)

    def _let_go(self, tid: Pid) -> None:
        _detach(tid)
        del self.tracees[tid]


def twice(step: Callable[..., object], *args: object) -> None:
    """Take a step of clearing up, and once more should it fail: memory may be short anywhere."""
    try:
        step(*args)
    except Exception:
        step(*args)


def release_all(processes: Iterable[StoppedProcess]) -> None:
    """Let go of several, all of them whatever fails for one."""
    with ExitStack() as steps:
        for each in processes:
            steps.callback(each.release)


def stop_all(processes: list[StoppedProcess], patience: float = PATIENCE) -> None:
    """Stop every thread of several processes, all interrupted first and waited for after.

    A process that is gone ends with no ``tracees``. If anything fails on the way, every thread
    already stopped is let go.
    """
    deadline = time.monotonic() + patience
    pausing(True)
    try:
        while fresh := [(each, tids) for each in processes if (tids := each.interrupt())]:
            for each, tids in fresh:
                each.wait(tids, deadline)
    except BaseException:
        release_all(processes)
        raise


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
        hint="run as root, or as the target's own user with ptrace allowed",
    ) from error


def _await_stop(tid: Pid, deadline: float) -> bool:
    """Wait for the interrupt to take; False when the thread ended instead.

    A signal that arrives first is passed on: the interrupt stays pending and follows before the
    thread runs another instruction.
    """
    spins = 0
    point("waitpid for a stop")
    while True:
        try:
            got, status = os.waitpid(tid, WALL | os.WNOHANG)
        except ChildProcessError:
            return False
        if not got:
            spins = _pause_a_little(tid, spins, deadline)
        elif not os.WIFSTOPPED(status):
            return False
        elif status >> 16 == EVENT_STOP:
            return True
        else:
            twice(ptrace, CONT, tid, 0, os.WSTOPSIG(status))  # else the signal would be lost


def _pause_a_little(tid: Pid, spins: int, deadline: float) -> int:
    if time.monotonic() > deadline:
        raise TargetBusy(
            f"thread {tid} does not stop: it waits where the kernel cannot interrupt it",
            hint="a vfork parent or a thread in state D; try again when that wait is over",
        )
    if spins > 200:
        time.sleep(0.00005)
    else:
        os.sched_yield()
    return spins + 1


def _give_back_wait(pid: Pid, tracee: Tracee) -> bool:
    """Rewind a wait that our stop ended, unless a signal of its own is there to end it."""
    try:
        registers = tracee.registers()
        if not cut_short(registers):
            return False
        status = thread_status(pid, tracee.tid)
        pending = int(status.get("SigPnd", "0"), 16) | int(status.get("ShdPnd", "0"), 16)
        if pending & ~int(status.get("SigBlk", "0"), 16):
            return False
        tracee.set_registers(started_again(registers))
    except ProcessLookupError:
        return False  # it died, or has not reached its stop
    return True


def _detach(tid: Pid) -> None:
    try:
        ptrace(DETACH, tid)
    except OSError as error:
        if error.errno != errno.ESRCH:
            raise
        _detach_running(tid)


def _detach_running(tid: Pid) -> None:
    """Detach from a thread that has not reached its stop: only a stopped one can be let go.

    There is no giving up: left alone, it would stop later with nobody to resume it. Should this
    process be killed while it waits here, the kernel detaches for it.
    """
    try:
        ptrace(INTERRUPT, tid)  # it may have been seized and no more
    except ProcessLookupError:
        return  # not even that
    while True:
        try:
            got, status = os.waitpid(tid, WALL | os.WNOHANG)
        except ChildProcessError:
            return
        if got and not os.WIFSTOPPED(status):
            return
        if got:
            sig = 0 if status >> 16 == EVENT_STOP else os.WSTOPSIG(status)
            ptrace(DETACH, tid, 0, sig)
            return
        time.sleep(0.0001)


@contextmanager
def signals_held() -> Iterator[None]:
    """Keep our own SIGINT and SIGTERM pending: inside, a stop must not be left half done."""
    held = {signal.SIGINT, signal.SIGTERM, signal.SIGUSR1}
    before = signal.pthread_sigmask(signal.SIG_BLOCK, held)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
