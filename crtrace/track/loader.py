"""Compile the BPF programs, load them and attach them.

BCC brings a whole compiler: a hundred MiB that the controller would carry for hours, and a second
to start. So a child compiles and hands over the code, which is kept for the next time (see
``bytecode``). The kernel holds everything for as long as the controller has its descriptors open,
and undoes everything when it dies, however it dies.
"""

from __future__ import annotations

import errno
import importlib.resources
import logging
import os
import resource
import subprocess
import sys
import time
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from crtrace.errors import FeatureMissing
from crtrace.linux import bpf
from crtrace.linux.btf import Btf
from crtrace.linux.libc import kernel_version
from crtrace.track.bytecode import BpfMap, BpfProgram, Bytecode, cache_key, keep, recall
from crtrace.track.headers import find_headers
from crtrace.units import PAGE_SIZE, human_bytes

log = logging.getLogger("crtrace")

REGIONS = 65_536
"""Regions that each generation of the written-page map holds: 128 GiB when densely written, or half
of that where each has a page with two faults."""
TARGETS = 4_096
PATIENCE = 120.0
"""Seconds that the compiler may take: half of one is usual."""
RING_PAGES = 512
"""4096-byte pages of the ring that tells of newly marked regions: 87,000 of 24 bytes each."""

KEY = np.dtype([("number", "<u4"), ("reserved", "<u4"), ("region", "<u8")])
"""``struct region_key`` of bpf/track.h."""
MAPS = (
    "written0", "written1", "targets", "generation", "totals", "question", "controller", "visits",
    "homes", "faulting", "plain", "fresh",
)  # fmt: skip
RAW_TRACEPOINTS = ("page_fault_user", "page_fault_kernel")
LOCKS = ("mmap_lock_acquire_returned", "mmap_lock_released")
"""Raw tracepoints, too, of the mmap lock."""
TRACEPOINTS = (
    ("task", "task_newtask"), ("sched", "sched_process_exec"), ("sched", "sched_process_exit"),
)  # fmt: skip
OLD_KERNEL = "-DOLD_KERNEL"
"""Before Linux 5.11 there are no tracepoints of the mmap lock, before 5.12 no atomic "or"."""
RESOLVER = "resolve"
MIGRATING = "migrating"
MIGRATIONS = ("set_migration_pte", "set_migration_pmd")
"""Raw tracepoints, from Linux 5.18 on, that this program can be attached to."""
COVERING, COVERED = "fault_of_anybody", "handle_mm_fault"
"""The program that marks what others write, and the kernel's function at which it runs."""
COVERING_NEEDS = "-DVMA_MM_OFFSET="
"""The option for the compiler without which it is left out."""


@dataclass(slots=True)
class Programs:
    """Descriptors of the loaded maps by name; attachments live until :meth:`close`.

    ``origin`` says where the code came from. ``covering`` is the program that marks what others
    write; -1: this kernel does not allow it. ``locks``: who takes the lock of an address space is
    counted.
    """

    maps: dict[str, int]
    ring: bpf.Ring
    resolver: int
    migrating: int
    covering: int
    locks: bool
    attachments: list[int]
    seconds: float
    origin: str

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
        """Detach and unload everything; it may be called twice."""
        self.ring.close()
        kept = self.resolver, self.migrating, self.covering
        for fd in (*self.maps.values(), *kept, *self.attachments):
            if fd >= 0:
                os.close(fd)
        self.maps, self.attachments = {}, []
        self.resolver = self.migrating = self.covering = -1


