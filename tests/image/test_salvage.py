"""What salvage leaves out is told, what is not told is there, and padding costs nothing."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from crtrace.analyze.lost import EpochLoss
from crtrace.analyze.loststate import WHAT
from crtrace.analyze.verify import Report, verify
from crtrace.errors import ImageDamaged
from crtrace.image.epoch import Epoch
from crtrace.image.framing import RecordType, padding, type_name
from crtrace.image.imagefile import Image
from crtrace.image.places import LOST, PAGE_LIMIT
from crtrace.image.reader import Chain
from crtrace.image.records import Arch, Cpu, Mm, Task, Thread
from crtrace.image.resolve import Source
from crtrace.image.store import ChainWriter
from crtrace.image.tables import FileInfo, Files, Vma, VmaKind, Vmas
from crtrace.units import PAGE_SIZE
from tests.image import tamper
from tests.image.support import (
    REGISTERS,
    RW,
    SPACE,
    ZERO,
    anon,
    epoch,
    noise,
    numbers,
    page,
    small_chain,
    write,
)
from tests.image.test_hostile import crtrace

pytestmark = pytest.mark.usefixtures("unsynced")
FIRST = "00000000.img"
CHILD, OBJECT = 2, 3


def rich_chain(path: Path, epochs: int = 2) -> Path:
    """Two processes, the second a child of the first, with an object, files and lost pages, and
    padding after records of nearly every type."""
    shared = Vma(start=96 << 12, end=99 << 12, flags=RW, kind=VmaKind.SHM, file=1, name="/memfd:xy",
                 object_space=OBJECT)  # fmt: skip
    with ChainWriter.open(path, create=True) as writer:
        for number in range(epochs):
            with writer.begin(reason="dump!") as image:
                image.add(Arch(machine="x86_64"))
                image.add(Files((FileInfo(id=1, path="/memfd:xy", object_space=OBJECT),)))
                above = 0
                for pid, space in ((100, SPACE), (200, CHILD)):
                    task = above = image.add(Task(pid=pid, comm=f"task{pid}"), parent=above)
                    mm = image.add(Mm(space=space, exe_file=1, auxv=bytes(4)), parent=task)
                    image.add(Vmas((anon(16, 16), shared)), parent=mm)
                    for tid in (pid, pid + 1):
                        thread = image.add(Thread(tid=tid), parent=task)
                        image.add(Cpu(((1, REGISTERS), (2, bytes(512)))), parent=thread)
                    write(image, {16 + at: page(7 * at + number + pid) for at in range(5)},
                          space=space)  # fmt: skip
                    write(image, {22: ZERO, 23: noise(pid + number)}, space=space, round=1)
                write(image, {1: page(9 + number), 2: noise(4)}, space=OBJECT)
                image.mark_unreadable(SPACE, numbers([29, 30]), 14)
                image.commit({"a": "b"})
    return path


def flip(file: Path, at: int) -> None:
    """Flip a bit."""
    data = bytearray(file.read_bytes())
    data[at] ^= 4
    file.write_bytes(data)


def image_of(path: Path, number: int = 0) -> Image:
    """An image, open."""
    chain = Chain.open(path)
    return chain.image(chain.entry(number))


def payload_of(path: Path, kind: int, which: int = 0) -> int:
    """Where the payload of a record lies in the first image."""
    image = image_of(path)
    return int(image.directory[image.ids(RecordType(kind))[which] - 1]["offset"]) + 32


def check(path: Path) -> Report:
    with Chain.open(path) as chain:
        return verify(chain)


Known = dict[Any, Any]


def known(view: Epoch, loss: EpochLoss | None) -> Known:
    """What an epoch says: of each process, thread and page, and of the image; without what is told
    to be lost."""
    found: Known = {"arch": view.arch, "stats": view.stats, "files": view.files}
    ranges = {each.pid: each.ranges for each in loss.processes} if loss else {}
    for task in view.tasks:
        pid = task.task.pid
        found["task", pid], found["mm", pid], found["map", pid] = task.task, task.mm, task.vmas
        for thread in task.threads:
            found["thread", thread.thread.tid] = thread.thread
            found["registers", thread.thread.tid] = thread.cpu
        for vma in task.vmas:
            for run in view.memory_runs(task, vma):
                assert run.source is not Source.LOST or loss
                data = view.read_run(task, vma, run.addr, run.npages)
                for at, contents in enumerate(data):
                    addr = run.addr + at * PAGE_SIZE
                    gone = any(start <= addr < end for start, end in ranges.get(pid, ()))
                    assert gone == (run.source is Source.LOST)
                    if not gone:
                        found["page", pid, addr] = run.source, contents.tobytes()
    return found


def assert_told(path: Path, whole: list[Known]) -> Report:
    """Of a damaged chain, everything is as it was or said to be lost."""
    report = check(path)
    lost = {loss.epoch: loss for loss in report.lost}
    with Chain.open(path) as chain:
        for entry in chain.entries:
            loss = lost.get(entry.epoch)
            if loss and loss.whole:
                continue
            found = known(chain.epoch(entry.epoch, report.suspects), loss)
            before = whole[entry.epoch]
            missing = {key for key in before if found.get(key) in (None, (), {})}
            missing -= {key for key in before if before[key] in (None, (), {})}
            wrong = {key for key in found if key not in missing and found[key] != before[key]}
            assert not wrong
            state = {key for key in missing if key[0] != "page" or ("map", key[1]) in missing}
            assert bool(state) == bool(loss and [s for s in loss.state if s.what != "unreadable"])
    return report


def all_known(path: Path) -> list[Known]:
    with Chain.open(path) as chain:
        return [known(chain.epoch(entry.epoch), None) for entry in chain.entries]


def test_whatever_byte_is_damaged_what_is_gone_is_told(tmp_path: Path) -> None:
    path = rich_chain(tmp_path / "chain")
    whole = all_known(path)
    data = (path / FIRST).read_bytes()
    for at in range(40, len(data), 61):
        flip(path / FIRST, at)
        assert not assert_told(path, whole).ok
        (path / FIRST).write_bytes(data)


def test_damaged_padding_is_reported_and_costs_nothing(tmp_path: Path) -> None:
    path = rich_chain(tmp_path / "chain")
    whole = all_known(path)
    data = (path / FIRST).read_bytes()
    kinds = set()
    for row in image_of(path).directory:
        end = int(row["offset"]) + 32 + int(row["length"])
        for at in range(end, end + padding(int(row["length"]))):
            flip(path / FIRST, at)
            report = assert_told(path, whole)
            (damage,) = report.damage
            assert (damage.offset, damage.pages_lost) == (int(row["offset"]), 0)
            assert "padding is not zero" in damage.message
            assert not report.lost
            assert not report.suspects.records
            (path / FIRST).write_bytes(data)
            kinds.add(type_name(int(row["type"])))
    assert kinds >= {"IMAGE", "TASK", "MM", "VMAS", "FILES", "THREAD", "CHUNK", "STATS"}


def test_an_export_with_damaged_padding_is_the_same(tmp_path: Path) -> None:
    path = rich_chain(tmp_path / "chain")
    row = image_of(path).directory[image_of(path).ids(RecordType.CHUNK)[0] - 1]
    for kind in ("raw", "core"):
        assert (
            crtrace("export", path, "--epoch", 0, "--format", kind, "-o", tmp_path / kind).code == 0
        )
    assert padding(int(row["length"]))
    flip(path / FIRST, int(row["offset"]) + 32 + int(row["length"]))
    assert crtrace("verify", path).code == 20
    for kind in ("raw", "core"):
        out = tmp_path / f"{kind}.salvaged"
        said = crtrace(
            "export", path, "--epoch", 0, "--format", kind, "-o", out, "--salvage", "--json"
        )
        assert (said.code, json.loads(said.out)["lost"]) == (0, [])
        assert out.read_bytes() == (tmp_path / kind).read_bytes()


# --- what is lost besides memory --------------------------------------------------------------

STATE: dict[int, tuple[str, str, int, int]] = {
    RecordType.ARCH: ("machine", "the description of the machine", 0, 0),
    RecordType.TASK: ("process", "a process, with all that belongs to it", 0, 0),
    RecordType.MM: ("address space", "the address space of process 200 (task200)", 200, 0),
    RecordType.VMAS: ("memory map", "the memory map of process 200 (task200)", 200, 0),
    RecordType.FILES: ("mapped files", "the table of mapped files", 0, 0),
    RecordType.THREAD: ("thread", "a thread of process 200 (task200), with its registers", 200, 0),
    RecordType.CPU: ("registers", "the registers of thread 201 of process 200 (task200)", 200, 201),
    RecordType.UNREADABLE: ("unreadable", "the reasons why pages could not be read", 0, 0),
    RecordType.STATS: ("statistics", "the statistics", 0, 0),
}


def test_every_kind_of_state_is_tried() -> None:
    assert STATE.keys() == WHAT.keys()


@pytest.mark.parametrize("kind", STATE, ids=type_name)
def test_what_is_lost_besides_memory_is_told(tmp_path: Path, kind: int) -> None:
    path = rich_chain(tmp_path / "chain")
    flip(path / FIRST, payload_of(path, kind, -1) + 2)
    what, text, pid, tid = STATE[kind]
    said = crtrace("verify", path)
    assert said.code == 20
    assert f"epoch 0 lacks {text}: {type_name(kind)} " in said.out
    (loss,) = json.loads(crtrace("verify", path, "--json").out)["lost"]
    (state,) = loss["state"]
    assert (loss["epoch"], loss["whole"], loss["processes"]) == (0, False, [])
    assert (state["pid"], state["tid"], state["comm"]) == (pid, tid, f"task{pid}" if pid else "")
    assert (state["what"], state["text"]) == (what, text)
    assert state["record"].startswith(type_name(kind))
    assert state["offset"] == payload_of(path, kind, -1) - 32
    for form in ("raw", "core"):
        out = tmp_path / form
        export = ("export", path, "--epoch", 0, "--format", form, "-o", out, "--salvage")
        said = crtrace(*export, "--json")
        assert said.code == 3, said.err
        assert f"epoch 0 lacks {text}: {type_name(kind)} " in said.err
        assert json.loads(said.out)["lost"] == [loss]
        assert out.stat().st_size > 5 * PAGE_SIZE


GONE = {
    RecordType.TASK: "may have been",
    RecordType.MM: "the address space of process",
    RecordType.VMAS: "the memory map of process",
}


@pytest.mark.parametrize("kind", GONE, ids=type_name)
@pytest.mark.parametrize("pid", [None, 100, 200])
def test_a_process_that_is_damaged_is_not_taken_for_one_that_ended(
    tmp_path: Path, kind: RecordType, pid: int | None
) -> None:
    """The first is damaged: only the second can be had, and only who asks for it gets it."""
    path = rich_chain(tmp_path / "chain")
    offset = payload_of(path, kind)
    flip(path / FIRST, offset + 2)
    out = tmp_path / "out"
    wanted = () if pid is None else ("--pid", pid)
    export = ("export", path, "--epoch", 0, "--format", "raw", "-o", out, "--salvage", *wanted)
    said = crtrace(*export)
    if pid == 200:
        assert (said.code, out.exists()) == (3, True)
        return
    assert (said.code, out.exists()) == (20, False)
    assert f"{type_name(kind)} " in said.err
    assert f"at offset {offset - 32:#x}: is damaged" in said.err
    assert GONE[kind] in said.err
    assert "--pid" in said.err
    assert "ended" not in said.err


def test_a_core_without_registers_is_refused_as_damaged(tmp_path: Path) -> None:
    path = small_chain(tmp_path / "chain")
    flip(path / FIRST, payload_of(path, RecordType.CPU) + 20)
    export = ("export", path, "--epoch", 0, "--salvage", "-o", tmp_path / "out")
    said = crtrace(*export)
    assert said.code == 20
    assert "no registers" in said.err
    assert "--format raw" in said.err
    assert crtrace(*export, "--format", "raw").code == 3


def test_a_process_that_ended_is_still_told_so(tmp_path: Path) -> None:
    path = tmp_path / "chain"
    with ChainWriter.open(path, create=True) as writer, writer.begin() as image:
        image.add(Task(pid=7, state="Z"))
        image.commit({"a": 1})
    flip(path / FIRST, payload_of(path, RecordType.STATS) + 1)
    said = crtrace("export", path, "--salvage", "-o", tmp_path / "out")
    assert said.code == 1
    assert "process 7 had ended" in said.err


# --- lies under right checksums ---------------------------------------------------------------


def change_place(row: int, packed: bytes) -> Callable[[tamper.Image], None]:
    """Another place in a row of the first page index."""

    def change(image: tamper.Image) -> None:
        payload = image.records(10)[0].payload
        (count,) = struct.unpack_from("<Q", payload, 8)
        payload[16 + 8 * (count + row) : 24 + 8 * (count + row)] = packed

    return change


def other_contents(image: tamper.Image) -> None:
    """A chunk with another page than was hashed, and the rest as it was."""
    chunk = image.records(9)[0]
    at = chunk.payload.index(noise(1)[:64])
    chunk.payload[at] ^= 1


def lie_about_zero(image: tamper.Image) -> None:
    """Another hash for the page of zeros."""
    payload = image.records(10)[0].payload
    (count,) = struct.unpack_from("<Q", payload, 8)
    payload[16 + 16 * count + 16] ^= 1


def no_object(image: tamper.Image) -> None:
    """A mapping of an object that is not there, in place of private memory."""
    image.records(5)[0].payload[16 + 36] = 77


LIES: dict[str, tuple[Callable[[tamper.Image], None], set[int]]] = {
    "no such slot": (change_place(0, struct.pack("<IHH", 7, 99, 0)), {16}),
    "no such record": (change_place(0, struct.pack("<IHH", 99, 0, 0)), {16}),
    "a record that is no chunk": (change_place(0, struct.pack("<IHH", 2, 0, 0)), {16}),
    "a hole in a full image": (change_place(0, struct.pack("<IHH", 0, 0, 2)), {16}),
    "inherited in a full image": (change_place(0, struct.pack("<IHH", 9, 0, 4)), {16}),
    "a page of zeros with another hash": (lie_about_zero, {17}),
    "contents with another hash": (other_contents, {18}),
    "an unknown kind": (change_place(0, struct.pack("<IHH", 0, 0, 9)), {*range(16, 48)}),
    "an object that is not there": (no_object, {*range(20, 48)}),
}


@pytest.mark.parametrize("name", LIES)
def test_a_lie_costs_the_pages_it_is_about_and_no_others(tmp_path: Path, name: str) -> None:
    path = small_chain(tmp_path / "chain", 1)
    with Chain.open(path) as chain:
        before = chain.epoch().read_pages(SPACE, numbers(range(16, 48)))
    lie, pages = LIES[name]
    tamper.rewrite(path, 0, lie)
    report = check(path)
    (loss,) = report.lost
    (process,) = loss.processes
    lost = {at >> 12 for start, end in process.ranges for at in range(start, end, PAGE_SIZE)}
    assert (lost, loss.state) == (pages, ())
    with Chain.open(path) as chain:
        view = chain.epoch(0, report.suspects)
        (task,) = view.tasks
        for run in view.memory_runs(task, task.vmas[0]):
            first = (run.addr >> 12) - 16
            rows = range(first, first + run.npages)
            assert (run.source is Source.LOST) == (not pages.isdisjoint(at + 16 for at in rows))
            if run.source is not Source.LOST:
                data = view.read_run(task, task.vmas[0], run.addr, run.npages)
                assert np.array_equal(data, before[rows.start : rows.stop])
    out = tmp_path / "out"
    said = crtrace("export", path, "--format", "raw", "-o", out, "--salvage", "--json")
    assert said.code == 3, said.err
    assert json.loads(said.out)["lost"][0]["processes"][0]["bytes"] == len(pages) * PAGE_SIZE


def test_a_summary_that_lies_is_not_used(tmp_path: Path) -> None:
    """The images that it sums up are there, and say it right."""
    path = small_chain(tmp_path / "chain", 9)
    whole = all_known(path)

    def lie(image: tamper.Image) -> None:
        payload = image.records(15)[0].payload
        (count,) = struct.unpack_from("<Q", payload, 32)
        payload[40 + 8 * count : 48 + 8 * count] = struct.pack("<IHH", 0, 0, 2)

    tamper.rewrite(path, 8, lie)
    with Chain.open(path) as chain:
        assert known(chain.epoch(8), None) != whole[8]
    assert not assert_told(path, whole).ok
    assert not check(path).lost


def test_inherited_pages_are_lost_where_they_are_in_the_parent_and_nowhere_else(
    tmp_path: Path,
) -> None:
    path = tmp_path / "chain"
    with ChainWriter.open(path, create=True) as writer:
        for number in range(2):
            with writer.begin() as image:
                for space in (SPACE, CHILD)[: number + 1]:
                    task = image.add(Task(pid=100 * space))
                    mm = image.add(Mm(space=space), parent=task)
                    image.add(Vmas((anon(16, 16),)), parent=mm)
                pages = {16: page(1), 17: noise(2)}
                if number:
                    image.inherit(CHILD, SPACE)
                    write(image, pages, space=CHILD)
                else:
                    write(image, {16: pages[16]})
                    write(image, {17: pages[17]})
                image.commit({})
    whole = all_known(path)
    flip(path / FIRST, payload_of(path, RecordType.CHUNK, 1) + 99)
    report = assert_told(path, whole)
    gone = ((17 << 12, 18 << 12),)
    told = {loss.epoch: {each.pid: each.ranges for each in loss.processes} for loss in report.lost}
    assert told == {0: {100: gone}, 1: {100: gone, 200: gone}}


def test_an_image_in_disorder_is_checked_all_the_same(tmp_path: Path) -> None:
    """Later epochs need its pages, though nothing else of it can be read."""
    path = small_chain(tmp_path / "chain", 2)

    def change(image: tamper.Image) -> None:
        image.records(1)[0].payload[80:96] = image.hash  # that epoch 1 was made on top of
        image.records(12)[0].parent = 1
        other_contents(image)

    tamper.rewrite(path, 0, change)
    report = check(path)
    assert [damage.record.split()[0] for damage in report.damage if damage.record] == ["CHUNK"]
    lost = {loss.epoch: loss for loss in report.lost}
    assert lost[0].whole
    assert lost[1].processes[0].ranges == ((18 << 12, 19 << 12),)


def test_a_mapping_of_petabytes_that_is_lost_costs_nothing(tmp_path: Path) -> None:
    path = tmp_path / "chain"
    with ChainWriter.open(path, create=True) as writer:
        epoch(writer, {16: page(1)}, vmas=[anon(1, 1 << 43)])
    flip(path / FIRST, payload_of(path, RecordType.PAGE_INDEX) + 17)
    (loss,) = check(path).lost
    assert loss.processes[0].bytes == 1 << 55
    with Chain.open(path) as chain:
        view = chain.epoch(0, check(path).suspects)
        assert view.page_kinds(SPACE, numbers([1, PAGE_LIMIT - 1])).tolist() == [LOST, LOST]
        with pytest.raises(ImageDamaged):
            chain.epoch(0).page_kinds(SPACE, numbers([1]))


def test_a_row_far_down_that_no_reader_knows_costs_its_index(tmp_path: Path) -> None:
    """Rows are looked at together, 65,536 at a time; those before it are sound."""
    path, count = tmp_path / "chain", 70_000
    with ChainWriter.open(path, create=True) as writer:
        pages = {16 + at: noise(at) if at < 3 else ZERO for at in range(count)}
        epoch(writer, pages, vmas=[anon(16, count + 9)])
    tamper.rewrite(path, 0, change_place(count - 1, struct.pack("<IHH", 0, 0, 9)))
    report = check(path)
    (damage,) = report.damage
    assert "kind 9" in damage.message
    assert report.lost[0].processes[0].bytes == (count + 9) * PAGE_SIZE
