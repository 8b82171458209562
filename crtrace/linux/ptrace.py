"""One traced thread: its registers, signals, and steps from stop to stop."""

from __future__ import annotations

import ctypes
import errno
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from crtrace.errors import TargetGone
from crtrace.linux.libc import ptrace, waitpid, words
from crtrace.linux.registers import REGS_SIZE, Registers
from crtrace.units import Pid

CONT, GETREGS, SETREGS, DETACH, SYSCALL = 7, 12, 13, 17, 24
SETOPTIONS, GETREGSET = 0x4200, 0x4204
SEIZE, INTERRUPT = 0x4206, 0x4207
PEEKSIGINFO, GETSIGMASK, SETSIGMASK = 0x4209, 0x420A, 0x420B
_PEEKED = 64
O_TRACESYSGOOD, O_SUSPEND_SECCOMP = 1, 1 << 21
EVENT_STOP = 128
WALL = 0x40000000

NT_PRSTATUS, NT_PRFPREG, NT_X86_XSTATE = 1, 2, 0x202
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
        iov = words(ctypes.addressof(self.buffer), size)
        try:
            ptrace(GETREGSET, self.tid, note, ctypes.addressof(iov))
        except OSError as error:
            if error.errno in (errno.EINVAL, errno.ENODEV, errno.EIO):
                return b""
            raise
        return ctypes.string_at(self.buffer, iov[1])

    def read_general(self) -> bytes:
        """The general registers, all 64 bits of each whatever code runs: what NT_PRSTATUS holds,
        but of 32-bit code GETREGSET has other ones."""
        ptrace(GETREGS, self.tid, 0, ctypes.addressof(self.buffer))
        return ctypes.string_at(self.buffer, REGS_SIZE)

    def registers(self) -> Registers:
        """The general registers now."""
        return Registers(self.read_general())

    def set_registers(self, registers: Registers) -> None:
        """Replace the general registers in one step."""
        raw = ctypes.create_string_buffer(registers.pack(), REGS_SIZE)
        ptrace(SETREGS, self.tid, 0, ctypes.addressof(raw))

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
        asked = words(0, int(shared) | _PEEKED << 32)  # struct ptrace_peeksiginfo_args
        count = ptrace(
            PEEKSIGINFO, self.tid, ctypes.addressof(asked), ctypes.addressof(self.buffer)
        )
        numbers = [self.buffer[at * 128][0] for at in range(count)]
        return sum({1 << (number - 1) for number in numbers})

    def capture(self) -> None:
        """Read registers, extended state and signals into this object."""
        self.prstatus = self.read_general()
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


@contextmanager
def signals_held() -> Iterator[None]:
    """Keep signals to us pending: inside, a stop must not be left half done, nor last as long as
    Ctrl-Z does. For the thread that calls this, and for those that it makes inside: a signal goes
    to whichever thread lets it."""
    held = {signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGTSTP}
    before = signal.pthread_sigmask(signal.SIG_BLOCK, held)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