class Loading:
    """A load under way: start it early, do other things, then take the :meth:`result`.

    ``regions`` is how many the map of written pages holds. Not ``covering``: only page faults are
    marked, as where the kernel allows no more.
    """

    def __init__(self, regions: int = REGIONS, *, covering: bool = True) -> None:
        self._began = time.monotonic()
        self._regions = regions
        self._covering = covering
        self._key = cache_key(bpf_sources())
        self._code = recall(self._key)
        self._child = None if self._code else _compiler()

    def result(self) -> Programs:
        """The loaded programs, when they are; ``FeatureMissing`` with what was said instead."""
        if self._code:
            try:
                return self._load(self._code, "kept from an earlier start")
            except OSError as error:
                log.debug("BPF code that was kept does not load, compiling anew: %s", error)
                self._child = _compiler()
        assert self._child
        code = _result_of(self._child)
        try:
            programs = self._load(code, f"compiled with headers {code.headers}")
        except OSError as error:
            raise _failure(f"{error}{_limit_behind(error)}") from error
        keep(self._key, code)
        return programs

    def _load(self, code: Bytecode, origin: str) -> Programs:
        _allow_locked_memory()
        with ExitStack() as undo:

            def held(fd: int) -> int:
                undo.callback(os.close, fd)
                return fd

            fds = [held(self._made(each)) for each in code.maps]
            loaded = {
                each.name: held(bpf.load_program(each.name, each.kind, each.bound(fds)))
                for each in code.programs
                if each.kind != bpf.KPROBE
            }
            attachments = []
            for name, program in loaded.items():
                match name.split("__"):
                    case "raw_tracepoint", event:
                        attachments.append(held(bpf.attach_raw_tracepoint(program, event)))
                    case "tracepoint", category, event:
                        attachments.append(held(bpf.attach_tracepoint(program, category, event)))
            covered = [held(fd) for fd in self._cover(code, fds)]
            maps = {each.name: fd for each, fd in zip(code.maps, fds, strict=True)}
            ring = bpf.Ring(maps["fresh"], RING_PAGES * PAGE_SIZE, KEY.itemsize // 8)
            undo.pop_all()
        resolver, migrating = loaded.pop(RESOLVER), loaded.pop(MIGRATING)
        for fd in loaded.values():
            os.close(fd)  # what is attached stays
        covering = covered.pop(0) if covered else -1
        seconds = time.monotonic() - self._began
        locks = any(name.endswith(LOCKS[0]) for name in loaded)
        return Programs(
            maps, ring, resolver, migrating, covering, locks, attachments + covered, seconds, origin
        )

    def _cover(self, code: Bytecode, fds: list[int]) -> tuple[int, ...]:
        """The program that marks what others write, and its attachment, if that can be had."""
        found = [each for each in code.programs if each.kind == bpf.KPROBE]
        if not found or not self._covering:
            return ()
        try:
            program = bpf.load_program(COVERING, bpf.KPROBE, found[0].bound(fds))
        except OSError as error:
            log.debug("the program that marks what others write does not load: %s", error)
            return ()
        try:
            return program, bpf.attach_kprobe(program, COVERED)
        except OSError as error:
            os.close(program)
            log.debug("no probe at %s, only page faults are marked: %s", COVERED, error)
            return ()

    def _made(self, each: BpfMap) -> int:
        entries = self._regions if each.name.startswith("written") else each.entries
        return bpf.create_map(each.name, each.kind, each.key_size, each.value_size, entries)

    def abandon(self) -> None:
        """Give the load up."""
        if self._child:
            self._child.kill()
            self._child.communicate()


def compiled() -> Bytecode:
    """Compile now, whatever is kept; ``FeatureMissing`` with what was said instead."""
    return _result_of(_compiler())


def _compiler() -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        # -P: the current directory, which may be anybody's, is no place to import from
        [sys.executable, "-P", "-m", "crtrace.track.loader"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,  # a Ctrl-C is for the controller to answer
    )


def _result_of(child: subprocess.Popen[bytes]) -> Bytecode:
    try:
        data, errors = child.communicate(timeout=PATIENCE)
    except subprocess.TimeoutExpired:
        child.kill()
        child.communicate()
        raise _failure(f"the compiler has not come to an end in {PATIENCE:.0f} s") from None
    if child.returncode or not data:
        raise _failure(_last_lines(errors.decode(errors="replace").strip()))
    if errors:
        log.debug("the compiler said: %s", errors.decode(errors="replace").strip())
    return Bytecode.unpack(data)


def _failure(said: str) -> FeatureMissing:
    return FeatureMissing(
        f"BPF programs cannot be loaded: {said}",
        hint="crtrace check tells what is missing; scripts/setup installs it",
    )


def _allow_locked_memory() -> None:
    """Before Linux 5.11, BPF maps are charged to this limit. Only who may raises it further."""
    _, most = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    for limit in (most, resource.RLIM_INFINITY):
        with suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_MEMLOCK, (limit, limit))


