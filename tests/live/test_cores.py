"""An exported epoch is what the kernel would have written, and debuggers make as much of it."""

from __future__ import annotations

import json
import os
import re
import resource
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from elftools.elf.elffile import ELFFile
from elftools.elf.segments import NoteSegment

from crtrace.linux.libc import syscall
from crtrace.units import PAGE_SIZE
from tests.live.cores import Core, export
from tests.live.harness import (
    Target,
    Vma,
    compile_target,
    maps,
    python_target,
    status,
    tasks,
    wait_until,
)
from tests.live.runner import run

Spawn = Callable[..., Target]
Note = tuple[str, str | int, bytes]
Extent = tuple[int, int, int]

SYS_TGKILL = 234
XSAVE_LAYOUT = 0x205  # Linux 6.12 and later; only the processor knows it, and no image has it
THREAD = ["NT_PRSTATUS", "NT_FPREGSET", 0x202]
PRSTATUS_SIZE, PID, END_OF_IDS, REGISTERS = 336, 32, 48, 112
PENDING = slice(16, 24)  # of a prstatus; times lie between the ids and the registers
STATE, FLAGS = slice(0, 3), slice(8, 16)  # of a prpsinfo

DRGN = """
import json, logging, sys, drgn
logging.getLogger("drgn").setLevel(logging.ERROR)  # it misses the distribution's own symbols
program = drgn.Program()
program.set_core_dump(sys.argv[1])
try:
    program.load_default_debug_info()
except drgn.MissingDebugInfoError:
    pass
marker = program["global_marker"]
raw = int.from_bytes(program.read(marker.address_, 8), "little")
traces = {t.tid: [f.name for f in t.stack_trace()] for t in program.threads()}
print(json.dumps({"main": program.main_thread().tid, "traces": traces,
                  "marker": int(marker), "at": marker.address_, "raw": raw}))
"""


@dataclass
class Elf:
    """A core as pyelftools reads it."""

    path: Path
    notes: list[Note]
    extents: list[Extent]
    """Address, length and offset of all bytes in the file, ascending."""

    def read(self, address: int, length: int) -> bytes:
        """Bytes of the memory, which must be in one segment of the file."""
        start, _, offset = next(e for e in self.extents if e[0] <= address < e[0] + e[1])
        with self.path.open("rb") as file:
            return os.pread(file.fileno(), length, offset + address - start)

    def has(self, address: int) -> bool:
        """Whether the file has bytes for an address."""
        return any(start <= address < start + length for start, length, _ in self.extents)

    def threads(self) -> dict[int, list[bytes]]:
        """The notes of each thread by its number."""
        found: dict[int, list[bytes]] = {}
        held: list[bytes] = []
        for _, kind, data in self.notes:
            if kind == "NT_PRSTATUS":
                held = found[int.from_bytes(data[PID : PID + 4], "little")] = []
            if kind in THREAD:
                held.append(data)
        return found

    def only(self, kind: str) -> bytes:
        """The one note of a type."""
        (data,) = [data for _, each, data in self.notes if each == kind]
        return data


def read_elf(path: Path) -> Elf:
    """A core, parsed by pyelftools."""
    with path.open("rb") as file:
        segments = list(ELFFile(file).iter_segments())
        notes: list[Note] = [
            (note["n_name"], note["n_type"], note["n_descdata"])
            for segment in segments
            if isinstance(segment, NoteSegment)
            for note in segment.iter_notes()
        ]
        extents = [
            (each["p_vaddr"], each["p_filesz"], each["p_offset"])
            for each in segments
            if each["p_type"] == "PT_LOAD" and each["p_filesz"]
        ]
    assert extents == sorted(extents)
    return Elf(path, notes, extents)


def tool(*command: object) -> str:
    """What a tool prints; it must not complain."""
    done = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert not done.stderr, done.stderr
    return done.stdout


# --- beside the kernel's own core of the same process, a moment later ---


@dataclass
class Pair:
    """Our core of a process that stood still, and the kernel's."""

    ours: Elf
    kernels: Elf
    maps: list[Vma]


