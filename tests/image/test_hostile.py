"""Images made to harm their reader: refused in bounded time and memory, with nothing written."""

from __future__ import annotations

import json
import os
import shutil
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lz4.block
import pytest
from xxhash import xxh3_64_intdigest, xxh3_128_digest

from crtrace.analyze.summary import show
from crtrace.analyze.verify import verify
from crtrace.errors import CrtraceError, ImageDamaged
from crtrace.export import core as core_module
from crtrace.export import notes as notes_module
from crtrace.export.core import export_core
from crtrace.export.raw import export_raw
from crtrace.image import heap, tables
from crtrace.image.chainindex import ENTRY, SUM
from crtrace.image.header import Stats
from crtrace.image.losses import UNREADABLE_ROW, Unreadable
from crtrace.image.reader import Chain
from crtrace.image.store import ChainWriter
from crtrace.image.tables import FileInfo, Files, Vma, VmaFlag, VmaKind, Vmas
from crtrace.units import PAGE_SIZE
from scripts import fuzz
from tests.image.support import RW, SPACE, add_task, anon, numbers, page, small_chain, write
from tests.image.tamper import Image, Record, enter, put_together, rewrite, take_apart

TREE = Path(__file__).resolve().parents[2]
FIRST = "00000000.img"
IMAGE, TASK, MM, VMAS, FILES, THREAD, CPU, CHUNK, INDEX = 1, 3, 4, 5, 6, 7, 8, 9, 10
UNREADABLE, STATS = 11, 12
SPACE_LIMIT = 640 << 20
"""Bytes of address space that a command may have; half of it are Python and its libraries."""
PATIENCE = 30

Change = Callable[[Image], object]


@dataclass
class Said:
    """What a command said, and its exit code."""

    code: int
    out: str
    err: str


def crtrace(*arguments: object, **environment: str) -> Said:
    """Run the program itself, in little memory."""
    command = [sys.executable, "-m", "crtrace", *map(str, arguments)]
    done = subprocess.run(
        ["sh", "-c", 'ulimit -v "$0" && exec "$@"', str(SPACE_LIMIT >> 10), *command],
        env={**os.environ, "OPENBLAS_NUM_THREADS": "1", "PYTHONPATH": str(TREE), **environment},
        capture_output=True, timeout=PATIENCE, check=False,
    )  # fmt: skip
    return Said(done.returncode, done.stdout.decode(), done.stderr.decode())


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_chain(tmp_path_factory.mktemp("template") / "chain")


@pytest.fixture
def path(tmp_path: Path, template: Path) -> Path:
    return shutil.copytree(template, tmp_path / "chain")


# --- lies in records, under right checksums ---------------------------------------------------


def put(kind: int, at: int, layout: str, *values: object) -> Change:
    """Overwrite fields in the first record of a type."""

    def change(image: Image) -> None:
        struct.pack_into("<" + layout, image.records(kind)[0].payload, at, *values)

    return change


def become(kind: int, payload: bytes) -> Change:
    """Another payload for the first record of a type."""
    return lambda image: image.records(kind)[0].payload.__setitem__(slice(None), payload)


def mappings(*rows: tuple[int, ...], text: bytes = b"") -> Change:
    """A VMAS with rows of start, end and whatever follows."""
    packed = b"".join(tables.VMA_ROW.pack(*row, *[0] * (9 - len(row))) for row in rows)
    return become(VMAS, heap.TABLE.pack(len(rows), tables.VMA_ROW.size, len(text)) + packed + text)


def named(count: int, length: int, step: int) -> Change:
    """Mappings with long names, each ``step`` bytes further in the heap than the one before."""
    rows = [(at << 12, at + 1 << 12, 0, 0, 0, 0, 0, at * step, length) for at in range(count)]
    return mappings(*rows, text=b"x" * (length + count * step))


def belongs(kind: int, parent: int) -> Change:
    def change(image: Image) -> None:
        image.records(kind)[0].parent = parent

    return change


