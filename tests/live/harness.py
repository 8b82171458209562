"""Start targets and judge them from outside.

Nothing here uses crtrace but its units: memory is read through ``/proc/PID/mem``, maps and
pagemap with code of its own, so that a mistake in crtrace cannot hide in its judge. Every wait is
for an event or a state and has a time limit; a limit that runs out is a failure with the reason.
"""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import re
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from crtrace.units import PAGE_SIZE, U64

SOURCES = Path(__file__).resolve().parents[1] / "targets"
BUILD = SOURCES / "build"
COMPILERS = {".c": ["gcc", "-std=gnu11"], ".cc": ["g++", "-std=gnu++17"]}
CFLAGS = ["-O1", "-g", "-Wall", "-Wextra", "-Werror", "-pthread"]
# A debugger must find every local, and every frame.
OWN_CFLAGS = {"threads": ["-O0"], "crowd": ["-O0"]}
# The kernel stores the CPU number in a thread's rseq area whenever it resumes it.
ENVIRONMENT = {"GLIBC_TUNABLES": "glibc.pthread.rseq=0"}

MemoryReader = Callable[[int, int], bytes]
"""Bytes of a target at an address, so many: from the live process or from an image."""


def compile_target(name: str) -> Path:
    """The program of ``tests/targets/NAME.c`` or ``.cc``, built if the sources are newer."""
    (source,), program = SOURCES.glob(f"{name}.c*"), BUILD / name
    newest = max(path.stat().st_mtime for path in (source, *SOURCES.glob("*.h")))
    if program.exists() and program.stat().st_mtime > newest:
        return program
    BUILD.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=BUILD) as scratch:
        built = Path(scratch) / name
        command = COMPILERS[source.suffix] + CFLAGS + OWN_CFLAGS.get(name, [])
        subprocess.run([*command, "-o", built, source], check=True)
        built.replace(program)  # whole or not at all, also for tests that run in parallel
    return program


def wait_until(condition: Callable[[], bool], what: str, timeout: float = 30) -> None:
    """Return once ``condition()`` holds; an AssertionError names ``what`` did not come."""
    limit = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < limit, f"waited {timeout} s in vain: {what}"
        time.sleep(0.001)


