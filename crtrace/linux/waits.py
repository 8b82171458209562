"""Give back the waits that a ptrace stop ended, and find one that we cause.

Most interrupted system calls are restarted by the kernel without the program noticing. A few end
with a plain EINTR instead (signal(7), "Interruption of system calls"); whoever stopped the thread
for no reason of its own must start those again.
"""

from __future__ import annotations

import errno
import struct
from collections.abc import Iterable

import numpy as np

from crtrace.linux.registers import CODE_64, REGS_SIZE, Registers

NEVER_RESTARTED = {
    45: "recvfrom", 46: "sendmsg", 47: "recvmsg", 44: "sendto", 42: "connect", 43: "accept",
    288: "accept4", 299: "recvmmsg", 307: "sendmmsg", 0: "read", 1: "write", 19: "readv",
    20: "writev", 65: "semop", 220: "semtimedop", 128: "rt_sigtimedwait", 208: "io_getevents",
    333: "io_pgetevents", 232: "epoll_wait", 281: "epoll_pwait", 441: "epoll_pwait2",
    426: "io_uring_enter",
}  # fmt: skip
"""By number. The socket calls are here for those with SO_RCVTIMEO or SO_SNDTIMEO."""


_RESULT_CALL_AND_CODE = struct.Struct("<80xq32xQ8xQ")
"""``rax``, ``orig_rax`` and ``cs`` in the general registers."""


def cut_short(state: bytes) -> bool:
    """Whether a stopped thread, whose general registers these are, is about to return EINTR from a
    wait that is never restarted."""
    result, call, code = _RESULT_CALL_AND_CODE.unpack_from(state)
    return result == -errno.EINTR and call in NEVER_RESTARTED and code in CODE_64


def started_again(registers: Registers) -> Registers:
    """Registers with which the thread enters its system call anew."""
    return registers.changed(rax=registers["orig_rax"], rip=registers["rip"] - 2, orig_rax=-1)


_RAX, _RDX, _RDI, _ORIG_RAX = 10, 12, 14, 15
_MADVISE, _GUARD_INSTALL = 28, 102
_ERESTARTNOINTR = 513


def guards_in_vain(states: Iterable[bytes]) -> list[int]:
    """Of the general registers of stopped threads: where they install guard regions, and had to
    begin again. In a private mapping of a file they do so as long as a page there is armed."""
    values = np.frombuffer(b"".join(states), dtype=np.uint64).reshape(-1, REGS_SIZE // 8)
    again = values[:, _RAX].view(np.int64) == -_ERESTARTNOINTR
    advise = (values[:, _ORIG_RAX] == _MADVISE) & (values[:, _RDX] == _GUARD_INSTALL)
    addresses: list[int] = values[again & advise, _RDI].tolist()
    return addresses