def twice(kind: int) -> Change:
    def change(image: Image) -> None:
        first = image.records(kind)[0]
        image.insert(Record(kind, first.flags, first.parent, bytearray(first.payload)))

    return change


def circle(image: Image) -> None:
    """Two tasks, each the parent of the other."""
    task = image.records(TASK)[0]
    image.insert(Record(TASK, 0, image.all.index(task) + 1, bytearray(task.payload)))
    task.parent = len(image.all)


def statistics(text: str) -> Change:
    return become(STATS, text.encode())


def unreadable(*rows: tuple[int, int, int]) -> Change:
    """An UNREADABLE with rows of space, first page, count."""
    packed = [UNREADABLE_ROW.pack(space, 14, first, count, 0, 0) for space, first, count in rows]
    payload = struct.pack("<II", len(rows), UNREADABLE_ROW.size) + b"".join(packed)
    return lambda image: image.add(UNREADABLE, payload)


HIGH = 1 << 56
REFUSED: dict[str, Change] = {
    "vmas: count times row size wraps": put(VMAS, 0, "II", 2**32 - 1, 2**32 - 8),
    "vmas: a heap of exabytes": put(VMAS, 8, "Q", 2**63),
    "vmas: a name beyond all bytes": mappings((0, 4096, 0, 0, 0, 0, 0, 2**32 - 1, 2**32 - 1)),
    "vmas: names that overlap": named(4000, 1 << 20, 1),
    "vmas: one name a thousand times": named(1000, 1 << 20, 0),
    "vmas: a zero byte in a name": mappings((0, 4096, 0, 0, 0, 0, 0, 0, 3), text=b"a\0b"),
    "vmas: overlapping": mappings((0, 8192), (4096, 12288)),
    "vmas: unaligned": mappings((0, 4097)),
    "vmas: above all of user space": mappings((HIGH, HIGH + 4096)),
    "vmas: to the end of all addresses": mappings((4096, 2**64 - 4096)),
    "vmas: a vsyscall of many pages": mappings((tables.VSYSCALL, 2**64 - 4096)),
    "vmas: beyond the object": mappings((4096, 8192, 2**64 - 4096, 3, 7, 0, SPACE)),
    "files: a name outside of the heap": lambda image: image.add(
        FILES, heap.TABLE.pack(1, 64, 0) + tables.FILE_ROW.pack(1, *[0] * 6, 5, 5, 0, 0, 0)
    ),
    "task: in a circle": circle,
    "task: its own parent": belongs(TASK, 2),
    "task: belongs to what is no task": belongs(TASK, 1),
    "mm: of nobody": belongs(MM, 0),
    "mm: two of one task": twice(MM),
    "vmas: of a task": belongs(VMAS, 2),
    "vmas: two of one mm": twice(VMAS),
    "thread: of nobody": belongs(THREAD, 0),
    "cpu: points nowhere": belongs(CPU, 2**32 - 1),
    "cpu: two of one thread": twice(CPU),
    "task: a pid that is none": put(TASK, 0, "I", 2**31),
    "thread: a tid that is none": put(THREAD, 0, "I", 2**32 - 1),
    "task: a state that is a control character": put(TASK, 20, "I", 0x1B),
    "task: too many pids": put(TASK, 72, "I", 2**30),
    "task: a command line of gigabytes": put(TASK, 92, "I", 2**32 - 1),
    "cpu: too many sets": put(CPU, 0, "I", 2**32 - 1),
    "cpu: a set of gigabytes": put(CPU, 12, "I", 2**32 - 1),
    "cpu: empty sets in millions": become(CPU, struct.pack("<II", 10**5, 0) + bytes(8 * 10**5)),
    "image: zero byte in the reason": put(IMAGE, 152, "I4s", 4, b"a\0b\0"),
    "stats: brackets without end": statistics('{"a":' + "[" * (5 << 20)),
    "stats: many small values": statistics('{"a":[' + "[]," * (2 << 20) + "[]]}"),
    "stats: too deep to print": statistics('{"a":' + "[" * 500 + "]" * 500 + "}"),
    "stats: not a number": statistics('{"frozen_time": NaN}'),
    "stats: infinite": statistics('{"a": [-1e999]}'),
    "stats: a number of 4000 digits": statistics('{"a": ' + "9" * 4000 + "}"),
    "stats: a number of 40000 digits": statistics('{"a": ' + "9" * 40000 + "}"),
    "stats: a time that is a text": statistics('{"frozen_time": "soon"}'),
    "stats: limits that are none": statistics('{"limits": 7}'),
    "stats: what was paid is a list": statistics('{"paid": [1]}'),
    "stats: in another encoding": become(STATS, '{"a": 1}'.encode("utf-16")),
    "unreadable: backwards": unreadable((SPACE, 9, 1), (SPACE, 8, 1)),
    "unreadable: overlapping": unreadable((SPACE, 8, 2), (SPACE, 9, 2)),
    "unreadable: beyond all pages": unreadable((SPACE, 2**52 - 1, 2)),
    "unreadable: more than there are numbers": unreadable((SPACE, 1, 2**64 - 1)),
    "unreadable: none": unreadable((SPACE, 8, 0)),
}


