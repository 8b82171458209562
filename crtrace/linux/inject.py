"""Make a stopped target run a system call, so that it puts itself right if we die half way.

When a tracer dies, the kernel lets its tracees run on with whatever registers they hold. So the way
back is laid out before anything is changed: signal frames with the original state lie in dead
stack, and each injected call returns into the target's own ``rt_sigreturn``. Only then is the
one register set written that begins the call. At every later instruction the target, left alone,
finishes the call, closes the descriptor that the call made, and continues as it was.

While we live, we do not use that way but set the exact original registers at the end, which also
lets a wait that the kernel restarts (``nanosleep``, ``futex``, ``poll``) run on by its own clock.

Where the target may have no more descriptors, its limit is raised for one call. The call that sets
the old limit again is then part of the way back.
"""

from __future__ import annotations

import errno
import os
import re
import resource
import signal
import struct
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

from crtrace.errors import COMPARE_INSTEAD, CrtraceError, NotPermitted, TargetBusy, TargetGone
from crtrace.faults import point
from crtrace.linux import ptrace as pt
from crtrace.linux.libc import pidfd_getfd, ptrace
from crtrace.linux.procfs import EXEC, Process, Vma, calls_exec
from crtrace.linux.registers import CODE_64, Registers
from crtrace.linux.stop import StoppedProcess, twice
from crtrace.linux.waits import started_again
from crtrace.units import Addr

SYS_CLOSE, SYS_MODIFY_LDT, SYS_SETRLIMIT = 3, 154, 160
RED_ZONE = 128
ALL_SIGNALS = (1 << 64) - 1
RESTARTS = (-512, -513, -514, -516)
"""ERESTARTSYS, ERESTARTNOINTR, ERESTARTNOHAND, ERESTART_RESTARTBLOCK."""

_CALL_RETURN = re.compile(rb"\x0f\x05\xc3")  # syscall; ret
_SIGRETURN = re.compile(rb"(?:\x48\xc7\xc0|\xb8)\x0f\x00\x00\x00\x0f\x05")  # mov $15, %rax; syscall
_BARE_CALL = re.compile(rb"\x0f\x05")

_SIGCONTEXT = (
    "r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15", "rdi", "rsi", "rbp", "rbx", "rdx",
    "rax", "rcx", "rsp", "rip", "eflags",
)  # fmt: skip
_UC_FP_XSTATE, _UC_SIGCONTEXT_SS, _UC_STRICT_RESTORE_SS = 1, 2, 4
_BAD_STACK_MODE = 0x40  # no valid ss_flags: rt_sigreturn then leaves the alternate stack alone
_FRAME_SIZE = 448  # return address, ucontext, room for siginfo; see signal_frame
_CLOSE, _LIMIT, _HOME, _FRAMES = 0, 1, 2, 3  # the frames, by what each goes on with
SCRATCH_SIZE = 512
_MAGIC1, _MAGIC2 = 0x46505853, 0x46505845
_SW_RESERVED = 464  # where the xsave area of a signal frame describes itself
_AMX_TILES = 1 << 18
_NON_DYNAMIC_XSTATE = 2816  # the xstate before AMX tiles, the only part with a size of its own


@dataclass(frozen=True, slots=True)
class Gadgets:
    """Instructions that the target already has. ``heals`` is False where only a bare
    ``syscall`` was found: then there is no way back but ours."""

    call: Addr
    call_bytes: bytes
    sigreturn: Addr

    @property
    def heals(self) -> bool:
        return self.sigreturn != 0


def find_gadgets(process: Process, vmas: list[Vma], limit: int = 64 << 20) -> Gadgets:
    """Look through the executable mappings, smallest first; while the target runs."""
    call = sigreturn = bare = 0
    executable = [vma for vma in vmas if vma.flags & EXEC and vma.end - vma.start <= limit]
    memory = process.open("mem")
    try:
        for vma in sorted(executable, key=lambda v: v.end - v.start):
            code = os.pread(memory, vma.end - vma.start, vma.start)
            call = call or _find(_CALL_RETURN, code, vma)
            sigreturn = sigreturn or _find(_SIGRETURN, code, vma)
            bare = bare or _find(_BARE_CALL, code, vma)
            if call and sigreturn:
                break
    except OSError as error:
        if error.errno == errno.EIO:  # the map is of the program before
            raise calls_exec(process) from error
        raise process.explain(error, "mem") from error
    finally:
        os.close(memory)
    if call and sigreturn and not _has_shadow_stack(process):
        return Gadgets(Addr(call), b"\x0f\x05\xc3", Addr(sigreturn))
    if not (call or bare):
        if process.maps() != vmas or all(vma.name != "[vdso]" for vma in vmas):
            # Only a part of the new program is there; the vdso comes last.
            raise calls_exec(process)
        raise CrtraceError(
            f"process {process.pid} has no system call instruction to borrow", hint=COMPARE_INSTEAD
        )
    return Gadgets(Addr(call or bare), b"\x0f\x05", Addr(0))


