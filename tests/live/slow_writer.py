"""A ``process_vm_writev`` that has pinned its target's page and waits for its source to come:

    python -m tests.live.slow_writer PID ADDRESS

The source is a page under a userfaultfd, which answers when a line comes on stdin. It says "pinned"
when the page is.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import select
import struct
import sys
import threading

import numpy as np

from crtrace.linux.libc import address_of, syscall
from crtrace.linux.uffd import SYS_USERFAULTFD
from crtrace.units import PAGE_SIZE

API, REGISTER, COPY = 0xC018AA3F, 0xC020AA00, 0xC028AA03
MISSING = 1
PROCESS_VM_WRITEV = 311


def write(pid: int, source: int, address: int) -> None:
    """Ends the process if it fails."""
    local, remote = (struct.pack("<2Q", at, PAGE_SIZE) for at in (source, address))
    done = syscall(PROCESS_VM_WRITEV, pid, address_of(local), 1, address_of(remote), 1, 0)
    if done != PAGE_SIZE:
        os._exit(1)


def main() -> None:
    """Pin, wait, write."""
    pid, address = map(int, sys.argv[1:])
    memory = mmap.mmap(-1, PAGE_SIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    source = np.frombuffer(memory, dtype=np.uint8).ctypes.data
    uffd = syscall(SYS_USERFAULTFD, os.O_CLOEXEC | os.O_NONBLOCK)
    fcntl.ioctl(uffd, API, struct.pack("<3Q", 0xAA, 0, 0))
    fcntl.ioctl(uffd, REGISTER, struct.pack("<4Q", source, PAGE_SIZE, MISSING, 0))
    writer = threading.Thread(target=write, args=(pid, source, address))
    writer.start()
    poller = select.poll()
    poller.register(uffd, select.POLLIN)
    poller.poll()
    print("pinned", flush=True)
    sys.stdin.readline()
    page = b"L" * PAGE_SIZE
    fcntl.ioctl(uffd, COPY, struct.pack("<5Q", source, address_of(page), PAGE_SIZE, 0, 0))
    writer.join()


if __name__ == "__main__":
    main()