def damaged(path: Path) -> bool:
    """Whether ``verify`` finds the first image damaged."""
    with Chain.open(path) as chain:
        return FIRST in [damage.file for damage in verify(chain).damage]


@pytest.mark.parametrize("case", REFUSED)
def test_lies_are_refused(path: Path, case: str) -> None:
    rewrite(path, 0, REFUSED[case])
    assert damaged(path)
    with Chain.open(path) as chain, pytest.raises(ImageDamaged):
        view = chain.epoch(0)
        show(view)
        list(view.image.records(Unreadable))  # which is read where a page was unreadable


@pytest.mark.parametrize(
    "case",
    ["vmas: names that overlap", "vmas: one name a thousand times", "stats: many small values",
     "stats: too deep to print", "task: in a circle", "cpu: empty sets in millions"],
)  # fmt: skip
def test_the_program_says_so_in_little_memory(path: Path, case: str) -> None:
    rewrite(path, 0, REFUSED[case])
    for command in (("show", path, "--epoch", 0), ("verify", path, "--json")):
        said = crtrace(*command)
        assert said.code == 20, said.err
        assert "Traceback" not in said.err


def index_row(chunk: int, slot: int = 0, kind: int = 0) -> Change:
    """Where the first page of the page index is said to be."""

    def change(image: Image) -> None:
        payload = image.records(INDEX)[0].payload
        rows = int.from_bytes(payload[8:16], "little")
        struct.pack_into("<IHH", payload, 16 + 8 * rows, chunk, slot, kind)

    return change


def block(count: int, pages: int) -> Change:
    """A chunk that says it has ``count`` pages, with a block that becomes ``pages`` pages."""
    packed = lz4.block.compress(bytes(pages * PAGE_SIZE), store_size=False)
    numbers = struct.pack(f"<{count}Q", *range(16, 16 + count))
    return become(CHUNK, struct.pack("<IIII", SPACE, count, 1, 0) + numbers + packed)


POINTERS: dict[str, Change] = {
    "to nothing": index_row(0),
    "beyond the last record": index_row(2**32 - 1),
    "to a record that is no chunk": index_row(1),
    "to a slot that is not there": index_row(9, 65535),
    "a kind that does not exist": index_row(9, 0, 65535),
    "inherited in a full image": index_row(SPACE, 0, 4),
    "inherited from a space that is not there": index_row(2**32 - 1, 0, 4),
    "a bomb: 2 MiB in a chunk of one page": block(1, 512),
    "a bomb: 64 MiB in a chunk of 512 pages": block(512, 1 << 14),
    "512 pages in a few bytes": block(512, 1),
}


