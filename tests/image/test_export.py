"""Cores and raw files, judged by readelf, gdb and plain reading."""

from __future__ import annotations

import json
import os
import re
import shutil
import stat
import struct
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from crtrace.errors import CrtraceError, UsageError
from crtrace.export import core as core_module
from crtrace.export.core import export_core
from crtrace.export.raw import export_raw
from crtrace.image.reader import Chain
from crtrace.image.records import Arch, Cpu, Mm, Task, Thread
from crtrace.image.store import ChainWriter
from crtrace.image.tables import FileInfo, Files, Vma, VmaFlag, VmaKind, Vmas
from crtrace.units import PAGE_SIZE
from tests.image.support import RW, SPACE, ZERO, noise, numbers, page, write

RIP, RSP = 0x401234, 0x7FFF0000F000
AUXV = struct.pack("<QQQQ", 6, PAGE_SIZE, 0, 0)
XSAVE = bytes(464) + (7).to_bytes(8, "little") + bytes(832 - 472)
RBX_AT, RIP_AT, RSP_AT = 5, 16, 19


def registers(rbx: int) -> bytes:
    """A ``user_regs_struct``."""
    values = [0] * 27
    values[RBX_AT], values[RIP_AT], values[RSP_AT] = rbx, RIP, RSP
    return struct.pack("<27Q", *values)


def mapping(first: int, count: int, flags: int = RW, **fields: object) -> Vma:
    start, end = first * PAGE_SIZE, (first + count) * PAGE_SIZE
    return Vma(start=start, end=end, flags=flags, **fields)  # type: ignore[arg-type]


TEXT = mapping(0x401, 8, VmaFlag.READ | VmaFlag.EXEC, kind=VmaKind.FILE, file=1, pgoff=PAGE_SIZE)
HEAP = mapping(0x500, 600, kind=VmaKind.HEAP, name="[heap]")
RESERVED = mapping(0x100000, 1 << 20, 0)
SHARED = mapping(0x300000, 4, RW | VmaFlag.SHARED, kind=VmaKind.FILE, file=2, object_space=2)
STACK = mapping(0x7FFF00000, 16, kind=VmaKind.STACK, name="[stack]")
VMAS = (TEXT, HEAP, RESERVED, SHARED, STACK)
PROGRAM = FileInfo(id=1, path="/usr/bin/tgt")
FILES = (PROGRAM, FileInfo(id=2, path="/memfd:m", object_space=2))
PAGES = {
    0x403: page(3), 0x500: page(0x1122334455667788), 0x502: noise(7), 0x503: ZERO,
    0x7FFF0000F: noise(8),
}  # fmt: skip


def write_epoch(
    path: Path,
    vmas: tuple[Vma, ...] = VMAS,
    *,
    machine: str = "x86_64",
    files: tuple[FileInfo, ...] = FILES,
) -> None:
    with ChainWriter.open(path, create=True) as writer, writer.begin() as image:
        image.add(Arch(machine=machine))
        task = Task(
            pid=4242, ppid=1, pgid=4242, sid=4242, comm="tgt", state="S", uid=(7, 7, 7, 7),
            cmdline=b"/usr/bin/tgt\0--serve\0",
        )  # fmt: skip
        task_id = image.add(task)
        mm = image.add(Mm(space=SPACE, auxv=AUXV), parent=task_id)
        image.add(Vmas(vmas), parent=mm)
        image.add(Files(files))
        for tid in (4243, 4242, 4244):
            thread = image.add(Thread(tid=tid, sigmask=1 << 9), parent=task_id)
            sets = ((1, registers(tid)), (2, bytes(512)), (0x202, XSAVE))
            image.add(Cpu(sets), parent=thread)
        image.add(Task(pid=4300, state="Z"), parent=task_id)
        write(image, PAGES)
        write(image, {1: noise(9)}, space=2)
        image.mark_unreadable(SPACE, numbers([0x510]), 14)
        image.commit({})


@pytest.fixture
def path(tmp_path: Path) -> Path:
    write_epoch(tmp_path / "chain")
    return tmp_path / "chain"


