"""FORMAT.md is enough: a reader made from it alone reads what crtrace reads, and refuses alike."""

from __future__ import annotations

import os
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from xxhash import xxh3_128_digest

from crtrace.analyze.verify import verify
from crtrace.errors import ChainIncomplete, FormatTooNew, ImageDamaged
from crtrace.image.reader import Chain
from crtrace.image.records import Arch, Task
from crtrace.image.store import ChainWriter, ImageWriter
from crtrace.image.tables import FileFlag, FileInfo, Files, Vma, VmaFlag, VmaKind
from crtrace.units import PAGE_SIZE
from tests.image import independent_reader as second
from tests.image import test_hostile, test_verify
from tests.image.independent_reader import Damaged, Incomplete, Refused, TooNew
from tests.image.second_opinion import assert_same
from tests.image.support import (
    RW,
    SPACE,
    ZERO,
    add_task,
    anon,
    noise,
    numbers,
    page,
    read_all,
    small_chain,
    write,
)
from tests.image.tamper import Image, Record, put_together, rewrite, take_apart

pytestmark = pytest.mark.usefixtures("unsynced")

CHILD, OBJECT, KEPT = 2, 3, 4
LIBRARY = FileInfo(id=1, path="/lib/x\udcff", size=1 << 20, build_id=b"\xff\x01", mtime_ns=-1)
MEMFD = FileInfo(id=2, path="/memfd:x", flags=FileFlag.DELETED, object_space=OBJECT)
ON_DISK = FileInfo(id=3, path="/tmp/x", object_space=KEPT)


def mapping(first: int, count: int, **fields: int) -> Vma:
    """A mapping of ``count`` pages from page ``first``."""
    start, end = first * PAGE_SIZE, (first + count) * PAGE_SIZE
    return Vma(**({"flags": RW, "kind": VmaKind.FILE} | fields), start=start, end=end)  # type: ignore[arg-type]


VMAS = [
    anon(10, 20),
    mapping(30, 8, file=1, pgoff=0x3000),
    mapping(40, 8, file=2, pgoff=2 * PAGE_SIZE, object_space=OBJECT),
    mapping(50, 8, file=3, object_space=KEPT, flags=RW | VmaFlag.FILE_BEHIND),
    mapping(60, 1, kind=VmaKind.VVAR),
    mapping(61, 2, kind=VmaKind.VDSO),
    mapping(63, 2, kind=VmaKind.DEVICE),
    mapping(2**30, 2**28, kind=VmaKind.ANON),
]
PAGES = [*range(9, 32), 41, 52, 61, 64, 2**30 + 2**20]


# --- chains that both read alike ---


@dataclass
class Step:
    """One epoch: what is written in which round, what is gone, and whether the child is there."""

    rounds: list[list[tuple[int, int, int]]]
    holes: list[tuple[int, int]] = field(default_factory=list)
    unread: list[tuple[int, int]] = field(default_factory=list)
    child: bool = False
    full: bool = False


SPACES = st.sampled_from([SPACE, CHILD, OBJECT, KEPT])
AT = st.tuples(SPACES, st.sampled_from(PAGES) | st.integers(0, 8))
WRITE = st.tuples(SPACES, st.sampled_from(PAGES) | st.integers(0, 8), st.integers(0, 5))
STEPS = st.lists(
    st.builds(
        Step, rounds=st.lists(st.lists(WRITE, max_size=12), min_size=1, max_size=3),
        holes=st.lists(AT, max_size=6), unread=st.lists(AT, max_size=3), child=st.booleans(),
        full=st.sampled_from([False] * 9 + [True]),
    ),
    min_size=1, max_size=12,
)  # fmt: skip


def bytes_of(value: int) -> bytes:
    """Few contents, so that equal ones are many: zeros, text, noise."""
    return noise(value) if value > 3 else page(value)


def commit(writer: ChainWriter, path: Path, step: Step, had_child: bool) -> None:
    """Write the epoch. A child that is new has all that its parent process had."""
    with writer.begin(full=step.full, reason="dump", kernel="6.18") as image:
        if not writer.entries:
            image.add(Arch(machine="x86_64", xstate_size=2432, xfeatures=7, clock_ticks=100))
        add_task(image, VMAS, files=Files((LIBRARY, MEMFD, ON_DISK)), threads=2)
        if step.child:
            add_task(image, VMAS[:1], pid=200, space=CHILD)
            if not had_child:
                inherit(image, path)
        image.add(Task(pid=300, comm="zombie\udcfe", exit_status=9, state="Z"))
        change(image, step)
        image.commit({"frozen_time": 5})