@pytest.mark.parametrize("case", POINTERS)
def test_pages_that_are_nowhere_are_refused(path: Path, case: str) -> None:
    rewrite(path, 0, POINTERS[case])
    assert damaged(path)
    out = path.parent / "out"
    with Chain.open(path) as chain, pytest.raises(ImageDamaged):
        export_raw(chain.epoch(0), out)
    assert not out.exists()


def lengths_of_exabytes(rows: bytearray) -> None:
    """Four records whose lengths add up to 2^64, so that the sums seem to fit."""
    for at in range(1, 5):
        rows[40 * at + 24 : 40 * at + 32] = struct.pack("<Q", 2**62)


def test_lengths_of_exabytes_are_refused(path: Path) -> None:
    image = take_apart((path / FIRST).read_bytes())
    enter(path, 0, put_together(image, lengths_of_exabytes))
    said = crtrace("show", path, "--epoch", 0)
    assert said.code == 20
    assert "DIRECTORY" in said.err


@pytest.mark.parametrize("command", ["verify", "show", "merge", "prune"])
def test_a_record_that_should_belong_to_no_other_is_refused(path: Path, command: str) -> None:
    """A copy is made record by record, each after the one it belongs to."""
    rewrite(path, 2, lambda image: image.add(FILES, heap.TABLE.pack(0, 64, 0)))
    rewrite(path, 2, belongs(FILES, 1))
    more = {"merge": ("--into", path.parent / "out"), "prune": ("--keep", 1)}
    before = sorted(os.listdir(path))
    said = crtrace(command, path, *more.get(command, ()))
    assert said.code == 20, said.err
    assert "belongs to record 1, expected the image" in said.out + said.err
    assert sorted(os.listdir(path)) == before


def sparse_record(path: Path, kind: int, flags: int, length: int) -> None:
    """One more record in the first image, of zeros that take no room on the disk."""
    image = take_apart((path / FIRST).read_bytes())
    image.add(kind, b"", flags)
    whole = put_together(image)
    (at, size) = struct.unpack_from("<QQ", whole, len(whole) - 40)
    rows = bytearray(whole[at + 32 : at + 32 + size])
    head = struct.pack("<IIQIIQ", kind, flags, length, len(image.all), 0, 0)
    rows[-16:] = struct.pack("<QQ", length, 0)
    end = at + length
    tail = b"\x89crtend\n" + struct.pack("<QQQ", end, size, end + 32 + size + 80)
    tail += xxh3_128_digest(bytes(rows))
    parts = ((13, len(image.all) + 1, bytes(rows)), (14, len(image.all) + 2, tail))
    with (path / FIRST).open("wb") as file:
        file.write(whole[: at - 32] + head)
        file.seek(end)
        for number, id, payload in parts:
            start = struct.pack("<IIQII", number, 0, len(payload), id, 0)
            file.write(start + struct.pack("<Q", xxh3_64_intdigest(start + payload)) + payload)
        total = file.tell()
    with_entry(path, 0, length=total, image_hash=tail[-16:])


@pytest.mark.parametrize(
    ("kind", "flags", "limit"),
    [(999, 1, 256 << 20), (TASK, 0, 16 << 20), (CPU, 1, 1 << 20), (0x80000000, 1, 256 << 20)],
)
def test_a_payload_that_is_too_long_is_refused_before_it_is_read(
    path: Path, kind: int, flags: int, limit: int
) -> None:
    sparse_record(path, kind, flags, 16 << 30)
    began = time.monotonic()
    said = crtrace("verify", path)
    assert said.code == 20, said.err
    assert f"a payload of {16 << 30} bytes, expected at most {limit}" in said.out
    assert "DIRECTORY at offset" in said.out
    assert time.monotonic() - began < PATIENCE / 5


