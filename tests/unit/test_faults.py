"""The points at which tests make crtrace fail."""

from __future__ import annotations

import errno
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from crtrace import faults


@pytest.fixture(autouse=True)
def no_faults() -> Iterator[None]:
    yield
    faults.plan("")


def _pass_some() -> None:
    for name in ("read", "write", "read", "read"):
        faults.point(name, 16 if name == "write" else "")


def test_counting_names_every_point(tmp_path: Path) -> None:
    faults.plan(f"count:{tmp_path / 'log'}")
    faults.point("read")
    faults.pausing(True)
    faults.point("write", 16)
    faults.pausing(False)
    faults.plan("")
    faults.point("read")
    assert (tmp_path / "log").read_text() == "1 running read\n2 paused write 0x10\n"


def test_nothing_fails_but_the_point_that_was_picked(tmp_path: Path) -> None:
    log = tmp_path / "log"
    for order, line in (
        ("3", "3 running read"),
        ("read#3", "3 running read"),
        ("2", "2 running write 0x10"),
    ):
        faults.plan(f"{order}:memory:{log}")
        with pytest.raises(MemoryError):
            _pass_some()
        assert log.read_text().splitlines()[-1] == line
    faults.plan("5:memory")
    _pass_some()
    faults.plan("read#4:enospc")
    _pass_some()
    with pytest.raises(OSError, match="No space") as caught:
        faults.point("read")
    assert caught.value.errno == errno.ENOSPC
    faults.point("read")


@pytest.mark.parametrize(("action", "number"), [("kill", signal.SIGKILL), ("stop", signal.SIGSTOP)])
def test_signals_to_itself(action: str, number: int) -> None:
    child = os.fork()
    if not child:
        faults.plan(f"1:{action}")
        faults.point("read")
        os._exit(0)
    _, how = os.waitpid(child, os.WUNTRACED)
    if os.WIFSTOPPED(how):
        assert os.WSTOPSIG(how) == number
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    else:
        assert how == number


@pytest.mark.parametrize("order", ["kill", "1:explode", "x:kill", "read#:kill", "1"])
def test_an_order_that_means_nothing_is_refused(order: str) -> None:
    with pytest.raises(ValueError, match="CRTRACE_FAULT"):
        faults.plan(order)
