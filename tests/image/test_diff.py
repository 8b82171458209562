"""What changed between two epochs, against a plain comparison of two dicts."""

from __future__ import annotations

import itertools
import json
import tempfile
import tracemalloc
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crtrace.analyze.diff import Diff, ProcessDiff
from crtrace.analyze.pagediff import Verdict, meaning
from crtrace.cli import diff_json, diff_text
from crtrace.errors import UsageError
from crtrace.image.epoch import Epoch
from crtrace.image.imagewriter import ImageWriter
from crtrace.image.pageindex import IndexRows
from crtrace.image.reader import Chain
from crtrace.image.records import Cpu, Mm, Task, Thread
from crtrace.image.store import ChainWriter
from crtrace.image.tables import FileInfo, Files, Vma, VmaFlag, VmaKind, Vmas
from crtrace.units import PAGE_SIZE
from tests.image.support import RW, SPACE, ZERO, add_task, anon, numbers, page, write

MEMFD, ON_DISK = 2, 3
"""Spaces of the objects."""
SAME, CHANGED, UNKNOWN, UNREADABLE = Verdict

Contents = dict[int, bytes | None]
"""Pages by number; None: cannot be read."""


@dataclass
class Memory:
    """A process at one moment, as a model."""

    vmas: list[Vma]
    own: Contents = field(default_factory=dict)
    memfd: Contents = field(default_factory=dict)
    disk: Contents = field(default_factory=dict)
    mtime: int = 0

    @property
    def files(self) -> Files:
        """The file table: a library, a memfd, a file of which some pages are kept."""
        return Files(
            (
                FileInfo(id=1, inode=11, mtime_ns=self.mtime, path="/lib/x"),
                FileInfo(id=2, inode=12, flags=2, object_space=MEMFD, path="/memfd:x"),
                FileInfo(id=3, inode=13, mtime_ns=self.mtime, object_space=ON_DISK, path="/db"),
            )
        )

    def spaces(self) -> dict[int, Contents]:
        """All contents by space."""
        return {SPACE: self.own, MEMFD: self.memfd, ON_DISK: self.disk}

    def mapped(self) -> dict[int, Vma]:
        """The mapping of each page."""
        return {at: vma for vma in self.vmas for at in _pages(vma)}

    def reads(self, at: int) -> bytes | tuple[int, int] | None:
        """What a page reads as: bytes, the file's inode and page, or None: nobody knows."""
        vma = self.mapped()[at]
        if at in self.own:
            return self.own[at]
        place = (vma.pgoff - vma.start) // PAGE_SIZE + at
        if vma.object_space and place in (held := self.spaces()[vma.object_space]):
            return held[place]
        if vma.kind == VmaKind.VVAR:
            return None
        on_disk = vma.file and (not vma.object_space or vma.flags & VmaFlag.FILE_BEHIND)
        return (10 + vma.file, place) if on_disk else ZERO


