"""Give back the waits that a ptrace stop ended.

Most interrupted system calls are restarted by the kernel without the program noticing. A few end
with a plain EINTR instead (signal(7), "Interruption of system calls"); whoever stopped the thread
for no reason of its own must start those again.
"""

from __future__ import annotations

import errno

from crtrace.linux.registers import Registers

NEVER_RESTARTED = {
    45: "recvfrom", 46: "sendmsg", 47: "recvmsg", 44: "sendto", 42: "connect", 43: "accept",
    288: "accept4", 299: "recvmmsg", 307: "sendmmsg", 0: "read", 1: "write", 19: "readv",
    20: "writev", 65: "semop", 220: "semtimedop", 128: "rt_sigtimedwait", 208: "io_getevents",
    333: "io_pgetevents", 232: "epoll_wait", 281: "epoll_pwait", 441: "epoll_pwait2",
    426: "io_uring_enter",
}  # fmt: skip
"""By number. The socket calls are here for those with SO_RCVTIMEO or SO_SNDTIMEO."""


def cut_short(registers: Registers) -> bool:
    """Whether a stopped thread is about to return EINTR from a wait that is never restarted."""
    return registers.signed("rax") == -errno.EINTR and registers["orig_rax"] in NEVER_RESTARTED


def started_again(registers: Registers) -> Registers:
    """Registers with which the thread enters its system call anew."""
    return registers.changed(rax=registers["orig_rax"], rip=registers["rip"] - 2, orig_rax=-1)
