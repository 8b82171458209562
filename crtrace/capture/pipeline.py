"""Buffers that travel from the reader to the threads that hash, compress and write them.

All buffers exist, touched and locked, before the first page is read, and there are no others: that
bounds the memory of the controller whatever the size of the target.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np

from crtrace.image.imagewriter import ImageWriter
from crtrace.linux.libc import lock_and_touch
from crtrace.units import CHUNK_BYTES, PAGE_SIZE, U64, Bytes

BUFFERS = 20
"""2 MiB each: what a pause can copy without waiting for the writers is 40 MiB."""


@dataclass(frozen=True, slots=True)
class Job:
    """A filled buffer: the contents of ``pages``, one after another."""

    space: int
    pages: U64
    buffer: Bytes
    round: int


class Pipeline:
    """A pool of chunk buffers and the worker threads that empty them into one image at a time.

    Any call may be cut short by an exception from a signal handler; nothing is lost but the page
    contents then in hand, and the pipeline can be used again.
    """

    def __init__(self, buffers: int = BUFFERS, workers: int = 0) -> None:
        self._arena = np.empty((buffers, CHUNK_BYTES), dtype=np.uint8)
        lock_and_touch(self._arena.reshape(-1))
        self._changed = threading.Condition()
        self._free = deque(self._arena)
        self._jobs: deque[Job] = deque()
        self._running = 0
        self._holding = self._overflowed = self._closing = False
        self._image: ImageWriter | None = None
        self._error: BaseException | None = None
        self._threads = [
            threading.Thread(target=self._work, name=f"writer-{n}", daemon=True)
            for n in range(workers or len(os.sched_getaffinity(0)))
        ]
        for thread in self._threads:
            thread.start()

    def close(self) -> None:
        """End the workers; what they have not begun is dropped."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()

    @contextmanager
    def writing(self, image: ImageWriter) -> Iterator[None]:
        """Direct all pages to ``image``; once left, in whatever way, no worker touches it."""
        self._image, self._error = image, None
        try:
            yield
        finally:
            with self._changed:
                self._jobs.clear()  # after a success there are none
                self._image, self._holding = None, False
                self._changed.wait_for(lambda: not self._running)
                self._free = deque(self._arena)

    def buffer(self) -> Bytes:
        """A free buffer of ``CHUNK_BYTES``; waits for one. Raises what a worker met."""
        with self._changed:
            if self._holding and not self._free:
                self._holding, self._overflowed = False, True
                self._changed.notify_all()
            self._changed.wait_for(lambda: self._free or self._error)
            if self._error:
                raise self._error
            return self._free.popleft()

    def give_back(self, buffer: Bytes) -> None:
        """Return a buffer unused."""
        with self._changed:
            self._free.append(buffer)

    def submit(self, job: Job) -> None:
        """Have the job written, and its buffer come back."""
        with self._changed:
            self._jobs.append(job)
            if not self._holding:
                self._changed.notify_all()

    def hold(self) -> None:
        """Wait until all workers are idle and keep them so: from here on jobs are only collected.

        Only if the buffers run out are the workers woken before :meth:`release`.
        """
        self.wait_idle()
        with self._changed:
            self._holding, self._overflowed = True, False

    def release(self) -> bool:
        """Let the workers have what was collected; whether they had to be woken before."""
        with self._changed:
            self._holding = False
            self._changed.notify_all()
            return self._overflowed

    def wait_idle(self) -> None:
        """Wait until all that was submitted is written. Raises what a worker met."""
        with self._changed:
            self._changed.wait_for(lambda: self._error or not (self._jobs or self._running))
            if self._error:
                raise self._error

    def _work(self) -> None:
        while job := self._next():
            error = self._write(job)
            with self._changed:
                self._error = self._error or error
                self._running -= 1
                if self._image:
                    self._free.append(job.buffer)
                self._changed.notify_all()

    def _next(self) -> Job | None:
        with self._changed:
            self._changed.wait_for(lambda: self._closing or (self._jobs and not self._holding))
            if self._closing:
                return None
            self._running += 1
            return self._jobs.popleft()

    def _write(self, job: Job) -> BaseException | None:
        image = self._image
        if image is None or self._error:
            return None
        data = job.buffer[: len(job.pages) * PAGE_SIZE].reshape(-1, PAGE_SIZE)
        try:
            image.write_pages(job.space, job.pages, data, round=job.round)
        except BaseException as error:  # it is raised where the reader next asks
            return error
        return None
