"""The controller stays small, however large the target is."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from tests.live.conftest import Spawn
from tests.live.runner import CRTRACE, verified

GIB = 1 << 30
LIMIT_MIB = 300


def available() -> int:
    """Bytes of memory that programs could still have."""
    with open("/proc/meminfo") as file:
        fields = dict(line.split(":") for line in file)
    return int(fields["MemAvailable"].split()[0]) << 10


@pytest.mark.timeout(600)
def test_eight_gib_are_dumped_with_little_memory(spawn: Spawn, tmp_path: Path) -> None:
    free = os.statvfs(tmp_path)
    if available() < 10 * GIB or free.f_bavail * free.f_frsize < 10 * GIB:
        pytest.skip("cannot run here: needs 10 GiB of memory and of disk")
    # Half of it is the shadow copy; both are written in full.
    target = spawn("writer", "--mib", 4096, "--fill", 1, "--running", 0)
    dump = [*CRTRACE, "dump", str(target.pid), "-o", str(tmp_path / "chain"), "--json"]
    with subprocess.Popen(dump, stdout=subprocess.PIPE, cwd="/") as process:
        assert process.stdout
        event = json.loads(process.stdout.read())
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0
    assert event["pages_written"] > 2_000_000
    # The largest of the controller and its children, the compiler included.
    assert usage.ru_maxrss >> 10 < LIMIT_MIB
    assert verified(tmp_path / "chain") == [0]
