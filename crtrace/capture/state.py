"""The state of a process other than its memory, as the records of an image.

What changes from moment to moment is read while the target is stopped (:func:`snapshot`); what does
not, outside the pause.
"""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path

from crtrace.capture.target import Target
from crtrace.capture.tree import Member
from crtrace.errors import TargetGone
from crtrace.image.imagewriter import ImageWriter
from crtrace.image.records import Arch, Cpu, Mm, Task, Thread
from crtrace.image.tables import FileFlag, FileInfo, Files, Vma, VmaFlag, VmaKind, Vmas
from crtrace.linux import procfs
from crtrace.linux.files import FileFacts, file_facts
from crtrace.linux.procfs import FileKey, Process, Stat, parse_status
from crtrace.linux.ptrace import NT_PRFPREG, NT_PRSTATUS, NT_X86_XSTATE, Tracee
from crtrace.linux.registers import Registers
from crtrace.units import Pid


@dataclass(slots=True)
class Snapshot:
    """What was read of a member during one pause; its ``threads`` with the leader first."""

    member: Member
    target: Target
    stat: Stat
    vmas: list[procfs.Vma]
    threads: list[Tracee]
    shared_pending: int

    @classmethod
    def take(cls, member: Member, threads: list[Tracee]) -> Snapshot:
        """Read registers and signals of stopped threads."""
        pid = member.process.pid
        threads = sorted(threads, key=lambda tracee: (tracee.tid != pid, tracee.tid))
        try:
            for tracee in threads:
                tracee.capture()
            shared_pending = threads[0].read_pending(shared=True)
        except ProcessLookupError as error:  # killed in its stop
            raise TargetGone(f"process {pid} has exited") from error
        assert member.stat  # read since it was stopped, to see that it is settled
        return cls(
            member, member.target, member.stat, member.target.map.vmas, threads, shared_pending
        )


@dataclass(slots=True)
class FileBook:
    """Facts of the files that are mapped.

    They are asked for in every epoch: a file may be deleted, and its number given to another one.
    Its size and time are what tells a later reader whether the file on disk is still the one that
    was mapped.
    """

    facts: dict[FileKey, FileFacts | None] = field(default_factory=dict)
    paths: dict[FileKey, str] = field(default_factory=dict)
    ids: dict[FileKey, int] = field(default_factory=dict)

    def update(self, targets: Iterable[Target], *, hurry: bool = False) -> None:
        """Bring the book up to what the targets map; in a ``hurry``, by what is new or was renamed.

        To be deleted is to be renamed, as the map shows it.
        """
        mapped: dict[FileKey, tuple[Process, procfs.Vma]] = {}
        for target in targets:
            for vma in target.map.vmas:
                if vma.file_backed:
                    key = target.process.file_key(vma)
                    mapped.setdefault(key, (target.process, vma))
        for key in self.facts.keys() - mapped.keys():
            del self.facts[key], self.paths[key]
        for key, (process, vma) in mapped.items():
            about = self.facts.get(key)
            if about is None or not hurry or self.paths[key] != vma.name:
                self.facts[key] = file_facts(process, vma, about)
            self.paths[key] = vma.name
            self.ids.setdefault(key, len(self.ids) + 1)

    def identify(self, process: Process, vma: procfs.Vma) -> int:
        """The file id of a VMA; 0 when it maps none."""
        return self.ids.get(process.file_key(vma), 0) if vma.file_backed else 0

    def rows(self, objects: dict[FileKey, int]) -> tuple[FileInfo, ...]:
        """The file table; ``objects`` are the spaces of those whose contents are kept."""
        return tuple(
            _file_row(self.ids[key], key, about, self.paths[key], objects.get(key, 0))
            for key, about in self.facts.items()
        )


