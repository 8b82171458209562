"""What changed between two epochs, against a plain comparison of two dicts."""

from __future__ import annotations

import itertools
import json
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from crtrace.analyze.diff import Diff, ProcessDiff
from crtrace.analyze.pagediff import Verdict, meaning
from crtrace.cli import diff_json
from crtrace.image.epoch import Epoch
from crtrace.image.imagewriter import ImageWriter
from crtrace.image.pageindex import IndexRows
from crtrace.image.reader import Chain
from crtrace.image.store import ChainWriter
from crtrace.image.tables import FileInfo, Files, Vma, VmaFlag, VmaKind
from crtrace.units import PAGE_SIZE
from tests.image.support import RW, SPACE, ZERO, add_task, numbers, page, write

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


@settings(max_examples=120, deadline=None)
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
