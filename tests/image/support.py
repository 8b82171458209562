"""Small chains to test with."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np

from crtrace.image.chainindex import IndexEntry
from crtrace.image.reader import Chain, Epoch
from crtrace.image.records import Cpu, Mm, Task, Thread
from crtrace.image.store import ChainWriter, ImageWriter
from crtrace.image.tables import Files, Vma, VmaFlag, VmaKind, Vmas
from crtrace.units import PAGE_SIZE, U64, Bytes

RW = VmaFlag.READ | VmaFlag.WRITE
SPACE = 1
ZERO = bytes(PAGE_SIZE)
REGISTERS = bytes(range(216))


def numbers(pages: Iterable[int]) -> U64:
    """Page numbers as an array."""
    return np.array(list(pages), dtype=np.uint64)


def page(seed: int) -> bytes:
    """A page that looks like no other and compresses well; 0 gives zeros."""
    return seed.to_bytes(8, "little") * (PAGE_SIZE // 8)


def noise(seed: int) -> bytes:
    """A page that does not compress."""
    return np.random.default_rng(seed).bytes(PAGE_SIZE)


def array(pages: Iterable[bytes]) -> Bytes:
    """Pages as rows."""
    return np.frombuffer(b"".join(pages), dtype=np.uint8).reshape(-1, PAGE_SIZE)


def add_task(
    image: ImageWriter,
    vmas: Iterable[Vma] = (),
    *,
    pid: int = 100,
    space: int = SPACE,
    files: Files | None = None,
    threads: int = 1,
) -> None:
    """A task with its threads and mappings."""
    task = image.add(Task(pid=pid, comm="target", cmdline=b"./target\0-x\0"))
    mm = image.add(Mm(space=space), parent=task)
    image.add(Vmas(tuple(vmas)), parent=mm)
    if files:
        image.add(files)
    for at in range(threads):
        thread = image.add(Thread(tid=pid + at, ns_tid=pid + at), parent=task)
        image.add(Cpu(((1, REGISTERS), (2, bytes(512)))), parent=thread)


def anon(first: int, count: int, **fields: int) -> Vma:
    """An anonymous mapping of ``count`` pages from page ``first``."""
    start, end = first * PAGE_SIZE, (first + count) * PAGE_SIZE
    return Vma(start=start, end=end, flags=RW, kind=VmaKind.ANON, **fields)


def write(
    image: ImageWriter, pages: Mapping[int, bytes], *, space: int = SPACE, round: int = 0
) -> None:
    """Write pages from a dict."""
    if pages:
        image.write_pages(space, numbers(pages), array(pages.values()), round=round)


def epoch(
    writer: ChainWriter,
    pages: Mapping[int, bytes],
    *,
    holes: Iterable[int] = (),
    full: bool = False,
    vmas: Iterable[Vma] = (),
) -> IndexEntry:
    """Commit an epoch of one task with these changes."""
    with writer.begin(full=full, reason="dump") as image:
        add_task(image, vmas)
        write(image, pages)
        image.mark_holes(SPACE, numbers(sorted(holes)))
        return image.commit({})


def small_chain(path: Path, epochs: int = 3) -> Path:
    """A chain of a few epochs with pages, zeros, holes and noise."""
    vmas = [anon(16, 32)]
    with ChainWriter.open(path, create=True) as writer:
        epoch(writer, {16: page(1), 17: ZERO, 18: noise(1), 19: page(4)}, vmas=vmas)
        for number in range(1, epochs):
            epoch(writer, {17: page(number), 30 + number: page(9)}, holes=[19], vmas=vmas)
    return path


def contents(view: Epoch, *, space: int = SPACE) -> dict[int, bytes]:
    """Everything that an epoch holds of a space."""
    pages = view.index(space).pages
    data = view.read_pages(space, pages)
    return {int(number): row.tobytes() for number, row in zip(pages, data, strict=True)}


def read_all(path: Path) -> list[dict[int, bytes]]:
    """The contents of every epoch of a chain."""
    with Chain.open(path) as chain:
        return [contents(chain.epoch(entry.epoch)) for entry in chain.entries]


def apply_step(
    writer: ChainWriter, memory: dict[int, dict[int, bytes]], kind: str, pages: set[int], seed: int
) -> None:
    """One step of ``memory``, and an epoch after which the chain has the same."""
    if kind == "space":
        memory.setdefault(2, {})
    elif kind == "drop":
        memory.pop(2, None)
    with writer.begin(full=kind == "full") as image:
        for space, held in memory.items():
            add_task(image, pid=100 + space, space=space)
            if kind == "hole":
                image.mark_holes(space, numbers(sorted(pages)))
                for at in pages:
                    held.pop(at, None)
            elif kind != "full":
                new = {at: page(seed * 100 + at) if seed else ZERO for at in sorted(pages)}
                held.update(new)
                write(image, new, space=space)
            if image.header.full or space not in writer.known:
                write(image, dict(sorted(held.items())), space=space, round=1)
        image.commit({})
