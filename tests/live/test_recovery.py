"""``watch`` and ``dump`` go on with a chain whose writer was cut, and wait for nobody's lock."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from crtrace.analyze.verify import verify
from crtrace.image.reader import Chain
from tests.live.conftest import Spawn
from tests.live.exactness import reader
from tests.live.harness import Target, layout_mismatches
from tests.live.runner import Watching, run, verified

AFTER_THE_ENTRY = "fdatasync of the index"
CUTS = {
    "kill": ("create", "pwritev", "fdatasync", "rename", "fsync of the directory",
             "pwrite of the index entry", AFTER_THE_ENTRY),
    "enospc": ("pwritev", "rename", AFTER_THE_ENTRY),
}  # fmt: skip


@pytest.fixture
def target(spawn: Spawn) -> Target:
    """A process whose memory all can be read, and which changes it only when told to."""
    target = spawn("layout")
    for name in {"secret", "guard"} & target.info["areas"].keys():
        target.obey(f"munmap {name}")
    return target


def whole(chain: Path) -> list[int]:
    """The epochs, none of which is damaged, whatever else may lie there."""
    with Chain.open(chain) as opened:
        report = verify(opened)
    assert report.ok, report.damage
    return report.epochs


def assert_exact(chain: Path, target: Target) -> None:
    """The newest epoch is what the target has now."""
    with Chain.open(chain) as opened:
        assert layout_mismatches(reader(opened.epoch(-1)), target) == []


def points_passed(pid: int, chain: Path, log: Path) -> Counter[str]:
    """How often a run of two epochs passes each point, so the number of the last of a name."""
    counted = {"CRTRACE_FAULT": f"count:{log}"}
    run("watch", pid, "-o", chain, "--count", 2, "--interval", 0.01, env=counted).expect(0)
    return Counter(line.split(" ", 2)[2] for line in log.read_text().splitlines())


@pytest.mark.parametrize(("action", "code"), [("kill", -signal.SIGKILL), ("enospc", 1)])
def test_watch_and_dump_go_on_after_any_cut(
    target: Target, tmp_path: Path, action: str, code: int
) -> None:
    chain = tmp_path / "chain"
    run("dump", target.pid, "-o", chain).expect(0)
    passed = points_passed(target.pid, chain, tmp_path / "points")
    passed["pwritev"] -= 4  # an image has more records than that, and not always as many
    count = 3
    for number, name in enumerate(CUTS[action]):
        target.obey(f"write anon_written 3 5 {number + 1}")
        fault = {"CRTRACE_FAULT": f"{name}#{passed[name]}:{action}"}
        cut = ("watch", target.pid, "-o", chain, "--count", 3, "--interval", 0.01)
        run(*cut, env=fault).expect(code)
        # The first epoch of that run is there; the second only if its entry was written.
        there = action == "kill" and name == AFTER_THE_ENTRY
        assert whole(chain) == list(range(count + 1 + there)), name
        count += 1 + there
        target.obey(f"write anon_written 4 7 {number + 101}")
        again = ("dump",) if number % 2 else ("watch", "--count", 1)
        run(*again, target.pid, "-o", chain).expect(0)
        count += 1
        assert whole(chain) == list(range(count)), name
        assert_exact(chain, target)
    assert verified(chain) == list(range(count))
    target.terminate_and_check()


@pytest.mark.parametrize(
    ("rubbish", "command"),
    [(b"", ("dump",)), (b"\0\xff\n1 2\n" * 100, ("watch", "--count", 1)), (b"1\n", ("dump",))],
)
def test_a_lock_is_as_good_as_its_holder(
    target: Target, tmp_path: Path, rubbish: bytes, command: tuple[object, ...]
) -> None:
    """Whatever the file says, and however the holder ended."""
    chain = tmp_path / "chain"
    with Watching(target.pid, chain, "--interval", 0) as watching:
        watching.event("checkpoint")
        (chain / "lock").write_bytes(rubbish)
        refused = run(*command, target.pid, "-o", chain)
        refused.expect(1, f"{chain} is being written by pid {watching.pid}\n")
        assert not refused.stdout
        os.kill(watching.pid, signal.SIGKILL)
    run("dump", target.pid, "-o", chain).expect(0)
    assert verified(chain) == [0, 1]
    assert_exact(chain, target)
    target.terminate_and_check()


HOLD = """
import fcntl, os, sys
fd = os.open(sys.argv[1], os.O_RDWR)
fcntl.flock(fd, fcntl.LOCK_EX)
os.ftruncate(fd, 0)
os.pwrite(fd, b"%d\\n" % os.getpid(), 0)
print(flush=True)
sys.stdin.read()
"""


def test_a_holder_in_another_pid_namespace_is_named_as_we_see_it(
    target: Target, tmp_path: Path
) -> None:
    chain = tmp_path / "chain"
    run("dump", target.pid, "-o", chain).expect(0)
    apart = ["unshare", "--pid", "--fork", "--mount-proc"]
    if subprocess.run([*apart, "true"], capture_output=True, check=False).returncode:
        pytest.skip("cannot run here: no new PID namespace")
    holding = subprocess.Popen(
        [*apart, sys.executable, "-c", HOLD, str(chain / "lock")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    with holding:
        assert holding.stdout
        assert holding.stdout.readline()
        assert (chain / "lock").read_text() == "1\n"
        children = Path(f"/proc/{holding.pid}/task/{holding.pid}/children").read_text().split()
        run("dump", target.pid, "-o", chain).expect(1, f"being written by pid {children[0]}\n")
        holding.communicate()
    run("dump", target.pid, "-o", chain).expect(0)
    assert verified(chain) == [0, 1]


def test_a_holder_that_we_cannot_see_is_said_to_be_elsewhere(
    target: Target, tmp_path: Path
) -> None:
    chain = tmp_path / "chain"
    apart = ("unshare", "--pid", "--fork", "--mount-proc")
    if subprocess.run([*apart, "true"], capture_output=True, check=False).returncode:
        pytest.skip("cannot run here: no new PID namespace")
    with Watching(target.pid, chain, "--interval", 0) as watching:
        watching.event("checkpoint")
        script = "import sys; from crtrace.image.store import ChainWriter as W; W.open(sys.argv[1])"
        inside = subprocess.run(
            [*apart, sys.executable, "-c", script, str(chain)],
            capture_output=True,
            text=True,
            cwd=Path(__file__).parents[2],
            check=False,
        )
        said = f"being written by pid {watching.pid} of another PID namespace"
        assert said in inside.stderr, inside.stderr
    assert verified(chain) == [0]


def test_a_chain_on_a_file_system_that_became_read_only(target: Target, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=8m,mode=0700", "tmpfs", disk]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("cannot run here: a file system cannot be mounted")
    chain = disk / "chain"
    try:
        run("dump", target.pid, "-o", chain).expect(0)
        subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
        for command in ("watch", "dump"):
            result = run(command, target.pid, "-o", chain)
            result.expect(1, f"read-only file system while opening {chain / 'lock'}")
        assert verified(chain) == [0]
        subprocess.run(["mount", "-o", "remount,rw", disk], check=True)
        run("dump", target.pid, "-o", chain).expect(0)
        assert verified(chain) == [0, 1]
    finally:
        subprocess.run(["umount", "-l", disk], check=True)
    target.terminate_and_check()