def inherit(image: ImageWriter, path: Path) -> None:
    """The child has just been forked: its pages are its parent's."""
    image.inherit(CHILD, SPACE)
    with Chain.open(path) as chain:
        if chain.entries:
            view = chain.epoch()
            pages = view.index(SPACE).pages
            image.write_pages(CHILD, pages, view.read_pages(SPACE, pages))


def change(image: ImageWriter, step: Step) -> None:
    """What the epoch has that the one before has not."""
    spaces = {SPACE, OBJECT, KEPT} | ({CHILD} if step.child else set())
    for at, writes in enumerate(step.rounds):
        for space in spaces:
            pages = {page: bytes_of(value) for where, page, value in writes if where == space}
            write(image, pages, space=space, round=at + 1)
    for space in spaces:
        holes = {page for where, page in step.holes if where == space}
        unread = {page for where, page in step.unread if where == space} - holes
        image.mark_holes(space, numbers(sorted(holes)))
        image.mark_unreadable(space, numbers(sorted(unread)), 14, reason=4)


def play(path: Path, steps: list[Step]) -> None:
    """A chain of these epochs."""
    with ChainWriter.open(path, create=True) as writer:
        child = False
        for step in steps:
            commit(writer, path, step, child)
            child = step.child


@settings(max_examples=60, deadline=None)
@given(steps=STEPS)
def test_any_chain_reads_alike(steps: list[Step]) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "chain"
        play(path, steps)
        assert len(assert_same(path)) == len(steps)


def rich(epochs: int) -> list[Step]:
    """Epochs with everything: rounds, zeros, holes, unreadable pages, a child that comes and goes,
    pages stored once."""
    steps = []
    for n in range(epochs):
        first = [(space, page, (n + page) % 6) for space in (1, 3, 4) for page in PAGES[n % 5 :: 5]]
        again = [(SPACE, PAGES[n % 7], 0), (CHILD, 12, 5), (CHILD, 13, n % 6), (OBJECT, 3, 5)]
        holes, unread = [(SPACE, PAGES[n % 11]), (KEPT, n % 9)], [(SPACE, 20 + n % 9), (OBJECT, 7)]
        steps.append(Step([first, again], holes, unread, child=n % 6 > 1, full=n == 75))
    return steps


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory, unsynced: None) -> Path:
    """A chain of 78 epochs with everything, summaries of 8 and of 64 images among them."""
    path = tmp_path_factory.mktemp("rich") / "chain"
    play(path, rich(78))
    return path


def test_a_chain_with_everything_reads_alike(chain: Path) -> None:
    found = assert_same(chain)
    kinds: set[int] = set()
    with closing(second.Chain(chain, summaries=True)) as reader:
        for number in reader.entries:
            image = reader.image(number)
            kinds |= {row.kind for index in image.spaces.values() for row in index.values()}
            assert bool(image.summaries) == (number in {*range(8, 75, 8)})
        used = {(n, s) for n in found for s in reader.image(n).spaces if reader.usable(n, s)}
        assert {number for number, _ in used} == {*range(8, 75, 8)}
        stored = [row for row in reader.image(0).spaces[SPACE].values() if row.kind == 0]
        assert len({(row.chunk, row.slot) for row in stored}) < len(stored)
    assert kinds == {0, 1, 2, 3, 4}


def test_the_example_chains_read_alike(tmp_path: Path) -> None:
    found = assert_same(small_chain(tmp_path, epochs=70))
    assert [spaces[SPACE] for spaces in found.values()] == read_all(tmp_path)
    assert found[2][SPACE] == {16: page(1), 17: page(2), 18: noise(1), 31: page(9), 32: page(9)}


def test_a_chain_without_epochs_has_none(tmp_path: Path) -> None:
    ChainWriter.open(tmp_path, create=True).close()
    assert assert_same(tmp_path) == {}