def export(path: Path, out: Path, *, pid: int | None = None) -> int:
    with Chain.open(path) as chain:
        return export_core(chain.epoch(), out, pid=pid)


@pytest.fixture
def core(path: Path, tmp_path: Path) -> Path:
    export(path, tmp_path / "core")
    return tmp_path / "core"


def segments(core: Path) -> list[tuple[int, int, int, int]]:
    """Address, size, size in the file and offset of every PT_LOAD, read by hand."""
    data = core.read_bytes()[: 64 + 56 * 200]
    count = struct.unpack_from("<H", data, 56)[0]
    heads = [struct.unpack_from("<IIQQQQQQ", data, 64 + 56 * at) for at in range(count)]
    return [(h[3], h[6], h[5], h[2]) for h in heads if h[0] == 1]


def run(*command: object) -> str:
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


readelf = pytest.mark.skipif(not shutil.which("readelf"), reason="readelf is not installed")
gdb = pytest.mark.skipif(not shutil.which("gdb"), reason="gdb is not installed")


def test_the_file_is_private_sparse_and_alone(core: Path) -> None:
    found = core.stat()
    assert stat.S_IMODE(found.st_mode) == 0o600
    assert found.st_size > 600 * PAGE_SIZE
    assert found.st_blocks * 512 < 40 * PAGE_SIZE
    assert sorted(os.listdir(core.parent)) == ["chain", "core"]


def test_every_page_is_where_the_headers_say(core: Path) -> None:
    found = segments(core)
    data = core.read_bytes()
    for number, expected in PAGES.items():
        addr = number * PAGE_SIZE
        (hit,) = [s for s in found if s[0] <= addr < s[0] + s[2]]
        at = hit[3] + addr - hit[0]
        assert data[at : at + PAGE_SIZE] == expected
        assert hit[3] % PAGE_SIZE == 0


