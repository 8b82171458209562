"""Give back the waits that a ptrace stop ended.

Most interrupted system calls are restarted by the kernel without the program noticing. A few end
with a plain EINTR instead (signal(7), "Interruption of system calls"); whoever stopped the thread
for no reason of its own must start those again.
"""

from __future__ import annotations

import errno

from crtrace.linux.procfs import thread_status
from crtrace.linux.ptrace import Registers, Tracee
from crtrace.units import Pid

NEVER_RESTARTED = {
    45: "recvfrom", 46: "sendmsg", 47: "recvmsg", 44: "sendto", 42: "connect", 43: "accept",
    288: "accept4", 299: "recvmmsg", 307: "sendmmsg", 0: "read", 1: "write", 19: "readv",
    20: "writev", 65: "semop", 220: "semtimedop", 128: "rt_sigtimedwait", 208: "io_getevents",
    333: "io_pgetevents", 232: "epoll_wait", 281: "epoll_pwait", 441: "epoll_pwait2",
    426: "io_uring_enter",
}  # fmt: skip
"""By number. The socket calls are here for those with SO_RCVTIMEO or SO_SNDTIMEO."""


def give_back_wait(pid: Pid, tracee: Tracee) -> bool:
    """Rewind a stopped thread whose wait our stop ended with EINTR; whether it was.

    Left alone when a signal of its own is waiting: then EINTR is what the program is to see.
    """
    registers = Registers(tracee.prstatus)
    if registers.signed("rax") != -errno.EINTR or registers["orig_rax"] not in NEVER_RESTARTED:
        return False
    status = thread_status(pid, tracee.tid)
    blocked = int(status.get("SigBlk", "0"), 16)
    pending = int(status.get("SigPnd", "0"), 16) | int(status.get("ShdPnd", "0"), 16)
    if pending & ~blocked:
        return False
    tracee.set_registers(
        registers.changed(rax=registers["orig_rax"], rip=registers["rip"] - 2, orig_rax=-1)
    )
    return True