def _file_row(
    number: int, key: FileKey, about: FileFacts | None, path: str, space: int
) -> FileInfo:
    about = about or FileFacts(0, 0, 1, False)
    deleted = path.endswith(" (deleted)")
    flags = (
        (FileFlag.DELETED if deleted or not about.links else 0)
        | (FileFlag.MEMFD if path.startswith("/memfd:") else 0)
        | (FileFlag.SYSV if path.startswith("/SYSV") and about.memory else 0)
        | (FileFlag.SHM if about.memory and not about.hugetlb else 0)
        | (FileFlag.HUGETLB if about.hugetlb else 0)
    )
    return FileInfo(
        id=number, flags=flags, dev=key[0], inode=key[1], size=about.size,
        mtime_ns=about.mtime_ns, object_space=space, path=path.removesuffix(" (deleted)"),
        build_id=about.build_id,
    )  # fmt: skip


_KINDS = {
    "[heap]": VmaKind.HEAP,
    "[stack]": VmaKind.STACK,
    "[vdso]": VmaKind.VDSO,
    "[vvar]": VmaKind.VVAR,
    "[vvar_vclock]": VmaKind.VVAR,
}


def vma_row(target: Target, vma: procfs.Vma, book: FileBook, objects: dict[FileKey, int]) -> Vma:
    """A VMA as the image records it."""
    key = target.process.file_key(vma)
    about = book.facts.get(key) if vma.file_backed else None
    kind = _KINDS.get(vma.name, VmaKind.FILE if vma.file_backed else VmaKind.ANON)
    if about and about.hugetlb:
        kind = VmaKind.HUGETLB
    elif about and about.memory:
        kind = VmaKind.SHM
    elif about and not about.regular:
        kind = VmaKind.DEVICE
    flags = vma.flags | target.advice.flags.get((vma.start, vma.end), 0)
    if about and about.regular and not about.memory and about.links:
        flags |= VmaFlag.FILE_BEHIND
    return Vma(
        start=vma.start, end=vma.end, pgoff=vma.offset, flags=flags, kind=kind,
        file=book.identify(target.process, vma),
        object_space=objects.get(key, 0) if vma.file_backed else 0,
        name=vma.name,
    )  # fmt: skip


@cache
def boot_id() -> bytes:
    """The 16 bytes that name this boot of the machine."""
    return bytes.fromhex(Path("/proc/sys/kernel/random/boot_id").read_text().replace("-", ""))


def kernel() -> str:
    """The running kernel's release."""
    return os.uname().release


def hostname() -> str:
    """This machine's name."""
    return socket.gethostname()


def write_records(
    image: ImageWriter, snapshots: list[Snapshot], book: FileBook, objects: dict[FileKey, int]
) -> None:
    """Write processes, address spaces, files and threads, after the pause."""
    image.add(_arch(snapshots))
    image.add(Files(book.rows(objects)))
    tasks: dict[Pid, int] = {}
    for snapshot in snapshots:
        member, target = snapshot.member, snapshot.target
        member.recorded = _task(member.process, snapshot.stat)
        above = tasks.get(Pid(snapshot.stat.ppid), 0)
        task = tasks[member.process.pid] = image.add(member.recorded, parent=above)
        mm = image.add(_mm(snapshot, book), parent=task)
        rows = (vma_row(target, vma, book, objects) for vma in snapshot.vmas)
        image.add(Vmas(tuple(rows)), parent=mm)
        for tracee in snapshot.threads:
            thread = image.add(_thread(member.process, tracee, snapshot), parent=task)
            image.add(_cpu(tracee), parent=thread)


def write_ends(image: ImageWriter, departed: list[Member]) -> None:
    """Write the last of processes that have ended since the epoch before."""
    for member in departed:
        if member.recorded:
            status = -1 if member.status is None else member.status
            image.add(replace(member.recorded, state="X", exit_status=status))


def _arch(snapshots: list[Snapshot]) -> Arch:
    xstate = snapshots[0].threads[0].xstate if snapshots else b""
    enabled = struct.unpack_from("<Q", xstate, 464)[0] if len(xstate) > 472 else 0
    return Arch(
        machine=os.uname().machine, xstate_size=len(xstate), xfeatures=enabled,
        clock_ticks=os.sysconf("SC_CLK_TCK"),
    )  # fmt: skip


def _or_empty(read: Callable[[], bytes]) -> bytes:
    """What is good to know but no reason to lose an epoch when the target is just exiting."""
    try:
        return read()
    except Exception:
        return b""