def test_a_long_record_that_may_be_passed_over_is(path: Path) -> None:
    rewrite(path, 2, lambda image: image.add(999, bytes(17 << 20), 1))
    with Chain.open(path) as chain:
        assert verify(chain).ok


# --- maps that are possible, and absurd -------------------------------------------------------


def chain_of(path: Path, vmas: Iterable[Vma], files: Files | None = None) -> Path:
    """One epoch with mappings, and pages in space 1 and 2."""
    with ChainWriter.open(path, create=True) as writer, writer.begin(reason="dump") as image:
        add_task(image, vmas, files=files)
        write(image, {16: page(1), 1 << 39: page(2)})
        write(image, {at: page(at) for at in range(0, 64, 2)}, space=2)
        image.commit({})
    return path


def test_a_mapping_of_petabytes_costs_nothing(tmp_path: Path) -> None:
    path = chain_of(tmp_path / "chain", [anon(1, 1 << 40)])
    rewrite(path, 0, unreadable((SPACE, 0, 2**51)))
    shown = crtrace("show", path, "--json")
    assert shown.code == 0, shown.err
    (vma,) = json.loads(shown.out)["tasks"][0]["vmas"]
    assert vma["bytes"]["stored"] == 2 * PAGE_SIZE
    assert vma["bytes"]["zero"] == ((1 << 40) - 2) * PAGE_SIZE
    out = tmp_path / "out"
    assert crtrace("export", path, "-o", out).code == 0
    assert out.stat().st_size < 1 << 20
    out.unlink()
    said = crtrace("export", path, "-o", out, "--format", "raw")
    assert said.code == 1
    assert "most of it empty; 128.0 TiB is the limit" in said.err
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["chain"]


def test_zeros_that_add_up_to_petabytes_are_not_written(tmp_path: Path) -> None:
    many = [anon(at << 24, 1 << 24) for at in range(1, 2100)]
    path = chain_of(tmp_path / "chain", many)
    with Chain.open(path) as chain, pytest.raises(CrtraceError, match="most of it empty"):
        export_core(chain.epoch(), tmp_path / "out")
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["chain"]


def test_the_page_of_vsyscall_is_read_though_it_is_high(tmp_path: Path) -> None:
    start = tables.VSYSCALL
    vmas = [anon(16, 1), Vma(start=start, end=start + PAGE_SIZE, kind=VmaKind.VSYSCALL)]
    path = chain_of(tmp_path / "chain", vmas)
    assert crtrace("show", path).code == 0