def abort(target: Target, folder: Path) -> Path:
    """Make the kernel write a core of a stopped target that was started in an empty folder."""
    resource.prlimit(target.pid, resource.RLIMIT_CORE, (resource.RLIM_INFINITY,) * 2)
    # One for each thread, so that none runs another instruction before it is ended by one of them.
    for tid in tasks(target.pid):
        syscall(SYS_TGKILL, target.pid, tid, signal.SIGABRT)
    os.kill(target.pid, signal.SIGCONT)  # which it does not live to see
    assert target.process.wait(60) == -signal.SIGABRT
    found = list(folder.iterdir())
    if not found:
        pattern = Path("/proc/sys/kernel/core_pattern").read_text().strip()
        pytest.skip(f"cannot run here: the kernel takes its cores elsewhere, to {pattern}")
    return found[0]


@pytest.fixture(params=["crowd", "layout"])
def pair(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Pair]:
    """Of a process that runs no instruction between the two."""
    folder = tmp_path / "cwd"
    folder.mkdir()
    with Target(["env", "-C", folder, compile_target(request.param)]) as target:
        os.kill(target.pid, signal.SIGSTOP)
        wait_until(lambda: stopped(target.pid), "all threads are stopped")
        run("dump", target.pid, "-o", tmp_path / "chain").expect(0)
        ours = export(tmp_path / "chain", tmp_path / "core")
        mapped = maps(target.pid)
        yield Pair(read_elf(ours), read_elf(abort(target, folder)), mapped)


def stopped(pid: int) -> bool:
    """Whether all threads are, by a signal."""
    return {status(pid, tid)["State"][0] for tid in tasks(pid)} == {"T"}


def test_a_core_is_the_one_that_the_kernel_writes(pair: Pair) -> None:
    compare_notes(pair.ours, pair.kernels)
    compare_threads(pair.ours.threads(), pair.kernels.threads())
    compare_memory(pair)


def compare_notes(ours: Elf, kernels: Elf) -> None:
    """The same notes in the same order, and those of the process alike."""
    shapes = [
        [(name, kind, len(data)) for name, kind, data in elf.notes] for elf in (ours, kernels)
    ]
    assert shapes[0] == [shape for shape in shapes[1] if shape[1] != XSAVE_LAYOUT]
    for kind in ("NT_AUXV", "NT_FILE"):
        assert ours.only(kind) == kernels.only(kind)
    info = [bytearray(elf.only("NT_PRPSINFO")) for elf in (ours, kernels)]
    for each in info:
        each[STATE] = bytes(3)  # one of them ran again, to die
        each[FLAGS] = bytes(8)  # the kernel's own, of no use to anybody
    assert info[0] == info[1]
    assert not any(ours.only("NT_SIGINFO")), "nobody died"


def compare_threads(ours: dict[int, list[bytes]], kernels: dict[int, list[bytes]]) -> None:
    """The same threads, with the same in all registers; the kernel begins with who died."""
    assert set(ours) == set(kernels)
    for tid, notes in kernels.items():
        for mine, theirs in zip(ours[tid], notes, strict=True):
            assert comparable(mine) == comparable(theirs), f"thread {tid}"


def comparable(note: bytes) -> bytes:
    """A note of a thread without what a fatal signal and the time change."""
    if len(note) != PRSTATUS_SIZE:
        return note
    pending = int.from_bytes(note[PENDING], "little")
    for fatal in (signal.SIGABRT, signal.SIGKILL):
        pending &= ~(1 << fatal - 1)
    return pending.to_bytes(8, "little") + note[PENDING.stop : END_OF_IDS] + note[REGISTERS:]


def compare_memory(pair: Pair) -> None:
    """No page that both have differs, and of what only the kernel has, none is the process's own:
    it writes clean pages of files, too, and pages of its own.
    """
    compared = 0
    for start, length, _ in pair.kernels.extents:
        for page in range(start, start + length, PAGE_SIZE):
            theirs = pair.kernels.read(page, PAGE_SIZE)
            mine = pair.ours.read(page, PAGE_SIZE) if pair.ours.has(page) else None
            vma = next((vma for vma in pair.maps if vma.start <= page < vma.end), None)
            if mine is None and vma and vma.inode:
                mine = of_file(vma, page)
            if mine is None and vma and vma.name.startswith(("[vvar", "[vsyscall")):
                continue
            assert mine == theirs, f"{page:#x} {vma}"
            compared += 1
    assert compared > 200


def of_file(vma: Vma, page: int) -> bytes:
    """What a page of a mapped file has, read from the file."""
    with open(vma.name, "rb") as file:
        data = os.pread(file.fileno(), PAGE_SIZE, vma.offset + page - vma.start)
    return data.ljust(PAGE_SIZE, b"\0")


