"""The armer of Linux 6.7 and later: write protection by userfaultfd, read by ``PAGEMAP_SCAN``.

Only pages with contents of their own are ever armed. A page that is mapped later, or comes back
after it was discarded, carries no protection and therefore counts as written, so unpopulated
memory costs nothing however large it is.
"""

from __future__ import annotations

import errno
import mmap
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import nullcontext
from functools import cache
from typing import TypeVar

import numpy as np

from crtrace.errors import COMPARE_INSTEAD, FeatureMissing, TargetBusy, TargetGone
from crtrace.linux import pagemap, uffd
from crtrace.linux.addrspace import EVERYTHING, AddressSpace
from crtrace.linux.inject import Injector, find_gadgets, read_ldt, take_descriptor
from crtrace.linux.libc import syscall
from crtrace.linux.pagemap import Filter, KernelScanner
from crtrace.linux.procfs import Process, Vma, calls_exec
from crtrace.linux.ptrace import signals_held
from crtrace.linux.stop import StoppedProcess
from crtrace.track.armer import How, Look, Scan
from crtrace.track.windows import effort, joined, large, middle, worth_while
from crtrace.units import (
    PAGE_SHIFT,
    PAGE_SIZE,
    U64,
    Bools,
    count_pages,
    intersect,
    merge,
    no_pages,
    subtract,
)

Here = TypeVar("Here")
There = TypeVar("There")
SMALL_GAP = 64  # pages
UNPROTECTED = Filter(exclude=pagemap.FILE | pagemap.PFNZERO | pagemap.GUARD | pagemap.WPALLOWED)
OWN_PROTECTED = Filter(need=pagemap.WPALLOWED, exclude=pagemap.OWN.exclude)
FEW = 512
"""Unprotected pages that are not worth a stop of their own."""
WRITTEN = Filter(need=pagemap.WRITTEN, exclude=pagemap.PFNZERO | pagemap.GUARD)
WRITTEN_OR_NOTHING = Filter(
    inverted=pagemap.PRESENT, any_of=pagemap.WRITTEN | pagemap.PRESENT | pagemap.PFNZERO
)
"""What is written, and where there is nothing: one walk for both, to be told apart afterwards. It
cannot arm, which passes over memory that is not to be armed."""
NOT_IN_PLACE = Filter(need=pagemap.SWAPPED)
_TOLD_APART = pagemap.REPORTED | pagemap.PFNZERO


