"""The life of ``crtrace watch``: epochs by the clock and on request, until it is told to stop."""

from __future__ import annotations

import os
import select
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

from crtrace.capture.session import ProgramChanged, Session
from crtrace.errors import TargetBusy, TargetGone
from crtrace.linux.events import ProcessEvents, open_events
from crtrace.linux.procfs import Process, comm_of

Event = dict[str, Any]


RETRY = 1.0
"""Seconds after which an epoch that was delayed is tried again."""
STATUS_PATIENCE = 0.2
DAY = 86_400.0


class StopNow(BaseException):
    """The second SIGINT or SIGTERM: leave at once, with the committed epochs whole."""

    def __init__(self, signum: int) -> None:
        super().__init__(signum)
        self.signum = signum


@dataclass(slots=True)
class Requests:
    """What signals have asked for."""

    stop: int = 0
    epoch: bool = False
    _pipe: tuple[int, int] = field(default_factory=lambda: os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC))

    @property
    def fd(self) -> int:
        """Readable after a signal."""
        return self._pipe[0]

    def clear(self) -> None:
        """Make ``fd`` wait for the next signal."""
        while select.select([self.fd], [], [], 0)[0]:
            os.read(self.fd, 512)

    def handle(self, signum: int, frame: FrameType | None) -> None:
        """The signal handler."""
        if signum == signal.SIGUSR1:
            self.epoch = True
        elif self.stop:
            raise StopNow(signum)
        else:
            self.stop = signum


@contextmanager
def listening() -> Iterator[Requests]:
    """Turn SIGINT, SIGTERM and SIGUSR1 into requests, for as long as the block runs."""
    requests = Requests()
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
    before = {number: signal.signal(number, requests.handle) for number in numbers}
    wakeup = signal.set_wakeup_fd(requests._pipe[1], warn_on_full_buffer=False)
    try:
        yield requests
    finally:
        signal.set_wakeup_fd(wakeup)
        for number, handler in before.items():
            signal.signal(number, handler)
        for fd in requests._pipe:
            os.close(fd)


class Watch:
    """Epochs of one session, as events. ``interval`` 0: only on SIGUSR1, after the first."""

    def __init__(
        self, session: Session, requests: Requests, *, interval: float, count: int | None
    ) -> None:
        self._session = session
        self._process: Process = session.process
        self._requests = requests
        self._interval = interval
        self._count = count
        self._events: ProcessEvents | None = open_events()
        self._reason, self._full = "start", False
        self._exit_status: int | None = None
        self.taken = 0
        self.losses = 0

    def close(self) -> None:
        """End the subscription to process events."""
        if self._events:
            self._events.close()

    def run(self) -> Iterator[Event]:
        """Take epochs and yield an event for each thing that happens, the last one included.

        Events are dicts with ``event``: ``checkpoint``, ``exec``, ``delayed`` (the target could
        not be stopped; it is tried again), ``exit`` (of the target) or ``end``.
        """
        due: float | None = time.monotonic() if self._interval else None
        while True:
            self._requests.epoch = delayed = False
            try:
                if self._full:
                    self._session.follow_exec()
                yield self._checkpoint()
            except ProgramChanged:
                yield self._exec_seen()
                continue
            except TargetBusy as error:
                yield {"event": "delayed", "reason": str(error), "hint": error.hint}
                delayed = True
            except TargetGone:
                yield self._exited()
                return
            if self.taken == self._count or self._requests.stop:
                yield self._end("signal" if self._requests.stop else "count")
                return
            due = self._next_due(due)
            woken = self._wait(time.monotonic() + RETRY if delayed else due)
            if woken == "exit":
                yield self._exited()
                return
            if woken == "stop":
                yield self._end("signal")
                return
            if woken == "exec":
                yield self._exec_seen()
            elif not self._full:
                self._reason = "request" if woken == "request" else "interval"

    def _checkpoint(self) -> Event:
        entry, stats = self._session.checkpoint(self._reason, full=self._full)
        self._full = False
        self.taken += 1
        self.losses += stats["pages_unreadable"]
        return {
            "event": "checkpoint",
            "epoch": entry.epoch,
            "reason": self._reason,
            "full": entry.full,
            "wall_ns": entry.wall_ns,
            **stats,
        }

    def _exec_seen(self) -> Event:
        """The next epoch is a full one of the new program."""
        self._reason, self._full = "exec", True
        return {"event": "exec", "pid": self._process.pid, "comm": comm_of(self._process.pid)}

    def _exited(self) -> Event:
        status = self._await_status()
        code = os.waitstatus_to_exitcode(status) if status is not None else None
        return {"event": "exit", "pid": self._process.pid, "status": code, "epochs": self.taken}

    def _await_status(self) -> int | None:
        """The wait status of the target, which comes a moment after its pidfd tells of the end."""
        limit = time.monotonic() + STATUS_PATIENCE
        while self._exit_status is None and self._events and time.monotonic() < limit:
            select.select([self._events.fd], [], [], STATUS_PATIENCE)
            self._read_events()
        return self._exit_status

    def _end(self, why: str) -> Event:
        return {"event": "end", "why": why, "epochs": self.taken}

    def _next_due(self, due: float | None) -> float | None:
        """The next moment of the clock; those that passed during an epoch are left out."""
        if due is None:
            return None
        missed = max(0, int((time.monotonic() - due) / self._interval))
        return due + (missed + 1) * self._interval

    def _wait(self, due: float | None) -> str:
        """Sleep until something happens: ``due``, ``request``, ``stop``, ``exec`` or ``exit``."""
        poller = select.poll()
        for fd in (self._requests.fd, self._process.pidfd):
            poller.register(fd, select.POLLIN)
        if self._events:
            poller.register(self._events.fd, select.POLLIN)
        while True:
            if self._requests.stop:
                return "stop"
            if self._requests.epoch:
                return "request"
            left = None if due is None else due - time.monotonic()
            if left is not None and left <= 0:
                return "due"
            ready = {fd for fd, _ in poller.poll(None if left is None else min(left, DAY) * 1000)}
            self._requests.clear()
            if self._process.pidfd in ready:
                return "exit"
            if self._events and self._events.fd in ready and self._read_events():
                return "exec"

    def _read_events(self) -> bool:
        """Take in what the proc connector has; whether the target called exec."""
        execs = False
        for event in self._events.read() if self._events else ():
            if event.pid == self._process.pid:
                execs |= event.kind == "exec"
                if event.kind == "exit":
                    self._exit_status = event.status
        if self._events and self._events.overflowed:
            self._events.overflowed = False
            execs |= self._session.program_changed()
        return execs
