"""The notes of an x86-64 ELF core: the kernel's structures, as gdb and readelf expect them."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import NamedTuple

from crtrace.errors import CrtraceError, ImageDamaged
from crtrace.image.epoch import Epoch, TaskView, ThreadView
from crtrace.image.fields import encode
from crtrace.image.framing import RecordType
from crtrace.image.records import NT_PRFPREG, NT_PRSTATUS, NT_X86_XSTATE, Task
from crtrace.image.tables import FileFlag, FileInfo
from crtrace.units import PAGE_SIZE

NT_PRPSINFO, NT_AUXV = 3, 6
NT_SIGINFO, NT_FILE = 0x53494749, 0x46494C45

NOTE = struct.Struct("<III")
PRSTATUS = struct.Struct("<iiihxxQQiiii64x216sixxxx")
PRPSINFO = struct.Struct("<bbbbxxxxQIIiiii16s80s")
STATES = "RSDTZW"
USER_REGS = 27 * 8
MAX_NAMES = 64 << 20
"""Most bytes of paths in NT_FILE, which has one for each mapping; the kernel stops at 4 MiB."""
SIGINFO_SIZE = 128
FXSAVE_USED = 464
"""Bytes of the floating-point registers. In what follows, the extended state says which parts it
has; where these registers are by themselves, the kernel has zeros there."""


class Ids(NamedTuple):
    """The numbers of a process as it sees them itself: those of its own PID namespace.

    The kernel writes these into cores, and debuggers compare them with what libc keeps in memory.
    """

    pid: int
    ppid: int
    pgid: int
    sid: int


def ids_of(epoch: Epoch, task: Task) -> Ids:
    """In a nested PID namespace, who is not in the epoch counts as outside: 0."""
    outer = (task.pid, task.ppid, task.pgid, task.sid)
    if len(task.ns_pids) < 2:
        return Ids(*outer)
    space = dict(task.namespaces).get("pid")
    known = {
        each.pid: each.ns_pids[-1]
        for each in (view.task for view in epoch.tasks)
        if each.ns_pids and dict(each.namespaces).get("pid") == space
    }
    return Ids(*(known.get(number, 0) for number in outer))


def core_notes(epoch: Epoch, task: TaskView) -> bytes:
    """All notes in the kernel's order: the main thread, the process, then the other threads.

    Raises ``CrtraceError`` when no thread has registers: debuggers refuse such a core.
    """
    threads = sorted(task.threads, key=lambda view: view.thread.tid != task.task.pid)
    threads = [view for view in threads if view.cpu and len(view.cpu.get(NT_PRSTATUS))]
    if not threads:
        message = f"pid {task.task.pid} has no registers in this epoch: no core"
        if epoch.passed_over(RecordType.THREAD) or epoch.passed_over(RecordType.CPU):
            hint = "--format raw needs none"
            raise ImageDamaged(f"{epoch.image.path}: damaged; {message}", hint=hint)
        raise CrtraceError(message)
    ids = ids_of(epoch, task.task)
    parts = [_note(NT_PRSTATUS, _prstatus(ids, threads[0])), *_process(epoch, task, ids)]
    parts += _float_notes(threads[0])
    for view in threads[1:]:
        parts += [_note(NT_PRSTATUS, _prstatus(ids, view)), *_float_notes(view)]
    return b"".join(parts)


def _process(epoch: Epoch, task: TaskView, ids: Ids) -> Iterator[bytes]:
    yield _note(NT_PRPSINFO, _prpsinfo(task.task, ids))
    yield _note(NT_SIGINFO, bytes(SIGINFO_SIZE))  # no signal: it was alive and well
    if task.mm and task.mm.auxv:
        yield _note(NT_AUXV, task.mm.auxv)
    yield _note(NT_FILE, _file_note(epoch, task))


def _float_notes(view: ThreadView) -> Iterator[bytes]:
    if view.cpu and (data := view.cpu.get(NT_PRFPREG)):
        yield _note(NT_PRFPREG, data[:FXSAVE_USED].ljust(len(data), b"\0"))
    if view.cpu and (data := view.cpu.get(NT_X86_XSTATE)):
        yield _note(NT_X86_XSTATE, data, b"LINUX")


def _note(kind: int, data: bytes, name: bytes = b"CORE") -> bytes:
    named = name + b"\0"
    head = NOTE.pack(len(named), len(data), kind)
    return head + named + bytes(-len(named) % 4) + data + bytes(-len(data) % 4)


def _prstatus(ids: Ids, view: ThreadView) -> bytes:
    thread = view.thread
    registers = view.cpu.get(NT_PRSTATUS) if view.cpu else b""
    if len(registers) != USER_REGS:
        raise CrtraceError(
            f"thread {thread.tid} has {len(registers)} bytes of registers, expected {USER_REGS}"
        )
    has_float = bool(view.cpu and view.cpu.get(NT_PRFPREG))
    return PRSTATUS.pack(
        0, 0, 0, 0, thread.pending, thread.sigmask, thread.ns_tid or thread.tid, *ids[1:],
        registers, has_float,
    )  # fmt: skip


def _prpsinfo(task: Task, ids: Ids) -> bytes:
    state = max(STATES.find(task.state), 0)
    arguments = task.cmdline[:79].replace(b"\0", b" ")
    name = encode(task.comm)[:15]
    return PRPSINFO.pack(
        state, ord(STATES[state]), task.state == "Z", 0, 0, task.uid[0], task.gid[0],
        *ids, name, arguments,
    )  # fmt: skip


def _file_note(epoch: Epoch, task: TaskView) -> bytes:
    """Which file is mapped where: this is how a debugger finds the libraries."""
    rows, names = [], []
    left = MAX_NAMES
    paths = {key: encode(_name(file)) + b"\0" for key, file in epoch.files.items()}
    for vma in task.vmas:
        if path := paths.get(vma.file):
            rows.append(struct.pack("<QQQ", vma.start, vma.end, vma.pgoff // PAGE_SIZE))
            names.append(path)
            left -= len(path)
            if left < 0:
                raise CrtraceError(f"the paths of mapped files take more than {MAX_NAMES} bytes")
    return struct.pack("<QQ", len(rows), PAGE_SIZE) + b"".join(rows) + b"".join(names)


def _name(file: FileInfo) -> str:
    """As the kernel puts it, so that nobody takes another file of that name for this one."""
    return f"{file.path} (deleted)" if file.flags & FileFlag.DELETED else file.path
