"""Memory that is written without a page fault, since it was pinned before it was armed.

What an io_uring has registered as fixed buffers is told by the ring. What others pinned for long
(RDMA, rings without a descriptor) is only counted by the kernel, and of some (vfio, sockets that
share memory with a network card) not even that. Direct reads pin their buffers for as long as they
last, and nothing tells where: only the descriptors do that allow them, or that may.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field

import numpy as np

from crtrace.errors import TargetBusy
from crtrace.linux.addrspace import AddressSpace
from crtrace.linux.procfs import Process
from crtrace.units import PAGE_SHIFT, PAGE_SIZE, U64, merge, no_pages, pairs

_RING = "anon_inode:[io_uring]"
_BUFFERS = re.compile(rb"^UserBufs:\t(\d+)\n((?: *\d+: .*\n)*)", re.M)
_BUFFER = re.compile(rb": 0x([0-9a-f]+)/(\d+)$", re.M)
_FLAGS = re.compile(rb"^flags:\t([0-7]+)$", re.M)
_INODE = re.compile(rb"^ino:\t(\d+)$", re.M)
_USERFAULTFD = "anon_inode:[userfaultfd]"
_FEATURES = re.compile(rb"^API:\t[0-9a-f]+:([0-9a-f]+):", re.M)
_WP_ASYNC = 1 << 15
_DEVICES = ("/dev/vfio/", "anon_inode:[vfio", "/dev/video", "/dev/kfd")
"""What can be asked to write to memory, and does not count what it pins, or pins nothing."""
_XDP_RINGS = (1 << 32, 3 << 31)
"""Offsets by which a socket's rings of what a network card filled are mapped."""
_FILES = re.compile(rb"^UserFiles:\t[1-9]", re.M)
_MOUNT = re.compile(rb"^mnt_id:\t(\d+)$", re.M)
_PASSED_ON = re.compile(rb"fuse(blk|\..*)?|virtiofs|9p|cifs|smb3|nfs4?|ceph")
"""File systems that may read past the page cache whatever the descriptor says."""
_COMPLETED = re.compile(rb"^CqTail:\t[1-9]", re.M)
_HUGE = 2 << 20
_TRIES = 100


@dataclass(slots=True)
class Pins:
    """What :meth:`find` found of one process. Without it nothing is known."""

    rings: list[str] = field(default_factory=list)
    """The descriptors of io_urings."""
    direct: int = 0
    """Descriptors by which direct reads may be under way."""
    devices: set[str] = field(default_factory=set)
    """What may write to its memory, and says nothing of it."""
    userfaultfds: int = 0
    """By these, pages can be moved without a fault or a lock."""
    notes_writes: bool = False
    """One of these notes the first write to a page, as we do: two cannot."""

    def find(self, process: Process) -> None:
        """Look at every descriptor; while the target runs: each
        takes some tens of microseconds."""
        self.rings, self.devices = [], set()
        self.direct = self.userfaultfds = 0
        self.notes_writes = False
        passed_on = _passed_on(process)
        for fd in process.listdir("fd"):
            link, info = process.readlink(f"fd/{fd}"), _fdinfo(process, fd)
            if link == _RING:
                self.rings.append(fd)
                self.direct += bool(_FILES.search(info))
            elif link == _USERFAULTFD:
                self.userfaultfds += 1
                found = _FEATURES.search(info)
                self.notes_writes |= bool(found and int(found[1], 16) & _WP_ASYNC)
            elif link.startswith(_DEVICES):
                self.devices.add(link)
            elif _reads_directly(info, passed_on):
                self.direct += 1

    def shared_with_cards(self, space: AddressSpace) -> bool:
        """Whether a network card writes packets into its memory (AF_XDP)."""
        return any(v.name.startswith("socket:[") and v.offset in _XDP_RINGS for v in space.vmas)

    def ranges(self, process: Process) -> U64:
        """The pages of all fixed buffers as registered now; quick. Raises ``TargetBusy`` when a
        ring stays busy, so that it does not tell."""
        if not self.rings:
            return no_pages()
        return merge(_pages(self._spans(process), PAGE_SIZE))

    def unexplained(self, process: Process) -> int:
        """Bytes that are pinned for long by something else than the rings that were found.

        The kernel counts a huge page as a whole, so a buffer accounts for the huge pages it may
        lie in: that much by others can go unnoticed.
        """
        pinned = int(process.status().get("VmPin", "0").split()[0]) << 10
        if not pinned:
            return 0
        pages = _pages(self._spans(process), PAGE_SIZE)
        exact = int((pages[:, 1] - pages[:, 0]).sum()) << PAGE_SHIFT
        if pinned <= exact:
            return 0
        wide = _pages(self._spans(process), _HUGE)
        return max(0, pinned - (int((wide[:, 1] - wide[:, 0]).sum()) << PAGE_SHIFT))

    def unmapped_rings(self, process: Process, space: AddressSpace) -> int:
        """Rings in use that no VMA shows: the kernel writes their entries into memory of the
        target's own (IORING_SETUP_NO_MMAP), and nothing tells where."""
        mapped = {vma.inode for vma in space.vmas if vma.name == _RING}
        found = [_fdinfo(process, fd) for fd in self.rings]
        inodes = [_INODE.search(info) for info in found if _COMPLETED.search(info)]
        return sum(1 for inode in inodes if inode and int(inode[1]) not in mapped)

    def _spans(self, process: Process) -> U64:
        """(address, bytes) of each buffer of each ring; one that two rings share comes twice."""
        found = [no_pages(), *(_buffers(process, fd) for fd in self.rings)]
        return np.concatenate(found)


