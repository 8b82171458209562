"""Memory that lives in an object and not in the process: shared memory, memfd, shared files.

Anybody who has the object can write it, by a mapping of his own or by ``pwrite``, and no protection
of the target's page tables sees that. So its pages are read in every epoch while the target is
stopped, through the object and not through the target's mapping; what did not change costs no
stored byte, since contents are compared by hash.
"""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass

import numpy as np

from crtrace.capture.spaces import Spaces
from crtrace.capture.target import Target
from crtrace.linux import pagemap
from crtrace.linux.addrspace import open_mapped
from crtrace.linux.files import FileFacts, nobody_writes
from crtrace.linux.procfs import WRITE, FileKey, Vma
from crtrace.units import PAGE_SHIFT, PAGE_SIZE, U64, Bytes, intersect, merge, no_pages, pairs

_OURS = errno.EMFILE, errno.ENFILE, errno.ENOMEM
"""What says nothing of a file that could not be opened, but of us."""
SETTLED_NS = 1_000_000_000
"""A file that was written before can be told from one written since by its time of change: no
kernel's clock for these times is as coarse as this."""

Still = tuple[int, ...]
"""What is the same as long as contents and mapped pages of an object are."""


def kept(vma: Vma, facts: FileFacts | None) -> bool:
    """Whether the contents of what a VMA maps belong into the image.

    They do when they can be found nowhere else later: memory without a disk behind it, deleted
    files, and shared files that are being written. Else the reference to the file is enough.
    """
    if facts is None or not facts.regular:
        return False
    nowhere_else = facts.memory or facts.links == 0
    return nowhere_else or (vma.shared and bool(vma.flags & WRITE))


@dataclass(frozen=True, slots=True)
class Mapping:
    """A VMA, and whose it is."""

    target: Target
    vma: Vma


@dataclass(slots=True)
class MappedObject:
    """One object, with the VMAs by which targets map parts of it."""

    key: FileKey
    space: int
    mappings: list[Mapping]
    facts: FileFacts
    fd: int = -1

    def still(self) -> Still | None:
        """What tells whether an object is still the same that it was, or None if only its contents
        can: somebody has it open for writing, or may have written it just now.

        Only for deleted files that are mapped privately or for reading, such as libraries after an
        upgrade; they need not be read while the target is stopped.
        """
        written = any(m.vma.shared and m.vma.flags & WRITE for m in self.mappings)
        if self.facts.memory or written or not nobody_writes(self.fd):
            return None
        try:
            about = os.fstat(self.fd)
        except OSError:  # whoever serves it is gone
            return None
        if about.st_ctime_ns > time.time_ns() - SETTLED_NS:
            return None
        return about.st_size, about.st_ctime_ns, *self.extent().ravel().tolist()

    def extent(self) -> U64:
        """The pages of the object that some VMA maps."""
        vmas = [mapping.vma for mapping in self.mappings]
        first = [vma.offset >> PAGE_SHIFT for vma in vmas]
        pairs = [
            (at, at + vma.end_page - vma.first_page) for at, vma in zip(first, vmas, strict=True)
        ]
        return merge(np.array(pairs, dtype=np.uint64))

    def open(self) -> bool:
        """Open the object itself; False where it went away between two looks, as its VMAs did."""
        for mapping in self.mappings:
            try:
                self.fd = open_mapped(mapping.target.process, mapping.vma)
            except OSError as error:
                if error.errno in _OURS:
                    raise
            else:
                return True
        return False

    def close(self) -> None:
        """Close it, so that we never keep an object alive longer than the target does."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def populated(self, known: U64) -> U64:
        """The mapped pages that may hold something: page ranges within the object.

        Memory objects and deleted files tell their holes. Of a file that is still on disk, it is
        the pages that targets have in their page tables, and those (``known`` page numbers) that an
        earlier epoch stored: to read it all could mean to read a whole disk.
        """
        inside = self.extent()
        with suppress(OSError):  # whoever serves it is gone: to read it will tell
            end = (os.fstat(self.fd).st_size + PAGE_SIZE - 1) >> PAGE_SHIFT
            inside = intersect(inside, np.array([[0, max(end, 0)]], dtype=np.uint64))
        present = [_present(mapping) for mapping in self.mappings]
        if self.facts.memory or not self.facts.links:
            data = (_data_ranges(self.fd, *span) for span in inside.tolist())
            return intersect(merge(*data, *present), inside)
        stored = pairs(known, known + np.uint64(1))
        return intersect(merge(*present, stored), inside)

    def read(self, ranges: U64, buffer: Bytes) -> list[tuple[int, int]]:
        """Fill ``buffer`` with the object's pages; what lies behind its end reads as zeros.

        Returns (position of the page in ``buffer``, errno) of those that could not be read.
        """
        failed: list[tuple[int, int]] = []
        at = 0
        for first, end in ranges.tolist():
            room = buffer[at * PAGE_SIZE : (at + end - first) * PAGE_SIZE]
            error = self._read_run(first * PAGE_SIZE, room)
            if error:
                failed += [(page, error) for page in range(at, at + end - first)]
            at += end - first
        return failed

    def _read_run(self, offset: int, room: Bytes) -> int:
        done = 0
        try:
            while got := os.preadv(self.fd, [room[done:].data], offset + done):
                done += got
        except OSError as error:
            return error.errno or errno.EIO
        room[done:] = 0
        return 0


def _present(mapping: Mapping) -> U64:
    """The pages of the object that are in page tables because of this VMA."""
    vma = mapping.vma
    ranges, _ = mapping.target.scanner.scan(pagemap.Filter(), vma.pages)
    shift = (vma.offset >> PAGE_SHIFT) - vma.first_page
    return (ranges.astype(np.int64) + shift).astype(np.uint64)


def _data_ranges(fd: int, first: int, end: int) -> U64:
    """Where a memory object has pages, within page range ``[first, end)``."""
    found, at, stop = [], first << PAGE_SHIFT, end << PAGE_SHIFT
    while at < stop:
        try:
            data = os.lseek(fd, at, os.SEEK_DATA)
            if data >= stop:
                break
            at = min(os.lseek(fd, data, os.SEEK_HOLE), stop)
        except OSError as error:
            if error.errno == errno.ENXIO:
                break  # nothing more, or cut off meanwhile by somebody who is not stopped
            data, at = at, stop  # it cannot tell its holes
        found.append((data >> PAGE_SHIFT, (at + PAGE_SIZE - 1) >> PAGE_SHIFT))
    return np.array(found, dtype=np.uint64) if found else no_pages()


def mapped_objects(
    targets: Iterable[Target], spaces: Spaces, facts: dict[FileKey, FileFacts | None]
) -> list[MappedObject]:
    """The objects whose contents belong into the image, of all that are mapped, each once."""
    found: dict[FileKey, MappedObject] = {}
    for target in targets:
        for vma in target.map.vmas:
            key = target.process.file_key(vma)
            about = facts.get(key)
            if not vma.file_backed or about is None or not kept(vma, about):
                continue
            if key not in found:
                found[key] = MappedObject(key, spaces.of_object(key), [], about)
            found[key].mappings.append(Mapping(target, vma))
    return [each for each in found.values() if each.open()]
