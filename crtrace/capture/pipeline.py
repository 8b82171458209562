"""Buffers that travel from the reader to the threads that hash, compress and write them.

All buffers exist, touched and locked, before the first page is read, and there are no others: that
bounds the memory of the controller whatever the size of the target.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from queue import SimpleQueue

import numpy as np

from crtrace.image.store import ImageWriter
from crtrace.linux.libc import lock_and_touch
from crtrace.units import CHUNK_BYTES, PAGE_SIZE, U64, Bytes

BUFFERS = 24
"""2 MiB each: what a pause can copy without waiting for the writers is 48 MiB."""


@dataclass(frozen=True, slots=True)
class Job:
    """A filled buffer: the contents of ``pages``, one after another."""

    space: int
    pages: U64
    buffer: Bytes
    round: int


class Pipeline:
    """A pool of chunk buffers and the worker threads that empty them into one image at a time."""

    def __init__(self, buffers: int = BUFFERS, workers: int = 0) -> None:
        self._arena = np.empty((buffers, CHUNK_BYTES), dtype=np.uint8)
        self.locked = lock_and_touch(self._arena.reshape(-1))
        self._free: SimpleQueue[Bytes] = SimpleQueue()
        for buffer in self._arena:
            self._free.put(buffer)
        self._jobs: SimpleQueue[Job | None] = SimpleQueue()
        self._held: list[Job] | None = None
        self._overflowed = False
        self._image: ImageWriter | None = None
        self._error: BaseException | None = None
        self._threads = [
            threading.Thread(target=self._work, name=f"writer-{n}", daemon=True)
            for n in range(workers or len(os.sched_getaffinity(0)))
        ]
        for thread in self._threads:
            thread.start()

    def close(self) -> None:
        """End the workers, after what was submitted."""
        for _ in self._threads:
            self._jobs.put(None)
        for thread in self._threads:
            thread.join()
        self._threads = []

    @contextmanager
    def writing(self, image: ImageWriter) -> Iterator[None]:
        """Direct all pages to ``image``; on leaving, however, no worker touches it any more."""
        self._image, self._error = image, None
        try:
            yield
        finally:
            self._submit_held()
            self.wait_idle()
            self._image = None

    def buffer(self) -> Bytes:
        """A free buffer of ``CHUNK_BYTES``; waits for one. Raises what a worker met."""
        if self._held is not None and self._free.empty():
            self._submit_held()
            self._held, self._overflowed = [], True
        buffer = self._free.get()
        if self._error:
            self._free.put(buffer)
            raise self._error
        return buffer

    def give_back(self, buffer: Bytes) -> None:
        """Return a buffer unused."""
        self._free.put(buffer)

    def submit(self, job: Job) -> None:
        """Have the job written, and its buffer come back."""
        if self._held is not None:
            self._held.append(job)
        else:
            self._jobs.put(job)

    def hold(self) -> None:
        """Wait until all workers are idle and keep them so: from here on jobs are only collected.

        Only if the buffers run out are the workers woken before :meth:`release`.
        """
        self.wait_idle()
        self._held, self._overflowed = [], False

    def release(self) -> bool:
        """Let the workers have what was collected; whether they had to be woken before."""
        self._submit_held()
        return self._overflowed

    def finish(self) -> None:
        """Wait until all is written. Raises what a worker met."""
        self.wait_idle()
        if self._error:
            raise self._error

    def _submit_held(self) -> None:
        held, self._held = self._held, None
        for job in held or ():
            self._jobs.put(job)

    def wait_idle(self) -> None:
        """Wait until the workers have nothing to do: all buffers are home."""
        home = [self._free.get() for _ in range(len(self._arena))]
        for buffer in home:
            self._free.put(buffer)

    def _work(self) -> None:
        while job := self._jobs.get():
            try:
                if self._image and not self._error:
                    data = job.buffer[: len(job.pages) * PAGE_SIZE].reshape(-1, PAGE_SIZE)
                    self._image.write_pages(job.space, job.pages, data, round=job.round)
            except BaseException as error:  # it is raised where the reader next asks
                self._error = error
            finally:
                self._free.put(job.buffer)
