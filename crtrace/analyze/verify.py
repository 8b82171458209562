"""Re-read a chain down to the last byte and say what is damaged and what that costs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np

from crtrace.analyze.imagecheck import Finding, check_image, finding
from crtrace.analyze.lost import EpochLoss, Suspects, losses
from crtrace.errors import ChainIncomplete, ImageDamaged
from crtrace.image.chaindir import INDEX_NAME, PART
from crtrace.image.chainindex import ENTRY_SIZE, Fault, IndexEntry
from crtrace.image.codec import hash_pages
from crtrace.image.epoch import Epoch
from crtrace.image.imagefile import Image
from crtrace.image.layers import LayerRows, OwnLayer, SummaryLayer, gather, summary_layer
from crtrace.image.merged import merge_layers
from crtrace.image.pageindex import PageIndex
from crtrace.image.places import PAGE_LIMIT, PageKind, kinds
from crtrace.image.reader import Chain
from crtrace.units import U64, Bools

INHERITED_ROWS = 4096
"""Rows of a page index whose contents are read at a time: 16 MiB."""

Progress = Callable[[int, int], None]
"""Called with the bytes done and the bytes there are."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Damage:
    """One thing that is wrong, and what it costs.

    ``epochs`` are those that may lack something: the one that the file belongs to and those that
    build on it. What each of them lacks, by process, is in ``Report.lost``.
    """

    file: str
    record: str = ""
    offset: int = 0
    message: str
    epochs: tuple[int, ...] = ()
    pages_lost: int = 0
    missing: bool = False


@dataclass(slots=True)
class Report:
    """What ``verify`` found. ``notices`` are oddities that cost nothing."""

    chain: str
    epochs: list[int] = field(default_factory=list)
    damage: list[Damage] = field(default_factory=list)
    lost: list[EpochLoss] = field(default_factory=list)
    notices: list[str] = field(default_factory=list)
    records: int = 0
    pages: int = 0
    bytes: int = 0
    suspects: Suspects = field(default_factory=Suspects)

    @property
    def ok(self) -> bool:
        """Whether nothing is damaged."""
        return not self.damage

    def to_json(self) -> dict[str, Any]:
        """A plain dict for JSON."""
        fields = asdict(replace(self, suspects=Suspects()))
        del fields["suspects"]
        return {"ok": self.ok, **fields}


def verify(chain: Chain, epoch: int | None = None, progress: Progress | None = None) -> Report:
    """Check every byte of the chain, or of one epoch and those it builds on.

    Goes on after damage; the report lists it. Raises ``FormatTooNew`` for what a later version
    wrote, and ``UsageError`` for an epoch that is not there.
    """
    report = Report(str(chain.path))
    if epoch is None:
        entries: tuple[IndexEntry, ...] = chain.entries
        _check_index(chain, report)
        _check_names(chain, report)
    else:
        entries = _ancestors(chain, chain.entry(epoch), report)
    total = sum(entry.length for entry in entries)
    for entry in entries:
        before = report.bytes

        def advance(done: int, before: int = before) -> None:
            report.bytes = before + done
            if progress:
                progress(report.bytes, total)

        _check_epoch(chain, entry, report, advance)
        report.epochs.append(entry.epoch)
    if report.damage:
        report.lost = losses(chain, entries, report.suspects)
    return report


def _check_index(chain: Chain, report: Report) -> None:
    for fault in chain.index.faults:
        if fault.harmless:
            report.notices.append(
                f"{INDEX_NAME} at offset {fault.offset:#x}: {fault.message}; the commit was cut "
                "short and its epoch never existed"
            )
            continue
        record, cost = _cost(fault)
        report.damage.append(
            Damage(
                file=INDEX_NAME, record=record, offset=fault.offset, message=fault.message + cost
            )
        )  # fmt: skip
        report.suspects.everything |= fault.offset > 0


