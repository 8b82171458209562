"""What became of the mappings of a process: which came and went, grew, split, or are others now."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise

from crtrace.analyze.pagediff import Pair
from crtrace.image.epoch import Epoch
from crtrace.image.tables import FileFlag, FileInfo, Vma, VmaKind
from crtrace.units import PAGE_SHIFT

ANONYMOUS = (VmaKind.ANON, VmaKind.HEAP, VmaKind.STACK)
IN_MEMORY = FileFlag.MEMFD | FileFlag.SHM | FileFlag.SYSV | FileFlag.HUGETLB

Backing = tuple[object, ...]


@dataclass(slots=True)
class MappingChange:
    """A mapping of the later epoch, or addresses of the earlier one that are mapped no more.

    ``change`` is one of: kept, came, went, moved (from elsewhere, known by its file and offset),
    grew, shrank, resized (at both ends), merged, split, replaced (other contents are mapped, at
    least in part). ``before``: the mappings that were there, or elsewhere if it moved. ``pairs``:
    what both epochs have. ``alone``: the parts that only one of them has.
    """

    change: str
    vma: Vma
    before: list[Vma] = field(default_factory=list)
    pairs: list[Pair] = field(default_factory=list)
    alone: list[Vma] = field(default_factory=list)

    @property
    def protection_before(self) -> list[str]:
        """The protection it had, where that was another one."""
        return sorted({vma.perms for vma in self.before} - {self.vma.perms})

    @property
    def altered(self) -> bool:
        """Whether the mapping itself changed, not only what it holds."""
        return self.change != "kept" or bool(self.protection_before)


def segments(
    a: Sequence[Vma], b: Sequence[Vma]
) -> Iterator[tuple[int, int, Vma | None, Vma | None]]:
    """The mapped addresses ``[start, end)``, cut wherever a mapping of either begins or ends."""
    edges = sorted({edge for vma in (*a, *b) for edge in (vma.start, vma.end)})
    left, right = _Walk(a), _Walk(b)
    for start, end in pairwise(edges):
        pair = left.at(start), right.at(start)
        if any(pair):
            yield start, end, *pair


class _Walk:
    """The mapping at addresses that ascend."""

    def __init__(self, vmas: Sequence[Vma]) -> None:
        self._vmas, self._next = vmas, 0

    def at(self, addr: int) -> Vma | None:
        while self._next < len(self._vmas) and self._vmas[self._next].end <= addr:
            self._next += 1
        rest = self._vmas[self._next : self._next + 1]
        return rest[0] if rest and rest[0].start <= addr else None


def same_file(a: FileInfo | None, b: FileInfo | None) -> bool:
    """Whether both are one file by device and inode."""
    return bool(a and b and _identity(a) == _identity(b))


def file_changed(a: FileInfo, b: FileInfo) -> bool:
    """Whether a file was written, as far as its size and time tell."""
    return (a.size, a.mtime_ns) != (b.size, b.mtime_ns)


def _identity(file: FileInfo) -> Backing:
    return file.dev, file.inode, file.flags & FileFlag.SYSV


def _backing(epoch: Epoch, vma: Vma) -> Backing:
    """What a mapping shows: the same for two mappings that show the same at each address."""
    where = vma.pgoff - vma.start
    if file := epoch.files.get(vma.file):
        return (*_identity(file), where)
    if vma.file or vma.object_space:
        return vma.name, vma.object_space, where
    return () if vma.kind in ANONYMOUS else (vma.kind,)


def _pair(a: Epoch, b: Epoch, start: int, end: int, was: Vma, now: Vma) -> Pair:
    before, after = a.files.get(was.file), b.files.get(now.file)
    same = bool(was.file and now.file) and _backing(a, was) == _backing(b, now)
    changed = bool(before and after and file_changed(before, after))
    return Pair(start >> PAGE_SHIFT, end >> PAGE_SHIFT, was, now, same, same and changed)


def _part(vma: Vma, start: int, end: int) -> Vma:
    return replace(vma, start=start, end=end, pgoff=vma.pgoff + start - vma.start)


def map_changes(a: Epoch, b: Epoch, was: Sequence[Vma], now: Sequence[Vma]) -> list[MappingChange]:
    """The mappings ``now`` of epoch ``b`` and what is gone of ``was``, ascending."""
    found: list[MappingChange] = []
    pieces = Counter[int]()
    for start, end, before, after in segments(was, now):
        if after is None:
            assert before is not None
            part = _part(before, start, end)
            found.append(MappingChange("went", part, [before], alone=[part]))
            continue
        if not found or found[-1].vma is not after:
            found.append(MappingChange("kept", after))
        mapping = found[-1]
        if before is None:
            mapping.alone.append(_part(after, start, end))
            continue
        mapping.pairs.append(_pair(a, b, start, end, before, after))
        mapping.before.append(before)
        pieces[before.start] += 1
    for mapping in found:
        if mapping.change != "went":
            mapping.change = _change(a, b, mapping, pieces)
    return _with_moves(a, b, found)


def _change(a: Epoch, b: Epoch, mapping: MappingChange, pieces: Counter[int]) -> str:
    """What happened to a mapping that is there now."""
    now, before = mapping.vma, mapping.before
    if not before:
        return "came"
    if any(_backing(a, was) != _backing(b, now) for was in before):
        return "replaced"
    if len(before) > 1:
        return "merged"
    return "split" if pieces[before[0].start] > 1 else _resized(before[0], now)


def _resized(was: Vma, now: Vma) -> str:
    low, high = now.start - was.start, was.end - now.end
    if not low and not high:
        return "kept"
    if low >= 0 and high >= 0:
        return "shrank"
    return "grew" if low <= 0 and high <= 0 else "resized"


def _with_moves(a: Epoch, b: Epoch, found: list[MappingChange]) -> list[MappingChange]:
    """Say of a mapping that came that it moved, if just one like it went: of the same place of the
    same file or object, and as long. Anonymous memory cannot be told apart by that.
    """
    gone: dict[Backing, list[MappingChange]] = {}
    for mapping in found:
        whole = mapping.change == "went" and mapping.vma == mapping.before[0]
        if whole and (key := _likeness(a, mapping.vma)):
            gone.setdefault(key, []).append(mapping)
    arrived = [mapping for mapping in found if mapping.change == "came"]
    like = Counter(_likeness(b, mapping.vma) for mapping in arrived)
    left = set[int]()
    for mapping in arrived:
        key = _likeness(b, mapping.vma)
        if key and like[key] == len(gone.get(key, ())) == 1:
            mapping.change, mapping.before = "moved", [gone[key][0].vma]
            left.add(id(gone[key][0]))
    return [mapping for mapping in found if id(mapping) not in left]


def _likeness(epoch: Epoch, vma: Vma) -> Backing:
    """What a mapping keeps when it moves; empty for anonymous memory."""
    file = epoch.files.get(vma.file)
    return (*_identity(file), vma.pgoff, vma.pages, vma.perms) if file else ()


def mapped_bytes(vmas: Iterable[Vma]) -> int:
    """The size of all mappings."""
    return sum(vma.end - vma.start for vma in vmas)