def test_segments_cover_the_mappings_and_split_where_bytes_end(core: Path) -> None:
    found = [(start // PAGE_SIZE, size // PAGE_SIZE, held // PAGE_SIZE) for start, size, held, _ in
             segments(core)]  # fmt: skip
    assert found == [
        (0x401, 2, 0), (0x403, 1, 1), (0x404, 5, 0),  # only the page that was written
        (0x500, 16, 16), (0x511, 583, 583),  # all but what could not be read
        (0x100000, 1 << 20, 0),  # a reservation has no bytes
        (0x300000, 4, 4),
        (0x7FFF00000, 16, 16),
    ]  # fmt: skip


@readelf
def test_readelf_sees_the_notes_in_the_kernels_order(core: Path) -> None:
    text = run("readelf", "-nlh", "--wide", core)
    assert "Warning" not in text
    assert "Error" not in text
    assert "CORE (Core file)" in text
    notes = re.findall(r"^\s+(?:CORE|LINUX)\s+0x[0-9a-f]+\s+(NT_\w+)", text, re.M)
    thread = ["NT_FPREGSET", "NT_X86_XSTATE"]
    main = ["NT_PRSTATUS", "NT_PRPSINFO", "NT_SIGINFO", "NT_AUXV", "NT_FILE", *thread]
    assert notes == main + 2 * ["NT_PRSTATUS", *thread]


def ask_gdb(core: Path, *commands: str) -> list[str]:
    """What gdb says to each command; errors are answers too."""
    script = core.with_suffix(".gdb")
    ask = 'echo <<<\\n\npython\ntry: gdb.execute("{}")\nexcept gdb.error as e: print(e)\nend\n'
    script.write_text("".join(map(ask.format, commands)))
    options = ("-nx", "-batch", "-iex", "set debuginfod enabled off")
    text = run("gdb", *options, "-c", core, "-x", script)
    assert "Unexpected size" not in text
    return text.split("<<<")


@gdb
def test_gdb_opens_it(core: Path) -> None:
    head, regs, threads, other, auxv, mappings = ask_gdb(
        core, "info registers rip rsp rbx", "info threads", "thread apply 2 info registers rbx",
        "info auxv", "info proc mappings",
    )  # fmt: skip
    assert "`/usr/bin/tgt --serve'" in head
    assert re.search(rf"rip\s+{RIP:#x}", regs)
    assert re.search(rf"rsp\s+{RSP:#x}", regs)
    assert re.search(rf"rbx\s+{4242:#x}", regs)
    assert re.findall(r"LWP (\d+)", threads) == ["4242", "4243", "4244"]
    assert re.search(rf"rbx\s+{4243:#x}", other)
    assert re.search(r"AT_PAGESZ.*4096", auxv)
    assert re.search(r"0x401000\s+0x409000\s+0x8000\s+0x1000\s+/usr/bin/tgt", mappings)


@gdb
def test_gdb_reads_memory_and_does_not_make_any_up(core: Path) -> None:
    _, own, zero, code, shared, stack, lost = ask_gdb(
        core, "x/2gx 0x500000", "x/gx 0x503000", "x/gx 0x403000", "x/gx 0x300001000",
        f"x/gx {0x7FFF0000F * PAGE_SIZE}", "x/gx 0x510000",
    )  # fmt: skip
    assert re.search(r"0x500000:\s+0x1122334455667788\s+0x1122334455667788", own)
    assert re.search(r"0x503000:\s+0x0{16}", zero)
    assert re.search(r"0x403000:\s+0x0{15}3", code)
    for text, data in ((shared, noise(9)), (stack, noise(8))):
        assert f"0x{int.from_bytes(data[:8], 'little'):016x}" in text
    assert "Cannot access memory at address 0x510000" in lost


@gdb
def test_gdb_takes_pages_that_are_not_kept_from_the_file(tmp_path: Path) -> None:
    library = tmp_path / "lib"
    library.write_bytes(b"".join(page(100 + at) for at in range(9)))
    files = (FileInfo(id=1, path=str(library)), FILES[1])
    write_epoch(tmp_path / "chain", files=files)
    export(tmp_path / "chain", tmp_path / "core")
    _, first, changed, after = ask_gdb(
        tmp_path / "core", "x/gx 0x401000", "x/gx 0x403000", "x/gx 0x404000"
    )
    assert re.search(r"0x401000:\s+0x0{14}65", first)
    assert re.search(r"0x403000:\s+0x0{15}3", changed)
    assert re.search(r"0x404000:\s+0x0{14}68", after)


@pytest.mark.parametrize("kept", [True, False])
def test_the_first_page_of_an_unchanged_elf_file_is_there(tmp_path: Path, kept: bool) -> None:
    library, head = tmp_path / "lib", b"\x7fELF".ljust(PAGE_SIZE, b"h")
    library.write_bytes(head + bytes(PAGE_SIZE))
    about = library.stat()
    if not kept:
        os.utime(library, ns=(0, about.st_mtime_ns + 1))
    vma = replace(TEXT, pgoff=0)
    info = FileInfo(id=1, path=str(library), size=about.st_size, mtime_ns=about.st_mtime_ns)
    write_epoch(tmp_path / "chain", (vma,), files=(info,))
    export(tmp_path / "chain", tmp_path / "core")
    found = [(start // PAGE_SIZE, held // PAGE_SIZE) for start, _, held, _ in
             segments(tmp_path / "core")]  # fmt: skip
    if kept:
        assert found == [(0x401, 1), (0x402, 0), (0x403, 1), (0x404, 0)]
        offset = segments(tmp_path / "core")[0][3]
        assert (tmp_path / "core").read_bytes()[offset : offset + PAGE_SIZE] == head
    else:
        assert found == [(0x401, 0), (0x403, 1), (0x404, 0)]


@readelf
def test_more_segments_than_16_bits_count(tmp_path: Path) -> None:
    count = 0xFFFE  # and the notes make it 65,535, the first that needs the long way
    vmas = tuple(mapping(0x1000 + 2 * at, 1, VmaFlag.READ) for at in range(count))
    write_epoch(tmp_path / "chain", vmas)
    assert export(tmp_path / "chain", tmp_path / "core") == count
    text = run("readelf", "-h", "--wide", tmp_path / "core")
    assert "65535 (65535)" in text
    assert "Number of section headers:         1" in text
    data = (tmp_path / "core").read_bytes()[: 64 + 56 * 3]
    assert struct.unpack_from("<IIQQQQQQ", data, 64 + 56)[3] == 0x1000 * PAGE_SIZE


def test_zeros_without_end_get_no_bytes(
    path: Path, core: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They read as zeros all the same."""
    before = core.stat().st_size
    monkeypatch.setattr(core_module, "MAX_ZEROS", 100 * PAGE_SIZE)
    export(path, core)
    found = {start // PAGE_SIZE: held // PAGE_SIZE for start, _, held, _ in segments(core)}
    assert found[0x500] == 16
    assert found[0x511] == 0
    assert core.stat().st_size == before - 583 * PAGE_SIZE


def test_which_task(path: Path, tmp_path: Path) -> None:
    out = tmp_path / "core"
    assert export(path, out, pid=4242) > 0
    with pytest.raises(UsageError, match="it has: 4242, 4300"):
        export(path, out, pid=1)
    with pytest.raises(CrtraceError, match="process 4300 had ended"):
        export(path, out, pid=4300)


def test_what_cannot_be_a_core_leaves_no_file(tmp_path: Path) -> None:
    write_epoch(tmp_path / "chain", machine="aarch64")
    with pytest.raises(CrtraceError, match="aarch64"):
        export(tmp_path / "chain", tmp_path / "core")
    assert os.listdir(tmp_path) == ["chain"]


def test_damage_found_on_the_way_leaves_no_file(path: Path, tmp_path: Path) -> None:
    image = path / "00000000.img"
    data = bytearray(image.read_bytes())
    data[data.index(noise(7)[:32])] ^= 1
    image.write_bytes(data)
    with pytest.raises(CrtraceError, match="checksum"):
        export(path, tmp_path / "core")
    assert os.listdir(tmp_path) == ["chain"]


def test_an_output_in_no_directory_is_an_error_that_names_it(path: Path, tmp_path: Path) -> None:
    with pytest.raises(CrtraceError, match=r"while writing .*nowhere/core"):
        export(path, tmp_path / "nowhere" / "core")


def test_a_link_at_the_output_is_replaced_and_not_followed(path: Path, tmp_path: Path) -> None:
    (tmp_path / "victim").write_bytes(b"precious")
    (tmp_path / "core").symlink_to(tmp_path / "victim")
    export(path, tmp_path / "core")
    assert (tmp_path / "victim").read_bytes() == b"precious"
    assert not (tmp_path / "core").is_symlink()


def test_raw_memory_and_its_map(path: Path, tmp_path: Path) -> None:
    out = tmp_path / "memory.raw"
    with Chain.open(path) as chain:
        assert export_raw(chain.epoch(), out) == 4
    rows = [json.loads(line) for line in (tmp_path / "memory.raw.map").read_text().splitlines()]
    assert [row["start"] for row in rows] == [TEXT.start, HEAP.start, SHARED.start, STACK.start]
    assert [row["name"] for row in rows] == ["", "[heap]", "", "[stack]"]
    assert rows[0]["perms"] == "r-xp"
    data = out.read_bytes()
    assert len(data) == sum(row["end"] - row["start"] for row in rows)
    memory = {number * PAGE_SIZE: held for number, held in PAGES.items()}
    memory[SHARED.start + PAGE_SIZE] = noise(9)
    for row in rows:
        for addr in range(row["start"], row["end"], PAGE_SIZE):
            at = row["offset"] + addr - row["start"]
            assert data[at : at + PAGE_SIZE] == memory.get(addr, ZERO)
    for name in (out, tmp_path / "memory.raw.map"):
        assert stat.S_IMODE(name.stat().st_mode) == 0o600
    assert out.stat().st_blocks * 512 < 20 * PAGE_SIZE
