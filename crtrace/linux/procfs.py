"""What ``/proc`` says of a process, with a hold on it that a reused number cannot fool."""

from __future__ import annotations

import errno
import os
import re
import select
import signal
import struct
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from operator import itemgetter
from types import TracebackType
from typing import NamedTuple, Self

import numpy as np

from crtrace.errors import (
    AlreadyTraced,
    CrtraceError,
    LeaderGone,
    NotPermitted,
    TargetBusy,
    TargetGone,
    UsageError,
)
from crtrace.faults import point
from crtrace.units import PAGE_SHIFT, PAGE_SIZE, U64, Addr, Pid, no_pages

READ, WRITE, EXEC, SHARED = 1, 2, 4, 8

_MAPS_LINE = re.compile(
    rb"^([0-9a-f]+)-([0-9a-f]+) (\S{4}) ([0-9a-f]+) ([0-9a-f]+):([0-9a-f]+) (\d+) *(.*)$", re.M
)
_ESCAPE = re.compile(rb"\\([0-3][0-7]{2})")


FileKey = tuple[int, int, int]
"""What tells one mapped inode from all others: device, inode number, and the IPC namespace of a
System V segment, whose inode number is its id there; 0 for what is none."""


@dataclass(frozen=True, slots=True)
class Vma:
    """One line of ``/proc/PID/maps``: a half-open range of addresses with one backing."""

    start: Addr
    end: Addr
    flags: int
    """READ, WRITE, EXEC and SHARED."""
    offset: int
    """Byte offset of ``start`` in the file or object."""
    device: int
    inode: int
    name: str

    @property
    def shared(self) -> bool:
        return bool(self.flags & SHARED)

    @property
    def file_backed(self) -> bool:
        """Backed by an inode: a file, memfd, shm segment, or shared anonymous memory.

        The inode number alone does not tell: the first System V segment has 0.
        """
        return self.inode != 0 or self.device != 0

    @property
    def first_page(self) -> int:
        return self.start >> PAGE_SHIFT

    @property
    def end_page(self) -> int:
        return self.end >> PAGE_SHIFT

    @property
    def pages(self) -> U64:
        """Its pages, as one range."""
        return np.array([[self.first_page, self.end_page]], dtype=np.uint64)

    @property
    def map_files_name(self) -> str:
        """Its name in ``/proc/PID/map_files``."""
        return f"{self.start:x}-{self.end:x}"


def parse_maps(raw: bytes) -> list[Vma]:
    """The VMAs of ``/proc/PID/maps``, by ascending address; without ``[vsyscall]``, which is not
    in the process's own half of the address space."""
    vmas = []
    for match in _MAPS_LINE.finditer(raw):
        start, end, perms, offset, major, minor, inode, name = match.groups()
        if name == b"[vsyscall]":
            continue
        flags = sum(
            bit
            for bit, letter in zip((READ, WRITE, EXEC, SHARED), b"rwxs", strict=True)
            if letter in perms
        )
        device = os.makedev(int(major, 16), int(minor, 16))
        plain = _ESCAPE.sub(lambda m: bytes((int(m[1], 8),)), name) if b"\\" in name else name
        vmas.append(
            Vma(
                Addr(int(start, 16)),
                Addr(int(end, 16)),
                flags,
                int(offset, 16),
                device,
                int(inode),
                os.fsdecode(plain),
            )
        )
    return vmas


_IN_USE = re.compile(rb"^(?:Rss|Swap|Private_Hugetlb|Shared_Hugetlb): +[1-9]", re.M)


def empty_vmas(raw: bytes) -> U64:
    """The page ranges of the VMAs in ``/proc/PID/smaps`` that have no page anywhere."""
    heads = list(_MAPS_LINE.finditer(raw))
    ends = [head.start() for head in heads[1:]] + [len(raw)]
    spans = [
        (int(head[1], 16) >> PAGE_SHIFT, int(head[2], 16) >> PAGE_SHIFT)
        for head, end in zip(heads, ends, strict=True)
        if not _IN_USE.search(raw, head.end(), end)
    ]
    return np.array(spans, dtype=np.uint64) if spans else no_pages()