def _pages(vma: Vma) -> range:
    return range(vma.start // PAGE_SIZE, vma.end // PAGE_SIZE)


def verdict(a: Memory, b: Memory, at: int) -> Verdict:
    """How a page compares that both have."""
    before, after = a.reads(at), b.reads(at)
    if before is None or after is None:
        return UNREADABLE
    if isinstance(before, bytes) and isinstance(after, bytes):
        return CHANGED if before != after else SAME
    was, now = a.mapped()[at], b.mapped()[at]
    if not was.file or was.file != now.file or was.pgoff - was.start != now.pgoff - now.start:
        return CHANGED
    if before == after:
        return UNKNOWN if a.mtime != b.mtime else SAME
    return CHANGED if at in a.own or at in b.own else UNKNOWN


KINDS: dict[str, dict[str, Any]] = {
    "anon": {"kind": VmaKind.ANON},
    "vvar": {"kind": VmaKind.VVAR},
    "file": {"kind": VmaKind.FILE, "file": 1},
    "memfd": {"kind": VmaKind.SHM, "file": 2, "object_space": MEMFD},
    "behind": {"kind": VmaKind.FILE, "file": 3, "object_space": ON_DISK},
}


@st.composite
def maps(draw: st.DrawFn) -> list[Vma]:
    """Mappings of all kinds, often where those of another draw are."""
    at, found = 10, []
    for _ in range(draw(st.integers(1, 5))):
        at += draw(st.sampled_from([0, 0, 0, 2]))
        length = draw(st.sampled_from([4, 4, 4, 1, 7]))
        flags = RW | draw(st.sampled_from([0, 0, VmaFlag.SHARED]))
        kind = draw(st.sampled_from(list(KINDS)))
        if kind == "behind":
            flags |= VmaFlag.FILE_BEHIND
        pgoff = draw(st.sampled_from([0, 0, at])) * PAGE_SIZE
        start, end = at * PAGE_SIZE, (at + length) * PAGE_SIZE
        found.append(Vma(start=start, end=end, flags=flags, pgoff=pgoff, **KINDS[kind]))
        at += length
    return found


VALUES = st.sampled_from([ZERO, page(1), page(2), None])
OWN = st.dictionaries(st.integers(8, 45), VALUES, max_size=12)
SHARED = st.dictionaries(st.integers(0, 45), VALUES, max_size=12)
MEMORIES = st.builds(Memory, maps(), OWN, SHARED, SHARED, st.integers(0, 1))


def put(image: ImageWriter, memory: Memory, before: Memory | None) -> None:
    """Write a memory into an image; ``before``: that of the parent."""
    add_task(image, memory.vmas, files=memory.files)
    for space, held in memory.spaces().items():
        write(image, {at: data for at, data in held.items() if data is not None}, space=space)
        lost = sorted(at for at, data in held.items() if data is None)
        image.mark_unreadable(space, numbers(lost), 5)
        gone = before.spaces()[space].keys() - held.keys() if before else ()
        image.mark_holes(space, numbers(sorted(gone)))


def build(path: Path, memories: Iterable[Memory], *, full: bool = False) -> Path:
    """A chain with these epochs."""
    before = None
    with ChainWriter.open(path, create=True) as writer:
        for memory in memories:
            with writer.begin(full=full) as image:
                put(image, memory, None if full else before)
                image.commit({})
            before = memory
    return path


def chopped(epoch: Epoch, size: int) -> Epoch:
    """The epoch, with its page indexes in parts of so many rows: all edges of windows are met."""
    real = epoch.index_parts

    def parts(space: int) -> Iterator[IndexRows]:
        for rows in real(space):
            for at in range(0, len(rows.pages), size):
                part = slice(at, at + size)
                yield IndexRows(rows.pages[part], rows.places[part], rows.hashes[part])

    epoch.index_parts = parts  # type: ignore[method-assign]
    return epoch


def verdicts(process: ProcessDiff) -> tuple[dict[int, Verdict], set[int], set[int]]:
    """What a diff says of every page that is not the same; pages that came, and that went."""
    found: dict[int, Verdict] = {}
    came: set[int] = set()
    went: set[int] = set()
    for mapping in process.mappings():
        for pair, runs in mapping.runs():
            for (start, end), code in zip(runs.ranges.tolist(), runs.codes.tolist(), strict=True):
                assert pair.start <= start < end <= pair.end
                assert not found.keys() & set(range(start, end)), "told twice"
                found |= dict.fromkeys(range(start, end), meaning(code)[0])
        for wanted in Verdict:
            inside = [v for at, v in found.items() if at in _pages(mapping.mapping.vma)]
            assert mapping.mapping.change == "went" or mapping.pages(wanted) == inside.count(wanted)
        for vma in mapping.mapping.alone:
            (went if mapping.mapping.change == "went" else came).update(_pages(vma))
            if mapping.mapping.change == "moved":
                went.update(_pages(mapping.mapping.before[0]))
    return found, came, went


@settings(max_examples=80, deadline=None)
@given(MEMORIES, MEMORIES, st.booleans(), st.sampled_from([1, 2, 3, 1000]), st.booleans())
def test_a_diff_is_the_comparison_of_two_dicts(
    a: Memory, b: Memory, full: bool, size: int, same_map: bool
) -> None:
    if same_map:
        b = replace(b, vmas=a.vmas)
    with tempfile.TemporaryDirectory() as name:
        path = build(Path(name) / "chain", (a, b), full=full)
        with Chain.open(path) as chain:
            for (x, y), (was, now) in {(0, 1): (a, b), (1, 0): (b, a)}.items():
                diff = Diff(chopped(chain.epoch(x), size), chopped(chain.epoch(y), size))
                (process,) = diff.processes()
                found, came, went = verdicts(process)
                both = was.mapped().keys() & now.mapped().keys()
                expected = {at: verdict(was, now, at) for at in both}
                assert found == {at: v for at, v in expected.items() if v is not SAME}
                assert came == now.mapped().keys() - both
                assert went == was.mapped().keys() - both
                check_json(diff, {at for at, v in found.items() if v is CHANGED})
                check_bytes(diff, was, now, found)


def check_json(diff: Diff, changed: set[int]) -> None:
    """The printed object has just these pages, in ranges that cannot be joined."""
    shown = json.loads("".join(diff_json.summary(diff, Path("chain"))))
    (process,) = shown["processes"]
    seen: set[int] = set()
    for mapping in process["mappings"]:
        ranges = mapping["ranges"]
        assert all(before[1] < after[0] for before, after in itertools.pairwise(ranges))
        pages = {at for start, end in ranges for at in range(start >> 12, end >> 12)}
        assert len(pages) == mapping["pages_changed"] == sum(mapping["changed"].values())
        seen |= pages
    assert seen == changed


def check_bytes(diff: Diff, was: Memory, now: Memory, found: dict[int, Verdict]) -> None:
    """The changed bytes turn what was into what is."""
    patched = {at: was.reads(at) for at in found}
    for line in diff_json.changed_bytes(diff):
        row = json.loads(line)
        for at in range(row["start"] >> 12, -(-row["end"] // PAGE_SIZE)):
            assert found[at] is CHANGED
            first, end = (
                max(0, min(PAGE_SIZE, edge - (at << 12))) for edge in (row["start"], row["end"])
            )
            source = slice((at << 12) + first - row["start"], (at << 12) + end - row["start"])
            before, after = was.reads(at), now.reads(at)
            assert (row["old"] is None) == isinstance(before, tuple)
            assert (row["new"] is None) == isinstance(after, tuple)
            if isinstance(before, bytes) and row["old"] is not None:
                assert bytes.fromhex(row["old"])[source] == before[first:end]
            held = patched[at]
            if row["new"] is None:
                patched[at] = after
            else:
                new = bytes.fromhex(row["new"])[source]
                held = held if isinstance(held, bytes) else ZERO
                patched[at] = held[:first] + new + held[end:]
    for at, fate in found.items():
        assert fate is not CHANGED or patched[at] == now.reads(at)


# ---- mappings ----------------------------------------------------------------------------------


def lib(first: int, count: int, *, offset: int = 0, flags: int = RW) -> Vma:
    """A mapping of the library."""
    start, end = first * PAGE_SIZE, (first + count) * PAGE_SIZE
    return Vma(
        start=start, end=end, pgoff=offset * PAGE_SIZE, flags=flags, kind=VmaKind.FILE, file=1
    )


READ_ONLY = replace(anon(10, 4), flags=VmaFlag.READ)
CHANGES: list[tuple[list[Vma], list[Vma], list[tuple[int, str]]]] = [
    ([anon(10, 4)], [anon(10, 4)], []),
    ([anon(10, 4)], [anon(20, 4)], [(10, "went"), (20, "came")]),
    ([anon(10, 4)], [anon(10, 6)], [(10, "grew")]),
    ([anon(10, 4)], [anon(8, 6)], [(8, "grew")]),
    ([anon(10, 4)], [anon(10, 2)], [(10, "shrank"), (12, "went")]),
    ([anon(10, 4)], [anon(12, 4)], [(10, "went"), (12, "resized")]),
    ([anon(10, 6)], [anon(10, 2), anon(14, 2)], [(10, "split"), (12, "went"), (14, "split")]),
    ([anon(10, 2), anon(12, 2)], [anon(10, 4)], [(10, "merged")]),
    ([anon(10, 4)], [READ_ONLY], [(10, "kept")]),
    ([lib(10, 4)], [anon(10, 4)], [(10, "replaced")]),
    ([lib(10, 4)], [lib(10, 4, offset=1)], [(10, "replaced")]),
    ([lib(10, 4, offset=1)], [lib(12, 2, offset=3)], [(10, "went"), (12, "shrank")]),
    ([lib(10, 4)], [lib(20, 4)], [(20, "moved")]),
    ([lib(10, 4), lib(15, 4)], [lib(20, 4)], [(10, "went"), (15, "went"), (20, "came")]),
]


@pytest.mark.parametrize(("before", "after", "expected"), CHANGES)
def test_what_becomes_of_mappings(
    tmp_path: Path, before: list[Vma], after: list[Vma], expected: list[tuple[int, str]]
) -> None:
    path = build(tmp_path / "chain", (Memory(before), Memory(after)))
    with Chain.open(path) as chain:
        (process,) = Diff(chain.epoch(0), chain.epoch(1)).processes()
        mappings = [each.mapping for each in process.mappings()]
    found = [(each.vma.start >> 12, each.change) for each in mappings if each.altered]
    assert found == expected
    for each in mappings:
        assert each.protection_before == (["rw-p"] if each.vma.flags == VmaFlag.READ else [])


def test_what_came_and_went_is_told_with_what_is_stored_of_it(tmp_path: Path) -> None:
    a = Memory([anon(10, 4)], {10: page(1), 12: page(2)})
    b = Memory([anon(10, 2), lib(20, 4)], {10: page(1), 21: page(3)})
    with Chain.open(build(tmp_path / "chain", (a, b))) as chain:
        (process,) = Diff(chain.epoch(0), chain.epoch(1)).processes()
        told = {each.mapping.vma.start >> 12: each.alone for each in process.mappings()}
        text = "".join(diff_text.summary(Diff(chain.epoch(0), chain.epoch(1))))
    assert (told[12]["stored"], told[12]["zero"]) == (PAGE_SIZE, PAGE_SIZE)
    assert (told[20]["stored"], told[20]["file"]) == (PAGE_SIZE, 3 * PAGE_SIZE)
    assert "  c000-e000  rw-p  anonymous: went, before: a000-e000 anonymous; gone: 4.0 KiB" in text
    assert "  14000-18000  rw-p  anonymous: came; new: 4.0 KiB stored, 12.0 KiB file\n" in text
    assert "0 pages changed, 0 B\n" in text


# ---- processes ---------------------------------------------------------------------------------


def member(
    image: ImageWriter, pid: int, space: int, pages: dict[int, bytes], **fields: Any
) -> None:
    """A process with one mapping of anonymous memory and one of the memfd."""
    task = image.add(Task(pid=pid, comm="x\033[31m", start_ticks=fields.pop("start", pid)))
    mm = image.add(Mm(space=space, auxv=fields.pop("auxv", b"")), parent=task)
    image.add(Vmas((anon(10, 8), lib_of_memfd(30))), parent=mm)
    for tid, rip in fields.items():
        thread = image.add(Thread(tid=int(tid[1:])), parent=task)
        image.add(Cpu(((1, bytes([rip])),)), parent=thread)
    write(image, pages, space=space)


def lib_of_memfd(first: int) -> Vma:
    """A shared mapping of the whole memfd, 8 pages."""
    return replace(lib(first, 8, flags=RW | VmaFlag.SHARED), file=2, object_space=MEMFD)


@pytest.fixture
def family(tmp_path: Path) -> Path:
    """Two epochs of a tree in which everything happens to processes and threads."""
    files = Memory([]).files
    with ChainWriter.open(tmp_path / "chain", create=True) as writer:
        with writer.begin() as image:
            image.add(files)
            member(image, 100, 10, {11: page(1), 12: page(2)}, t100=1, t101=1, t102=1)
            member(image, 200, 20, {11: page(1)}, t200=1)
            member(image, 300, 30, {11: page(1)})
            member(image, 400, 40, {11: page(1)})
            member(image, 500, 50, {11: page(1)}, auxv=b"before")
            member(image, 600, 10, {})
            member(image, 700, 70, {11: page(1)})
            write(image, {1: page(5), 2: page(6)}, space=MEMFD)
            image.commit({})
        with writer.begin() as image:
            image.add(files)
            member(image, 100, 10, {12: page(3)}, t100=1, t102=2, t103=1)
            member(image, 200, 20, {})
            member(image, 300, 31, {11: page(1)})
            image.add(Task(pid=400, start_ticks=400, state="X", exit_status=9))
            member(image, 500, 50, {11: page(2)}, auxv=b"after")
            member(image, 600, 10, {})
            member(image, 700, 71, {11: page(1)}, start=701)
            write(image, {1: page(7)}, space=MEMFD)
            image.commit({})
    return tmp_path / "chain"


def test_what_becomes_of_processes_and_threads(family: Path) -> None:
    with Chain.open(family) as chain:
        processes = list(Diff(chain.epoch(0), chain.epoch(1)).processes())
        found = [(each.task.task.pid, each.change, each.shares) for each in processes]
        compared = {each.task.task.pid for each in processes if list(each.mappings())}
        threads = processes[0].threads()
    assert found == [
        (100, "kept", None), (200, "kept", None), (300, "exec", None), (400, "ended", None),
        (500, "exec", None), (600, "kept", 100), (700, "came", None), (700, "went", None),
    ]  # fmt: skip
    assert compared == {100, 200}
    assert threads == {"came": [103], "went": [101], "registers": [102]}


def test_an_object_is_compared_once_and_told_for_each_mapping(
    family: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Chain.open(family) as chain:
        walked: list[int] = []
        for epoch in (a := chain.epoch(0), b := chain.epoch(1)):
            real = epoch.index_parts
            monkeypatch.setattr(
                epoch, "index_parts", lambda n, real=real: (walked.append(n), real(n))[1]
            )
        found = {}
        for process in list(Diff(a, b).processes())[:2]:
            found[process.task.task.pid] = verdicts(process)[0]
    assert found == {100: {12: CHANGED, 31: CHANGED}, 200: {31: CHANGED}}
    assert walked.count(MEMFD) == 2, "once for each epoch"


def test_one_process_can_be_chosen(family: Path) -> None:
    with Chain.open(family) as chain:
        a, b = chain.epoch(0), chain.epoch(1)
        pids = [each.task.task.pid for each in Diff(a, b, pid=200).processes()]
        with pytest.raises(UsageError, match="neither epoch has pid 5; they have: 100, 200"):
            Diff(a, b, pid=5)
    assert pids == [200]


def test_nothing_of_a_name_reaches_the_terminal_raw(family: Path) -> None:
    with Chain.open(family) as chain:
        diff = Diff(chain.epoch(0), chain.epoch(1))
        text = "".join([*diff_text.summary(diff), *diff_text.changed_bytes(diff)])
        shown = json.loads("".join(diff_json.summary(diff, family)))
    assert "\033" not in text
    assert "process 100 x\\x1b[31m\n" in text
    assert "threads: 103 came; 101 went; 102 have other registers\n" in text
    assert "runs another program; its whole map was replaced: 2 mappings of 64.0 KiB by" in text
    assert "process 600 x\\x1b[31m: its memory is that of process 100\n" in text
    assert [each["change"] for each in shown["processes"][:4]] == ["kept", "kept", "exec", "ended"]


# ---- files, bytes, size ------------------------------------------------------------------------


def test_files_that_changed_are_named(tmp_path: Path) -> None:
    a = Memory([lib(10, 4)], {11: page(1)})
    b = replace(a, mtime=5)
    with Chain.open(build(tmp_path / "chain", (a, b))) as chain:
        diff = Diff(chain.epoch(0), chain.epoch(1))
        assert [(file["path"], file["changed"]) for file in diff.files()] == [
            ("/lib/x", True), ("/db", True),
        ]  # fmt: skip
        text = "".join(diff_text.summary(diff))
        assert Diff(chain.epoch(0), chain.epoch(0)).files() == []
    assert "3 pages of its file may have changed (3 file to file)" in text
    assert "  /lib/x: changed on disk; " in text


def test_changed_bytes_are_shown_line_by_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = bytearray(page(0))
    old[32:37] = b"hello"
    new = bytearray(old)
    new[33] = ord("E")
    new[4095] = 0xFF
    a = Memory([anon(10, 2), lib(20, 2)], {10: bytes(old)})
    b = Memory([anon(10, 2), lib(20, 2)], {10: bytes(new), 21: page(1)})
    with Chain.open(build(tmp_path / "chain", (a, b))) as chain:
        diff = Diff(chain.epoch(0), chain.epoch(1))
        lines = "".join(diff_text.changed_bytes(diff)).splitlines()
        monkeypatch.setattr(diff_text, "colours", lambda: True)
        coloured = "".join(diff_text.changed_bytes(diff)).splitlines()
    zeros = "0000 0000 0000 0000 0000 0000 0000 000"
    assert lines == [
        "process 100 target",
        "a000-c000  rw-p  anonymous",
        "-00000000a020: 6865 6c6c 6f00 0000 0000 0000 0000 0000  hello...........",
        "+00000000a020: 6845 6c6c 6f00 0000 0000 0000 0000 0000  hEllo...........",
        f"-00000000aff0: {zeros}0  ................",
        f"+00000000aff0: {zeros[:-1]}ff  ................",
        "14000-16000  rw-p  anonymous",
        " 15000-16000: before a file's, whose contents are not kept",
    ]
    red, green, plain = "\033[31m\033[1m", "\033[32m\033[1m", "\033[0m"
    assert coloured[2].startswith(f"-00000000a020: 68{red}65{plain} 6c6c 6f00 ")
    assert coloured[3].endswith(f"  h{green}E{plain}llo...........")


def test_a_large_diff_takes_little_memory(tmp_path: Path) -> None:
    """Every second page of the worst kind: as many ranges as pages, in an object and outside."""
    path, count = tmp_path / "chain", 150_000
    vmas = [anon(1 << 20, 1 << 28), replace(lib_of_memfd(1 << 30), end=(1 << 30) + 2 * count << 12)]
    pages = np.arange(0, 2 * count, 2, dtype=np.uint64)
    data = np.zeros((2048, PAGE_SIZE), dtype=np.uint8)
    with ChainWriter.open(path, create=True) as writer:
        for changed in (0, 1):
            with writer.begin() as image:
                add_task(image, vmas, files=Memory([]).files)
                data[:] = changed
                step = pages[::2] if changed else pages
                for part in np.array_split(step, len(step) // 2048 + 1):
                    image.write_pages(SPACE, part + np.uint64(1 << 20), data[: len(part)])
                    image.write_pages(MEMFD, part, data[: len(part)])
                image.commit({})
    with Chain.open(path) as chain:
        diff = Diff(chain.epoch(0), chain.epoch(1))
        tracemalloc.start()
        size, ranges = 0, 0
        for part in diff_json.summary(diff, path):
            size += len(part)
            ranges += part.count("],[")
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert ranges > count - 20
    assert size > 15 * count
    assert peak < 100 << 20