def _find(pattern: re.Pattern[bytes], code: bytes, vma: Vma) -> int:
    match = pattern.search(code)
    return vma.start + match.start() if match else 0


def _has_shadow_stack(process: Process) -> bool:
    return "shstk" in process.status().get("x86_Thread_features", "")


def rewound(registers: Registers) -> Registers:
    """Registers that start an interrupted system call again, as the kernel would."""
    if registers.signed("orig_rax") >= 0 and registers.signed("rax") in RESTARTS:
        return started_again(registers)
    return registers.changed(orig_rax=-1)


def signal_frame(restorer: int, registers: Registers, mask: int, fpstate: int) -> bytes:
    """What lies at the stack pointer when ``rt_sigreturn`` is about to be entered by ``ret``.

    First the address that ``ret`` takes, then the ``ucontext`` from which the kernel restores.
    """
    r = registers
    flags = _UC_SIGCONTEXT_SS | _UC_STRICT_RESTORE_SS | (_UC_FP_XSTATE if fpstate else 0)
    frame = struct.pack("<Q QQ QiiQ", restorer, flags, 0, 0, _BAD_STACK_MODE, 0, 0)
    frame += struct.pack("<18Q", *(r[name] for name in _SIGCONTEXT))
    frame += struct.pack("<4H", r["cs"], 0, 0, r["ss"])
    frame += struct.pack("<4Q Q 8Q Q", 0, 0, mask, 0, fpstate, *[0] * 8, mask)
    return frame.ljust(_FRAME_SIZE, b"\0")


def signal_xstate(xstate: bytes) -> bytes:
    """Extended state from ptrace, dressed as a signal frame holds it."""
    in_use = struct.unpack_from("<Q", xstate, 512)[0]
    enabled = struct.unpack_from("<Q", xstate, _SW_RESERVED)[0]
    size = len(xstate)
    if not in_use & _AMX_TILES:
        size, enabled = min(size, _NON_DYNAMIC_XSTATE), enabled & ~_AMX_TILES
    described = struct.pack("<IIQI28x", _MAGIC1, size + 4, enabled, size)
    return xstate[:_SW_RESERVED] + described + xstate[512:size] + struct.pack("<I", _MAGIC2)