# --- C++ with threads and exceptions ---


@pytest.fixture(scope="module")
def crowd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Core]:
    """The core of a process that lives on; nobody who reads it can ask the process."""
    folder = tmp_path_factory.mktemp("crowd")
    with Target("crowd") as target:
        run("dump", target.pid, "-o", folder / "chain").expect(0)
        out = export(folder / "chain", folder / "core")
        yield Core(out, compile_target("crowd"), target.pid, target.info)
        target.terminate_and_check()


def below(function: str) -> list[str]:
    """Functions that must be found in a thread's backtrace, from the innermost out."""
    between = {
        "in_templates": [f"descend<{depth}>" for depth in range(6)],
        "in_lambda": ["std::function"],
        "in_handler": [],
        "in_unwinding": ["~Guard"],
    }
    return ["await_item", *between[function], function, "main", "_M_run"]


def assert_in_order(text: str, wanted: list[str]) -> None:
    """All are there, each after the one before."""
    at = 0
    for name in wanted:
        at = text.find(name, at)
        assert at >= 0, f"no {name} where it should be in {text}"
        at += len(name)


def by_thread(text: str, start: str) -> dict[int, str]:
    """A tool's output, cut at the lines that begin a thread."""
    _, *parts = re.split(start, text, flags=re.M)
    return dict(zip(map(int, parts[::2]), parts[1::2], strict=True))


def test_gdb_walks_through_templates_lambdas_and_exceptions(crowd: Core) -> None:
    said = crowd.gdb("thread apply all backtrace -frame-arguments none")
    traces = by_thread(said, r"^Thread \d+ \(.*LWP (\d+)\)\):$")
    assert set(traces) == {crowd.pid, *(thread["tid"] for thread in crowd.info["threads"])}
    for thread in crowd.info["threads"]:
        assert_in_order(traces[thread["tid"]], ["await_item", thread["function"], "clone"])


def test_gdb_reads_thread_locals_and_containers(crowd: Core) -> None:
    said = crowd.gdb("thread apply all print own_marker", "set language c++", "print global_table")
    markers = by_thread(said, r"^Thread \d+ \(.*LWP (\d+)\)\):$")
    expected = {thread["tid"]: thread["tid"] for thread in crowd.info["threads"]}
    found = {tid: int(re.findall(r"= (\d+)$", text, re.M)[0]) for tid, text in markers.items()}
    assert found == {crowd.pid: 1000, **expected}
    assert re.search(r'\["odd"\] = .*\{1, 3, 5\}', said)


def test_eu_stack_needs_nothing_but_the_core(crowd: Core) -> None:
    traces = by_thread(tool("eu-stack", f"--core={crowd.path}"), r"^TID (\d+):$")
    assert set(traces) == {crowd.pid, *(thread["tid"] for thread in crowd.info["threads"])}
    for thread in crowd.info["threads"]:
        assert_in_order(traces[thread["tid"]], below(thread["function"]))


def test_elfutils_find_what_is_mapped_and_have_no_complaint(crowd: Core) -> None:
    modules = tool("eu-unstrip", "-n", f"--core={crowd.path}")
    for name in (str(crowd.program), "libstdc++.so", "libc.so", "ld-linux", "vdso"):
        assert re.search(rf"^0x\S+ [0-9a-f]{{40}}@0x.*{re.escape(name)}", modules, re.M), modules
    notes = tool("eu-readelf", "-n", "-l", crowd.path)
    assert notes.count(" PRSTATUS") == len(crowd.info["threads"]) + 1
    assert f"psargs: {crowd.program}" in notes


def test_drgn_needs_nothing_but_the_core(crowd: Core) -> None:
    pytest.importorskip("drgn", reason="cannot run here: no drgn for this Python")
    found = json.loads(tool(sys.executable, "-c", DRGN, crowd.path))
    assert found["main"] == crowd.pid
    assert found["at"] == crowd.info["global_marker"]
    assert found["raw"] == found["marker"] == 0x5EED
    for thread in crowd.info["threads"]:
        names = [name or "" for name in found["traces"][str(thread["tid"])]]
        assert_in_order(" ".join(names), ["await_item", thread["function"], "_M_run"])


# --- CPython ---


