"""System calls that Python has no wrapper for: thin, typed, raising ``OSError``."""

from __future__ import annotations

import ctypes
import fcntl
import os
import re
from typing import TYPE_CHECKING

import numpy as np

from crtrace.faults import point
from crtrace.units import U64, Pid

if TYPE_CHECKING:
    from numpy.typing import NDArray

SYS_PROCESS_VM_READV = 310
SYS_KCMP, _KCMP_VM = 312, 1
SYS_PERF_EVENT_OPEN = 298
SYS_BPF = 321
SYS_PIDFD_GETFD = 438
IOV_MAX = 1024
_NAMES = {
    SYS_BPF: "bpf", SYS_PERF_EVENT_OPEN: "perf_event_open", SYS_PIDFD_GETFD: "pidfd_getfd",
}  # fmt: skip

_libc = ctypes.CDLL(None, use_errno=True)
_syscall = _libc.syscall
_syscall.restype = ctypes.c_long
_syscall.argtypes = [ctypes.c_long] + [ctypes.c_ulong] * 6
_ptrace = _libc.ptrace
_ptrace.restype = ctypes.c_long
_ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]
_mlock = _libc.mlock
_mlock.argtypes = [ctypes.c_void_p, ctypes.c_size_t]


_WORDS = [ctypes.c_uint64 * count for count in range(8)]


def words(*values: int) -> ctypes.Array[ctypes.c_uint64]:
    """Up to seven 64-bit words for the kernel to read or fill. Their types are kept: garbage
    collection would take them, and to make one again takes a pause 10 to 30 µs."""
    return _WORDS[len(values)](*values)


def syscall(number: int, *args: int) -> int:
    """The result of a system call; ``OSError`` with its errno when it fails."""
    point(_NAMES.get(number, "syscall"), args[0] if number == SYS_BPF else "")
    padded = args + (0,) * (6 - len(args))
    result: int = _syscall(number, *padded)
    if result == -1:
        errno = ctypes.get_errno()
        raise OSError(errno, os.strerror(errno))
    return result


def ptrace(request: int, tid: int, addr: int = 0, data: int = 0) -> int:
    """``ptrace(2)``. Every call for a tracee must come from the thread that seized it."""
    point("ptrace", request)
    ctypes.set_errno(0)
    result: int = _ptrace(request, tid, addr, data)
    errno = ctypes.get_errno()
    if result == -1 and errno:
        raise OSError(errno, os.strerror(errno), f"thread {tid}")
    return result


def kernel_version() -> tuple[int, int]:
    """Of the running Linux: major and minor; (0, 0) if it does not say."""
    found = re.match(r"(\d+)\.(\d+)", os.uname().release)
    return (int(found[1]), int(found[2])) if found else (0, 0)


def waitpid(tid: int, options: int = 0) -> tuple[int, int]:
    """``waitpid(2)``: who it was, and the raw wait status."""
    point("waitpid")
    return os.waitpid(tid, options)


def ioctl(name: str, fd: int, request: int, argument: bytes | bytearray | int) -> int:
    """``ioctl(2)``, ``name`` being what it is called in the kernel; a bytearray is changed."""
    point(name)
    result = fcntl.ioctl(fd, request, argument)
    return result if isinstance(result, int) else 0


def process_vm_readv(pid: Pid, local: int, size: int, remote: U64) -> int:
    """Copy up to ``IOV_MAX`` remote pieces into ``size`` bytes at address ``local``.

    ``remote`` is an ``(n, 2)`` C-ordered array of (address, length). Returns the bytes copied:
    fewer than asked when a piece could not be read, 0 when that was the first. Other failures
    (``ESRCH``, ``EPERM``) are raised.
    """
    point("process_vm_readv")
    here = words(local, size)
    result: int = _syscall(
        SYS_PROCESS_VM_READV, pid, ctypes.addressof(here), 1, remote.ctypes.data, len(remote), 0
    )
    if result >= 0:
        return result
    errno = ctypes.get_errno()
    if errno == 14:  # EFAULT: the first piece cannot be read this way
        return 0
    raise OSError(errno, os.strerror(errno), f"process {pid}")


def pidfd_getfd(pidfd: int, fd: int) -> int:
    """A duplicate, in this process, of another process's descriptor."""
    return syscall(SYS_PIDFD_GETFD, pidfd, fd, 0)


def same_memory(one: Pid, other: Pid) -> bool:
    """Whether two processes share an address space; ``OSError`` where that cannot be asked."""
    return syscall(SYS_KCMP, one, other, _KCMP_VM) == 0


def lock_and_touch(buffer: NDArray[np.uint8]) -> None:
    """Fault in every page of ``buffer``, and keep it resident unless ``mlock`` is refused."""
    buffer[:: os.sysconf("SC_PAGESIZE")] = 0
    _mlock(buffer.ctypes.data, buffer.nbytes)


def address_of(data: bytes) -> int:
    """Where an immutable byte string lies; it must outlive the use of the address."""
    return ctypes.cast(ctypes.c_char_p(data), ctypes.c_void_p).value or 0