class Target:
    """A target program as a context manager: ready inside the block, gone after it.

    ``program`` names one of ``tests/targets/*.c``, or is the beginning of a command line that
    keeps the handshake of ``target.h``. Options follow the FIFOs: ``Target("writer", "--mib", 4)``.
    """

    info: dict[str, Any]
    """What the target said when it was ready."""

    def __init__(self, program: str | Sequence[str | Path], *options: object) -> None:
        self._program, self._options = program, [str(option) for option in options]
        self._pending = b""

    def __enter__(self) -> Self:
        is_name = isinstance(self._program, str)
        start = [compile_target(str(self._program))] if is_name else list(self._program)
        with contextlib.ExitStack() as stack:
            self.directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            ready, command = self.directory / "ready", self.directory / "command"
            self._fds = []
            for fifo in (ready, command):
                os.mkfifo(fifo)
                # Open for both, so that no side has to wait and nothing ends with an exec.
                self._fds.append(os.open(fifo, os.O_RDWR | os.O_CLOEXEC))
                stack.callback(os.close, self._fds[-1])
            with open(self.directory / "stderr", "wb") as stderr:
                self.process = subprocess.Popen(
                    [*map(str, start), str(ready), str(command), *self._options],
                    stdin=subprocess.DEVNULL,
                    stderr=stderr,
                    env=os.environ | ENVIRONMENT,
                    start_new_session=True,  # a Ctrl-C is for the tests
                )
            stack.callback(self._kill)
            self._pidfd = os.pidfd_open(self.pid)
            stack.callback(os.close, self._pidfd)
            self.info = self.await_ready()
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stack.close()

    def _kill(self) -> None:
        self.process.kill()
        self.process.wait()

    @property
    def pid(self) -> int:
        """Its process number."""
        return self.process.pid

    @property
    def stderr(self) -> str:
        """What it wrote to stderr so far."""
        return (self.directory / "stderr").read_text(errors="replace")

    def _line(self, timeout: float) -> str:
        limit = time.monotonic() + timeout
        while b"\n" not in self._pending:
            left = limit - time.monotonic()
            readable, _, _ = select.select([self._fds[0], self._pidfd], [], [], max(left, 0))
            assert readable, f"no answer for {timeout} s; stderr: {self.stderr}"
            if self._fds[0] not in readable:
                raise AssertionError(f"ended with {self.process.wait()}; stderr: {self.stderr}")
            self._pending += os.read(self._fds[0], 65536)
        line, _, self._pending = self._pending.partition(b"\n")
        return line.decode()

    def await_ready(self, timeout: float = 60) -> dict[str, Any]:
        """The next ready line: at the start, and again when a target execs another."""
        word, _, info = self._line(timeout).partition(" ")
        assert word == "ready", f"said {word} {info}"
        ready: dict[str, Any] = json.loads(info)
        return ready

    def send(self, line: str) -> None:
        """Send a command without waiting for its :meth:`answer`."""
        os.write(self._fds[1], line.encode() + b"\n")

    def has_answered(self, timeout: float) -> bool:
        """Whether there is an :meth:`answer`, at the latest after ``timeout`` seconds."""
        return b"\n" in self._pending or bool(select.select([self._fds[0]], [], [], timeout)[0])

    def answer(self, timeout: float = 60) -> str:
        """The line that a command which was sent answers."""
        return self._line(timeout)

    def command(self, line: str, timeout: float = 60) -> str:
        """Send a command, return the line it answers."""
        self.send(line)
        return self.answer(timeout)

    def obey(self, line: str, timeout: float = 60) -> str:
        """Send a command that must succeed, return what follows the "ok"."""
        answer = self.command(line, timeout)
        verdict, _, rest = answer.partition(" ")
        assert verdict == "ok", f"{line}: {answer}; stderr: {self.stderr}"
        return rest

    def ask(self, line: str, timeout: float = 60) -> Any:
        """Send a command that answers with JSON, return it decoded."""
        return json.loads(self.command(line, timeout))

    def terminate(self, timeout: float = 60) -> int:
        """End it by SIGTERM and return the exit status: 0 if its own check found no fault."""
        self.process.terminate()
        return self.process.wait(timeout)

    def terminate_and_check(self, timeout: float = 60) -> None:
        """End it by SIGTERM; its own check must find no fault."""
        status = self.terminate(timeout)
        assert status == 0, f"exit status {status}; stderr: {self.stderr}"


# --- what a process is, read plainly ---


def read_mem(pid: int, addr: int, length: int) -> bytes:
    """Memory through ``/proc/PID/mem``; OSError (EIO) where something cannot be read."""
    with open(f"/proc/{pid}/mem", "rb", buffering=0) as mem:
        data = b""
        while len(data) < length:
            part = os.pread(mem.fileno(), length - len(data), addr + len(data))
            if not part:
                raise OSError(f"/proc/{pid}/mem ends at {addr + len(data):#x}")
            data += part
        return data


def write_mem(pid: int, addr: int, data: bytes) -> None:
    """Change memory behind a target's back."""
    with open(f"/proc/{pid}/mem", "r+b", buffering=0) as mem:
        assert os.pwrite(mem.fileno(), data, addr) == len(data)


def flip_byte(pid: int, addr: int) -> None:
    """Corrupt one byte."""
    write_mem(pid, addr, bytes([read_mem(pid, addr, 1)[0] ^ 0xFF]))


@dataclass(frozen=True, slots=True)
class Vma:
    """A line of ``/proc/PID/maps``: the half-open range ``[start, end)``."""

    start: int
    end: int
    perms: str
    offset: int
    device: str
    inode: int
    name: str

    @property
    def private(self) -> bool:
        """Copy on write, as opposed to shared."""
        return self.perms[3] == "p"

    def __str__(self) -> str:
        return f"{self.start:x}-{self.end:x} {self.perms} {self.offset:x} {self.name}"