@pytest.fixture(scope="module")
def snake(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Core]:
    """The core of an interpreter."""
    folder = tmp_path_factory.mktemp("snake")
    with python_target("stack_target") as target:
        run("dump", target.pid, "-o", folder / "chain").expect(0)
        out = export(folder / "chain", folder / "core")
        yield Core(out, Path(sys.executable).resolve(), target.pid, target.info)
        target.terminate_and_check()


def test_pystack_finds_the_python_stacks(snake: Core) -> None:
    pytest.importorskip("pystack", reason="cannot run here: no pystack for this Python")
    said = tool(sys.executable, "-m", "pystack", "core", snake.path, "--locals")
    traces = by_thread(said, r"^Traceback for thread (\d+) .*$")
    assert set(traces) == {snake.pid, *snake.info["tids"].values()}
    for secret, tid in snake.info["tids"].items():
        wanted = [f'secret: "{secret}"', *3 * ["in descend", f'secret: "{secret}"']]
        assert_in_order(traces[tid], ["in run", "in work", *wanted])
    assert_in_order(traces[snake.pid], ["in main", "in serve", "in _commands"])


def test_gdb_finds_the_python_stacks(snake: Core) -> None:
    said = snake.gdb("thread apply all py-bt", "thread apply all py-locals")
    if "Undefined command" in said:
        pytest.skip("cannot run here: gdb has no helper for this Python")
    assert len(re.findall(r"in descend$", said, re.M)) == 4 * len(snake.info["tids"])
    for secret in snake.info["tids"]:
        assert len(re.findall(rf"^secret = '{secret}'$", said, re.M)) == 5
    assert_in_order(said, ["in _commands", "in serve", "in main"])


# --- a PID namespace ---


def test_threads_have_the_numbers_that_they_know_themselves(spawn: Spawn, tmp_path: Path) -> None:
    """A debugger finds these in libc's memory, too, and must not take them for others."""
    target = spawn(["unshare", "--pid", "--fork", "--kill-child", compile_target("crowd")])
    (pid,) = Path(f"/proc/{target.pid}/task/{target.pid}/children").read_text().split()
    run("dump", pid, "-o", tmp_path / "chain").expect(0)
    core = Core(
        export(tmp_path / "chain", tmp_path / "core"), compile_target("crowd"), 1, target.info
    )
    assert core.info["pid"] == 1
    said = core.gdb("thread apply all print own_marker")
    markers = by_thread(said, r"^Thread \d+ \(.*LWP (\d+)\)\):$")
    found = {tid: int(re.findall(r"= (\d+)$", text, re.M)[0]) for tid, text in markers.items()}
    assert found == {1: 1000, **{thread["tid"]: thread["tid"] for thread in core.info["threads"]}}


# --- very many mappings ---

MANY = 70_000


@pytest.fixture
def room_for_mappings() -> Iterator[None]:
    """A process may have more mappings than 16 bits count."""
    setting = Path("/proc/sys/vm/max_map_count")
    before = setting.read_text()
    try:
        setting.write_text(str(max(int(before), 2 * MANY)))
    except OSError:
        pytest.skip("cannot run here: the limit of mappings cannot be raised")
    try:
        yield
    finally:
        setting.write_text(before)


def test_more_mappings_than_16_bits_count(
    room_for_mappings: None, spawn: Spawn, tmp_path: Path
) -> None:
    target = spawn("mappings", "--count", MANY)
    run("dump", target.pid, "-o", tmp_path / "chain").expect(0)
    out = tmp_path / "core"
    export(tmp_path / "chain", out)
    core = Core(out, compile_target("mappings"), target.pid, target.info)

    said, complaint = core.readelf("-h", "-l", "-n")
    assert not complaint
    assert "Warning" not in said
    count = len(re.findall("^  (?:LOAD|NOTE)", said, re.M))
    assert count > MANY
    assert f"65535 ({count})" in said

    area, each = core.info["area"], core.info["each"]
    last = (MANY - 1) // each * each
    assert core.value(f"*(long *)(area + {last} * 4096)") == str(last)
    elf = read_elf(out)
    for page in range(0, MANY, 100 * each):
        assert elf.read(area + page * PAGE_SIZE, 8) == page.to_bytes(8, "little")
    assert not elf.has(area + PAGE_SIZE)
    assert out.stat().st_blocks * 512 < 80 << 20, "sparse"
    target.terminate_and_check()