class Injector:
    """Runs system calls on one thread of a wholly stopped process; a context manager.

    Until the first call nothing is changed but dead stack; after leaving, nothing at all is.
    """

    def __init__(self, stopped: StoppedProcess, vmas: list[Vma], gadgets: Gadgets) -> None:
        self._process = stopped.process
        self._gadgets = gadgets
        self._thread, self._base = _choose_thread(stopped, vmas)
        self._original = self._thread.registers()
        self._mask = self._thread.read_sigmask()
        self._frames = 0
        self.scratch = 0
        self._began = False
        self._opened = -1
        self._limit: tuple[int, int] | None = None
        self._enough = (0, 0)
        self._raised = False
        self._saved = b""

    def __enter__(self) -> Injector:
        self._memory = self._process.open("mem", os.O_RDWR)
        try:
            self._lay_way_back()
            self._set_options()
        except BaseException:
            self.__exit__()
            raise
        return self

    def _set_options(self) -> None:
        """Hold off its sandbox, if it has one, until the thread is let go of."""
        options = pt.O_TRACESYSGOOD | (pt.O_SUSPEND_SECCOMP if self._sandboxed() else 0)
        try:
            ptrace(pt.SETOPTIONS, self._thread.tid, 0, options)
        except PermissionError as error:
            raise NotPermitted(
                f"process {self._process.pid} is in a sandbox (seccomp), which may not be held off",
                hint="CAP_SYS_ADMIN and no seccomp filter of our own are needed for that; "
                + COMPARE_INSTEAD,
            ) from error

    def __exit__(self, *_: object) -> None:
        """Put everything back. If that fails for good, the target is left headed for home."""
        try:
            if self._opened >= 0:
                twice(self._close_left)
            if self._raised:
                twice(self._lower_left)
            if self._began:
                twice(self._give_back)
            twice(ptrace, pt.SETOPTIONS, self._thread.tid, 0, 0)
            twice(self._write, self._saved)
        finally:
            os.close(self._memory)

    def _sandboxed(self) -> bool:
        return self._process.status().get("Seccomp", "0") != "0"

    def _lay_way_back(self) -> None:
        xstate = signal_xstate(self._thread.read_regset(pt.NT_X86_XSTATE, pt.XSTATE_MAX))
        room = (len(xstate) + 63) & ~63
        size = room + _FRAMES * _FRAME_SIZE + SCRATCH_SIZE
        self._base = (self._base - size) & ~63
        self._frames = self._base + room
        self.scratch = self._frame(_FRAMES)
        self._home = rewound(self._original)
        try:
            saved = os.pread(self._memory, size, self._base)
            gadget = os.pread(self._memory, len(self._gadgets.call_bytes), self._gadgets.call)
        except OSError as error:
            raise calls_exec(self._process) from error
        if gadget != self._gadgets.call_bytes:
            raise calls_exec(self._process)
        self._saved = saved
        self._write(xstate.ljust(self._frames - self._base, b"\0") + self._way_frames())

    def _way_frames(self) -> bytes:
        """The signal frames; after them, in scratch, the old limits and the new."""
        self._expected = self._process.lowest_free_fd()
        soft, hard = self._process.descriptor_limits()
        if self._expected >= soft:
            self._limit = (soft, hard)
            self._enough = (self._expected + 1, max(hard, self._expected + 1))
        after = _LIMIT if self._limit else _HOME
        close = self._call_registers(SYS_CLOSE, (self._expected,), self._frame(after))
        frames = signal_frame(self._gadgets.sigreturn, close, ALL_SIGNALS, self._base)
        limit = self._limit_registers()
        frames += signal_frame(self._gadgets.sigreturn, limit, ALL_SIGNALS, self._base)
        frames += signal_frame(self._gadgets.sigreturn, self._home, self._mask, self._base)
        return frames + struct.pack("<QQQQ", soft, hard, *self._enough)

    def _frame(self, number: int) -> int:
        return self._frames + number * _FRAME_SIZE

    def _limit_registers(self) -> Registers:
        args = (resource.RLIMIT_NOFILE, self.scratch)
        return self._call_registers(SYS_SETRLIMIT, args, self._frame(_HOME))

    def _raise_limit(self) -> None:
        """The target may do it itself up to its hard limit; beyond, we need CAP_SYS_RESOURCE.

        Without that the call that follows will fail with EMFILE, which says enough.
        """
        self._raised = True
        if self._limit and self._enough[1] == self._limit[1]:
            args = (resource.RLIMIT_NOFILE, self.scratch + 16)
            self._run(self._call_registers(SYS_SETRLIMIT, args, self._frame(_LIMIT)))
            return
        self._head_for(self._limit_registers())
        with suppress(PermissionError):
            resource.prlimit(self._process.pid, resource.RLIMIT_NOFILE, self._enough)

    def _lower_limit(self) -> None:
        self._run(self._limit_registers())
        self._raised = False

    def _lower_left(self) -> None:
        """Where something failed while the limit was raised."""
        self._head_home()
        self._lower_limit()

    def _write(self, data: bytes) -> None:
        point("pwrite /proc/PID/mem")
        os.pwrite(self._memory, data, self._base)

    def _call_registers(self, number: int, args: tuple[int, ...], stack: int) -> Registers:
        named = dict(zip(("rdi", "rsi", "rdx", "r10", "r8", "r9"), args, strict=False))
        return self._original.changed(
            rax=number, orig_rax=-1, rip=self._gadgets.call, rsp=stack, **named
        )

    def read_scratch(self, size: int) -> bytes:
        """Bytes from ``scratch``, where calls may put up to ``SCRATCH_SIZE`` bytes of results."""
        return os.pread(self._memory, size, self.scratch)

    def call(self, number: int, *args: int, opens: bool = False) -> int:
        """The call's result, negative errno as the kernel gives it.

        ``opens``: it makes a descriptor, which the target closes should we die before we do.
        """
        if not opens:
            return self._run(self._call_registers(number, args, self._frame(_HOME)))
        if self._limit:
            self._raise_limit()
        self._opened = self._expected  # until we know better
        self._opened = self._run(self._call_registers(number, args, self._frame(_CLOSE)))
        result = self._opened
        if self._raised:
            self._lower_limit()
        return result

    def _run(self, registers: Registers) -> int:
        self._head_for(registers)
        self._to_syscall_stop()
        self._to_syscall_stop()
        return self._thread.registers().signed("rax")

    def _head_for(self, registers: Registers) -> None:
        self._thread.set_registers(registers)
        if not self._began:
            self._began = True
            self._thread.set_sigmask(ALL_SIGNALS)

    def close_opened(self) -> None:
        """Have the target close what the last call opened; done on leaving if it was not before."""
        if self.call(SYS_CLOSE, self._opened):
            raise TargetGone("a descriptor could not be closed in the target")
        self._opened = -1

    def _close_left(self) -> None:
        """Where a call was broken off it may have opened its descriptor or not."""
        self._head_home()
        self.call(SYS_CLOSE, self._opened)
        self._opened = -1

    def _to_syscall_stop(self) -> None:
        """Run to the next entry to or exit from a system call, whatever else comes between."""
        self._run_until(pt.SYSCALL, lambda status: os.WSTOPSIG(status) == signal.SIGTRAP | 0x80)

    def _run_until(self, request: int, reached: Callable[[int], bool]) -> None:
        sig = 0
        while True:
            status = self._thread.resume(request, sig)
            if reached(status):
                return
            sig = os.WSTOPSIG(status) if status >> 16 == 0 else 0
            if sig not in (0, signal.SIGSTOP):
                raise CrtraceError(
                    f"signal {sig} in process {self._process.pid} during an injected call",
                    hint=f"its sandbox may forbid that system call; {COMPARE_INSTEAD}",
                )

    def _give_back(self) -> None:
        """Exactly the registers and mask that were there, in the kind of stop they were read in.

        The kernel restarts an interrupted call only on its way out of a signal stop, so the thread
        is brought into one. Up to the last step it is headed for its own ``rt_sigreturn``.
        """
        self._head_home()
        self._thread.set_sigmask(self._mask)
        self._thread.set_registers(self._original)

    def _head_home(self) -> None:
        self._thread.set_registers(self._way_home())
        ptrace(pt.INTERRUPT, self._thread.tid)
        self._run_until(pt.CONT, lambda status: status >> 16 == pt.EVENT_STOP)

    def _way_home(self) -> Registers:
        if not self._gadgets.heals:
            return self._home
        through = _CLOSE if self._opened >= 0 else _LIMIT if self._raised else _HOME
        stack = self._frame(through) + 8
        return self._original.changed(orig_rax=-1, rip=self._gadgets.sigreturn, rsp=stack)


