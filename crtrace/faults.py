"""Points at which tests make crtrace fail, numbered in the order in which they are passed.

``CRTRACE_FAULT`` in the environment picks one. The lowest wrappers pass a point before each call
that matters, so none can be forgotten:

    N:kill    SIGKILL at the N-th point, counted from 1
    N:stop    SIGSTOP there: whoever asked for it kills us then, or lets us go on
    N:memory  MemoryError
    N:enospc  OSError, ENOSPC
    count:PATH  no fault; a line for each point is appended to the file: number, "paused" or
                "running", name. ``N:ACTION:PATH`` writes the line of the point that it acts on.

``NAME#N`` in place of N is the N-th of the points of that name: what several threads do, or what is
done as often as the target writes, shifts the numbers of all that follows. Without the variable, a
point costs one call of a Python function.
"""

from __future__ import annotations

import errno
import itertools
import os
import signal

_ACTIONS = ("kill", "stop", "memory", "enospc")


class _Plan:
    """What is to happen, and how many points were passed so far, by whichever thread."""

    def __init__(self, order: str) -> None:
        which, _, rest = order.partition(":")
        self._name, _, number = which.rpartition("#")
        action, _, path = rest.partition(":")
        counting = which == "count"
        if counting:
            number, action, path = "0", "", rest
        if not number.isdigit() or (action not in _ACTIONS and not counting):
            raise ValueError(f"CRTRACE_FAULT is {order!r}; see crtrace/faults.py")
        self._number, self._action = int(number), action
        self._log = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600) if path else -1
        self._numbers = itertools.count(1)  # next() is one step for all threads

    def passed(self, name: str) -> None:
        if self._name and name != self._name:
            return
        number = next(self._numbers)
        if self._action and number != self._number:
            return
        if self._log >= 0:
            where = "paused" if _Now.paused else "running"
            os.write(self._log, f"{number} {where} {name}\n".encode())
        match self._action:
            case "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            case "stop":
                os.kill(os.getpid(), signal.SIGSTOP)
            case "memory":
                raise MemoryError(f"asked for at point {number}, {name}")
            case "enospc":
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def close(self) -> None:
        if self._log >= 0:
            os.close(self._log)


class _Now:
    """The plan that is in force, and whether the target is held."""

    plan: _Plan | None = None
    paused = False


def point(name: str, detail: int | str = "") -> None:
    """Here something may be made to fail. The name is the call that follows."""
    if _Now.plan:
        tail = f"{detail:#x}" if isinstance(detail, int) else detail
        _Now.plan.passed(f"{name} {tail}".rstrip())


def pausing(now: bool) -> None:
    """A pause of the target begins or is over; only the log tells of it."""
    _Now.paused = now


def plan(order: str) -> None:
    """Count from 1 again and follow ``order``; an empty one asks for nothing."""
    before, _Now.plan = _Now.plan, _Plan(order) if order else None
    if before:
        before.close()


plan(os.environ.get("CRTRACE_FAULT", ""))
