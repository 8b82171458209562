"""Controllers in processes of their own that are quick to start, since all of the program is
inherited: to be killed in great numbers."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

from crtrace.capture.session import Session
from crtrace.image.store import ChainWriter
from crtrace.linux.procfs import Process
from crtrace.track.dirty import WrittenPages
from crtrace.track.loader import Programs
from crtrace.units import Pid
from tests.live.harness import status, tasks

HEALING = 5.0
"""Seconds in which a target that was left half way must get a CPU to put itself right."""


def forked(life: Callable[[], None]) -> int:
    """The number of a process that does ``life`` and ends with 0, or 1 if that raises."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        life()
        code = 0
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
    finally:
        os._exit(code)


def control(pid: int, path: Path, programs: Programs, epochs: int = 1 << 30) -> None:
    """A controller's whole life: attach, then one epoch after another."""
    with ChainWriter.open(path, create=True) as chain:
        session = Session(Process(Pid(pid)), chain, WrittenPages(programs))
        for _ in range(epochs):
            session.checkpoint()


def untraced(pid: int) -> bool:
    """Whether nobody traces any thread of a process."""
    return all(status(pid, tid)["TracerPid"] == "0" for tid in tasks(pid))
