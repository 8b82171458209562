"""The life of ``crtrace watch``: epochs by the clock and on request, until it is told to stop."""

from __future__ import annotations

import os
import select
import signal
import time
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

from crtrace.capture.session import Session
from crtrace.capture.tree import ProgramChanged
from crtrace.errors import TargetBusy, TargetGone
from crtrace.image.chainindex import IndexEntry
from crtrace.linux.events import ProcessEvents, open_events
from crtrace.linux.procfs import Process, comm_of
from crtrace.units import Pid

Event = dict[str, Any]


RETRY = 1.0
"""Seconds after which an epoch that was delayed is tried again."""
STATUS_PATIENCE = 0.2
DAY = 86_400.0


def checkpoint_event(entry: IndexEntry, reason: str, stats: dict[str, Any]) -> Event:
    """What is told of a committed epoch."""
    return {
        "event": "checkpoint",
        "epoch": entry.epoch,
        "reason": reason,
        "full": entry.full,
        "wall_ns": entry.wall_ns,
        **stats,
    }


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
        self,
        session: Session,
        requests: Requests,
        *,
        interval: float,
        count: int | None,
        tree: bool = False,
    ) -> None:
        self._session = session
        self._process: Process = session.process
        self._requests = requests
        self._interval = interval
        self._count = count
        self._events: ProcessEvents | None = open_events()
        self._reason, self._full = "start", False
        self._statuses: dict[Pid, int] = {}
        self._tree = tree
        self._alive: dict[Pid, Process] = self._followed()
        self.taken = 0
        self.losses = 0
        self.limits: list[str] = []
        session.exit_status = self._await_status

    def close(self) -> None:
        """End the subscription to process events."""
        if self._events:
            self._events.close()

    def run(self) -> Iterator[Event]:
        """Take epochs and yield an event for each thing that happens, the last one included.

        Events are dicts with ``event``: ``checkpoint``, ``exec``, ``delayed`` (the targets could
        not be stopped; it is tried again), ``fork`` and ``exit`` (of a process), or ``end``.
        """
        due: float | None = time.monotonic() if self._interval else None
        while True:
            self._requests.epoch = delayed = False
            try:
                yield self._checkpoint()
            except ProgramChanged:
                yield self._exec_seen(self._process.pid)
                continue
            except TargetBusy as error:
                yield {"event": "delayed", "reason": str(error), "hint": error.hint}
                delayed = True
            except TargetGone:
                yield from self._conclude()
                return
            yield from self._comings_and_goings()
            if self.taken == self._count or self._requests.stop:
                yield self._end("signal" if self._requests.stop else "count")
                return
            due = self._next_due(due)
            woken = yield from self._wait(time.monotonic() + RETRY if delayed else due)
            if woken == "exit":
                yield from self._conclude()
                return
            if woken == "stop":
                yield self._end("signal")
                return
            if woken == "exec":
                yield self._exec_seen(self._process.pid)
            elif not self._full:
                self._reason = "request" if woken == "request" else "interval"

    def _checkpoint(self) -> Event:
        entry, stats = self._session.checkpoint(self._reason, full=self._full)
        self._full = False
        self.taken += 1
        return self._committed(entry, stats, self._reason)

    def _committed(self, entry: IndexEntry, stats: dict[str, Any], reason: str) -> Event:
        self.losses += stats["pages_unreadable"]
        self.limits += [limit for limit in stats["limits"] if limit not in self.limits]
        return checkpoint_event(entry, reason, stats)

    def _exec_seen(self, pid: Pid) -> Event:
        """A process runs a new program; when it is the target, the next epoch is a full one."""
        if pid == self._process.pid:
            self._reason, self._full = "exec", True
        return {"event": "exec", "pid": pid, "comm": comm_of(pid)}

    def _followed(self) -> dict[Pid, Process]:
        """The target; with ``tree``, all members. Others only share its memory for a while."""
        processes = self._session.processes if self._tree else [self._process]
        return {process.pid: process for process in processes}

    def _comings_and_goings(self) -> Iterator[Event]:
        """Events for what the last epoch has found begun or ended."""
        now = self._followed()
        for pid in self._alive.keys() - now.keys():
            yield self._exited(pid)
        for pid in sorted(now.keys() - self._alive.keys()):
            yield {"event": "fork", "pid": pid, "comm": comm_of(pid)}
        self._alive = now

    def _conclude(self) -> Iterator[Event]:
        """Nobody is left."""
        if self._tree and self.taken:
            entry, stats = self._session.conclude()
            yield self._committed(entry, stats, "exit")
        for pid in sorted(self._alive):
            yield self._exited(pid)
        self._alive = {}

    def _exited(self, pid: Pid) -> Event:
        status = self._await_status(pid)
        code = os.waitstatus_to_exitcode(status) if status is not None else None
        return {"event": "exit", "pid": pid, "status": code, "epochs": self.taken}

    def _await_status(self, pid: Pid) -> int | None:
        """The wait status of a process, which comes a moment after its pidfd tells of the end."""
        limit = time.monotonic() + STATUS_PATIENCE
        while pid not in self._statuses and self._events and time.monotonic() < limit:
            poller = select.poll()
            poller.register(self._events.fd, select.POLLIN)
            poller.poll(STATUS_PATIENCE * 1000)
            self._read_events()
        return self._statuses.get(pid)

    def _end(self, why: str) -> Event:
        return {"event": "end", "why": why, "epochs": self.taken}

    def _next_due(self, due: float | None) -> float | None:
        """The next moment of the clock; those that passed during an epoch are left out."""
        if due is None:
            return None
        missed = max(0, int((time.monotonic() - due) / self._interval))
        return due + (missed + 1) * self._interval

    def _wait(self, due: float | None) -> Generator[Event, None, str]:
        """Sleep until something is to be done: ``due``, ``request``, ``stop``, ``exec`` (of the
        target) or ``exit`` (of the last process); yields events of what happens meanwhile."""
        while True:
            if self._requests.stop:
                return "stop"
            if self._requests.epoch:
                return "request"
            left = None if due is None else due - time.monotonic()
            if left is not None and left <= 0:
                return "due"
            self._sleep(None if left is None else min(left, DAY))
            for pid in self._read_events():
                if pid == self._process.pid:
                    return "exec"
                yield self._exec_seen(pid)
            for pid in [pid for pid, process in self._alive.items() if process.ended()]:
                if len(self._alive) == 1:
                    # In a tree there may be children that no epoch has met yet.
                    return "due" if self._tree else "exit"
                del self._alive[pid]
                yield self._exited(pid)

    def _sleep(self, seconds: float | None) -> None:
        """Until a signal, the end of a process, or an event."""
        poller = select.poll()
        for fd in (self._requests.fd, *(process.pidfd for process in self._alive.values())):
            poller.register(fd, select.POLLIN)
        if self._events:
            poller.register(self._events.fd, select.POLLIN)
        poller.poll(None if seconds is None else seconds * 1000)
        self._requests.clear()

    def _read_events(self) -> list[Pid]:
        """Take in what the proc connector has; the processes under watch that called exec."""
        execs: list[Pid] = []
        watched = self._alive.keys() | {process.pid for process in self._session.processes}
        for event in self._events.read() if self._events else ():
            if event.kind == "exit" and event.pid in watched:
                self._statuses[event.pid] = event.status
            if event.kind == "exec" and event.pid in self._alive:
                execs.append(event.pid)
        if self._events and self._events.overflowed:
            self._events.overflowed = False
            if self._session.program_changed():
                execs.append(self._process.pid)
        return execs
