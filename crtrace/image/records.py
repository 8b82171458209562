"""The records of the machine, a process, the head of its address space, and its threads."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import ClassVar, Self

from crtrace.errors import FormatTooNew, ImageDamaged
from crtrace.image.fields import Cursor, blob, must_be_zero, text, u32s
from crtrace.image.framing import RecordType
from crtrace.units import PAGE_SIZE

NT_PRSTATUS, NT_PRFPREG, NT_X86_XSTATE = 1, 2, 0x202
MAX_PID_T = 2**31 - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Arch:
    """The machine that the target ran on."""

    TYPE: ClassVar = RecordType.ARCH
    FIXED: ClassVar = struct.Struct("<IIQI")

    machine: str
    page_size: int = PAGE_SIZE
    xstate_size: int = 0
    xfeatures: int = 0
    clock_ticks: int = 100

    def pack(self) -> bytes:
        """The payload."""
        fixed = (self.page_size, self.xstate_size, self.xfeatures, self.clock_ticks)
        return self.FIXED.pack(*fixed) + text(self.machine)

    @classmethod
    def unpack(cls, data: bytes, where: str) -> Self:
        """Raises ``FormatTooNew`` for pages of another size."""
        cursor = Cursor(data, where)
        page_size, xstate_size, xfeatures, ticks = cursor.take(cls.FIXED)
        if page_size != PAGE_SIZE:
            raise FormatTooNew(f"{where}: pages of {page_size} bytes are not read by this crtrace")
        return cls(
            machine=cursor.text(), page_size=page_size, xstate_size=xstate_size,
            xfeatures=xfeatures, clock_ticks=ticks,
        )  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """A process. ``start_ticks`` together with ``pid`` names it beyond doubt.

    ``ns_pids`` are its numbers in nested PID namespaces, outermost first; ``namespaces`` pairs of
    name and inode; ``cmdline`` is raw, as in ``/proc/PID/cmdline``; ``exit_status`` is -1 while
    it runs.
    """

    TYPE: ClassVar = RecordType.TASK
    FIXED: ClassVar = struct.Struct("<IIIIIIQ4I4IiI")

    pid: int
    ppid: int = 0
    pgid: int = 0
    sid: int = 0
    tty: int = 0
    state: str = "R"
    start_ticks: int = 0
    uid: tuple[int, ...] = (0, 0, 0, 0)
    gid: tuple[int, ...] = (0, 0, 0, 0)
    exit_status: int = -1
    seccomp: int = 0
    ns_pids: tuple[int, ...] = ()
    comm: str = ""
    cwd: str = ""
    root: str = ""
    cgroup: str = ""
    cmdline: bytes = b""
    namespaces: tuple[tuple[str, int], ...] = ()

    def pack(self) -> bytes:
        """The payload."""
        fixed = self.FIXED.pack(
            self.pid, self.ppid, self.pgid, self.sid, self.tty, ord(self.state),
            self.start_ticks, *self.uid, *self.gid, self.exit_status, self.seccomp,
        )  # fmt: skip
        texts = b"".join(map(text, (self.comm, self.cwd, self.root, self.cgroup)))
        spaces = [text(name) + struct.pack("<Q", inode) for name, inode in self.namespaces]
        count = struct.pack("<I", len(spaces))
        head = fixed + u32s(self.ns_pids) + texts + blob(self.cmdline)
        return head + count + b"".join(spaces)

    @classmethod
    def unpack(cls, data: bytes, where: str) -> Self:
        """Raises ``ImageDamaged`` when a field does not fit."""
        cursor = Cursor(data, where)
        fixed = cursor.take(cls.FIXED)
        pid, ppid, pgid, sid, tty, state, start = fixed[:7]
        ns_pids = cursor.u32s()
        check_pids((pid, ppid, pgid, sid, *ns_pids), where)
        comm, cwd, root, cgroup = (cursor.text() for _ in range(4))
        cmdline = cursor.blob()
        spaces = [_namespace(cursor) for _ in range(cursor.count(12, "namespaces"))]
        return cls(
            pid=pid, ppid=ppid, pgid=pgid, sid=sid, tty=tty, state=letter(state, where),
            start_ticks=start, uid=fixed[7:11], gid=fixed[11:15], exit_status=fixed[15],
            seccomp=fixed[16], ns_pids=ns_pids, comm=comm, cwd=cwd, root=root, cgroup=cgroup,
            cmdline=cmdline, namespaces=tuple(spaces),
        )  # fmt: skip


def _namespace(cursor: Cursor) -> tuple[str, int]:
    name = cursor.text()
    return name, cursor.take(struct.Struct("<Q"))[0]


def check_pids(numbers: tuple[int, ...], where: str) -> None:
    """Raise ``ImageDamaged`` for a number that a ``pid_t``, which is signed, cannot have."""
    if max(numbers) > MAX_PID_T:
        raise ImageDamaged(f"{where}: {max(numbers)} is no process number")


def letter(code: int, where: str) -> str:
    """A state letter from its stored number."""
    if not 0x20 <= code < 0x7F:
        raise ImageDamaged(f"{where}: {code:#x} is no state letter")
    return chr(code)


@dataclass(frozen=True, slots=True, kw_only=True)
class Mm:
    """The head of an address space; its VMAs follow in a ``Vmas`` whose parent it is."""

    TYPE: ClassVar = RecordType.MM
    FIXED: ClassVar = struct.Struct("<II13Q")

    space: int
    exe_file: int = 0
    start_code: int = 0
    end_code: int = 0
    start_data: int = 0
    end_data: int = 0
    start_brk: int = 0
    brk: int = 0
    start_stack: int = 0
    arg_start: int = 0
    arg_end: int = 0
    env_start: int = 0
    env_end: int = 0
    map_count: int = 0
    flags: int = 0
    auxv: bytes = b""
    ldt: bytes = b""

    def pack(self) -> bytes:
        """The payload."""
        fixed = self.FIXED.pack(
            self.space, self.exe_file, self.start_code, self.end_code, self.start_data,
            self.end_data, self.start_brk, self.brk, self.start_stack, self.arg_start,
            self.arg_end, self.env_start, self.env_end, self.map_count, self.flags,
        )  # fmt: skip
        return fixed + blob(self.auxv) + blob(self.ldt)

    @classmethod
    def unpack(cls, data: bytes, where: str) -> Self:
        """Raises ``ImageDamaged`` when a field does not fit."""
        cursor = Cursor(data, where)
        (
            space, exe_file, start_code, end_code, start_data, end_data, start_brk, brk,
            start_stack, arg_start, arg_end, env_start, env_end, map_count, flags,
        ) = cursor.take(cls.FIXED)  # fmt: skip
        return cls(
            space=space, exe_file=exe_file, start_code=start_code, end_code=end_code,
            start_data=start_data, end_data=end_data, start_brk=start_brk, brk=brk,
            start_stack=start_stack, arg_start=arg_start, arg_end=arg_end, env_start=env_start,
            env_end=env_end, map_count=map_count, flags=flags,
            auxv=cursor.blob(), ldt=cursor.blob(),
        )  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Thread:
    """A thread: what the kernel knows of it besides its registers.

    ``syscall`` is ``orig_rax``: the system call it was in, -1 for none.
    """

    TYPE: ClassVar = RecordType.THREAD
    FIXED: ClassVar = struct.Struct("<IIIIQQq")

    tid: int
    ns_tid: int = 0
    state: str = "R"
    sigmask: int = 0
    pending: int = 0
    syscall: int = -1
    comm: str = ""

    def pack(self) -> bytes:
        """The payload."""
        fixed = self.FIXED.pack(
            self.tid, self.ns_tid, ord(self.state), 0, self.sigmask, self.pending, self.syscall
        )
        return fixed + text(self.comm)

    @classmethod
    def unpack(cls, data: bytes, where: str) -> Self:
        """Raises ``ImageDamaged`` when a field does not fit."""
        cursor = Cursor(data, where)
        tid, ns_tid, state, reserved, sigmask, pending, syscall = cursor.take(cls.FIXED)
        must_be_zero(reserved, where)
        check_pids((tid, ns_tid), where)
        return cls(
            tid=tid, ns_tid=ns_tid, state=letter(state, where), sigmask=sigmask,
            pending=pending, syscall=syscall, comm=cursor.text(),
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Cpu:
    """The register sets of a thread: pairs of ELF note type and bytes."""

    TYPE: ClassVar = RecordType.CPU

    sets: tuple[tuple[int, bytes], ...]

    def get(self, note_type: int) -> bytes:
        """The set of that type; empty when there is none."""
        return next((data for kind, data in self.sets if kind == note_type), b"")

    def pack(self) -> bytes:
        """The payload."""
        head = struct.pack("<II", len(self.sets), 0)
        return head + b"".join(struct.pack("<I", kind) + blob(data, 8) for kind, data in self.sets)

    @classmethod
    def unpack(cls, data: bytes, where: str) -> Self:
        """Raises ``ImageDamaged`` when a field does not fit."""
        cursor = Cursor(data, where)
        number = cursor.count(8, "register sets")
        must_be_zero(cursor.u32(), where)
        return cls(tuple((cursor.u32(), cursor.blob(8)) for _ in range(number)))
