"""A program that works on its memory in several ways at once, until it is told to stop.

Run as ``python -m crtrace.demo.workload FILE``; it prints a line when it is ready, works, and ends
when its standard input does.
"""

from __future__ import annotations

import mmap
import random
import sys
import threading
import time
from collections.abc import Callable

import numpy as np

ARRAY_MIB = 48
FILE_PAGES = 2048
SHARED_PAGES = 512


def churn_heap(rng: random.Random) -> Callable[[], None]:
    """A heap that grows and shrinks: small and large blocks come and go."""
    blocks: list[bytearray] = []

    def step() -> None:
        for _ in range(rng.randrange(40)):
            blocks.append(bytearray(rng.randbytes(64)) * rng.choice((1, 16, 256, 4096)))
        for _ in range(rng.randrange(50)):
            if blocks:
                blocks.pop(rng.randrange(len(blocks)))

    return step


def write_array(rng: random.Random) -> Callable[[], None]:
    """A large array, written here and there."""
    cells = np.random.default_rng(1).integers(0, 1 << 40, ARRAY_MIB << 17, dtype=np.int64)

    def step() -> None:
        for _ in range(20):
            at = rng.randrange(len(cells) - 700)
            cells[at : at + rng.randrange(1, 700)] += 1

    return step


def write_mapping(rng: random.Random, memory: mmap.mmap) -> Callable[[], None]:
    """A mapping, written a few bytes at a time."""

    def step() -> None:
        for _ in range(10):
            at = rng.randrange(len(memory) - 64)
            memory[at : at + 64] = rng.randbytes(64)

    return step


def keep_doing(step: Callable[[], None], pause: float) -> None:
    """A thread's whole life."""
    while True:
        step()
        time.sleep(pause)


def main() -> None:
    """Start a thread for each kind of work and wait for the end of input."""
    with open(sys.argv[1], "r+b") as file:
        file.truncate(FILE_PAGES * mmap.PAGESIZE)
        private = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        shared_file = mmap.mmap(file.fileno(), 64 * mmap.PAGESIZE)
    shared = mmap.mmap(-1, SHARED_PAGES * mmap.PAGESIZE)
    works = [
        churn_heap(random.Random(1)),
        write_array(random.Random(2)),
        write_mapping(random.Random(3), private),
        write_mapping(random.Random(4), shared_file),
        write_mapping(random.Random(5), shared),
    ]
    for number, step in enumerate(works):
        threading.Thread(
            target=keep_doing, args=(step, 0.002 + 0.001 * number), daemon=True
        ).start()
    print("ready", flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    main()