def _limit_behind(error: OSError) -> str:
    """What else a refusal may mean."""
    limit, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if error.errno != errno.EPERM or limit == resource.RLIM_INFINITY:
        return ""
    return f"; before Linux 5.11, ulimit -l counts for BPF: it is {human_bytes(limit)} here"


def _last_lines(text: str, count: int = 3) -> str:
    """What the compiler or the kernel said, without Python's own lines; its first error, if any."""
    lines = [line for line in text.splitlines() if not line.startswith(("Traceback", " "))]
    lines = [line for line in lines if "error: " in line][:1] or lines
    return " | ".join(lines[-count:]) or "the compiler died without a word"


def bpf_sources() -> Path:
    """The directory of the BPF C: inside the installed package, or beside it in a source tree."""
    packaged = Path(str(importlib.resources.files("crtrace"))) / "bpf"
    return packaged if packaged.is_dir() else packaged.parent.parent / "bpf"


def _compile() -> Bytecode:
    """The child's work. BCC loads what it compiles; that goes when the child does."""
    headers = find_headers()
    if headers is None:
        raise SystemExit("no kernel headers found for BCC: run scripts/setup")
    if headers.path:
        os.environ["BCC_KERNEL_SOURCE"] = headers.path
    best = [OLD_KERNEL] if kernel_version() < (5, 12) else kernel_types()
    try:
        return _compiled_with(best, headers.source)
    except Exception as error:  # BCC raises nothing more special
        failure = error
    if COVERING_NEEDS in "".join(best):
        # Some kernels let nobody read their memory, which that program does.
        with suppress(Exception):
            return _compiled_with(best[1:], headers.source)
    raise failure


def _compiled_with(known: list[str], headers: str) -> Bytecode:
    from bcc import BPF

    folder = bpf_sources()
    flags = [
        f"-I{folder}",
        f"-DREGIONS={REGIONS}",
        f"-DTARGETS={TARGETS}",
        f"-DRING_PAGES={RING_PAGES}",
        *known,
    ]
    program = BPF(src_file=str(folder / "track.c"), cflags=flags)
    for name in (RESOLVER, MIGRATING):
        program.load_func(name, BPF.RAW_TRACEPOINT)
    tables = [program[name] for name in MAPS]
    return Bytecode(
        headers,
        tuple(_map(name, table) for name, table in zip(MAPS, tables, strict=True)),
        tuple(_programs(program, [table.map_fd for table in tables], known)),
    )


def kernel_types() -> list[str]:
    """What the programs need to know of the running kernel's types, as options for the compiler.

    The first is for the program that marks what others write. Empty where the kernel does not tell:
    headers may be of another version.
    """
    btf = Btf.of_kernel()
    if not btf:
        return []
    offset = btf.offset("vm_area_struct", "vm_mm")
    released = btf.tracepoint_arguments("mmap_lock_released")
    acquired = btf.tracepoint_arguments("mmap_lock_acquire_returned")
    if offset is None or not released or acquired != released + 1:
        return []
    return [f"{COVERING_NEEDS}{offset}", f"-DLOCK_WRITE_ARG={released - 1}"]


def _map(name: str, table: Any) -> BpfMap:
    if table.ttype == bpf.RINGBUF:
        return BpfMap(name, table.ttype, 0, 0, RING_PAGES * PAGE_SIZE)
    sizes = len(bytes(table.Key())), len(bytes(table.Leaf()))
    return BpfMap(name, table.ttype, *sizes, table.max_entries)


def _programs(program: Any, fds: list[int], known: list[str]) -> list[BpfProgram]:
    raw = RAW_TRACEPOINTS if OLD_KERNEL in known else RAW_TRACEPOINTS + LOCKS
    kinds = {
        **{f"tracepoint__{category}__{each}": bpf.TRACEPOINT for category, each in TRACEPOINTS},
        **{f"raw_tracepoint__{each}": bpf.RAW_TRACEPOINT for each in raw},
        RESOLVER: bpf.RAW_TRACEPOINT,
        MIGRATING: bpf.RAW_TRACEPOINT,
    }
    if COVERING_NEEDS in "".join(known):
        kinds[COVERING] = bpf.KPROBE
    return [
        BpfProgram.of(name, kind, program.dump_func(name.encode()), fds)
        for name, kind in kinds.items()
    ]


if __name__ == "__main__":
    sys.stdout.buffer.write(_compile().pack())