class Stat(NamedTuple):
    """The fields of ``/proc/PID/stat`` that are used, by the names of proc(5)."""

    comm: str
    state: str
    ppid: int
    pgrp: int
    session: int
    tty_nr: int
    flags: int
    starttime: int
    startcode: int
    endcode: int
    startstack: int
    start_data: int
    end_data: int
    start_brk: int
    arg_start: int
    arg_end: int
    env_start: int
    env_end: int
    exit_code: int


_STAT_NUMBERS = itemgetter(3, 4, 5, 6, 8, 21, 25, 26, 27, *range(44, 52))


def parse_stat(raw: str) -> Stat:
    """``/proc/PID/stat``; the command may hold spaces and parentheses."""
    head, _, tail = raw.rpartition(")")
    f = ["", "", *tail.split()]  # f[n] is field n + 1 of proc(5)
    return Stat(head.partition("(")[2], f[2], *map(int, _STAT_NUMBERS(f)))


EXEC_TIME = 0.2
"""Seconds that a process may take to end all other threads when one calls ``execve``."""
EXEC_WAITS = 1.0
"""The same, while some of them are seen to end: one may have to wait for a disk first."""
EXEC_BLINK = 0.02
"""Seconds that it may look as if it had ended, while the one that calls becomes the first."""
EXEC_LOOKS = 3
"""So many looks in a row must have found the same."""
PF_EXITING, PF_IO_WORKER, PF_KTHREAD = 0x4, 0x10, 0x00200000
_AT_PAGESZ = 6


def parse_status(raw: str) -> dict[str, str]:
    """``/proc/PID/status`` as a dict of stripped strings."""
    pairs = (line.partition(":") for line in raw.splitlines())
    return {name: value.strip() for name, _, value in pairs}


def thread_status(pid: Pid, tid: Pid) -> dict[str, str]:
    """The status of one thread; empty when it is gone."""
    try:
        with open(f"/proc/{pid}/task/{tid}/status", errors="replace") as file:
            return parse_status(file.read())
    except OSError:
        return {}


def thread_stat(pid: Pid, tid: Pid) -> Stat | None:
    """``stat`` of one thread; None when it is gone."""
    try:
        with open(f"/proc/{pid}/task/{tid}/stat", errors="replace") as file:
            return parse_stat(file.read())
    except OSError:
        return None


def comm_of(pid: Pid) -> str:
    """The short name of a process, for messages."""
    try:
        with open(f"/proc/{pid}/comm", errors="replace") as file:
            return file.read().strip()
    except OSError:
        return "gone"


