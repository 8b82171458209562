"""The controller stays small, however large the target is."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.live.conftest import Spawn
from tests.live.runner import verified

GIB = 1 << 30
LIMIT_MIB = 200
SCRIPT = """
import atexit, runpy, sys
atexit.register(lambda: sys.stderr.write(open("/proc/self/status").read()))
runpy.run_module("crtrace", run_name="__main__", alter_sys=True)
"""


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
    dump = ["dump", str(target.pid), "-o", str(tmp_path / "chain"), "--json"]
    done = subprocess.run(
        [sys.executable, "-P", "-c", SCRIPT, *dump],
        capture_output=True,
        text=True,
        cwd="/",
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["pages_written"] > 2_000_000
    peak_kib = int(done.stderr.split("VmHWM:")[1].split()[0])
    assert peak_kib >> 10 < LIMIT_MIB
    assert verified(tmp_path / "chain") == [0]
