"""What ``list`` and ``show`` tell, as plain dicts ready for JSON."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from itertools import count
from typing import Any

from crtrace.errors import CrtraceError
from crtrace.image.chainindex import IndexEntry, field_dict
from crtrace.image.epoch import Epoch, TaskView, ThreadView
from crtrace.image.header import Stats
from crtrace.image.losses import UnreadableRange, UnreadableReason
from crtrace.image.reader import Chain
from crtrace.image.resolve import Source
from crtrace.image.tables import (
    FileFlag,
    FileInfo,
    Vma,
    VmaKind,
)
from crtrace.units import PAGE_SIZE

Progress = Callable[[int, int], None]
"""Called with how many are done, and of how many."""


def list_epochs(chain: Chain, progress: Progress | None = None) -> list[dict[str, Any]]:
    """One dict an epoch, ascending: what the index has, reason and pause.

    An image that cannot be read does not end the list: its dict says why under ``damage``, and
    its ``reason`` and ``pause_us`` are None, as they are where they were not recorded.
    """
    rows = []
    for entry in chain.entries:
        rows.append(_list_one(chain, entry))
        if progress:
            progress(len(rows), len(chain.entries))
    return rows


def _list_one(chain: Chain, entry: IndexEntry) -> dict[str, Any]:
    row: dict[str, Any] = {**field_dict(entry), "reason": None, "pause_us": None, "damage": None}
    try:
        image = chain.image(entry)
        row["reason"] = image.header.reason
        for _, _, stats in image.records(Stats):
            row["pause_us"] = stats.fields.get("frozen_time")
    except CrtraceError as error:
        row["damage"] = str(error)
    return row


def show(epoch: Epoch, progress: Progress | None = None) -> dict[str, Any]:
    """Everything about an epoch but the contents of its pages. Progress is in mappings."""
    header, arch = epoch.header, epoch.arch
    total, done = sum(len(task.vmas) for task in epoch.tasks), count(1)

    def described(task: TaskView, vma: Vma) -> dict[str, Any]:
        row = _vma(epoch, task, vma)
        if progress:
            progress(next(done), total)
        return row

    return {
        **field_dict(epoch.image.entry),
        "reason": header.reason,
        "boottime_ns": header.boottime_ns,
        "boot_id": header.boot_id.hex(),
        "kernel": header.kernel,
        "hostname": header.hostname,
        "tool_version": header.tool_version,
        "armer": header.armer,
        "machine": arch.machine if arch else None,
        "images_needed": len(epoch.lineage),
        "tasks": [
            _task(task) | {"vmas": [described(task, vma) for vma in task.vmas]}
            for task in epoch.tasks
        ],
        "files": [_file(file) for file in epoch.files.values()],
        "stats": epoch.stats,
        "losses": [_loss(loss) for loss in epoch.losses()],
    }


def _task(view: TaskView) -> dict[str, Any]:
    task = view.task
    return {
        "pid": task.pid,
        "ppid": task.ppid,
        "comm": task.comm,
        "cmdline": [
            part.decode("utf-8", "backslashreplace")
            for part in task.cmdline.rstrip(b"\0").split(b"\0")
        ],
        "state": task.state,
        "start_ticks": task.start_ticks,
        "uid": list(task.uid),
        "gid": list(task.gid),
        "cwd": task.cwd,
        "root": task.root,
        "cgroup": task.cgroup,
        "ns_pids": list(task.ns_pids),
        "namespaces": dict(task.namespaces),
        "exit_status": task.exit_status,
        "space": view.mm.space if view.mm else None,
        "threads": [_thread(thread) for thread in view.threads],
    }


def _thread(view: ThreadView) -> dict[str, Any]:
    thread = view.thread
    return {
        "tid": thread.tid,
        "ns_tid": thread.ns_tid,
        "comm": thread.comm,
        "state": thread.state,
        "sigmask": thread.sigmask,
        "pending": thread.pending,
        "syscall": thread.syscall,
        "registers": [kind for kind, _ in view.cpu.sets] if view.cpu else [],
    }


def _vma(epoch: Epoch, task: TaskView, vma: Vma) -> dict[str, Any]:
    return {
        "start": vma.start,
        "end": vma.end,
        "perms": vma.perms,
        "offset": vma.pgoff,
        "kind": value_name(VmaKind, vma.kind),
        "name": vma.name,
        "file": vma.file or None,
        "bytes": held_bytes(epoch, task, vma),
    }


def held_bytes(epoch: Epoch, task: TaskView, vma: Vma) -> dict[str, int]:
    """How many bytes of a mapping come from where."""
    held: Counter[Source] = Counter()
    for run in epoch.memory_runs(task, vma):
        held[run.source] += run.npages * PAGE_SIZE
    return {source.value: held[source] for source in Source if source is not Source.LOST}


def _file(file: FileInfo) -> dict[str, Any]:
    return {
        "id": file.id,
        "path": file.path,
        "flags": [flag.name.lower() for flag in FileFlag if file.flags & flag and flag.name],
        "dev": file.dev,
        "inode": file.inode,
        "size": file.size,
        "mtime_ns": file.mtime_ns,
        "build_id": file.build_id.hex(),
        "kept": bool(file.object_space),
    }


def _loss(loss: UnreadableRange) -> dict[str, Any]:
    return {
        "space": loss.space,
        "start": loss.first * PAGE_SIZE,
        "end": (loss.first + loss.count) * PAGE_SIZE,
        "errno": loss.errno,
        "reason": value_name(UnreadableReason, loss.reason),
    }


def value_name(kind: type[VmaKind] | type[UnreadableReason], value: int) -> str:
    """The name of a value, or its number when a later writer made it up."""
    return next((member.name.lower() for member in kind if member == value), str(value))