def _choose_thread(stopped: StoppedProcess, vmas: list[Vma]) -> tuple[pt.Tracee, int]:
    """A thread to run the call on, and the address below which there is dead stack.

    The main stack is preferred: programs with small stacks of their own making (Go, coroutines)
    may keep live data right below them, while the low end of ``[stack]`` is far from all.
    """
    stack = next((vma for vma in vmas if vma.name == "[stack]"), None)
    main = stopped.main()
    registers = main.registers()
    if registers["cs"] not in CODE_64:
        raise TargetBusy(
            f"process {stopped.process.pid} runs 32-bit code just now",
            hint=f"try again; {COMPARE_INSTEAD}",
        )
    pointer = registers["rsp"]
    need = pt.XSTATE_MAX + _FRAMES * _FRAME_SIZE + SCRATCH_SIZE + 256
    if stack is None or (stack.start + need <= pointer - RED_ZONE and pointer < stack.end):
        return main, pointer - RED_ZONE
    if not stack.start <= pointer < stack.end and stack.end - stack.start > 4 * need:
        return main, stack.start + need
    raise TargetBusy(
        f"process {stopped.process.pid} has no room left on its main stack",
        hint=f"try again when it is less deep in calls; {COMPARE_INSTEAD}",
    )


def take_descriptor(injector: Injector, pidfd: int, number: int, *args: int) -> int:
    """Inject a call that opens a descriptor, take it out of the target, and close it there.

    Returns our descriptor. ``OSError`` with the target's errno when the call failed; then the
    target has no new descriptor either.
    """
    result = injector.call(number, *args, opens=True)
    if result < 0:
        raise OSError(-result, os.strerror(-result))
    taken = pidfd_getfd(pidfd, result)
    try:
        injector.close_opened()
    except BaseException:
        os.close(taken)
        raise
    return taken


def read_ldt(injector: Injector) -> bytes:
    """The local descriptor table: its entries up to the last used one, at most 64 of them.

    Empty for nearly every process. The kernel shows it to nobody but its owner, hence the call.
    """
    asked = SCRATCH_SIZE
    got = injector.call(SYS_MODIFY_LDT, 0, injector.scratch, asked)
    if got <= 0:
        return b""
    entries = injector.read_scratch(got).rstrip(b"\0")
    return entries.ljust((len(entries) + 7) // 8 * 8, b"\0")
