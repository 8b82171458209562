"""What damage costs: by epoch, process and address."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace

import numpy as np

from crtrace.analyze.imagecheck import Finding
from crtrace.analyze.loststate import StateLoss, lost_state
from crtrace.errors import ChainIncomplete, ImageDamaged
from crtrace.image.chainindex import IndexEntry
from crtrace.image.epoch import Epoch, TaskView
from crtrace.image.framing import RecordType
from crtrace.image.imagefile import Image
from crtrace.image.reader import Chain
from crtrace.image.resolve import Source
from crtrace.image.salvage import Salvage
from crtrace.image.tables import Vma
from crtrace.units import PAGE_SHIFT, PAGE_SIZE, U64, intersect, merge, no_pages

SHOWN_RANGES = 64
"""Lost ranges listed for one process in one epoch: a long chain has many of these lists."""


@dataclass(frozen=True, slots=True)
class ProcessLoss:
    """The memory of a process that an epoch lacks: ranges ``(start, end)`` of addresses.

    ``more``: how many further ranges there are that are not listed; ``bytes`` counts them all.
    """

    pid: int
    comm: str
    bytes: int
    ranges: tuple[tuple[int, int], ...]
    more: int = 0


@dataclass(frozen=True, slots=True)
class EpochLoss:
    """What an epoch lacks. ``whole``: all of it; its image cannot be read.

    ``processes`` has the memory, ``state`` what else.
    """

    epoch: int
    whole: bool
    processes: tuple[ProcessLoss, ...] = ()
    state: tuple[StateLoss, ...] = ()


@dataclass(slots=True)
class Suspects(Salvage):
    """What damage may have made unreadable, over all images that were looked at."""

    pages: U64 = field(default_factory=no_pages)
    """A range array of page numbers, of whatever space."""
    everything: bool = False
    """Any page may be concerned: a whole page index or image is damaged."""

    def add(self, image: Image, found: Finding) -> None:
        """Damage inside an image. A record that can be used all the same loses only the pages
        that are known."""
        epoch = image.entry.epoch
        self.pages = merge(self.pages, *(part for parts in found.lost.values() for part in parts))
        self.everything |= found.anywhere
        if found.usable:
            for space, parts in found.lost.items():
                known = self.entries.get((epoch, space), no_pages())
                self.entries[epoch, space] = merge(known, *parts)
            return
        self.records.setdefault(epoch, set()).add(found.number)
        kind = image.directory[found.number - 1]["type"]
        self.everything |= bool(kind == RecordType.PAGE_INDEX)

    def add_image(self, epoch: int) -> None:
        """An image that cannot be opened."""
        self.records.setdefault(epoch, set())
        self.everything = True


def losses(chain: Chain, entries: Iterable[IndexEntry], suspects: Suspects) -> list[EpochLoss]:
    """What each of these epochs lacks; those that lack nothing are left out."""
    found = []
    for entry in entries:
        try:
            epoch = chain.epoch(entry.epoch, suspects)
            lost, state = tuple(_of_processes(epoch, suspects)), tuple(lost_state(epoch))
        except (ImageDamaged, ChainIncomplete):
            found.append(EpochLoss(entry.epoch, whole=True))
            continue
        if lost or state:
            found.append(EpochLoss(entry.epoch, False, lost, state))
    return found


def _of_processes(epoch: Epoch, suspects: Suspects) -> Iterator[ProcessLoss]:
    for task in epoch.tasks:
        ranges = no_pages()
        for vma in task.vmas if task.mm else ():
            ranges = merge(ranges, _of_mapping(epoch, task, vma, suspects))
        if len(ranges):
            spans = (ranges * np.uint64(PAGE_SIZE)).tolist()
            size = sum(end - start for start, end in spans)
            shown = tuple((start, end) for start, end in spans[:SHOWN_RANGES])
            more = len(spans) - len(shown)
            yield ProcessLoss(task.task.pid, task.task.comm, size, shown, more)


def _of_mapping(epoch: Epoch, task: TaskView, vma: Vma, suspects: Suspects) -> U64:
    """The lost pages of a mapping, as a range array."""
    found = [no_pages()]
    for part in _parts(vma, suspects):
        for run in epoch.memory_runs(task, part):
            if run.source is Source.LOST:
                first = run.addr >> PAGE_SHIFT
                found.append(np.array([[first, first + run.npages]], dtype=np.uint64))
    return merge(*found)


def _parts(vma: Vma, suspects: Suspects) -> Iterator[Vma]:
    """The parts of a mapping that may be concerned."""
    if suspects.everything:
        yield vma
        return
    whole = np.array([[vma.start >> PAGE_SHIFT, vma.end >> PAGE_SHIFT]], dtype=np.uint64)
    ranges = intersect(whole, suspects.pages)
    if vma.object_space:
        in_object = whole - whole[0, 0] + np.uint64(vma.pgoff >> PAGE_SHIFT)
        behind = intersect(in_object, suspects.pages)
        ranges = merge(ranges, behind - in_object[0, 0] + whole[0, 0])
    for start, end in (ranges << np.uint64(PAGE_SHIFT)).tolist():
        yield replace(vma, start=start, end=end, pgoff=vma.pgoff + start - vma.start)