def _fdinfo(process: Process, fd: str) -> bytes:
    """``/proc/PID/fdinfo/FD``; empty once it is closed."""
    try:
        return process.read(f"fdinfo/{fd}")
    except FileNotFoundError:
        return b""


def _reads_directly(info: bytes, passed_on: set[bytes]) -> bool:
    found, mount = _FLAGS.search(info), _MOUNT.search(info)
    flags = int(found[1], 8) if found else 0
    if flags & os.O_ACCMODE == os.O_WRONLY:
        return False
    return bool(flags & os.O_DIRECT) or (mount is not None and mount[1] in passed_on)


def _passed_on(process: Process) -> set[bytes]:
    """The mounts whose file systems pass on where to read to, by their numbers."""
    found = set()
    for line in process.read("mountinfo").splitlines():
        about, _, kind = line.partition(b" - ")
        if _PASSED_ON.fullmatch(kind.split(b" ", 1)[0]):
            found.add(about.split(b" ", 1)[0])
    return found


def _buffers(process: Process, fd: str) -> U64:
    """(address, bytes) of a ring's fixed buffers. A ring that is just in use leaves them out."""
    for _ in range(_TRIES):
        info = _fdinfo(process, fd)
        if info and process.readlink(f"fd/{fd}") != _RING:
            return no_pages()
        found = _BUFFERS.search(info)
        if found and found[2].count(b"\n") == int(found[1]):
            spans = [(int(at, 16), int(size)) for at, size in _BUFFER.findall(found[2])]
            # Before Linux 6.12 or so, an empty place is shown as a buffer at the end of all memory.
            spans = [span for span in spans if span[0] < 1 << 63]
            return np.array(spans, dtype=np.uint64) if spans else no_pages()
        if not info:
            return no_pages()
    raise TargetBusy(
        f"io_uring {fd} of process {process.pid} is in use all the time, and does not tell its "
        "buffers",
        hint="try again",
    )


def _pages(spans: U64, unit: int) -> U64:
    """The page ranges of (address, bytes), each rounded out to whole units of bytes."""
    unit_less_one, mask = np.uint64(unit - 1), np.uint64(2**64 - unit)
    starts, ends = spans[:, 0] & mask, (spans[:, 0] + spans[:, 1] + unit_less_one) & mask
    return pairs(starts, ends) >> np.uint64(PAGE_SHIFT)