def test_segments_do_not_multiply_without_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Many mappings of one object, of which every other page is kept."""
    flags = RW | VmaFlag.SHARED | VmaFlag.FILE_BEHIND
    vmas = [
        Vma(start=at << 18, end=(at << 18) + 64 * PAGE_SIZE, flags=flags, kind=VmaKind.FILE,
            file=1, object_space=2)
        for at in range(1, 9)
    ]  # fmt: skip
    files = Files((FileInfo(id=1, path="/" + "x" * 99, object_space=2),))
    path = chain_of(tmp_path / "chain", vmas, files)
    out = tmp_path / "out"
    with Chain.open(path) as chain:
        assert export_core(chain.epoch(), out) == 8 * 64
        monkeypatch.setattr(core_module, "MAX_SEGMENTS", 8 * 64)
        assert export_core(chain.epoch(), out) == 8 * 64
        monkeypatch.setattr(core_module, "MAX_SEGMENTS", 8 * 64 - 1)
        with pytest.raises(CrtraceError, match="more than 511 segments"):
            export_core(chain.epoch(), out)
        monkeypatch.undo()
        monkeypatch.setattr(notes_module, "MAX_NAMES", 8 * 101 - 1)
        with pytest.raises(CrtraceError, match="paths of mapped files"):
            export_core(chain.epoch(), out)


def test_a_file_that_is_not_in_the_table_is_no_file(tmp_path: Path) -> None:
    path = chain_of(tmp_path / "chain", [anon(16, 4, file=77)])
    shown = crtrace("show", path, "--json")
    assert json.loads(shown.out)["files"] == []
    assert crtrace("export", path, "-o", tmp_path / "out").code == 0


# --- names ------------------------------------------------------------------------------------

EVIL = "\x1b[2J\x1b]0;owned\x07\n../../etc/passwd\u202e\udcff\u0416\r\x9b"


def evil_chain(path: Path) -> Path:
    """Hostile names wherever there are names."""
    vma = Vma(
        start=64 << 12, end=65 << 12, flags=RW, kind=VmaKind.FILE, file=1, name=EVIL
    )  # fmt: skip
    stats = {EVIL: EVIL, "limits": [EVIL], "paid": {EVIL: [EVIL]}, "frozen_time": None}
    text = dict.fromkeys(("reason", "kernel", "hostname", "tool_version", "armer"), EVIL)
    with (
        ChainWriter.open(path, create=True) as writer,
        writer.begin(**text) as image,  # type: ignore[arg-type]
    ):
        add_task(image, [anon(16, 4), vma], files=Files((FileInfo(id=1, path=EVIL),)))
        write(image, {16: page(1)})
        image.commit(dict(stats))
    raw = EVIL.encode("utf-8", "surrogateescape")

    def rename(image: Image) -> None:
        for kind in (TASK, THREAD):
            for record in image.records(kind):
                at = 76 if kind == TASK else 40
                old = int.from_bytes(record.payload[at : at + 4], "little")
                text = struct.pack("<I", len(raw)) + raw + bytes(-len(raw) % 4)
                record.payload[at : at + 4 + old + -old % 4] = text

    rewrite(path, 0, rename)
    return path


def test_names_do_nothing_to_a_terminal(tmp_path: Path) -> None:
    path = evil_chain(tmp_path / "chain")
    (path / "9\x1b[2J.img").touch()
    out = tmp_path / "out"
    for command in (
        ("list", path), ("show", path), ("verify", path), ("export", path, "-o", out),
        ("list", path, "--json"), ("show", path, "--json"), ("verify", path, "--json"),
        ("export", path, "-o", out, "--format", "raw", "--json"),
    ):  # fmt: skip
        said = crtrace(*command)
        assert said.code == 0, said.err
        fuzz.check_text(said.out + said.err)
        if "--json" in command:
            fuzz.check_json(said.out)
    shown = json.loads(crtrace("show", path, "--json").out)
    assert shown["reason"] == shown["tasks"][0]["comm"] == shown["files"][0]["path"] == EVIL
    assert shown["tasks"][0]["threads"][0]["comm"] == shown["tasks"][0]["vmas"][1]["name"] == EVIL
    assert "\\x1b[2J" in crtrace("show", path, PYTHONIOENCODING="ascii").out
    (listed,) = [json.loads(line) for line in (tmp_path / "out.map").read_text().splitlines()]
    assert listed["name"] == ""
    made = sorted(entry.name for entry in tmp_path.iterdir())
    assert made == ["chain", "out", "out.map"]


# --- the index, and what lies in the directory ------------------------------------------------


def with_entry(path: Path, number: int, **fields: Any) -> None:
    """Change fields of an index entry and seal it again."""
    names = ["epoch", "image_id", "parent_id", "parent_epoch", "flags", "zero", "length",
             "image_hash"]  # fmt: skip
    data = bytearray((path / "chain.idx").read_bytes())
    at = 128 * (number + 1)
    values = list(ENTRY.unpack(data[at : at + ENTRY.size]))
    for name, value in fields.items():
        values[names.index(name)] = value
    packed = ENTRY.pack(*values)
    checksum = SUM.pack(xxh3_64_intdigest(bytes(data[16:32]) + packed))
    data[at : at + 128] = packed + checksum
    (path / "chain.idx").write_bytes(data)


@pytest.mark.parametrize(
    ("fields", "codes"),
    [
        ({"epoch": 2**63}, {2}),
        ({"epoch": 2**64 - 1}, {2}),
        ({"epoch": 1}, {2}),  # twice the same: the second never existed
        ({"parent_epoch": 2}, {2}),
        ({"parent_epoch": 2**63}, {2}),
        ({"parent_epoch": 0}, {20}),
        ({"parent_id": bytes(16)}, {20}),
        ({"length": 2**64 - 1}, {20}),
        ({"length": 0}, {20}),
        ({"flags": 2**32 - 1}, {2}),
    ],
)
def test_entries_that_point_anywhere(path: Path, fields: dict[str, Any], codes: set[int]) -> None:
    with_entry(path, 2, **fields)
    with Chain.open(path) as chain:
        report = verify(chain)
        assert report.damage
        with pytest.raises(CrtraceError) as caught:
            chain.epoch(fields.get("epoch", 2) if fields.get("epoch", 2) > 2 else 2)
    assert caught.value.exit_code in codes


def fifo(file: Path) -> None:
    os.mkfifo(file)


def listening(file: Path) -> None:
    with socket.socket(socket.AF_UNIX) as end:
        before = os.getcwd()
        os.chdir(file.parent)  # its address is limited to 108 bytes
        try:
            end.bind(file.name)
        finally:
            os.chdir(before)


def sparse(file: Path) -> None:
    with file.open("wb") as image:
        image.truncate(8 << 40)


def elsewhere(file: Path) -> None:
    file.symlink_to("/etc/passwd")


def another(file: Path) -> None:
    file.symlink_to("00000001.img")


@pytest.mark.parametrize("make", [fifo, listening, Path.mkdir, elsewhere, another])
@pytest.mark.parametrize("name", [FIRST, "chain.idx"])
def test_what_is_no_image_is_not_read(path: Path, make: Callable[[Path], None], name: str) -> None:
    (path / name).unlink()
    make(path / name)
    said = crtrace("show", path, "--epoch", 0)
    assert said.code == 20, said.err


def test_a_sparse_image_is_not_read(path: Path) -> None:
    """Of a length that is not the index entry's, and of one that is."""
    (path / FIRST).unlink()
    sparse(path / FIRST)
    assert crtrace("show", path, "--epoch", 0).code == 20
    with_entry(path, 0, length=8 << 40)
    said = crtrace("verify", path)
    assert said.code == 20
    assert "does not begin with an IMAGE record" in said.out