def try_on_ourselves() -> None:
    """Map, write, arm, write again and see whether exactly the second write is noticed.

    Raises ``OSError`` or ``FeatureMissing`` where this way of arming does not work.
    """
    memory = mmap.mmap(-1, 4 * PAGE_SIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory[:] = b"x" * len(memory)
    start = np.frombuffer(memory, dtype=np.uint8).ctypes.data
    ours = os.open("/proc/self/pagemap", os.O_RDONLY | os.O_CLOEXEC)
    try:
        fd = syscall(uffd.SYS_USERFAULTFD, uffd.CREATE_FLAGS)
        try:
            uffd.enable(fd)
            if error := uffd.register(fd, start, start + len(memory)):
                raise OSError(error, os.strerror(error))
            scanner = KernelScanner(ours)
            want = Filter(need=pagemap.WRITTEN)
            pages = np.array([[start, start + len(memory)]], dtype=np.uint64)
            pages >>= np.uint64(PAGE_SHIFT)
            scanner.scan(want, pages, arm=True)
            memory[2 * PAGE_SIZE] = 0
            ranges, _ = scanner.scan(want, pages)
        finally:
            os.close(fd)
    finally:
        os.close(ours)
    if (ranges - np.uint64(start >> PAGE_SHIFT)).tolist() != [[2, 3]]:
        raise OSError("a write to an armed page was not reported as it should be")


def _no_scan(process: Process) -> Exception:
    """Why a process's pagemap cannot be scanned: for want of the feature, or of the process."""
    with open("/proc/self/pagemap", "rb", buffering=0) as own:
        if pagemap.supported(own.fileno()):
            return calls_exec(process) if process.alive() else process.gone()
    return FeatureMissing("this kernel has no PAGEMAP_SCAN", hint="Linux 6.7 or later is needed")


class UserfaultfdArmer:
    """Arms one process. It holds the only descriptor of the userfaultfd: when that closes, by
    :meth:`close` or by our death, the kernel lifts every protection."""

    name = "userfaultfd"
    stands_still = False

    def __init__(self, process: Process, space: AddressSpace) -> None:
        self._process = process
        self._space = space
        self._uffd = -1
        self._pagemap = process.open("pagemap")
        self._refused: set[Vma] = set()
        self._uncleared: list[Vma] = []
        """Registered, and their marks not yet taken off."""
        self._doubtful = False
        self._absent = no_pages()
        """Where page tables had nothing but the zero page, as far as was looked since."""
        self._sorted: Callable[[], object] = no_pages
        """Brings that, and what is swapped out, up to the last scan."""
        self._moving = no_pages()
        """Found written while the kernel moved them to other memory, perhaps: they are not armed
        when they arrive."""
        self._own_in_files: object = None
        """What was last found of them, and what was made of it: that seldom changes."""
        self._files_and_zeros = no_pages(), no_pages()
        self._swapped = no_pages()
        """Swapped out when last looked at."""
        self._unprotected = no_pages()
        """Not armed when last looked at, or shortly before."""
        self._effort = 0
        """How much a scan of everything has to do, in pages."""
        self.ldt = b""
        try:
            self._prepare()
        except BaseException:
            self.close()
            raise

    def _prepare(self) -> None:
        if not pagemap.supported(self._pagemap):
            raise _no_scan(self._process)
        self._scanner = KernelScanner(self._pagemap)
        self._second = KernelScanner(self._pagemap)
        """For what is looked for at the same time."""
        self._space.refresh()
        self._gadgets = find_gadgets(self._process, self._space.vmas)

    @property
    def heals(self) -> bool:
        """See :class:`crtrace.track.armer.Armer`."""
        return self._gadgets.heals

    def arm(self, stopped: StoppedProcess) -> None:
        """Create the userfaultfd inside the target and take it out."""
        self._space.refresh()
        theirs, _ = self._scanner.scan(Filter(need=pagemap.WPALLOWED))
        if len(theirs):
            raise TargetBusy(
                f"the writes of process {self._process.pid} are tracked by a userfaultfd already, "
                "its own or another crtrace's: two cannot",
                hint=COMPARE_INSTEAD,
            )
        try:
            with Injector(stopped, self._space.vmas, self._gadgets) as injector:
                self._uffd = take_descriptor(
                    injector, self._process.pidfd, uffd.SYS_USERFAULTFD, uffd.CREATE_FLAGS
                )
                self.ldt = read_ldt(injector)
        except OSError as error:
            raise self._explain(error) from error
        uffd.enable(self._uffd)

    def _explain(self, error: OSError) -> Exception:
        if error.errno in (errno.EMFILE, errno.ENFILE):
            return TargetBusy(
                f"process {self._process.pid} has no free descriptor",
                hint="one is needed for a moment; raise its RLIMIT_NOFILE with prlimit(1)",
            )
        if error.errno == errno.ESRCH:
            return TargetGone(f"process {self._process.pid} was killed while it was armed")
        if error.errno == errno.ENOSYS:
            return FeatureMissing("this kernel has no userfaultfd")
        return error

    def scan(self, space: AddressSpace, how: How) -> Scan:
        """See :class:`crtrace.track.armer.Armer`. Newer VMAs are registered on the way."""
        self._sorted()
        fresh, _ = self._scanner.scan(UNPROTECTED)
        unarmed = self._adopt(space, fresh, how.stopped) if len(fresh) else fresh
        self._unprotected = fresh if how.within is None else merge(fresh, self._unprotected)
        windows = self._windows(space, how)
        if self._uncleared:
            self._clear_marks(space, how.stopped)
        written, nothing = self._look_through(windows, how.beside)
        of_files, zeros = self._of_files(space)
        found = merge(subtract(written, of_files), fresh, _markers(space, *nothing), zeros)
        beyond = space.not_private

        @cache
        def absent() -> U64:
            # Who does not stand still may have filled a page between the two walks.
            self._absent = subtract(self._sort_out(windows, *nothing), written)
            return self._absent

        self._sorted = absent
        if not how.stopped:
            present = count_pages(subtract(space.private, absent()))
            self._effort = effort(present, len(space.vmas))
        self._doubtful = False
        return Scan(
            found,
            lambda: merge(beyond, subtract(absent(), zeros), of_files),
            unarmed,
            bounded=windows is not None,
        )

    def written_now(self) -> None:
        """See :class:`crtrace.track.armer.Armer`: a fault for each page."""

    def boundable(self) -> bool:
        """See :class:`crtrace.track.armer.Armer`."""
        return large(self._effort)

    def _windows(self, space: AddressSpace, how: How) -> U64 | None:
        """Where to look, given the bounds; None: everywhere.

        Mapped files are not bounded: who cuts one off takes no lock of its mappers. Nor is what is
        not armed, or was not in memory: newer kernels discard such pages without that lock.
        """
        if how.within is None or self._doubtful or self._uncleared:
            return None
        refused = space.ranges(self._is_refused) if self._refused else no_pages()
        beyond = merge(space.private_files, refused, self._unprotected, self._moving, self._swapped)
        within = merge(intersect(how.within, space.anonymous), beyond)
        return worth_while(within, self._effort, beside=how.beside is not None)

    def _look_through(
        self, windows: U64 | None, beside: ThreadPoolExecutor | None
    ) -> tuple[U64, tuple[U64, U64]]:
        """What was written, now armed again; and ranges with nothing but the zero page or what is
        swapped out, and their categories."""
        if beside and windows is None:
            return _at_once(beside, lambda: self._written(None), lambda: self._nothing(None))
        return self._written(windows), self._nothing(windows)

    def look(self, space: AddressSpace, beside: ThreadPoolExecutor) -> Look:
        """See :class:`crtrace.track.armer.Armer`."""
        self._sorted()
        cut = middle(space.mapped)
        low = np.array([[0, cut]], dtype=np.uint64)
        high = np.array([[cut, EVERYTHING[0, 1]]], dtype=np.uint64)
        upper, lower = _at_once(
            beside,
            lambda: self._scanner.scan(WRITTEN_OR_NOTHING, high, report=_TOLD_APART),
            lambda: self._second.scan(WRITTEN_OR_NOTHING, low, report=_TOLD_APART),
        )
        ranges = np.concatenate((lower[0], upper[0]))
        categories = np.concatenate((lower[1], upper[1]))
        written = _are(categories, pagemap.WRITTEN | pagemap.WPALLOWED, WRITTEN.exclude)
        written &= categories & np.uint64(WRITTEN.any_of) != 0  # what is not there counts, too
        nothing = ~_are(categories, pagemap.PRESENT, pagemap.PFNZERO)
        absent = self._sort_out(None, ranges[nothing], categories[nothing])
        found = subtract(merge(ranges[written]), self._moving)
        return Look(intersect(found, space.anonymous), intersect(absent, space.anonymous))

    def _written(self, windows: U64 | None) -> U64:
        """What was written since it was armed; it is armed again."""
        # What a scan has armed and could not hand over looks as if it had not been written.
        again, self._doubtful = self._doubtful, True
        still = self._moving
        if len(still):  # what arrives only behind this scan, or during it
            still = merge(self._scanner.scan(NOT_IN_PLACE, still)[0])
        written, categories = self._scanner.scan(WRITTEN, windows, arm=True)
        moving = written[(categories & np.uint64(pagemap.SWAPPED)) != 0]
        self._moving = merge(still, moving)
        return merge(written, self.everything()) if again else written

    def everything(self) -> U64:
        """See :class:`crtrace.track.armer.Armer`."""
        ranges, _ = self._scanner.scan(OWN_PROTECTED)
        return subtract(merge(ranges), self._space.ranges(self._is_refused))

    def _adopt(self, space: AddressSpace, fresh: U64, stopped: bool) -> U64:
        """Register the VMAs of unprotected pages; the pages that remain without protection.

        All that a VMA holds when it is registered counts as written, whatever its marks say. If
        the target runs, it is stopped for that, unless the pages are so few that they can as well
        be read in the pause.
        """
        if stopped:
            self._register(space, fresh)
        elif count_pages(subtract(fresh, space.ranges(self._is_refused))) <= FEW:
            return fresh
        else:
            try:
                with signals_held(), StoppedProcess(self._process):
                    self._register(space, fresh)
            except TargetBusy:
                return fresh
        return intersect(fresh, space.ranges(self._is_refused))

    def _register(self, space: AddressSpace, fresh: U64) -> None:
        space.refresh()
        for vma in space.touching(fresh):
            if vma in self._refused:
                continue
            if space.is_hugetlb(vma):
                # Where an armed page of it was discarded, a fault for reading arms the new one.
                self._refused.add(vma)
                continue
            self._uncleared.append(vma)
            error = uffd.register(self._uffd, vma.start, vma.end)
            if error:
                self._uncleared.pop()
            if error in (errno.EBUSY, errno.EPERM, errno.EINVAL):
                self._refused.add(vma)

    def _clear_marks(self, space: AddressSpace, stopped: bool) -> None:
        """Make all pages of VMAs that were just registered count as written.

        Where the map has changed since, that is done once more with the target stopped.
        """
        changed = [
            vma for vma in self._uncleared if uffd.clear_marks(self._uffd, vma.start, vma.end)
        ]
        if changed:
            with signals_held(), nullcontext() if stopped else StoppedProcess(self._process):
                space.refresh()
                spans = [(vma.first_page, vma.end_page) for vma in changed]
                for vma in space.touching(merge(np.array(spans, dtype=np.uint64))):
                    error = uffd.clear_marks(self._uffd, vma.start, vma.end)
                    if error == errno.ESRCH:
                        raise TargetGone("the address space that was armed is gone")
                    if error not in (0, errno.ENOENT):
                        raise OSError(error, os.strerror(error), str(vma))
        self._uncleared = []

    def _is_refused(self, vma: Vma) -> bool:
        return vma in self._refused

    def _nothing(self, windows: U64 | None) -> tuple[U64, U64]:
        return self._second.scan(pagemap.NOTHING_THERE, windows)

    def _sort_out(self, windows: U64 | None, ranges: U64, categories: U64) -> U64:
        """Where page tables have nothing but the zero page, ``ranges`` being what a scan in
        ``windows`` has found of that or swapped out."""
        swapped = _swapped_out(categories)
        out, absent = merge(ranges[swapped]), merge(ranges[~swapped])
        if windows is not None:
            out = merge(subtract(self._swapped, windows), out)
            absent = merge(subtract(self._absent, windows), absent)
        self._swapped, self._absent = out, absent
        return absent

    def _of_files(self, space: AddressSpace) -> tuple[U64, U64]:
        """The parts of private file mappings whose contents are those of the file; and pages in
        them that KSM has found to be zeros, which are not armed.

        To ask of every page whether it is its file's takes ten times as long as the scan itself, so
        only where files are mapped it is asked.
        """
        own, categories = self._scanner.scan(
            pagemap.OWN_OR_ZEROS, joined(space.private_files, SMALL_GAP), report=pagemap.PFNZERO
        )
        found = space.changes, own.tobytes(), categories.tobytes()
        if found != self._own_in_files:
            zeros = intersect(own[categories != 0], space.private_files)
            self._files_and_zeros = subtract(space.private_files, merge(own)), zeros
            self._own_in_files = found
        return self._files_and_zeros

    def let_go(self, address: int) -> None:
        """See :class:`crtrace.track.armer.Armer`: it is read every time, like what is refused."""
        for vma in self._space.vmas:
            if vma.start <= address < vma.end and not uffd.unregister(
                self._uffd, vma.start, vma.end
            ):
                self._refused.add(vma)

    def close(self) -> None:
        """Lift every protection by closing the userfaultfd."""
        for name in ("_uffd", "_pagemap"):
            fd = getattr(self, name)
            if fd >= 0:
                os.close(fd)
                setattr(self, name, -1)


def _swapped_out(categories: U64) -> Bools:
    # A guard page looks swapped out too, and reads as nothing.
    return _are(categories, pagemap.SWAPPED, pagemap.GUARD)


def _markers(space: AddressSpace, ranges: U64, categories: U64) -> U64:
    """What only looks swapped out. When an armed page of a file mapping is discarded, such a marker
    keeps its protection. These pages are read again, and turn out as what they are."""
    if not (categories & np.uint64(pagemap.SWAPPED)).any():
        return no_pages()
    markers = ranges[_swapped_out(categories) & _are(categories, 0, pagemap.WRITTEN)]
    return intersect(markers, space.private_files)


def _are(categories: U64, need: int, exclude: int) -> Bools:
    """Which have all of ``need`` and none of ``exclude``."""
    such: Bools = categories & np.uint64(need | exclude) == need
    return such


def _at_once(
    beside: ThreadPoolExecutor, here: Callable[[], Here], there: Callable[[], There]
) -> tuple[Here, There]:
    """What both return; ``there`` runs in the other thread, and has ended in any case."""
    other = beside.submit(there)
    try:
        found = here()
    finally:
        wait([other])
    return found, other.result()
