"""A process's address space as a list of VMAs that is read again cheaply."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from itertools import pairwise

import numpy as np

from crtrace.linux.procfs import WRITE, Process, Vma, empty_vmas, parse_maps
from crtrace.units import PAGE_SHIFT, U64, merge, no_pages, subtract

TASK_END = 0x7FFF_FFFF_F000
"""End of the user half of the address space with 4-level page tables, less its guard page."""
EVERYTHING = np.array([[0, TASK_END >> PAGE_SHIFT]], dtype=np.uint64)
"""All pages that a process could have: a range array."""
_HUGE = 2 << 20


class AddressSpace:
    """The VMAs of a process as last read. ``refresh`` costs one file read when nothing changed."""

    def __init__(self, process: Process) -> None:
        self._process = process
        self._raw = b""
        self.vmas: list[Vma] = []
        self.changes = 0
        """Times that it was found changed."""
        self._kinds: dict[str, U64] = {}
        self._huge: dict[int, bool] = {}
        """Which devices are hugetlbfs."""

    def refresh(self) -> bool:
        """Read the map again; whether it differs from before. Raises when there is none."""
        raw = self._process.read("maps")
        if not raw:
            raise self._process.gone()
        if raw == self._raw:
            return False
        self._raw, self.vmas = raw, parse_maps(raw)
        self.changes += 1
        self._kinds = {}
        return True

    def ranges(self, wanted: Callable[[Vma], bool]) -> U64:
        """The page ranges of the VMAs that ``wanted`` accepts."""
        found = [(vma.first_page, vma.end_page) for vma in self.vmas if wanted(vma)]
        return np.array(found, dtype=np.uint64) if found else no_pages()

    @property
    def mapped(self) -> U64:
        """The page ranges of all VMAs, joined."""
        return self._kind("mapped", lambda vma: True)

    @property
    def not_private(self) -> U64:
        """The page ranges where no private memory is, mapped or not."""
        return self._once("not private", lambda: subtract(EVERYTHING, self.private))

    @property
    def private(self) -> U64:
        """The page ranges of private memory, joined."""
        return self._kind("private", lambda vma: not vma.shared)

    @property
    def anonymous(self) -> U64:
        """The same, of what is no file's."""
        return self._kind("anonymous", lambda vma: not vma.shared and not vma.file_backed)

    @property
    def private_files(self) -> U64:
        """The same, of what is a file's until it is written."""
        return self._kind("files", lambda vma: vma.file_backed and not vma.shared)

    @property
    def touching_alike(self) -> U64:
        """The page ranges of private mappings that lie side by side and are of the same file, or
        none: what parts them is their protection, or the like."""
        return self._once("touching alike", self._find_touching)

    def _find_touching(self) -> U64:
        found = set()
        for one, other in pairwise(self.vmas):
            alike = (one.device, one.inode) == (other.device, other.inode)
            if one.end == other.start and alike and not (one.shared or other.shared):
                found |= {one, other}
        return merge(self.ranges(found.__contains__))

    @property
    def hugetlb(self) -> U64:
        """The page ranges of private mappings of hugetlbfs."""
        return self._kind("hugetlb", lambda vma: not vma.shared and self.is_hugetlb(vma))

    def is_hugetlb(self, vma: Vma) -> bool:
        """Whether a mapping's blocks are as large as huge pages. Other file systems may have such
        blocks, too: then some pages are read more often than they had to be."""
        if not vma.file_backed:
            return False
        if vma.device not in self._huge:
            try:
                fd = open_mapped(self._process, vma)
                try:
                    self._huge[vma.device] = os.fstatvfs(fd).f_bsize >= _HUGE
                finally:
                    os.close(fd)
            except OSError as error:
                return error.errno != errno.ENOENT  # else it is gone again, with its pages
        return self._huge[vma.device]

    @property
    def only_read(self) -> U64:
        """The page ranges of private memory that the process itself cannot write."""
        return self._kind("only read", lambda vma: not (vma.shared or vma.flags & WRITE))

    @property
    def vdso(self) -> U64:
        """The pages of ``[vdso]``: the kernel's own code, but debuggers want it in every image."""
        return self._kind("vdso", lambda vma: vma.name == "[vdso]")

    def _kind(self, name: str, wanted: Callable[[Vma], bool]) -> U64:
        return self._once(name, lambda: merge(self.ranges(wanted)))

    def _once(self, name: str, make: Callable[[], U64]) -> U64:
        """What is made of the map, until that changes."""
        if name not in self._kinds:
            self._kinds[name] = make()
        return self._kinds[name]

    def resident(self) -> int:
        """About how many pages it has in memory, as of now; the kernel has them counted."""
        return int(self._process.read("statm").split()[1])

    def empty(self) -> U64:
        """The page ranges of the VMAs without a page in memory or swapped out, as of now.

        It takes the kernel time in proportion to all memory that is in use.
        """
        if not (raw := self._process.read("smaps")):
            raise self._process.gone()
        return empty_vmas(raw)

    def touching(self, ranges: U64) -> list[Vma]:
        """The VMAs that hold a page of the range array, each once."""
        starts = np.array([vma.first_page for vma in self.vmas], dtype=np.uint64)
        ends = np.array([vma.end_page for vma in self.vmas], dtype=np.uint64)
        first = np.searchsorted(ends, ranges[:, 0], side="right")
        last = np.searchsorted(starts, ranges[:, 1], side="left")
        hit = np.zeros(len(self.vmas) + 1, dtype=np.int64)
        np.add.at(hit, first, 1)
        np.add.at(hit, np.maximum(first, last), -1)
        return [vma for vma, on in zip(self.vmas, np.cumsum(hit)[:-1], strict=True) if on]


def filled_by_reads() -> bool:
    """Whether a fault for reading can bring a huge page of the process's own."""
    try:
        with open("/sys/kernel/mm/transparent_hugepage/use_zero_page") as file:
            return file.read().strip() == "0"
    except OSError:
        return False


def open_mapped(process: Process, vma: Vma) -> int:
    """A descriptor of the inode that a VMA maps, whatever became of its name; ``OSError``."""
    return os.open(
        f"map_files/{vma.map_files_name}", os.O_RDONLY | os.O_CLOEXEC, dir_fd=process.dirfd
    )