def test_an_index_of_many_epochs_is_read_in_bounded_memory(path: Path) -> None:
    data = (path / "chain.idx").read_bytes()
    values = list(ENTRY.unpack(data[128 : 128 + ENTRY.size]))
    out = [data[:128]]
    for number in range(50_000):
        packed = ENTRY.pack(number, *values[1:])
        out.append(packed + SUM.pack(xxh3_64_intdigest(data[16:32] + packed)))
    (path / "chain.idx").write_bytes(b"".join(out))
    assert crtrace("show", path).code == 21
    assert crtrace("show", path, "--epoch", 0).code == 0


# --- what is not written ----------------------------------------------------------------------


def test_a_record_that_no_reader_would_take_is_not_written(path: Path) -> None:
    with ChainWriter.open(path) as writer:
        before = (path / "chain.idx").read_bytes()
        with pytest.raises(CrtraceError, match="than may be read"), writer.begin() as image:
            image.add(Stats({"limits": ["x" * (5 << 20)]}))
        assert (path / "chain.idx").read_bytes() == before
    assert sorted(entry.name for entry in path.iterdir() if entry.suffix == ".part") == []


@pytest.mark.parametrize("output", ["/", ".", ".."])
def test_a_directory_is_not_replaced_by_an_export(path: Path, output: str) -> None:
    said = crtrace("export", path, "-o", output)
    assert said.code in (1, 2)
    assert "Traceback" not in said.err