def _vma(line: str) -> Vma:
    addresses, perms, offset, device, inode, *name = line.rstrip("\n").split(maxsplit=5)
    start, end = (int(address, 16) for address in addresses.split("-"))
    return Vma(start, end, perms, int(offset, 16), device, int(inode), name[0] if name else "")


def maps(pid: int) -> list[Vma]:
    """The mappings, ascending."""
    return [_vma(line) for line in Path(f"/proc/{pid}/maps").read_text().splitlines()]


def smaps(pid: int) -> list[tuple[Vma, dict[str, str]]]:
    """The mappings with the fields that ``/proc/PID/smaps`` adds."""
    found: list[tuple[Vma, dict[str, str]]] = []
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        if re.match(r"[0-9a-f]+-", line):
            found.append((_vma(line), {}))
        else:
            key, _, value = line.partition(":")
            found[-1][1][key] = value.strip()
    return found


PRESENT, SWAPPED, FILE_OR_SHARED = np.uint64(1 << 63), np.uint64(1 << 62), np.uint64(1 << 61)
FRAME = np.uint64((1 << 55) - 1)


def pagemap(pid: int, start: int, end: int) -> U64:
    """The pagemap words of the pages in ``[start, end)``."""
    with open(f"/proc/{pid}/pagemap", "rb", buffering=0) as file:
        count = (end - start) // PAGE_SIZE
        words = os.pread(file.fileno(), 8 * count, start // PAGE_SIZE * 8)
    return np.frombuffer(words, dtype=np.uint64)


def _zero_page() -> np.uint64:
    """The page frame that a page reads from when it was never written."""
    with mmap.mmap(-1, PAGE_SIZE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as page:
        view = np.frombuffer(page, dtype=np.uint8)
        assert view[0] == 0  # touches the page
        addr = int(view.ctypes.data)
        del view  # the mapping cannot be closed under it
        frame = pagemap(os.getpid(), addr, addr + PAGE_SIZE)[0] & FRAME
    return np.uint64(frame)


def resident_private_pages(pid: int) -> U64:
    """Page numbers, ascending, of the private mappings' own pages: present or swapped out,
    neither the page cache's nor the zero page (only root sees that one; a huge zero page counts).
    """
    zero = _zero_page()
    found = [np.empty(0, dtype=np.uint64)]
    for vma, fields in smaps(pid):
        # Empty reserves can be terabytes.
        resident = any(int(fields[key].split()[0]) for key in ("Rss", "Swap", "Private_Hugetlb"))
        if not vma.private or not resident or vma.name == "[vsyscall]":
            continue
        words = pagemap(pid, vma.start, vma.end)
        own = (words & (PRESENT | SWAPPED) != 0) & (words & FILE_OR_SHARED == 0)
        if zero:
            own &= (words & SWAPPED != 0) | (words & FRAME != zero)
        found.append(np.flatnonzero(own).astype(np.uint64) + np.uint64(vma.start // PAGE_SIZE))
    return np.concatenate(found)


# --- what targets promise about their memory ---


def _mix(x: U64) -> U64:
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ x >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ x >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return x ^ x >> np.uint64(31)


def pattern_page(seed: int, page: int) -> bytes:
    """The 4096 bytes that a target stores for a seed in page number ``page`` of an area."""
    words = np.full(PAGE_SIZE // 8, seed, dtype=np.uint64)
    fourth = np.arange(0, len(words), 4, dtype=np.uint64)
    key = (seed << 40) & (2**64 - 1) ^ page << 16
    words[::4] = _mix(np.uint64(key) ^ fourth)
    return words.tobytes()


def expected_page(seed: int | None, page: int) -> bytes | None:
    """The page that a number of ``layout``'s "seeds" stands for; None: it cannot be read."""
    if seed is None:
        return None
    if seed >= 0:
        return pattern_page(seed, page) if seed else bytes(PAGE_SIZE)
    return pattern_page(-seed, page)[: PAGE_SIZE // 2] + bytes(PAGE_SIZE // 2)


def layout_mismatches(read: MemoryReader, target: Target) -> list[str]:
    """Pages of a ``layout`` target that ``read`` gives otherwise than they must be."""
    wrong = []
    for name, area in target.ask("areas").items():
        for page, seed in enumerate(target.ask(f"seeds {name}")):
            expected = expected_page(seed, page)
            if expected is None:
                continue
            if read(area["addr"] + page * PAGE_SIZE, PAGE_SIZE) != expected:
                wrong.append(f"{name} page {page}")
    return wrong


def shadow_mismatches(read: MemoryReader, info: Mapping[str, Any]) -> list[int]:
    """Addresses where data and shadow disagree in the areas of ``writer``, ``tiny`` and numpy.

    ``read`` must speak of one moment. The one word that each thread was just writing is left out.
    """
    in_flight = {int.from_bytes(read(at + 8, 8), "little") for at in info.get("control", [])}
    wrong: list[int] = []
    for area in info["areas"]:
        data, shadow = (
            np.frombuffer(read(area[side], area["bytes"]), dtype=np.uint64)
            for side in ("data", "shadow")
        )
        wrong += [area["data"] + 8 * int(i) for i in np.flatnonzero(data != shadow)]
    return [addr for addr in wrong if addr not in in_flight]


# --- pausing, and proof that nothing was disturbed ---


def _read(path: str) -> str:
    """A file of /proc; empty if this kernel has none, or the thread has gone."""
    try:
        return Path(path).read_text(errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return ""


def tasks(pid: int) -> list[int]:
    """The threads of a process, ascending."""
    return sorted(int(tid) for tid in os.listdir(f"/proc/{pid}/task"))


def status(pid: int, tid: int | None = None) -> dict[str, str]:
    """``/proc/PID/status``, of one thread if ``tid`` is given."""
    lines = _read(f"/proc/{pid}/task/{tid or pid}/status").splitlines()
    return {key: value.strip() for key, _, value in (line.partition(":") for line in lines)}


def blocked_in(pid: int, tid: int) -> str:
    """Number, arguments, stack and instruction pointer of the system call that a thread is
    blocked in, as ``/proc`` puts it; empty if it runs or is stopped outside of any.
    """
    line = _read(f"/proc/{pid}/task/{tid}/syscall").strip()
    return line if line[:1].isdigit() else ""


def _same_wait(before: str, after: str) -> bool:
    """Whether two answers of ``blocked_in`` are one wait; unknown counts as yes."""
    if not before or not after or before == after:
        return True
    (was, where), (became, still) = before.split(maxsplit=1), after.split(maxsplit=1)
    # How the kernel goes on waiting after any stop: the time that is left, same arguments.
    return where == still and RESTART_SYSCALL in (was, became)


@contextlib.contextmanager
def stopped(pid: int) -> Iterator[None]:
    """The process stands still by SIGSTOP: every thread stopped and off its CPU.

    SIGSTOP ends some waits with EINTR (see ``sleepers``), so it is no harmless pause.
    """

    def all_stopped() -> bool:
        return all(
            status(pid, tid).get("State", "X")[0] in "tTZX"
            and not _read(f"/proc/{pid}/task/{tid}/syscall").startswith("running")
            for tid in tasks(pid)
        )

    os.kill(pid, signal.SIGSTOP)
    try:
        wait_until(all_stopped, f"all threads of {pid} stopped")
        yield
    finally:
        os.kill(pid, signal.SIGCONT)
        wait_until(
            lambda: all(status(pid, tid).get("State", "X")[0] != "T" for tid in tasks(pid)),
            f"all threads of {pid} resumed",
        )


RESTART_SYSCALL = {"x86_64": "219", "aarch64": "128"}.get(os.uname().machine)
STATUS_FIELDS = (
    *("TracerPid", "PPid", "Uid", "Gid", "Groups", "Threads", "Umask", "NoNewPrivs"),
    *("SigIgn", "SigCgt", "ShdPnd", "CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"),
    *("Seccomp", "Seccomp_filters", "Cpus_allowed", "Mems_allowed", "THP_enabled"),
)
FILES = (
    *("timers", "limits", "personality", "coredump_filter", "oom_score_adj", "cgroup"),
    *("timerslack_ns", "autogroup", "uid_map", "loginuid", "comm"),
)
STATES = {"T": "stopped", "t": "traced", "Z": "zombie", "X": "dead"}


class Untouched:
    """What must not change in a target: a snapshot at construction, compared later.

    Fields: ``fds``, ``mappings``, ``vma_flags``, ``threads``, ``states``, ``masks``, ``tracers``,
    ``sandboxes``, ``children``, ``registers`` (of threads blocked in a system call in both
    snapshots), ``namespaces``, ``cwd``, ``root``, ``exe``, those of STATUS_FIELDS and FILES. Memory
    contents are for others to compare; timers of setitimer(2) only the target itself can see.
    """

    def __init__(self, pid: int, *, stack_may_grow: bool = True) -> None:
        self.pid, self._stack_may_grow = pid, stack_may_grow
        self.fields = self._take()

    def _fds(self) -> dict[str, str]:
        fds = {}
        for fd in os.listdir(f"/proc/{self.pid}/fd"):
            with contextlib.suppress(FileNotFoundError):
                flags = re.search(r"flags:\s*(\d+)", _read(f"/proc/{self.pid}/fdinfo/{fd}"))
                link = os.readlink(f"/proc/{self.pid}/fd/{fd}")
                fds[fd] = f"{link} flags {flags[1] if flags else ''}"
        return fds

    def _place(self, vma: Vma) -> str:
        if vma.name == "[stack]" and self._stack_may_grow:
            return f"[stack]-{vma.end:x} {vma.perms}"
        return str(vma)

    def _take(self) -> dict[str, dict[str, str]]:
        pid, tids = self.pid, tasks(self.pid)
        vmas = smaps(pid)
        by_tid = {str(tid): status(pid, tid) for tid in tids}
        own = by_tid[str(pid)]
        fields = {
            "fds": self._fds(),
            "mappings": {self._place(vma): "" for vma, _ in vmas},
            # "sd" is of the soft-dirty bits, which are anybody's to clear.
            "vma_flags": {
                self._place(vma): extra.get("VmFlags", "").replace(" sd", "") for vma, extra in vmas
            },
            "threads": {tid: it.get("Name", "") for tid, it in by_tid.items()},
            "states": {t: STATES.get(it.get("State", "X")[0], "live") for t, it in by_tid.items()},
            "masks": {t: f"{it.get('SigBlk')} {it.get('SigPnd')}" for t, it in by_tid.items()},
            "tracers": {tid: it.get("TracerPid", "") for tid, it in by_tid.items()},
            "sandboxes": {
                tid: f"{it.get('Seccomp')} {it.get('Seccomp_filters')} {it.get('NoNewPrivs')}"
                for tid, it in by_tid.items()
            },
            "namespaces": {
                name: os.readlink(f"/proc/{pid}/ns/{name}")
                for name in os.listdir(f"/proc/{pid}/ns")
            },
            "children": {str(t): _read(f"/proc/{pid}/task/{t}/children") for t in tids},
            "registers": {str(tid): blocked_in(pid, tid) for tid in tids},
        }
        for name in ("cwd", "root", "exe"):
            fields[name] = {"": os.readlink(f"/proc/{pid}/{name}")}
        fields |= {name: {"": own.get(name, "")} for name in STATUS_FIELDS}
        return fields | {name: {"": _read(f"/proc/{pid}/{name}")} for name in FILES}

    def differences(self, ignore: Iterable[str] = ()) -> list[str]:
        """What differs now, one line each: "field key: before -> after"."""
        now, ignored = self._take(), set(ignore)
        assert ignored <= now.keys(), f"no such fields: {ignored - now.keys()}"
        found = []
        for field in sorted(now.keys() - ignored):
            was, became = self.fields[field], now[field]
            for key in sorted(was.keys() | became.keys()):
                before, after = was.get(key), became.get(key)
                if field == "registers" and _same_wait(before or "", after or ""):
                    continue
                if before != after:
                    found.append(f"{field} {key}: {before!r} -> {after!r}")
        return found

    def assert_same(self, ignore: Iterable[str] = (), patience: float = 0.0) -> None:
        """Nothing differs but in the fields to ``ignore``.

        A target whose tracer was killed has to run before it can have put itself right: for
        ``patience`` seconds it is asked again.
        """
        deadline = time.monotonic() + patience
        while (found := self.differences(ignore)) and time.monotonic() < deadline:
            time.sleep(0.01)
        assert not found, "changed in the target:\n" + "\n".join(found)


# --- real programs ---


class Redis:
    """As much of a Redis client as the tests need: one connection, RESP by hand."""

    def __init__(self, process: subprocess.Popen[bytes], port: int) -> None:
        self.process, self.pid, self.port = process, process.pid, port
        self._socket = socket.create_connection(("127.0.0.1", port), timeout=30)
        self._stream = self._socket.makefile("rwb")

    @staticmethod
    def _encode(*words: str | bytes) -> bytes:
        encoded = [word if isinstance(word, bytes) else word.encode() for word in words]
        parts = [b"$%d\r\n%s\r\n" % (len(word), word) for word in encoded]
        return b"*%d\r\n%s" % (len(parts), b"".join(parts))

    def _answer(self) -> bytes | int | None:
        line = self._stream.readline().rstrip()
        kind, rest = line[:1], line[1:]
        if kind == b"+":
            return rest
        if kind == b":":
            return int(rest)
        assert kind == b"$", f"Redis answers {line!r}"
        return None if rest == b"-1" else self._stream.read(int(rest) + 2)[:-2]

    def call(self, *words: str | bytes) -> bytes | int | None:
        """Send one command and return its simple or bulk answer."""
        self._stream.write(self._encode(*words))
        self._stream.flush()
        return self._answer()

    def set_many(self, items: Mapping[str, bytes]) -> None:
        """Store every item, all in one pipeline."""
        for key, value in items.items():
            self._stream.write(self._encode("SET", key, value))
        self._stream.flush()
        for key in items:
            assert self._answer() == b"OK", f"SET {key}"

    def get(self, key: str) -> bytes | None:
        """The value of a key."""
        value = self.call("GET", key)
        assert not isinstance(value, int)
        return value

    def dbsize(self) -> int:
        """How many keys there are."""
        size = self.call("DBSIZE")
        assert isinstance(size, int)
        return size

    def close(self) -> None:
        """Close the connection."""
        self._stream.close()
        self._socket.close()


@contextlib.contextmanager
def redis_server(tmp_path: Path) -> Iterator[Redis]:
    """A redis-server without persistence on a free port of 127.0.0.1."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    options = ["--bind", "127.0.0.1", "--port", str(port), "--save", "", "--appendonly", "no"]
    log = tmp_path / "redis.log"
    with open(log, "wb") as out:
        process = subprocess.Popen(
            ["redis-server", *options, "--dir", str(tmp_path)],
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            env=os.environ | ENVIRONMENT,
            start_new_session=True,
        )

    def ready() -> bool:
        assert process.poll() is None, log.read_text()
        return "Ready to accept connections" in log.read_text()

    try:
        wait_until(ready, "redis-server is ready")
        with contextlib.closing(Redis(process, port)) as redis:
            yield redis
    finally:
        process.kill()
        process.wait()


def python_target(name: str) -> Target:
    """A target of ``tests/targets/NAME.py``, run by this interpreter."""
    return Target([sys.executable, SOURCES / f"{name}.py"])


def python_numpy_target() -> Target:
    """CPython with threads that update numpy arrays (``numpy_target.py``)."""
    return python_target("numpy_target")


def sqlite_target() -> Target:
    """CPython with a busy in-memory SQLite database (``sqlite_target.py``)."""
    return python_target("sqlite_target")