def _cost(fault: Fault) -> tuple[str, str]:
    """What of the index is wrong, and what that means."""
    first = fault.offset // ENTRY_SIZE - 1
    if first < 0:
        return "header", ""
    if fault.entries == 1:
        return f"entry {first}", "; the epoch it stood for is lost"
    last = first + fault.entries - 1
    return f"entries {first} to {last}", "; the epochs they stood for are lost"


def _check_names(chain: Chain, report: Report) -> None:
    """Files that no entry speaks of."""
    expected = {entry.name for entry in chain.entries}
    names = chain.names()
    lost = set(chain.index.lost(names))
    for name in names:
        if name in lost:
            message = f"{name} is there, and its entry is lost"
            report.damage.append(Damage(file=INDEX_NAME, message=message))
        elif name.endswith(PART):
            report.notices.append(f"{name} is unfinished; the next writer removes it")
        elif name.endswith(".img") and name not in expected:
            report.notices.append(f"{name} has no entry in {INDEX_NAME}: never committed, or lost")


def _ancestors(chain: Chain, entry: IndexEntry, report: Report) -> tuple[IndexEntry, ...]:
    """The entry and those it builds on, oldest first; a missing one is damage."""
    entries = [entry]
    try:
        while parent := chain.parent(entries[-1]):
            entries.append(parent)
    except (ChainIncomplete, ImageDamaged) as error:
        missing = isinstance(error, ChainIncomplete)
        report.suspects.everything = True
        report.damage.append(
            Damage(
                file=INDEX_NAME, message=str(error), epochs=(entry.epoch,), missing=missing
            )
        )  # fmt: skip
    return tuple(reversed(entries))


def _dependents(chain: Chain, epoch: int) -> tuple[int, ...]:
    """The epoch and every later one that builds on it."""
    found = {epoch}
    for entry in chain.entries:
        if not entry.full and entry.parent_epoch in found:
            found.add(entry.epoch)
    return tuple(sorted(found))


def _check_epoch(
    chain: Chain, entry: IndexEntry, report: Report, advance: Callable[[int], None]
) -> None:
    epochs = _dependents(chain, entry.epoch)
    name = entry.name
    try:
        image = chain.image(entry)
    except (ImageDamaged, ChainIncomplete) as error:
        missing = isinstance(error, ChainIncomplete)
        report.damage.append(Damage(file=name, message=str(error), epochs=epochs, missing=missing))
        report.suspects.add_image(entry.epoch)
        advance(entry.length)
        return
    _check_owners(image, report, epochs)
    _check_link(chain, image, report, epochs)
    for found in check_image(image, advance):
        report.damage.append(_damage(name, found, epochs))
        report.suspects.add(image, found)
    for found in _check_inherited(chain, image, report.suspects):
        report.damage.append(_damage(name, found, epochs))
        report.suspects.add(image, found)
    for found in _check_summaries(chain, image):
        report.damage.append(_damage(name, found, ()))
        report.suspects.add(image, found)
    report.records += len(image.directory)
    report.pages += sum(len(index) for space in image.spaces if (index := _index(image, space)))
    advance(entry.length)


def _check_owners(image: Image, report: Report, epochs: tuple[int, ...]) -> None:
    """Which record belongs to which: of this epoch alone nothing can be read if that is wrong."""
    try:
        image.check_parents()
    except ImageDamaged as error:
        report.damage.append(Damage(file=image.name, message=str(error), epochs=epochs))


def _check_inherited(chain: Chain, image: Image, suspects: Suspects) -> Iterator[Finding]:
    """The pages that an image inherits of its parent's, against their hashes."""
    try:
        epoch = chain.epoch(image.entry.epoch, suspects)
    except (ImageDamaged, ChainIncomplete):
        return  # it was made on top of another parent, which was found
    for space in image.spaces:
        index = _index(image, space)
        if index is None:
            continue
        number = image.index_id(space)
        text = f"{image.where(number)}: inherited pages do not have the hash in the index"
        found = finding(image, number, text, usable=True)
        with suppress(ImageDamaged):  # the rows are, which was found
            for pages, hashes in _inherited(index):
                wrong, why = _differ(epoch, space, pages, hashes)
                found.message = why or found.message
                if wrong.any():
                    found.lose(space, pages[wrong])
        if found.pages:
            yield found


