"""The proc connector, heard for all of the machine."""

from __future__ import annotations

import subprocess
import sys
from contextlib import closing

import pytest

from crtrace.linux.events import ProcessEvents, in_initial_pid_namespace
from tests.live.harness import wait_until

RENAMED = "import ctypes, sys; ctypes.CDLL(None).prctl(15, b'Hintergrundr\\xc3')"  # PR_SET_NAME


def test_a_name_that_is_cut_within_a_letter_does_no_harm() -> None:
    if not in_initial_pid_namespace():
        pytest.skip("cannot run here: the proc connector is silent in a PID namespace")
    kinds: list[str] = []

    def exited() -> bool:
        kinds.extend(event.kind for event in events.read() if event.pid == process.pid)
        return "exit" in kinds

    with closing(ProcessEvents()) as events:
        process = subprocess.Popen([sys.executable, "-c", RENAMED])
        assert process.wait() == 0
        wait_until(exited, "its exit is told of")
    assert kinds == ["fork", "exec", "exit"]
