"""Copy pages out of a process: the fast way in merged runs, and for what that cannot read, the
sure way page by page. A page that cannot be read at all is an answer, not an exception."""

from __future__ import annotations

import errno
import os

import numpy as np

from crtrace.errors import TargetGone
from crtrace.faults import point
from crtrace.linux.libc import IOV_MAX, process_vm_readv
from crtrace.linux.procfs import Process
from crtrace.units import PAGE_SHIFT, PAGE_SIZE, U64, Bytes, count_pages


class MemoryReader:
    """Reads one process's memory as it was when this reader was opened: after an ``execve`` it
    raises ``TargetGone`` rather than read the new program's."""

    def __init__(self, process: Process) -> None:
        self._pid = process.pid
        self._mem = process.open("mem")

    def close(self) -> None:
        """Close the memory file; it may be called twice."""
        if self._mem >= 0:
            os.close(self._mem)
            self._mem = -1

    def same_program(self, known: int) -> bool:
        """Whether the address space still lives, asked with an address that was readable in it."""
        try:
            return len(os.pread(self._mem, 1, known)) == 1
        except OSError as error:
            return error.errno == errno.EIO  # it is there, but not that page

    def read(self, ranges: U64, out: Bytes) -> list[tuple[int, int]]:
        """Fill ``out`` (flat, at least the bytes of ``ranges``) with the pages in order.

        Returns (position of the page in ``out``, errno) for each page that nothing could read;
        its bytes there are zeros. Raises ``TargetGone``.
        """
        pieces = np.ascontiguousarray(ranges << np.uint64(PAGE_SHIFT))
        pieces[:, 1] -= pieces[:, 0]
        total, done = count_pages(ranges) * PAGE_SIZE, 0
        failed: list[tuple[int, int]] = []
        while done < total:
            got, asked = self._read_some(pieces, out, done)
            done += got
            if got == asked:
                pieces = pieces[IOV_MAX:]
                continue
            pieces = _skip(pieces, got)
            error = self._read_page(int(pieces[0, 0]), out[done : done + PAGE_SIZE])
            if error:
                failed.append((done // PAGE_SIZE, error))
            done += PAGE_SIZE
            pieces = _skip(pieces, PAGE_SIZE)
        return failed

    def _read_some(self, pieces: U64, out: Bytes, at: int) -> tuple[int, int]:
        batch = pieces[:IOV_MAX]
        asked = int(batch[:, 1].sum())
        try:
            got = process_vm_readv(self._pid, out.ctypes.data + at, asked, batch)
        except ProcessLookupError as error:
            raise TargetGone(f"process {self._pid} has exited") from error
        return got // PAGE_SIZE * PAGE_SIZE, asked

    def _read_page(self, address: int, out: Bytes) -> int:
        """One page through ``/proc/PID/mem``, which also reads what has no read permission."""
        point("preadv /proc/PID/mem")
        try:
            got = os.preadv(self._mem, [out.data], address)
        except OSError as error:
            out[:] = 0
            return error.errno or errno.EIO
        if got == 0:
            raise TargetGone(f"process {self._pid} has left this address space")
        if got < len(out):
            out[:] = 0
            return errno.EIO
        return 0


def _skip(pieces: U64, size: int) -> U64:
    """``pieces`` of (address, length) without their first ``size`` bytes."""
    ends = np.cumsum(pieces[:, 1])
    first = int(np.searchsorted(ends, np.uint64(size), side="right"))
    rest = pieces[first:].copy()
    if len(rest):
        inside = np.uint64(size) - (ends[first] - pieces[first, 1])
        rest[0, 0] += inside
        rest[0, 1] -= inside
    return rest