MAX_CMDLINE = 8 << 20
"""More than ``execve`` takes; but a process may say that its arguments are all of its memory."""


def _task(process: Process, stat: Stat) -> Task:
    status = parse_status(_or_empty(lambda: process.read("status")).decode(errors="replace"))
    return Task(
        pid=process.pid, ppid=stat.ppid, pgid=stat.pgrp, sid=stat.session,
        tty=stat.tty_nr & 0xFFFFFFFF, state=stat.state, start_ticks=stat.starttime,
        uid=_four(status.get("Uid", "")), gid=_four(status.get("Gid", "")),
        seccomp=int(status.get("Seccomp", "0")),
        ns_pids=tuple(int(n) for n in status.get("NSpid", str(process.pid)).split()),
        comm=stat.comm, cwd=process.readlink("cwd"), root=process.readlink("root"),
        cgroup=_or_empty(lambda: process.read("cgroup")).decode(errors="replace").strip(),
        cmdline=_or_empty(lambda: process.read("cmdline", MAX_CMDLINE)),
        namespaces=_namespaces(process),
    )  # fmt: skip


def _four(text: str) -> tuple[int, ...]:
    return tuple(int(n) for n in text.split()[:4]) or (0, 0, 0, 0)


def _namespaces(process: Process) -> tuple[tuple[str, int], ...]:
    names = ("cgroup", "ipc", "mnt", "net", "pid", "time", "user", "uts")
    links = ((name, process.readlink(f"ns/{name}")) for name in names)
    return tuple((name, int(link[link.index("[") + 1 : -1])) for name, link in links if link)


MMF_DUMP_FILTER_SHIFT = 2
"""Where the coredump filter lies in the kernel's ``mm->flags`` (include/linux/mm_types.h)."""


def _mm(snapshot: Snapshot, book: FileBook) -> Mm:
    process, target = snapshot.member.process, snapshot.target
    stat, vmas = snapshot.stat, snapshot.vmas
    heap = [vma.end for vma in vmas if vma.name == "[heap]"]
    exe = process.readlink("exe")
    named = (vma for vma in vmas if vma.file_backed and vma.name == exe)
    first = next(named, None)
    dump_filter = _or_empty(lambda: process.read("coredump_filter")) or b"0"
    return Mm(
        space=target.space, exe_file=book.identify(process, first) if first else 0,
        start_code=stat.startcode, end_code=stat.endcode, start_data=stat.start_data,
        end_data=stat.end_data, start_brk=stat.start_brk, brk=max(heap, default=stat.start_brk),
        start_stack=stat.startstack, arg_start=stat.arg_start, arg_end=stat.arg_end,
        env_start=stat.env_start, env_end=stat.env_end, map_count=len(vmas),
        flags=int(dump_filter, 16) << MMF_DUMP_FILTER_SHIFT,
        auxv=_or_empty(lambda: process.read("auxv")), ldt=target.armer.ldt,
    )  # fmt: skip


def _thread(process: Process, tracee: Tracee, snapshot: Snapshot) -> Thread:
    name = f"task/{tracee.tid}"
    comm = _or_empty(lambda: process.read(f"{name}/comm")).decode(errors="replace").strip()
    status = _or_empty(lambda: process.read(f"{name}/status")).decode(errors="replace")
    inner = int(parse_status(status).get("NSpid", str(tracee.tid)).split()[-1])
    registers = Registers(tracee.prstatus)
    shared = snapshot.shared_pending if tracee.tid == process.pid else 0
    return Thread(
        tid=tracee.tid, ns_tid=inner, state="t", sigmask=tracee.sigmask,
        pending=tracee.pending | shared, syscall=registers.signed("orig_rax"), comm=comm,
    )  # fmt: skip


def _cpu(tracee: Tracee) -> Cpu:
    sets = [(NT_PRSTATUS, tracee.prstatus), (NT_PRFPREG, tracee.fpregs)]
    if tracee.xstate:
        sets.append((NT_X86_XSTATE, tracee.xstate))
    return Cpu(tuple(sets))
