"""The proc connector, heard for all of the machine."""

from __future__ import annotations

import subprocess
import sys
from contextlib import closing

from crtrace.linux.events import ProcessEvents

RENAMED = "import ctypes, sys; ctypes.CDLL(None).prctl(15, b'Hintergrundr\\xc3')"  # PR_SET_NAME


def test_a_name_that_is_cut_within_a_letter_does_no_harm() -> None:
    with closing(ProcessEvents()) as events:
        process = subprocess.Popen([sys.executable, "-c", RENAMED])
        assert process.wait() == 0
        kinds = [event.kind for event in events.read() if event.pid == process.pid]
    assert kinds == ["fork", "exec", "exit"]