class Process:
    """A living process, held by pidfd and by a descriptor of its ``/proc`` directory.

    Both refer to this process and no later one of the same number. Every read raises
    ``TargetGone`` once it is gone, ``NotPermitted`` where the kernel refuses.
    """

    def __init__(self, pid: Pid) -> None:
        self.pid = pid
        try:
            self.pidfd = os.pidfd_open(pid)
            self.dirfd = os.open(f"/proc/{pid}", os.O_RDONLY | os.O_DIRECTORY)
        except OSError as error:
            raise _no_such(pid, error) from error
        self.starttime = self.stat().starttime

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the process; it may be called twice."""
        for name in ("pidfd", "dirfd"):
            fd = getattr(self, name)
            if fd >= 0:
                os.close(fd)
                setattr(self, name, -1)

    def open(self, name: str, flags: int = os.O_RDONLY) -> int:
        """A descriptor of ``/proc/PID/name``."""
        point("open", name.rpartition("/")[2])
        try:
            return os.open(name, flags | os.O_CLOEXEC, dir_fd=self.dirfd)
        except OSError as error:
            raise self.explain(error, name) from error

    def read(self, name: str, limit: int = sys.maxsize) -> bytes:
        """``/proc/PID/name``, the first ``limit`` bytes at most."""
        fd = self.open(name)
        try:
            parts = []
            while part := os.read(fd, min(1 << 20, limit)):
                parts.append(part)
                limit -= len(part)
            return b"".join(parts)
        except OSError as error:
            raise self.explain(error, name) from error
        finally:
            os.close(fd)

    def readlink(self, name: str) -> str:
        """Where ``/proc/PID/name`` points; empty where it cannot be read."""
        try:
            return os.readlink(name, dir_fd=self.dirfd)
        except OSError:
            return ""

    def listdir(self, name: str) -> list[str]:
        """The entries of the directory ``/proc/PID/name``."""
        fd = self.open(name, os.O_RDONLY | os.O_DIRECTORY)
        try:
            return os.listdir(fd)
        except OSError as error:
            raise self.explain(error, name) from error
        finally:
            os.close(fd)

    def explain(self, error: OSError, name: str) -> Exception:
        """The error to raise when ``/proc/PID/name`` could not be read."""
        if self.dirfd < 0:
            return self._exited()
        # There always are a list of threads and mounts, but for a moment of an execve.
        always = name in ("task", "mountinfo")
        missing = error.errno == errno.ENOENT and (always or not self.alive())
        unmounted = error.errno == errno.EINVAL and name == "mountinfo"
        if error.errno == errno.ESRCH or missing or unmounted:
            return self.gone()
        if error.errno in (errno.EACCES, errno.EPERM):
            return NotPermitted(
                f"not allowed to open /proc/{self.pid}/{name}",
                hint="run as root; for a process of another user, CAP_DAC_OVERRIDE is needed, too",
            )
        return error

    def gone(self) -> CrtraceError:
        """The error to raise when the kernel shows nothing of the process any more.

        That is so too when only the first thread has exited and others run on; and for a moment
        when another than the first calls ``execve``, which makes that one end.
        """
        began, before, looks = time.monotonic(), 0.0, 0
        while not self.alive():
            waited, others = time.monotonic() - began, self._others()
            ending = EXEC_WAITS if False in others else EXEC_TIME
            limit = ending if True in others else EXEC_BLINK
            # One look may fall between two steps of an execve, however late it comes.
            before, looks = limit, looks + 1 if limit == before else 0
            if waited > limit and looks >= EXEC_LOOKS:
                if limit == EXEC_BLINK:
                    return self._exited()
                if limit == EXEC_WAITS:
                    break
                return LeaderGone(
                    f"the first thread of process {self.pid} has exited, others run on: "
                    "not supported",
                    hint="the kernel shows such a process's memory to nobody by its number",
                )
            time.sleep(0.001)
        return calls_exec(self)

    def _others(self) -> set[bool | None]:
        """Of the threads but the first, whether they go on: False for those that are about to end,
        None for those that have."""
        with suppress(OSError):
            every = (Pid(int(name)) for name in os.listdir(f"/proc/{self.pid}/task"))
            return {_goes_on(self.pid, tid) for tid in every if tid != self.pid}
        return set()

    def _exited(self) -> TargetGone:
        return TargetGone(f"process {self.pid} has exited")

    def alive(self) -> bool:
        """Whether its first thread lives: it exists, and neither is a zombie nor becomes one."""
        try:
            stat = self.stat()
            return stat.state not in "ZX" and not stat.flags & PF_EXITING
        except (OSError, TargetGone):
            return False

    def ended(self) -> bool:
        """Whether all of its threads have ended.

        The pidfd alone does not tell: it does so too when another than the first thread calls
        ``execve``.
        """
        poller = select.poll()
        poller.register(self.pidfd, select.POLLIN)
        return bool(poller.poll(0)) and not self.alive() and isinstance(self.gone(), TargetGone)

    def threads(self) -> list[Pid]:
        """The numbers of all its threads now."""
        return [Pid(int(name)) for name in self.listdir("task")]

    def stat(self) -> Stat:
        """``/proc/PID/stat``."""
        try:
            fd = os.open("stat", os.O_RDONLY | os.O_CLOEXEC, dir_fd=self.dirfd)
        except OSError as error:
            raise TargetGone(f"process {self.pid} has exited") from error
        try:
            return parse_stat(os.read(fd, 4096).decode(errors="replace"))
        except OSError as error:
            raise TargetGone(f"process {self.pid} has exited") from error
        finally:
            os.close(fd)

    def status(self) -> dict[str, str]:
        """``/proc/PID/status``."""
        return parse_status(self.read("status").decode(errors="replace"))

    def maps(self) -> list[Vma]:
        """Its VMAs now."""
        return parse_maps(self.read("maps"))

    def file_key(self, vma: Vma) -> FileKey:
        """What tells the inode that one of its VMAs maps from others."""
        return vma.device, vma.inode, self.ipc_namespace if vma.name.startswith("/SYSV") else 0

    @cached_property
    def ipc_namespace(self) -> int:
        """The inode of its IPC namespace when first asked."""
        return self.namespace("ipc").st_ino

    def namespace(self, kind: str) -> os.stat_result:
        """What tells its namespace of a kind (``pid``, ``ipc``): device and inode."""
        name = f"ns/{kind}"
        try:
            return os.stat(name, dir_fd=self.dirfd)
        except OSError as error:
            raise self.explain(error, name) from error

    @cached_property
    def comm(self) -> str:
        """Its short name when first asked."""
        return self.stat().comm

    def descriptor_limits(self) -> tuple[int, int]:
        """The soft and the hard limit of its number of descriptors."""
        limits = self.read("limits").decode()
        line = next(line for line in limits.splitlines() if line.startswith("Max open files"))
        soft, hard = line.split()[3:5]
        return int(soft), int(hard)

    def lowest_free_fd(self) -> int:
        """The descriptor that its next open gets, as long as its threads are stopped."""
        used = {int(name) for name in self.listdir("fd")}
        return next(n for n in range(len(used) + 1) if n not in used)


def calls_exec(process: Process) -> TargetBusy:
    """What to raise where two looks at a process saw two programs."""
    return TargetBusy(f"process {process.pid} has just called execve", hint="try again")


def _goes_on(pid: Pid, tid: Pid) -> bool | None:
    """Whether a thread is not about to end; None if it has."""
    stat, status = thread_stat(pid, tid), thread_status(pid, tid)
    if not stat or stat.state in "ZX":
        return None
    killed = int(status.get("SigPnd", "0"), 16) >> (signal.SIGKILL - 1) & 1
    return not (stat.flags & PF_EXITING or killed)


def _no_such(pid: Pid, error: OSError) -> Exception:
    leader = thread_status(pid, pid).get("Tgid", str(pid))
    if leader != str(pid):
        return UsageError(
            f"{pid} is the number of a single thread", hint=f"its process is {leader}"
        )
    if error.errno in (errno.ESRCH, errno.ENOENT, errno.EINVAL):
        return TargetGone(f"there is no process {pid}")
    return NotPermitted(f"not allowed to open process {pid}: {error.strerror}", hint="run as root")


def parents() -> dict[Pid, Pid]:
    """The parent of every process there is now."""
    found: dict[Pid, Pid] = {}
    for name in os.listdir("/proc"):
        if name.isdigit():
            with suppress(OSError), open(f"/proc/{name}/stat", errors="replace") as file:
                found[Pid(int(name))] = Pid(parse_stat(file.read()).ppid)
    return found


def refuse_unsuitable(process: Process) -> None:
    """Raise for a process that can never be a target, with the reason.

    ``UsageError`` for ourselves, a kernel thread and a 32-bit program; ``TargetGone`` for a zombie;
    ``TargetBusy`` for one that is traced.
    """
    pid, stat = process.pid, process.stat()
    if pid == os.getpid():
        raise UsageError(f"process {pid} is crtrace itself, which cannot stop itself")
    if stat.flags & PF_KTHREAD:
        raise UsageError(f"process {pid} ({stat.comm}) is a kernel thread: it has no memory")
    if stat.state in "ZX":
        error = process.gone()
        if isinstance(error, TargetGone):
            error = TargetGone(f"process {pid} ({stat.comm}) is a zombie: its memory is gone")
        raise error
    tracer = int(process.status()["TracerPid"])
    if tracer not in (0, os.getpid()):
        raise AlreadyTraced(
            f"process {pid} ({stat.comm}) is already traced by process {tracer} "
            f"({comm_of(Pid(tracer))})",
            hint="end that debugger or tracer first",
        )
    if is_32_bit(process):
        raise UsageError(f"process {pid} ({stat.comm}) is a 32-bit program: not supported")


def is_32_bit(process: Process) -> bool:
    """By the auxiliary vector, which is empty or half full for a moment in an ``execve``. An entry
    is a small number and a value, of a word each."""
    deadline = time.monotonic() + 1.0
    while True:
        auxv = process.read("auxv")
        pairs = list(struct.iter_unpack("<QQ", auxv[: len(auxv) // 16 * 16]))
        if pairs and pairs[0][0] >> 32:
            return True
        if (_AT_PAGESZ, PAGE_SIZE) in pairs:
            return False
        if time.monotonic() > deadline:
            raise TargetBusy(f"process {process.pid} is at the edge of an execve", hint="try again")
        time.sleep(0.001)