# --- random images ----------------------------------------------------------------------------


@pytest.mark.parametrize(("what", "executions"), [("records", 4000), ("chains", 60)])
def test_a_short_round_of_the_fuzzer(tmp_path: Path, what: str, executions: int) -> None:
    keep = tmp_path / "findings"
    done = subprocess.run(
        [sys.executable, TREE / "scripts/fuzz.py", what, "--executions", str(executions),
         "--keep", keep],
        env={**os.environ, "PYTHONPATH": str(TREE)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{what}: {executions} executions" in done.stdout
    assert not keep.exists()


def test_the_fuzzer_finds_what_there_is_to_find(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A reader that fails or hangs is noticed, and only the changes that matter are kept."""
    seeds = fuzz.make_seeds(tmp_path)
    records = fuzz.Records(seeds, tmp_path)

    def careless(data: bytes) -> None:
        if len(data) > 4 and data[0] == 255:
            raise IndexError("too far")

    records.targets = {"TASK": careless}
    found: dict[str, Path] = {}
    fuzz.fuzz("records", records, 1, lambda done, _: bool(found) or done > 5000, found, tmp_path)
    ((place, kept),) = found.items()
    assert place.startswith("IndexError")
    assert kept.with_suffix(".TASK").read_bytes()[0] == 255
    monkeypatch.setattr(fuzz, "PATIENCE", 0.05)
    records.targets = {"TASK": lambda data: all(True for _ in iter(int, 1))}
    assert fuzz.failure(records, ("TASK", b"")) == "Hang"


def test_the_fuzzer_notices_what_is_written_elsewhere(tmp_path: Path) -> None:
    guard = fuzz.Guard()
    (tmp_path / "in").mkdir()
    guard.inside = str(tmp_path / "in")
    try:
        (tmp_path / "in" / "file").write_text("")
        with pytest.raises(fuzz.Wrong, match="was opened for writing"):
            (tmp_path / "elsewhere").write_text("")
    finally:
        guard.inside = None
    assert not (tmp_path / "elsewhere").exists()


@pytest.mark.parametrize("text", ["\x1b[2J", "a\rb", "\u202e", "\udcff", "\x9b"])
def test_the_fuzzer_notices_what_a_terminal_might_obey(text: str) -> None:
    with pytest.raises(fuzz.Wrong):
        fuzz.check_text(f"a line\n{text}\n")
    fuzz.check_text("a line\nmore: é ж █\n")


@pytest.mark.parametrize("text", ['{"a": NaN}', "[1]", '{"a": -Infinity}'])
def test_the_fuzzer_notices_what_is_no_json(text: str) -> None:
    with pytest.raises(fuzz.Wrong):
        fuzz.check_json('{"a": 1}\n' + text)


def test_the_losses_of_a_whole_image_are_those_of_its_index(tmp_path: Path) -> None:
    """The table may say more than the index does: the index decides."""
    path = tmp_path / "chain"
    with ChainWriter.open(path, create=True) as writer, writer.begin() as image:
        add_task(image, [anon(16, 64)])
        write(image, {16: page(1)})
        image.mark_unreadable(SPACE, numbers([20, 21, 40]), 14)
        image.commit({})

    def widen(image: Image) -> None:
        payload = image.records(UNREADABLE)[0].payload
        table = Unreadable.unpack(bytes(payload), "here")
        assert [(row.first, row.count) for row in table.rows] == [(20, 2), (40, 1)]
        payload[:] = struct.pack("<II", 1, 32) + UNREADABLE_ROW.pack(SPACE, 14, 0, 2**52, 4, 0)

    rewrite(path, 0, widen)
    with Chain.open(path) as chain:
        found = chain.epoch().losses()
    assert [(row.first, row.count) for row in found] == [(20, 2), (40, 1)]
    assert Vmas(()).pack()
