"""The target goes on as if nothing had been there, also when crtrace is killed."""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path

import pytest

from crtrace.track.loader import Programs
from tests.live.conftest import Spawn
from tests.live.controllers import HEALING, control, forked, untraced
from tests.live.exactness import judged
from tests.live.harness import Untouched, blocked_in, wait_until
from tests.live.runner import Watching, run

KILLS = 100


def test_a_controller_killed_at_any_moment_leaves_no_trace(
    spawn: Spawn, tmp_path: Path, programs: Programs
) -> None:
    rng = random.Random(1)
    target = spawn("tiny")
    path = tmp_path / "chain"
    before = Untouched(target.pid)
    reader = target.info["tids"]["reader"]
    waiting = blocked_in(target.pid, reader)
    epochs = []
    for number in range(KILLS):
        controller = forked(lambda: control(target.pid, path, programs))
        # Half of them while it attaches, which takes some milliseconds.
        time.sleep(rng.uniform(0.0, 0.015) if number % 2 else rng.uniform(0.0, 0.4))
        os.kill(controller, signal.SIGKILL)
        assert os.waitpid(controller, 0)[1] == signal.SIGKILL, "the controller failed by itself"
        wait_until(lambda: untraced(target.pid), "the kernel lets the target go")
        # Its main thread comes and goes; of the others, two check their own registers.
        before.assert_same(ignore=["registers"], patience=HEALING)
        wait_until(lambda: blocked_in(target.pid, reader) == waiting, "the same wait goes on")
        target.obey("check")
        if (path / "chain.idx").exists() and number % 20 == 19:
            (report,) = run("verify", path, "--json").expect(0).events
            epochs.append(len(report["epochs"]))
    assert epochs == sorted(epochs)
    assert epochs[-1] > 5, "hardly any controller lived long enough for an epoch"
    with judged(target.pid, path) as after:
        after.take()
    target.terminate_and_check()


@pytest.mark.parametrize("delay", [0.05, 0.4, 0.6, 0.8, 1.2])
def test_the_program_itself_killed_leaves_no_trace(
    spawn: Spawn, tmp_path: Path, delay: float
) -> None:
    target = spawn("tiny")
    before = Untouched(target.pid)
    with Watching(target.pid, tmp_path / "chain", "--interval", 0.01) as watching:
        time.sleep(delay)
        os.kill(watching.pid, signal.SIGKILL)
    wait_until(lambda: untraced(target.pid), "the kernel lets the target go")
    before.assert_same(ignore=["registers"], patience=HEALING)
    target.terminate_and_check()
