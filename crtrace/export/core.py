"""An epoch as an ELF core file, for gdb and its like."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import groupby, islice
from typing import NamedTuple

from crtrace.errors import CrtraceError, ImageDamaged, UsageError
from crtrace.export.elfhead import elf_head
from crtrace.export.notes import core_notes
from crtrace.export.placement import Placement, Progress, write_memory
from crtrace.export.sparsefile import SparseFile, sparse_file
from crtrace.image.epoch import Epoch, TaskView
from crtrace.image.framing import RecordType
from crtrace.image.resolve import UNKNOWN_WHEN_ABSENT, Source
from crtrace.image.tables import Vma, VmaFlag
from crtrace.units import PAGE_SIZE

EHDR = struct.Struct("<16sHHIQQQIHHHHHH")
PHDR = struct.Struct("<IIQQQQQQ")
SHDR = struct.Struct("<IIQQQQIIQQ")
IDENT = b"\x7fELF\x02\x01\x01" + bytes(9)
ET_CORE, EM_X86_64 = 4, 62
PT_LOAD, PT_NOTE = 1, 4
PN_XNUM = 0xFFFF

MAX_ZEROS = 64 << 30
"""Zeros longer than this get no bytes in the file, which could grow beyond what file systems
allow: address sanitizers reserve terabytes."""


MAX_SEGMENTS = 1 << 20
"""More would take much memory here, and debuggers would not take them."""


class Segment(NamedTuple):
    """One PT_LOAD: ``[start, end)`` of a mapping, with bytes in the file or without.

    ``held``: bytes of it that the chain has. ``head``: its first page, where that is not from the
    chain but from an ELF file.
    """

    vma: Vma
    start: int
    end: int
    stored: bool
    held: int = 0
    head: bytes = b""


class Part(NamedTuple):
    """Neighbouring pages of a mapping, ``[start, end)``, with contents from the same source."""

    vma: Vma
    start: int
    end: int
    source: Source


def export_core(
    epoch: Epoch,
    path: str | os.PathLike[str],
    *,
    pid: int | None = None,
    progress: Progress | None = None,
) -> int:
    """Write the core of one task (by default the first); the number of segments.

    The file is sparse, mode 0600, and appears when it is complete. Pages of mapped files that the
    chain does not keep have no bytes in it; debuggers take them from the files, which they find
    by the first pages of ELF files (``elf_head``). Raises ``UsageError`` for a task that is not
    there, ``CrtraceError`` for one without memory.
    """
    task = find_task(epoch, pid)
    if epoch.arch and epoch.arch.machine != "x86_64":
        raise CrtraceError(f"cores of {epoch.arch.machine} cannot be written")
    notes = core_notes(epoch, task)
    segments = _all_segments(epoch, task)
    with sparse_file(path) as out:
        _write_head(out, notes, segments)
        ranges, end = [], _data_start(notes, segments)
        for segment in segments:
            if segment.stored:
                out.write(segment.head, end)
                ranges.append((segment.start, segment.end, end))
                end += segment.end - segment.start
        stored = sum(segment.held for segment in segments)
        write_memory(Placement(out, ranges), epoch, task, stored, progress)
        out.truncate(end)
    return len(segments)


def find_task(epoch: Epoch, pid: int | None) -> TaskView:
    """The task with that pid, or the first. Raises as ``export_core`` does, and ``ImageDamaged``
    when it is damage that has the task, or what is mapped in it."""
    fitting = [view for view in epoch.tasks if pid in (None, view.task.pid)]
    lost = _lost_memory(epoch)
    for view in fitting:
        if view.id in lost:
            raise _without_memory(epoch, view, lost[view.id])
        if view.mm:
            _check_first(epoch, view, pid)
            return view
    _check_first(epoch, None, pid)
    if fitting:
        raise CrtraceError(
            f"process {fitting[0].task.pid} had ended in this epoch: it has no memory",
            hint="choose an earlier one with --epoch",
        )
    wanted = "a task" if pid is None else f"pid {pid}"
    raise UsageError(f"the epoch does not have {wanted}; it has: {_pids(epoch)}")


def _pids(epoch: Epoch) -> str:
    return ", ".join(str(view.task.pid) for view in epoch.tasks) or "none"


def _lost_memory(epoch: Epoch) -> dict[int, int]:
    """Tasks (record ids) without address space or map because of damage, and what is damaged."""
    rows = epoch.image.directory
    heads = {int(rows[each - 1]["parent"]): each for each in epoch.passed_over(RecordType.MM)}
    maps = {int(rows[each - 1]["parent"]): each for each in epoch.passed_over(RecordType.VMAS)}
    return {int(rows[head - 1]["parent"]): each for head, each in maps.items()} | heads


def _without_memory(epoch: Epoch, view: TaskView, number: int) -> ImageDamaged:
    what = "memory map" if view.mm else "address space"
    return ImageDamaged(
        f"{epoch.image.where(number)}: is damaged, and with it the {what} of process "
        f"{view.task.pid}: nothing can be exported",
        hint=f"choose another epoch, or another process with --pid; it has: {_pids(epoch)}",
    )


def _check_first(epoch: Epoch, view: TaskView | None, pid: int | None) -> None:
    """Raise ``ImageDamaged`` when a damaged task may be the one that is wanted."""
    lost = epoch.passed_over(RecordType.TASK)
    if lost and (view is None or (pid is None and lost[0] < view.id)):
        wanted = "the first" if pid is None else f"process {pid}"
        raise ImageDamaged(
            f"{epoch.image.where(lost[0])}: is damaged, and may have been {wanted}",
            hint=f"choose one of those that are left with --pid: {_pids(epoch)}",
        )


def _all_segments(epoch: Epoch, task: TaskView) -> list[Segment]:
    segments = list(islice(_segments(epoch, task), MAX_SEGMENTS + 1))
    if len(segments) > MAX_SEGMENTS:
        # Many mappings of one object can make any number of segments out of few bytes.
        raise CrtraceError(
            f"the core of pid {task.task.pid} would have more than {MAX_SEGMENTS} segments",
            hint="--format raw has no such limit",
        )
    return segments


def _segments(epoch: Epoch, task: TaskView) -> Iterator[Segment]:
    """The mappings as segments, split where bytes begin or end.

    Pages that could not be read, or are lost, are in none: debuggers take a segment without bytes,
    if they find no file for it, for zeros, and that would be a lie.
    """
    held: Segment | None = None
    for part in _with_heads(epoch, _parts(epoch, task)):
        if held and (held.vma, held.end, held.stored) == (part.vma, part.start, part.stored):
            held = held._replace(end=part.end, held=held.held + part.held)
            continue
        if held:
            yield held
        held = part
    if held:
        yield held


def _with_heads(epoch: Epoch, parts: Iterable[Part]) -> Iterator[Segment]:
    """Segments, some of which could be one; the first page of an ELF file is by itself."""
    for vma, start, end, source in parts:
        if source in (Source.UNREADABLE, Source.LOST):
            continue
        rest = start
        if source is Source.FILE and start == vma.start and not vma.pgoff:
            head = elf_head(epoch.files.get(vma.file)) if vma.flags & VmaFlag.READ else b""
            if head:
                rest += PAGE_SIZE
                yield Segment(vma, start, rest, True, head=head)
        if rest < end:
            held = end - rest if source in (Source.STORED, Source.OBJECT) else 0
            yield Segment(vma, rest, end, _has_bytes(vma, source, end - rest), held)


def _parts(epoch: Epoch, task: TaskView) -> Iterator[Part]:
    """All mappings from start to end.

    Those to which the same rule applies are looked up at once, gaps between them included, since
    to look up each takes too long where there are tens of thousands.
    """
    for _, group in groupby(task.vmas, _rule):
        vmas = list(group)
        at = 0
        for run in epoch.memory_runs(task, replace(vmas[0], end=vmas[-1].end)):
            end = run.addr + run.npages * PAGE_SIZE
            while at < len(vmas) and vmas[at].start < end:
                vma = vmas[at]
                yield Part(vma, max(vma.start, run.addr), min(vma.end, end), run.source)
                if vma.end > end:
                    break
                at += 1


def _rule(vma: Vma) -> tuple[int, ...]:
    """What, besides its address, decides where a page of a mapping comes from."""
    if vma.object_space:
        return vma.object_space, vma.pgoff - vma.start, vma.flags & VmaFlag.FILE_BEHIND
    return 0, vma.kind in UNKNOWN_WHEN_ABSENT, vma.file != 0


def _has_bytes(vma: Vma, source: Source, size: int) -> bool:
    if source is Source.ZERO:
        accessible = vma.flags & (VmaFlag.READ | VmaFlag.WRITE | VmaFlag.EXEC)
        return bool(accessible) and size <= MAX_ZEROS
    return source in (Source.STORED, Source.OBJECT)


def _data_start(notes: bytes, segments: list[Segment]) -> int:
    return (_notes_start(segments) + len(notes) + PAGE_SIZE - 1) & -PAGE_SIZE


def _notes_start(segments: list[Segment]) -> int:
    count = len(segments) + 1
    return EHDR.size + count * PHDR.size + (SHDR.size if count >= PN_XNUM else 0)


def _write_head(out: SparseFile, notes: bytes, segments: list[Segment]) -> None:
    count = len(segments) + 1
    many = count >= PN_XNUM
    section = EHDR.size + count * PHDR.size
    parts = [
        EHDR.pack(
            IDENT, ET_CORE, EM_X86_64, 1, 0, EHDR.size, section if many else 0, 0, EHDR.size,
            PHDR.size, PN_XNUM if many else count, SHDR.size if many else 0, int(many), 0,
        ),
        PHDR.pack(PT_NOTE, 0, _notes_start(segments), 0, 0, len(notes), 0, 4),
        *_program_headers(segments, _data_start(notes, segments)),
    ]  # fmt: skip
    if many:
        # The count does not fit its 16 bits: it is where section header 0 keeps sh_info.
        parts.append(SHDR.pack(0, 0, 0, 0, 0, 1, 0, count, 0, 0))
    out.write(b"".join(parts) + notes, 0)


def _program_headers(segments: list[Segment], offset: int) -> Iterator[bytes]:
    for vma, start, end, stored, *_ in segments:
        size = end - start
        bits = ((VmaFlag.READ, 4), (VmaFlag.WRITE, 2), (VmaFlag.EXEC, 1))
        flags = sum(bit for flag, bit in bits if vma.flags & flag)
        in_file = size if stored else 0
        yield PHDR.pack(PT_LOAD, flags, offset, start, 0, in_file, size, PAGE_SIZE)
        offset += in_file
