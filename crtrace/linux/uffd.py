"""userfaultfd in asynchronous write-protect mode: the kernel notes a first write by itself.

No page fault is ever delivered to us: with ``WP_ASYNC`` the kernel clears the mark and lets the
write go on, so a target never waits for crtrace, and closing the descriptor undoes everything.
"""

from __future__ import annotations

import errno
import struct

from crtrace.errors import FeatureMissing
from crtrace.linux.libc import ioctl

SYS_USERFAULTFD = 323
O_CLOEXEC, USER_MODE_ONLY = 0o2000000, 1
CREATE_FLAGS = O_CLOEXEC | USER_MODE_ONLY
"""USER_MODE_ONLY needs no privilege in the target, and makes no difference in WP_ASYNC mode."""

_UFFD_API = 0xAA
_UFFDIO_API = 0xC018AA3F
_UFFDIO_REGISTER = 0xC020AA00
_UFFDIO_UNREGISTER = 0x8010AA01
_UFFDIO_WRITEPROTECT = 0xC018AA06
_REGISTER_MODE_WP = 2
WP_HUGETLBFS_SHMEM, WP_UNPOPULATED, WP_ASYNC = 1 << 12, 1 << 13, 1 << 15
FEATURES = WP_HUGETLBFS_SHMEM | WP_UNPOPULATED | WP_ASYNC


def enable(fd: int) -> None:
    """Choose the features; raises ``FeatureMissing`` on a kernel without WP_ASYNC (before 6.7)."""
    try:
        ioctl("UFFDIO_API", fd, _UFFDIO_API, struct.pack("<3Q", _UFFD_API, FEATURES, 0))
    except OSError as error:
        raise FeatureMissing(
            f"userfaultfd has no asynchronous write protection here: {error.strerror}",
            hint="Linux 6.7 or later with CONFIG_USERFAULTFD and CONFIG_PTE_MARKER_UFFD_WP",
        ) from error


def register(fd: int, start: int, end: int) -> int:
    """Register whole VMAs in ``[start, end)`` (bytes) for write protection; 0 or the errno.

    While the target is stopped: a VMA that has changed since it was seen would be registered in
    part, and thereby split. Then, before a scan is believed, :func:`clear_marks`.

    ``EBUSY``: another userfaultfd holds the range. ``EPERM``/``EINVAL``: the kernel does not track
    that kind. ``ENOMEM``: the range is gone, or its address space is.
    """
    registration = struct.pack("<4Q", start, end - start, _REGISTER_MODE_WP, 0)
    return _try("UFFDIO_REGISTER", fd, _UFFDIO_REGISTER, registration)


def unregister(fd: int, start: int, end: int) -> int:
    """Lift all protection in ``[start, end)`` (bytes), and note no write there; 0 or the errno."""
    return _try("UFFDIO_UNREGISTER", fd, _UFFDIO_UNREGISTER, struct.pack("<2Q", start, end - start))


def clear_marks(fd: int, start: int, end: int) -> int:
    """Lift the protection of all pages in registered VMAs; 0 or the errno.

    Marks may be left from an earlier registration that ``mremap`` ended, on pages that have been
    made writable since: such a page would look protected for ever, and its writes be missed.

    ``ENOENT``: there is something that is not registered. ``ESRCH``: the address space is gone.
    """
    protection = struct.pack("<3Q", start, end - start, 0)
    return _try("UFFDIO_WRITEPROTECT", fd, _UFFDIO_WRITEPROTECT, protection)


def _try(name: str, fd: int, request: int, argument: bytes) -> int:
    try:
        ioctl(name, fd, request, argument)
    except OSError as error:
        return error.errno or errno.EIO
    return 0