def _check_summaries(chain: Chain, image: Image) -> Iterator[Finding]:
    """The summaries that are sound in themselves, against what they sum up."""
    for space in image.spaces:
        with suppress(ImageDamaged, ChainIncomplete):  # found where it is
            parts = image.summary(space)
            lineage = chain.lineage(image.entry)
            layer = summary_layer(lineage, space, 0) if parts else None
            index = image.page_index(space)
            if layer is None or index is None:
                continue
            older, level, ended = gather(lineage, space, 1, layer.level)
            expected = merge_layers([OwnLayer(index, 0), *older])
            ends = len(lineage) if ended else level
            if ends != layer.level or not _says(layer, expected):
                number = image.summary_ids[space][0]
                text = f"{image.where(number)}: it is not what the images that it sums up say"
                yield finding(image, number, text)


def _says(layer: SummaryLayer, expected: Iterator[LayerRows]) -> bool:
    """Whether a layer has just these rows, but for holes of images that it does not sum up."""
    reach = 0
    for rows in expected:
        end = int(rows.pages[-1]) + 1
        summed_up = (rows.levels < layer.end) | (kinds(rows.places) != PageKind.HOLE)
        if not layer.between(reach, end).equals(rows.select(summed_up)):
            return False
        reach = end
    return layer.at_or_after(reach) == PAGE_LIMIT


def _differ(epoch: Epoch, space: int, pages: U64, hashes: U64) -> tuple[Bools, str]:
    """Which pages do not have these hashes, and why if they cannot even be read."""
    try:
        kind = epoch.page_kinds(space, pages)
        data = epoch.read_pages(space, pages)
    except (ImageDamaged, ChainIncomplete) as error:
        return np.ones(len(pages), dtype=np.bool_), str(error)
    absent = (kind != PageKind.STORED) & (kind != PageKind.ZERO)
    differ: Bools = absent | (hash_pages(data) != hashes).any(axis=1)
    where = epoch.image.where(epoch.image.index_id(space))
    lacking = f"{where}: inherited pages are damaged or missing in the parent image"
    return differ, lacking if absent.any() else ""


def _inherited(index: PageIndex) -> Iterator[tuple[U64, U64]]:
    """Page numbers and hashes of the inherited rows, some thousands at a time."""
    for start in range(0, len(index), INHERITED_ROWS):
        rows = index.rows(start, min(start + INHERITED_ROWS, len(index)))
        which = kinds(rows.places) == PageKind.INHERITED
        if which.any():
            yield rows.pages[which], rows.hashes[which]


def _index(image: Image, space: int) -> PageIndex | None:
    try:
        return image.page_index(space)
    except ImageDamaged:
        return None


def _check_link(chain: Chain, image: Image, report: Report, epochs: tuple[int, ...]) -> None:
    try:
        parent = chain.parent(image.entry)
        if parent is None:
            return
        above = chain.image(parent)
    except ChainIncomplete as error:
        report.suspects.everything = True
        report.damage.append(
            Damage(file=image.name, message=str(error), epochs=epochs, missing=True)
        )
        return
    except ImageDamaged:
        return  # found when the parent's turn came
    try:
        image.check_parent(above)
    except ImageDamaged as error:
        report.suspects.everything = True
        report.damage.append(Damage(file=image.name, message=str(error), epochs=epochs))


def _damage(name: str, found: Finding, epochs: tuple[int, ...]) -> Damage:
    return Damage(
        file=name, record=found.record, offset=found.offset, message=found.message,
        epochs=epochs, pages_lost=found.pages,
    )  # fmt: skip