def test_the_reader_is_a_program(tmp_path: Path) -> None:
    path = small_chain(tmp_path / "chain")
    (path / "00000002.img").unlink()
    command = [sys.executable, second.__file__, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    lines = done.stdout.splitlines()
    assert (done.returncode, done.stderr, len(lines)) == (1, "", 3)
    with closing(second.Chain(path)) as reader:
        assert lines[1] == f"1: 4 pages, {second.digest(reader.epoch(1))}"
    assert lines[2] == "2: Incomplete: 00000002.img is missing"


# --- damage ---


def assert_refused_or_right(path: Path, right: dict[int, dict[int, second.Pages]]) -> set[int]:
    """What the second reader does not refuse is as it was; which epochs it has."""
    found = set()
    for summaries in (False, True):
        try:
            reader = second.Chain(path, summaries=summaries)
        except Refused:
            return set()
        with closing(reader):
            for number in reader.entries:
                try:
                    assert reader.epoch(number) == right[number]
                    found.add(number)
                except Refused:
                    pass
    return found


def test_no_byte_of_an_image_can_change(tmp_path: Path) -> None:
    path = small_chain(tmp_path)
    with closing(second.Chain(path)) as reader:
        entry = reader.entries[1]
        data = reader.directory.read("00000001.img")
        assert second.Image(data, entry).epoch == 1
    for at in range(len(data)):
        changed = bytearray(data)
        changed[at] ^= 1 << at % 8
        with pytest.raises(Refused):
            second.Image(bytes(changed), entry)


def test_a_byte_of_the_index_costs_its_epoch_and_those_that_build_on_it(tmp_path: Path) -> None:
    path = small_chain(tmp_path)
    right = assert_same(path)
    index = (path / "chain.idx").read_bytes()
    for at in range(0, len(index), 5):
        changed = bytearray(index)
        changed[at] ^= 1 << at % 8
        (path / "chain.idx").write_bytes(changed)
        entry = at // 128 - 1
        assert assert_refused_or_right(path, right) == {*range(max(entry, 0))}
        if entry >= 0:
            with Chain.open(path) as chain, closing(second.Chain(path)) as reader:
                assert [each.epoch for each in chain.entries] == [*reader.entries]
                assert reader.lost == (entry < 2)


@pytest.fixture(scope="module")
def whole(
    tmp_path_factory: pytest.TempPathFactory, unsynced: None
) -> tuple[Path, dict[str, bytes], dict[int, dict[int, second.Pages]]]:
    """A chain of ten epochs, its files, and what it holds."""
    path = tmp_path_factory.mktemp("whole") / "chain"
    play(path, rich(10))
    files = {name.name: name.read_bytes() for name in path.iterdir() if name.name != "lock"}
    return path, files, assert_same(path)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_what_is_not_refused_of_a_damaged_chain_is_right(
    whole: tuple[Path, dict[str, bytes], dict[int, dict[int, second.Pages]]], data: st.DataObject
) -> None:
    path, files, right = whole
    name = data.draw(st.sampled_from(sorted(files)))
    old = files[name]
    start = data.draw(st.integers(0, len(old) - 1))
    length = data.draw(st.sampled_from([1, 8, 128, 4096]))
    kind = data.draw(st.sampled_from(["flip", "zero", "cut", "other", "twice"]))
    piece = old[start : start + length]
    new = {
        "flip": old[:start] + bytes(byte ^ 0x10 for byte in piece) + old[start + length :],
        "zero": old[:start] + bytes(len(piece)) + old[start + length :],
        "cut": old[:start],
        "other": files["00000003.img"],
        "twice": old[: start + length] + old[start:],
    }[kind]
    try:
        (path / name).write_bytes(new)
        found = assert_refused_or_right(path, right)
    finally:
        (path / name).write_bytes(old)
    if name.endswith(".img") and new != old:
        assert found == {*range(int(name[:8]))}


# --- images with right checksums that must not be read, and some that must ---


def patch(kind: int, at: int, data: bytes) -> Callable[[Image], object]:
    """Bytes of the first record of a kind."""

    def change(image: Image) -> None:
        payload = image.records(kind)[0].payload
        payload[at : at + len(data)] = data

    return change


def become(kind: int, data: bytes) -> Callable[[Image], object]:
    """Other bytes in place of the first record of a kind."""
    return lambda image: image.records(kind)[0].payload.__setitem__(slice(None), data)


def extend(kind: int, data: bytes) -> Callable[[Image], object]:
    """Bytes after those of the first record of a kind."""
    return lambda image: image.records(kind)[0].payload.extend(data)


def u32(value: int) -> bytes:
    return struct.pack("<I", value)


def u64(value: int) -> bytes:
    return struct.pack("<Q", value)


def flags(kind: int, value: int) -> Callable[[Image], object]:
    """Flags of the first record of a kind."""
    return lambda image: setattr(image.records(kind)[0], "flags", value)


def kind_of_page(row: int, place: bytes) -> Callable[[Image], object]:
    """Another place for a row of the page index, whose hash is zero then."""

    def change(image: Image) -> None:
        payload = image.records(second.PAGE_INDEX)[0].payload
        (count,) = struct.unpack_from("<Q", payload, 8)
        payload[16 + 8 * (count + row) : 24 + 8 * (count + row)] = place
        start = 16 * (1 + count + row)
        payload[start : start + 16] = bytes(16)

    return change


def again(kind: int) -> Callable[[Image], object]:
    """The first record of a kind twice."""
    return lambda image: image.insert(image.records(kind)[0])


def parent(kind: int, number: int = 1) -> Callable[[Image], object]:
    """The first record of a kind belongs to another."""
    return lambda image: setattr(image.records(kind)[0], "parent", number)


def added(kind: int, payload: bytes) -> Callable[[Image], object]:
    """One more record."""
    return lambda image: image.add(kind, payload)


def padded(kind: int, text: bytes) -> Callable[[Image], object]:
    """A byte that is not zero after a text in the first record of a kind."""

    def change(image: Image) -> None:
        payload = image.records(kind)[0].payload
        payload[payload.index(text) + len(text)] = 7

    return change


def one_more_page(number: int, kind: int) -> Callable[[Image], object]:
    """A row of the page index for a page, without contents."""

    def change(image: Image) -> None:
        payload = image.records(second.PAGE_INDEX)[0].payload
        space, _, count = struct.unpack_from("<IIQ", payload)
        pages, places = 16 + 8 * count, 16 + 16 * count
        place = struct.pack("<IHH", 0, 0, kind)
        rows = payload[16:pages] + u64(number), payload[pages:places] + place, payload[places:]
        payload[:] = struct.pack("<IIQ", space, 0, count + 1) + b"".join(rows) + bytes(16)

    return change


def zero_page(image: Image) -> None:
    """A row for one more page of zeros."""
    one_more_page(99, 1)(image)
    image.records(second.PAGE_INDEX)[0].payload[-16:] = xxh3_128_digest(ZERO)


def unread(*rows: tuple[int, ...], size: int = 32) -> bytes:
    """A table with rows of space, first page, count and, if that is given, what is reserved."""
    packed = [
        struct.pack("<IiQQII", space, 14, first, count, 4, *(more or [0])).ljust(size, b"\0")
        for space, first, count, *more in rows
    ]
    return struct.pack("<II", len(rows), size) + b"".join(packed)


def both(*changes: Callable[[Image], object]) -> Callable[[Image], object]:
    """Several changes."""
    return lambda image: [change(image) for change in changes]


def summary_row(kind: int) -> Callable[[Image], object]:
    """A kind with a slot in the first row of the first summary."""

    def change(image: Image) -> None:
        payload = image.records(second.SUMMARY)[0].payload
        (count,) = struct.unpack_from("<Q", payload, 32)
        payload[40 + 8 * count : 48 + 8 * count] = struct.pack("<IHH", 0, 9, kind)

    return change


TOO_NEW = {
    "major": patch(second.IMAGE, 8, u32(2)),
    "type": lambda image: image.add(77, b""),
    "flag": flags(second.STATS, 2),
    "summary": lambda image: image.add(second.SUMMARY, b""),
    "pages of 8 KiB": patch(second.ARCH, 0, u32(8192)),
}
DAMAGED = {
    "magic": patch(second.IMAGE, 0, b"\0"),
    "chain": patch(second.IMAGE, 16, bytes(16)),
    "image": patch(second.IMAGE, 32, bytes(16)),
    "parent": patch(second.IMAGE, 48, bytes(16)),
    "parent's hash": patch(second.IMAGE, 64, bytes(16)),
    "epoch": patch(second.IMAGE, 96, u64(7)),
    "parent's epoch": patch(second.IMAGE, 104, u64(6)),
    "kind of image": patch(second.IMAGE, 112, u32(2)),
    "mapping before another": patch(second.VMAS, 16, u64(70 * PAGE_SIZE)),
    "half a page": patch(second.VMAS, 16, u64(10 * PAGE_SIZE + 8)),
    "heap": patch(second.VMAS, 60, u32(99)),
    "row size": patch(second.VMAS, 4, u32(40)),
    "rows": patch(second.VMAS, 0, u32(2**32 - 1)),
    "file twice": patch(second.FILES, 16 + 64, u32(1)),
    "no file": patch(second.FILES, 16, u32(0)),
    "object": patch(second.VMAS, 52, u32(77)),
    "text": patch(second.THREAD, 40, u32(99)),
    "register sets": patch(second.CPU, 0, u32(2**31)),
    "statistics": patch(second.STATS, 0, b"["),
    "pages of a chunk": patch(second.CHUNK, 4, u32(513)),
    "codec": patch(second.CHUNK, 8, u32(2)),
    "order in a chunk": patch(second.CHUNK, 16, u64(2**51)),
    "block": extend(second.CHUNK, b"\0"),
    "rows of an index": patch(second.PAGE_INDEX, 8, u64(77)),
    "end of an index": extend(second.PAGE_INDEX, b"\0"),
    "page number": patch(second.PAGE_INDEX, 16, u64(2**53)),
    "two indexes": again(second.PAGE_INDEX),
    "no index": lambda image: image.remove(image.records(second.PAGE_INDEX)[0]),
    "no chunk": kind_of_page(0, struct.pack("<IHH", 1, 0, 0)),
    "no slot": kind_of_page(0, struct.pack("<IHH", 5, 600, 0)),
    "kind of page": kind_of_page(0, struct.pack("<IHH", 0, 0, 5)),
    "hash of zeros": kind_of_page(0, struct.pack("<IHH", 0, 0, 1)),
    "hole with a slot": kind_of_page(0, struct.pack("<IHH", 0, 1, 2)),
    "inherited of nobody": kind_of_page(0, struct.pack("<IHH", 77, 0, 4)),
    "gap in a summary": patch(second.SUMMARY, 24, u64(2**51)),
    "base of a summary": patch(second.SUMMARY, 32, u64(65537)),
    "two IMAGE": again(second.IMAGE),
    "two ARCH": again(second.ARCH),
    "two FILES": again(second.FILES),
    "two STATS": again(second.STATS),
    "two UNREADABLE": both(
        one_more_page(99, 3), added(11, unread((SPACE, 99, 1))), added(11, unread())
    ),
    "IMAGE belongs to itself": parent(second.IMAGE),
    "ARCH of IMAGE": parent(second.ARCH),
    "FILES of IMAGE": parent(second.FILES),
    "CHUNK of IMAGE": parent(second.CHUNK),
    "PAGE_INDEX of IMAGE": parent(second.PAGE_INDEX),
    "SUMMARY of IMAGE": parent(second.SUMMARY),
    "STATS of IMAGE": parent(second.STATS),
    "UNREADABLE of IMAGE": both(added(11, unread()), parent(11)),
    "STATS of a record of type 0": both(
        lambda image: image.all.insert(1, Record(0, 1, 0, bytearray())),
        lambda image: setattr(image.records(second.STATS)[0], "parent", 2),
    ),
    "CPU of a task": parent(second.CPU, 3),
    "a directory amid the records": added(second.DIRECTORY, b""),
    "a tail that may be passed over": lambda image: image.add(second.TAIL, b"", 1),
    "reserved in IMAGE": patch(second.IMAGE, 116, u32(1)),
    "reserved in FILES": patch(second.FILES, 16 + 60, u32(1)),
    "reserved in THREAD": patch(second.THREAD, 12, u32(1)),
    "reserved in CPU": patch(second.CPU, 4, u32(1)),
    "reserved in CHUNK": patch(second.CHUNK, 12, u32(1)),
    "reserved in PAGE_INDEX": patch(second.PAGE_INDEX, 4, u32(1)),
    "reserved in UNREADABLE": both(one_more_page(99, 3), added(11, unread((SPACE, 99, 1, 1)))),
    "reserved in SUMMARY": patch(second.SUMMARY, 4, u32(1)),
    "padding after a blob": padded(second.TASK, b"target"),
    "padding after a text of IMAGE": padded(second.IMAGE, b"6.18-x"),
    "far page of a chunk": patch(second.CHUNK, 16, u64(2**60)),
    "unreadable without a table": one_more_page(99, 3),
    "unreadable and not in the table": both(
        one_more_page(99, 3), one_more_page(101, 3), added(11, unread((SPACE, 99, 1)))
    ),
    "in the table and not unreadable": both(
        one_more_page(99, 3), added(11, unread((SPACE, 99, 2)))
    ),
    "a table for nothing": added(11, unread((SPACE, 99, 1))),
    "a table for a space that is not there": added(11, unread((77, 99, 1))),
    "a table out of order": both(
        one_more_page(99, 3),
        one_more_page(101, 3),
        added(11, unread((SPACE, 101, 1), (SPACE, 99, 1))),
    ),
    "rows of odd size": both(one_more_page(99, 3), added(11, unread((SPACE, 99, 1), size=36))),
    "space 0": patch(second.MM, 0, u32(0)),
    "space 0 with an index": both(
        patch(second.MM, 0, u32(0)), added(10, struct.pack("<IIQ", 0, 0, 0))
    ),
    "file of a mapping": patch(second.VMAS, 16 + 32, u32(77)),
    "file of the program": patch(second.MM, 4, u32(77)),
    "registers of another size": patch(second.CPU, 8, u32(2)),
    "wall clock": patch(second.IMAGE, 120, u64(5)),
    "one hole more than the entry says": one_more_page(99, 2),
    "one page of zeros more": zero_page,
    "a chunk that no entry names": added(
        second.CHUNK, struct.pack("<IIIIQ", SPACE, 1, 0, 0, 5) + bytes(4096)
    ),
    "a slot for a hole of a summary": summary_row(2),
    "summary of a space that is not there": patch(second.SUMMARY, 0, u32(77)),
}
DAMAGED_FULL = {
    "hole": one_more_page(99, 2),
    "inherited": one_more_page(99, 4),
    "parent": patch(second.IMAGE, 48, bytes(15) + b"1"),
    "parent's hash": patch(second.IMAGE, 64, bytes(15) + b"1"),
    "parent's epoch": patch(second.IMAGE, 104, u64(7)),
}
HARMLESS: dict[str, Callable[[Image], object]] = {
    "minor": patch(second.IMAGE, 12, u32(9)),
    "optional": lambda image: image.add(0x80000077, b"new", 1),
    "fields": lambda image: [extend(kind, b"newer")(image) for kind in (1, 3, 4, 7, 8)],
    "statistics": become(second.STATS, b'{"new":1}'),
    "order": lambda image: image.all.append(image.all.pop(-2)),
    "no table": added(11, unread()),
    "no statistics": lambda image: image.remove(image.records(second.STATS)[0]),
}


def changed(
    path: Path, name: str, change: Callable[[Image], object], *, full: bool = False
) -> None:
    """A chain of nine epochs whose last image is another, with right checksums."""
    vmas = [anon(16, 32), anon(50, 9)]
    with ChainWriter.open(path, create=True) as writer:
        for number in range(9):
            alone = full and number == 8
            with writer.begin(reason="dump", kernel="6.18-x", full=alone) as image:
                image.add(Arch(machine="x86_64"))
                files = Files((LIBRARY, MEMFD))
                add_task(image, [*vmas, mapping(70, 4, file=2, object_space=OBJECT)], files=files)
                write(image, {16: page(number + 1), 17: noise(number), 18: ZERO})
                image.commit({"frozen_time": 1, "a": "longer than that"})
    rewrite(path, 8, change)


@pytest.mark.parametrize("name", TOO_NEW)
def test_what_is_too_new_is_refused_as_that(tmp_path: Path, name: str) -> None:
    changed(tmp_path, name, TOO_NEW[name])
    with Chain.open(tmp_path) as chain, closing(second.Chain(tmp_path)) as reader:
        reader.epoch(7)
        with pytest.raises(TooNew):
            reader.epoch(8)
        with pytest.raises(FormatTooNew):
            verify(chain)


@pytest.mark.parametrize(
    ("name", "full"),
    [*((name, False) for name in DAMAGED), *((name, True) for name in DAMAGED_FULL)],
)
def test_what_contradicts_the_document_is_damage(tmp_path: Path, name: str, full: bool) -> None:
    changed(tmp_path, name, (DAMAGED_FULL if full else DAMAGED)[name], full=full)
    with Chain.open(tmp_path) as chain, closing(second.Chain(tmp_path)) as reader:
        reader.epoch(7)
        with pytest.raises(Damaged):
            reader.epoch(8)
        report = verify(chain)
        assert {damage.file for damage in report.damage} == {"00000008.img"}
        assert all(f"{tmp_path}/00000008.img" in damage.message for damage in report.damage)


OTHERS = {
    **{f"verify: {lie.__name__}": lie for lie in test_verify.LIES},
    **{f"hostile: {name}": lie for name, lie in test_hostile.REFUSED.items()},
    **{f"hostile: {name}": lie for name, lie in test_hostile.POINTERS.items()},
}


@pytest.mark.parametrize("name", OTHERS)
def test_what_one_reader_refuses_the_other_does(tmp_path: Path, name: str) -> None:
    """The lies that other tests tell crtrace's reader alone."""
    path = small_chain(tmp_path)
    rewrite(path, 0, OTHERS[name])
    with Chain.open(path) as chain, closing(second.Chain(path)) as reader:
        with pytest.raises(Damaged):
            reader.epoch(0)
        assert "00000000.img" in {damage.file for damage in verify(chain).damage}


@pytest.mark.parametrize("name", HARMLESS)
def test_what_a_later_minor_version_adds_is_passed_over(tmp_path: Path, name: str) -> None:
    changed(tmp_path, name, lambda image: image)
    with closing(second.Chain(tmp_path)) as reader:
        before = reader.epoch(8)
    rewrite(tmp_path, 8, HARMLESS[name])
    assert assert_same(tmp_path)[8] == before
    with Chain.open(tmp_path) as chain:
        assert verify(chain).ok


def test_an_index_of_a_space_that_nobody_names_is_read_like_any_other(tmp_path: Path) -> None:
    changed(tmp_path, "", added(second.PAGE_INDEX, struct.pack("<IIQ", 77, 0, 0)))
    found = assert_same(tmp_path)
    assert (found[8].keys() - found[7].keys(), found[8][77]) == ({77}, {})
    with Chain.open(tmp_path) as chain:
        assert verify(chain).ok


def test_longer_rows_are_cut(tmp_path: Path) -> None:
    def change(image: Image) -> None:
        for kind, size in ((second.VMAS, 48), (second.FILES, 64)):
            payload = image.records(kind)[0].payload
            (count,) = struct.unpack_from("<I", payload)
            for row in reversed(range(count)):
                payload[16 + (row + 1) * size : 16 + (row + 1) * size] = b"\xff" * 8
            payload[4:8] = u32(size + 8)

    changed(tmp_path, "", change)
    assert_same(tmp_path)


# --- what is missing, and what is in the way ---


@pytest.mark.parametrize("lost", ["image", "entry"])
def test_a_lineage_with_a_gap_is_incomplete(tmp_path: Path, lost: str) -> None:
    path = small_chain(tmp_path)
    if lost == "image":
        (path / "00000001.img").unlink()
    else:
        index = bytearray((path / "chain.idx").read_bytes())
        index[256:384] = bytes(128)
        (path / "chain.idx").write_bytes(index)
    with Chain.open(path) as chain, closing(second.Chain(path)) as reader:
        assert reader.epoch(0)
        for read in (lambda: reader.epoch(2), lambda: reader.epoch(1)):
            with pytest.raises(Incomplete):
                read()
        with pytest.raises(ChainIncomplete):
            chain.epoch(2).read_pages(SPACE, numbers([19]))


def test_a_later_version_of_the_index_is_too_new(tmp_path: Path) -> None:
    path = small_chain(tmp_path)
    index = bytearray((path / "chain.idx").read_bytes())
    index[8] = 2
    index[120:128] = second.checksum(bytes(index[:120]))
    (path / "chain.idx").write_bytes(index)
    with pytest.raises(TooNew):
        second.Chain(path)
    with pytest.raises(FormatTooNew):
        Chain.open(path)


def test_links_and_pipes_are_refused(tmp_path: Path) -> None:
    path = small_chain(tmp_path / "chain")
    image = path / "00000001.img"
    image.rename(tmp_path / "elsewhere")
    with closing(second.Chain(path)) as reader, Chain.open(path) as chain:
        for make in (lambda: image.symlink_to(tmp_path / "elsewhere"), lambda: os.mkfifo(image)):
            make()
            with pytest.raises(Damaged):
                reader.epoch(1)
            with pytest.raises(ImageDamaged):
                chain.image(chain.entry(1))
            image.unlink()
    (tmp_path / "link").symlink_to(path)
    with pytest.raises(Incomplete):
        second.Chain(tmp_path / "link")


# --- replaced images ---


def replace(path: Path, number: int, *, full: bool) -> None:
    """Write an image again so that it holds what its parent does; drop the parent's epoch.

    With ``full`` everything that the lineage holds, and all earlier epochs are dropped.
    """
    with closing(second.Chain(path)) as chain:
        image, parent = chain.image(number), chain.image(number - 1)
        old = take_apart((path / f"{number:08d}.img").read_bytes())
        index = chain.index(number, SPACE) if full else parent.spaces[SPACE] | image.spaces[SPACE]
        kept = {at: row for at, row in sorted(index.items()) if row.kind != second.HOLE or not full}
        stored = {at: row for at, row in kept.items() if row.kind == second.STORED}
        contents = b"".join(chain.image(row.epoch).stored(row) for row in stored.values())
    old.all = [each for each in old.all if each.type not in {second.CHUNK, 10, second.SUMMARY}]
    head = old.records(second.IMAGE)[0].payload
    head[80:96] = image.entry["hash"]
    above = parent.head
    if full:
        head[48:80], head[104:116] = bytes(32), u64(2**64 - 1) + u32(0)
    else:
        head[48:80], head[104:112] = above["parent_id"] + above["parent_hash"], u64(number - 2)
    pages = struct.pack(f"<{len(stored)}Q", *stored)
    old.add(second.CHUNK, struct.pack("<IIII", SPACE, len(stored), 0, 0) + pages + contents)
    slots = {at: slot for slot, at in enumerate(stored)}
    place = [
        struct.pack("<IHH", len(old.all) if at in slots else 0, slots.get(at, 0), row.kind)
        for at, row in kept.items()
    ]
    columns = struct.pack(f"<IIQ{len(kept)}Q", SPACE, 0, len(kept), *kept) + b"".join(place)
    old.add(second.PAGE_INDEX, columns + b"".join(row.hash for row in kept.values()))
    data = put_together(old)
    (path / f"{number:08d}.1.img").write_bytes(data)
    enter_again(path, number, data, bytes(head), kept, full=full)


def enter_again(
    path: Path, number: int, data: bytes, head: bytes, kept: dict[int, second.Entry], *, full: bool
) -> None:
    """The new ``chain.idx``."""
    index = (path / "chain.idx").read_bytes()
    blocks = [index[at : at + 128] for at in range(128, len(index), 128)]
    kinds = [row.kind for row in kept.values()]
    entry = bytearray(blocks[number])
    entry[24:40], entry[40:48] = head[48:64], head[104:112]
    entry[48:56] = struct.pack("<II", full, 1)
    entry[56:80] = u64(len(data)) + data[-16:]
    counts = kinds.count(0) + kinds.count(1), kinds.count(2), 4096 * kinds.count(0), len(data)
    entry[88:120] = struct.pack("<4Q", *counts)
    entry[120:] = second.checksum(index[16:32] + entry[:120])
    before = [] if full else blocks[: number - 1]
    (path / "chain.idx").write_bytes(
        index[:128] + b"".join([*before, bytes(entry), *blocks[number + 1 :]])
    )


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("number", [1, 4, 8])
def test_an_image_that_was_written_again_changes_nothing(
    tmp_path: Path, number: int, full: bool
) -> None:
    if number == 1 and not full:
        number = 2
    path = small_chain(tmp_path, epochs=12)
    before = assert_same(path)
    replace(path, number, full=full)
    after = assert_same(path)
    dropped = {*range(number)} if full else {number - 1}
    assert after == {at: spaces for at, spaces in before.items() if at not in dropped}
    with closing(second.Chain(path, summaries=True)) as reader:
        image = reader.image(8)
        assert reader.usable(8, SPACE) is None
        assert bool(image.summaries) == (number != 8)


def test_the_hash_of_no_replaced_image_is_nobodys(tmp_path: Path) -> None:
    """A parent that was not written again answers to its own hash alone."""
    path = small_chain(tmp_path)
    rewrite(path, 2, patch(second.IMAGE, 64, bytes(16)))
    with closing(second.Chain(path)) as reader, pytest.raises(Damaged):
        reader.epoch(2)
    with Chain.open(path) as chain:
        assert not verify(chain).ok
