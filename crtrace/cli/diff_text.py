"""What ``crtrace diff`` tells people, piece by piece."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from crtrace.analyze.diff import Diff, MappingDiff, ProcessDiff, contents
from crtrace.analyze.pagediff import Verdict, changed_ranges
from crtrace.cli.hexview import colours, hex_lines
from crtrace.cli.output import clock, paint, printable
from crtrace.image.epoch import Epoch
from crtrace.image.tables import Vma
from crtrace.units import PAGE_SIZE, human_bytes

SHOWN = 8
"""Changed ranges of a mapping, and threads, that are listed; ``--json`` has all."""


def summary(diff: Diff) -> Iterator[str]:
    """What changed, mapping by mapping."""
    yield f"from {_epoch_text(diff.a)} to {_epoch_text(diff.b)}\n"
    for process in diff.processes():
        yield f"\n{paint(_process_text(process), bold=True)}\n"
        yield from _threads_text(process)
        totals = [0, 0]
        for mapping in process.mappings():
            yield from _mapping_text(mapping, totals)
        if process.change == "kept" and process.shares is None:
            size = human_bytes(totals[0] * PAGE_SIZE)
            yield f"{_count(totals[0], 'page')} changed, {size}{_unreadable(totals[1])}\n"
    for number, file in enumerate(diff.files()):
        if not number:
            yield f"\n{paint('files', bold=True)}\n"
        yield f"  {printable(file['path'])}: {_file_text(file)}\n"


def _epoch_text(epoch: Epoch) -> str:
    return f"epoch {epoch.header.epoch} ({clock(epoch.header.wall_ns, 'milliseconds')})"


def _count(number: int, thing: str) -> str:
    return f"{number} {thing}" if number == 1 else f"{number} {thing}s"


def _unreadable(pages: int) -> str:
    return f"; {_count(pages, 'page')} not readable in one of the epochs" if pages else ""


def _process_text(process: ProcessDiff) -> str:
    name = f"process {process.task.task.pid} {printable(process.task.task.comm)}"
    if process.shares is not None:
        return f"{name}: its memory is that of process {process.shares}"
    if process.change == "kept":
        return name
    sizes = [
        f"{_count(size['mappings'], 'mapping')} of {human_bytes(size['bytes'])}"
        for size in process.sizes().values()
        if size and size["mappings"]
    ]
    said = {
        "came": "came, with",
        "went": "is gone, with",
        "ended": "ended, with",
        "exec": "runs another program; its whole map was replaced:",
    }
    return f"{name} {said[process.change]} {' by '.join(sizes) or 'no memory'}"


def _threads_text(process: ProcessDiff) -> Iterator[str]:
    if process.change not in ("kept", "exec"):
        return
    words = {"came": "came", "went": "went", "registers": "have other registers"}
    facts = (
        f"{', '.join(map(str, tids[:SHOWN]))}{_more(len(tids))} {words[what]}"
        for what, tids in process.threads().items()
        if tids
    )
    if text := "; ".join(facts):
        yield f"threads: {text}\n"


def _more(count: int) -> str:
    return f" and {count - SHOWN} more" if count > SHOWN else ""


def _mapping_text(mapping: MappingDiff, totals: list[int]) -> Iterator[str]:
    """The lines of a mapping if it has changed; adds pages changed and unreadable to ``totals``."""
    ranges: list[list[int]] = []
    count = 0
    for part in changed_ranges(runs for _, runs in mapping.runs()):
        count += len(part)
        ranges += part[: SHOWN - len(ranges)].tolist()
    changed = mapping.pages(Verdict.CHANGED)
    totals[0] += changed
    totals[1] += mapping.pages(Verdict.UNREADABLE)
    facts = [*_change_text(mapping), *_pages_text(mapping)]
    if facts:
        vma = mapping.mapping.vma
        yield f"  {_range(vma)}  {vma.perms}  {_name(vma)}: {'; '.join(facts)}\n"
    for start, end in ranges:
        place = f"{start * PAGE_SIZE:x}-{end * PAGE_SIZE:x}"
        yield f"      {place}  {_count(end - start, 'page')}\n"
    if count > SHOWN:
        yield f"      and {_count(count - SHOWN, 'range')} more\n"


def _range(vma: Vma) -> str:
    return f"{vma.start:x}-{vma.end:x}"


def _name(vma: Vma) -> str:
    return printable(vma.name) or "anonymous"


def _change_text(mapping: MappingDiff) -> Iterator[str]:
    """What happened to the mapping itself."""
    about = mapping.mapping
    if about.change != "kept":
        before = ", ".join(f"{_range(vma)} {_name(vma)}" for vma in about.before)
        whole = about.before == [about.vma] or not before
        yield about.change if whole else f"{about.change}, before: {before}"
    if protection := about.protection_before:
        yield f"was {', '.join(protection)}"
    if held := [f"{human_bytes(n)} {source}" for source, n in mapping.alone.items() if n]:
        yield f"{'gone' if about.change == 'went' else 'new'}: {', '.join(held)}"


def _pages_text(mapping: MappingDiff) -> Iterator[str]:
    said = {
        Verdict.CHANGED: "changed",
        Verdict.UNKNOWN: "of its file may have changed",
    }
    for verdict, words in said.items():
        if pages := mapping.pages(verdict):
            how = ", ".join(f"{n} {what}" for what, n in mapping.how(verdict).items())
            yield f"{_count(pages, 'page')} {words} ({how})"


def _file_text(file: dict[str, Any]) -> str:
    facts = []
    if file["changed"]:
        facts.append("changed on disk; what is not kept of it cannot be compared")
    if file["size"] != file["size_before"]:
        facts.append(f"{file['size_before']} bytes, now {file['size']}")
    return "; ".join(facts + ["deleted"] * file["deleted"])


def changed_bytes(diff: Diff) -> Iterator[str]:
    """The lines of 16 bytes that differ, before and after."""
    colour = colours()
    for process in diff.processes():
        yield f"{paint(_process_text(process), bold=True)}\n"
        for mapping in process.mappings():
            vma = mapping.mapping.vma
            heading = f"{_range(vma)}  {vma.perms}  {_name(vma)}\n"
            for part in contents(diff, process, mapping):
                if part.old is None or part.new is None:
                    side = "before" if part.old is None else "now"
                    where = f"{part.addr:x}-{part.addr + part.npages * PAGE_SIZE:x}"
                    lines = [f" {where}: {side} a file's, whose contents are not kept"]
                else:
                    lines = [*hex_lines(part.addr, part.old, part.new, colour=colour)]
                yield heading + "".join(f"{line}\n" for line in lines)
                heading = ""
