"""``PAGEMAP_SCAN``: which pages of a process have contents, which were written, and arm them again.

Linux 6.7 and later. Categories and flags are those of ``include/uapi/linux/fs.h``.
"""

from __future__ import annotations

import fcntl
import struct
from dataclasses import dataclass

import numpy as np

from crtrace.errors import TargetGone
from crtrace.units import PAGE_SHIFT, PAGE_SIZE, U64

WPALLOWED, WRITTEN, FILE, PRESENT, SWAPPED, PFNZERO = (1 << bit for bit in range(6))
GUARD = 1 << 8
"""Guard regions report themselves from Linux 6.15 on; older kernels refuse the bit."""

REPORTED = WPALLOWED | WRITTEN | PRESENT | SWAPPED
"""Categories in the answer. Not FILE: to tell it, the kernel looks at every page's own descriptor,
and a scan takes ten times as long; so it is used only as a condition, and only where needed."""

WP_MATCHING = 1
_ARG = struct.Struct("<12Q")
_PAGEMAP_SCAN = 0xC0606610
_VECTOR = 8192
TASK_END = 0x7FFF_FFFF_F000
"""End of the user half of the address space with 4-level page tables, less its guard page."""


@dataclass(frozen=True, slots=True)
class Filter:
    """Which pages a scan reports: all of ``need``, none of ``exclude``, any of ``any_of``.

    In ``any_of``, what is in ``inverted`` means its absence.
    """

    need: int = 0
    exclude: int = 0
    any_of: int = PRESENT | SWAPPED
    inverted: int = 0


NOTHING_THERE = Filter(inverted=PRESENT, any_of=PRESENT | PFNZERO)
"""Pages that are not present, or are the zero page. Swapped-out ones among them say so."""


class Scanner:
    """Scans one process through its open pagemap. ``vector`` is touched when made, not in use."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self._vector = np.zeros((_VECTOR, 3), dtype=np.uint64)

    def scan(
        self, want: Filter, *, arm: bool = False, start: int = 0, end: int = TASK_END
    ) -> tuple[U64, U64]:
        """Page ranges that match, and the categories of each.

        Returns an ``(n, 2)`` array of half-open page ranges and ``(n,)`` categories. With ``arm``,
        each reported page that was written is write-protected in the same step, and pages outside
        write-protect VMAs are passed over in silence (so ask for those apart). ``start`` and
        ``end`` are byte addresses. Raises ``TargetGone``.
        """
        mask = want.need | want.exclude
        parts = []
        while start < end:
            arg = bytearray(
                _ARG.pack(
                    _ARG.size, WP_MATCHING if arm else 0, start, end, 0, self._vector.ctypes.data,
                    _VECTOR, 0, want.exclude | want.inverted, mask, want.any_of,
                    REPORTED,
                )
            )  # fmt: skip
            try:
                count = fcntl.ioctl(self.fd, _PAGEMAP_SCAN, arg)
            except ProcessLookupError as error:
                raise TargetGone("the address space that was scanned is gone") from error
            parts.append(self._vector[:count].copy())
            start = _ARG.unpack(arg)[4]
        found = np.concatenate(parts) if parts else self._vector[:0]
        return found[:, :2] >> np.uint64(PAGE_SHIFT), found[:, 2]


def supported(fd: int, category: int = PRESENT) -> bool:
    """Whether this kernel has the scan at all, and knows ``category``."""
    probe = np.zeros((1, 3), dtype=np.uint64)
    arg = bytearray(
        _ARG.pack(
            _ARG.size, 0, 0, PAGE_SIZE, 0, probe.ctypes.data, 1, 0, 0, 0, category, category
        )
    )  # fmt: skip
    try:
        fcntl.ioctl(fd, _PAGEMAP_SCAN, arg)
    except ProcessLookupError:
        pass  # it is known; the process is gone
    except OSError:
        return False
    return True
