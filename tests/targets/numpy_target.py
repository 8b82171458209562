"""Threads that update numpy arrays, each with a shadow copy. Commands: check, stats."""

from __future__ import annotations

import json

import numpy as np
import numpy.typing as npt
from pytarget import Crew, serve

WORDS = 1 << 18


class Worker:
    """One array of 2 MiB and its shadow, written in strided slices of random numbers."""

    def __init__(self, seed: int) -> None:
        self.random = np.random.default_rng(seed)
        self.data: npt.NDArray[np.float64] = np.zeros(WORDS)
        self.shadow = self.data.copy()
        self.updates = 0

    def step(self) -> None:
        """Write a few hundred numbers, in the shadow first."""
        start, stride = self.random.integers(WORDS // 2), self.random.integers(1, 600)
        place = slice(start, start + 256 * stride, stride)
        values = self.random.random(len(self.shadow[place]))
        self.shadow[place] = values
        self.data[place] = values
        self.updates += 1


def main() -> None:
    """Run two workers until told to stop."""
    workers = [Worker(seed) for seed in range(2)]
    crew = Crew(*(worker.step for worker in workers))

    def check() -> bool:
        with crew:
            return all(np.array_equal(worker.data, worker.shadow) for worker in workers)

    def stats() -> str:
        return json.dumps({"updates": sum(worker.updates for worker in workers)})

    areas = [
        {"data": w.data.ctypes.data, "shadow": w.shadow.ctypes.data, "bytes": w.data.nbytes}
        for w in workers
    ]
    serve({"areas": areas}, {"stats": stats}, check)


main()
