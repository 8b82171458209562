"""The handshake of target.h for targets written in Python."""

from __future__ import annotations

import json
import os
import select
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from typing import Any


class Crew:
    """Threads that repeat a step each; inside ``with crew`` all are parked between two steps."""

    def __init__(self, *steps: Callable[[], None]) -> None:
        self._change = threading.Condition()
        self._going = True
        self._parked, self._members = 0, len(steps)
        for step in steps:
            threading.Thread(target=self._run, args=(step,), daemon=True).start()

    def _run(self, step: Callable[[], None]) -> None:
        while True:
            if not self._going:
                self._park()
            try:
                step()
            except Exception:  # a thread that ends alone would never be parked
                traceback.print_exc()
                os._exit(1)

    def _park(self) -> None:
        with self._change:
            self._parked += 1
            self._change.notify_all()
            self._change.wait_for(lambda: self._going)
            self._parked -= 1

    def __enter__(self) -> None:
        with self._change:
            self._going = False
            self._change.wait_for(lambda: self._parked == self._members)

    def __exit__(self, *_: object) -> None:
        with self._change:
            self._going = True
            self._change.notify_all()


def _commands(source: int, terminated: threading.Event) -> Iterator[str]:
    """Lines of the command FIFO until "quit", its end, or SIGTERM.

    The signal may come between a look at the flag and the wait, so the wait is short.
    """
    pending = b""
    while not terminated.is_set():
        if not select.select([source], [], [], 0.1)[0]:
            continue
        part = os.read(source, 4096)
        if not part:
            return
        pending += part
        while b"\n" in pending:
            line, _, pending = pending.partition(b"\n")
            yield line.decode()
            if line == b"quit":
                return


def serve(
    info: dict[str, Any], commands: dict[str, Callable[[], str]], check: Callable[[], bool]
) -> None:
    """Say ready, obey, and end the process with the verdict of ``check``, also a command."""
    commands = {"check": lambda: "ok" if check() else "bad", "quit": lambda: "ok", **commands}
    terminated = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: terminated.set())
    with open(sys.argv[1], "w", buffering=1) as out, open(sys.argv[2], "rb", buffering=0) as orders:
        out.write(f"ready {json.dumps({'pid': os.getpid(), **info})}\n")
        for line in _commands(orders.fileno(), terminated):
            out.write(commands.get(line, lambda: "bad")() + "\n")
    good = check()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0 if good else 1)  # the threads never end
