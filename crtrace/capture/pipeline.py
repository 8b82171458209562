"""Threads that read pages, hash, compress and write them; and buffers that are filled in a pause.

While the target runs, each worker does all of it, chunk by chunk: nobody waits for anybody, and
what it has just read is in its processor's cache. In a pause pages are only read, into the buffers.

All buffers exist, touched and locked, before the first page is read, and there are no others: that
bounds the memory of the controller whatever the size of the target.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import numpy as np

from crtrace.image.imagewriter import ImageWriter
from crtrace.linux.libc import lock_and_touch
from crtrace.units import CHUNK_BYTES, PAGE_SIZE, U64, Bytes, expand

BUFFERS = 20
"""2 MiB each: what a pause can copy without waiting for the writers is 40 MiB."""


@dataclass(frozen=True, slots=True)
class Job:
    """A filled buffer: the contents of the pages of a range array, one after another."""

    space: int
    ranges: U64
    buffer: Bytes
    round: int


Fill = Callable[[Bytes], Job]
"""Reads pages into the buffer that it is given."""


class Pipeline:
    """A pool of chunk buffers and the worker threads that bring pages into one image at a time.

    Any call may be cut short by an exception from a signal handler; nothing is lost but the page
    contents then in hand, and the pipeline can be used again.
    """

    def __init__(self, buffers: int = BUFFERS, workers: int = 0) -> None:
        self._arena = np.empty((buffers, CHUNK_BYTES), dtype=np.uint8)
        lock_and_touch(self._arena.reshape(-1))
        self._changed = threading.Condition()
        self._free = deque(self._arena)
        self._fills: Iterator[Fill] | None = None
        self._jobs: deque[Job] = deque()
        self._running = 0
        self._collecting = self._holding = self._closing = False
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
                self._image = self._fills = None
                self._collecting = self._holding = False
                self._changed.wait_for(lambda: not self._running)
                self._free = deque(self._arena)

    def copy(self, fills: Iterator[Fill]) -> None:
        """Do each of ``fills`` once. Raises what one of them does, or what a worker met.

        Between :meth:`hold` and :meth:`release` it is done here and now, and writing is left for
        later; otherwise by the workers, and when this returns all is written.
        """
        if self._collecting:
            for fill in fills:
                self._collect(fill)
            return
        with self._changed:
            self._fills = fills
            self._changed.notify_all()
            self._changed.wait_for(lambda: not (self._fills or self._jobs or self._running))
            error, self._error = self._error, None
            if error:
                raise error

    def hold(self) -> None:
        """Wait until all workers are idle and keep them so: from here on jobs are only collected.

        Only if the buffers run out are the workers woken before :meth:`release`.
        """
        self.wait_idle()
        with self._changed:
            self._collecting = self._holding = True

    def release(self) -> bool:
        """Let the workers have what was collected; whether they had to be woken before."""
        with self._changed:
            overflowed = self._collecting and not self._holding
            self._collecting = self._holding = False
            self._changed.notify_all()
            return overflowed

    def wait_idle(self) -> None:
        """Wait until all that was collected is written. Raises what a worker met."""
        with self._changed:
            self._changed.wait_for(lambda: self._error or not (self._jobs or self._running))
            if self._error:
                raise self._error

    def _collect(self, fill: Fill) -> None:
        buffer = self._buffer()
        try:
            job = fill(buffer)
        except BaseException:
            self._give_back(buffer)
            raise
        with self._changed:
            self._jobs.append(job)
            if not self._holding:
                self._changed.notify_all()

    def _buffer(self) -> Bytes:
        """A free buffer of ``CHUNK_BYTES``; waits for one. Raises what a worker met."""
        with self._changed:
            if self._holding and not self._free:
                self._holding = False
                self._changed.notify_all()
            self._changed.wait_for(lambda: self._free or self._error)
            if self._error:
                raise self._error
            return self._free.popleft()

    def _give_back(self, buffer: Bytes) -> None:
        with self._changed:
            self._free.append(buffer)
            self._changed.notify_all()

    def _work(self) -> None:
        while task := self._next():
            error = None
            try:
                task()
            except BaseException as caught:  # it is raised where somebody waits for the workers
                error = caught
            with self._changed:
                self._error = self._error or error
                if error:
                    self._fills = None
                self._running -= 1
                self._changed.notify_all()

    def _next(self) -> Callable[[], None] | None:
        with self._changed:
            self._changed.wait_for(
                lambda: self._closing or self._fills or (self._jobs and not self._holding)
            )
            if self._closing:
                return None
            self._running += 1
            return partial(self._empty, self._jobs.popleft()) if self._jobs else self._copy_all

    def _empty(self, job: Job) -> None:
        """Write a job that was collected."""
        try:
            self._write(job)
        finally:
            self._give_back(job.buffer)

    def _copy_all(self) -> None:
        """Do ``fills`` together with the other workers, until none is left."""
        buffer = self._buffer()
        try:
            while fill := self._next_fill():
                self._write(fill(buffer))
        finally:
            self._give_back(buffer)

    def _next_fill(self) -> Fill | None:
        with self._changed:
            fill = next(self._fills, None) if self._fills else None
            if fill is None:
                self._fills = None
            return fill

    def _write(self, job: Job) -> None:
        image = self._image
        if image is None or self._error:
            return
        pages = expand(job.ranges)
        data = job.buffer[: len(pages) * PAGE_SIZE].reshape(-1, PAGE_SIZE)
        image.write_pages(job.space, pages, data, round=job.round)
