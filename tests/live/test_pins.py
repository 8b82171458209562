"""Memory that the kernel writes without a page fault is found, or at least counted."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from crtrace.linux import uffd
from crtrace.linux.addrspace import AddressSpace
from crtrace.linux.pins import Pins
from crtrace.linux.procfs import Process
from crtrace.linux.stop import StoppedProcess
from crtrace.track.armer import How
from crtrace.track.userfaultfd import UserfaultfdArmer
from crtrace.units import PAGE_SHIFT, PAGE_SIZE, Pid, contains, merge
from tests.live.conftest import Spawn
from tests.live.exactness import judged
from tests.live.harness import Target, read_mem

HUGE_PAGE = 2 << 20
ROOT = Path(__file__).parents[2]


@pytest.fixture
def target(spawn: Spawn) -> Target:
    """A target with one ring."""
    target = spawn("pins")
    if not target.command("ring").startswith("ok"):
        pytest.skip("cannot run here: no io_uring (see kernel.io_uring_disabled)")
    return target


@pytest.fixture
def process(target: Target) -> Iterator[Process]:
    """Its process."""
    with Process(Pid(target.pid)) as process:
        yield process


def found(process: Process) -> Pins:
    """What a look at all its descriptors finds."""
    pins = Pins()
    pins.find(process)
    return pins


def area_pages(target: Target, pins: Pins, process: Process) -> list[list[int]]:
    """The pinned page ranges, counted from the beginning of the target's area."""
    ranges = pins.ranges(process)
    first = np.uint64(target.info["addr"] >> PAGE_SHIFT)
    return [[int(start), int(end)] for start, end in (ranges - first).tolist()]


def test_without_fixed_buffers_there_is_nothing(process: Process) -> None:
    pins = found(process)
    assert len(pins.rings) == 1
    assert not len(pins.ranges(process))
    assert pins.unexplained(process) == 0


def test_fixed_buffers_are_found_as_they_are_now(target: Target, process: Process) -> None:
    target.obey("ring")
    pins = found(process)
    target.obey("register 0 3 4")
    target.obey("register 1 6 2")
    assert area_pages(target, pins, process) == [[3, 8]]
    assert pins.unexplained(process) == 0
    target.obey("unregister 0")
    assert area_pages(target, pins, process) == [[6, 8]]
    target.obey("close 1")
    assert area_pages(target, pins, process) == []


def test_sparse_tables_tell_the_places_that_are_filled(target: Target, process: Process) -> None:
    pins = found(process)
    if not target.command("sparse 0 8").startswith("ok"):
        pytest.skip("cannot run here: no tables that are sparse (before Linux 5.19)")
    assert area_pages(target, pins, process) == []
    target.obey("place 0 5 20 2")
    target.obey("place 0 1 30 1")
    assert area_pages(target, pins, process) == [[20, 22], [30, 31]]
    assert pins.unexplained(process) == 0


def test_buffers_that_rings_share_outlive_the_first(target: Target, process: Process) -> None:
    target.obey("ring")
    target.obey("register 0 8 2")
    if not target.command("clone 0 1").startswith("ok"):
        pytest.skip("cannot run here: the kernel cannot clone buffers (before Linux 6.12)")
    pins = found(process)
    assert area_pages(target, pins, process) == [[8, 10]]
    target.obey("close 0")
    assert area_pages(target, pins, process) == [[8, 10]]


def test_the_memory_of_a_closed_descriptor_is_nobodys(target: Target, process: Process) -> None:
    """Another file may have its number by then."""
    target.obey("register 0 8 2")
    pins = found(process)
    target.obey("close 0")
    target.obey("open /proc/self/exe")
    assert area_pages(target, pins, process) == []


def test_huge_pages_are_explained_by_the_buffers_inside(target: Target, process: Process) -> None:
    target.obey("huge 0")
    pins = found(process)
    assert int(process.status()["VmPin"].split()[0]) << 10 in (2 * PAGE_SIZE, HUGE_PAGE)
    assert pins.unexplained(process) == 0


def test_a_ring_without_a_descriptor_is_counted(target: Target, process: Process) -> None:
    if not target.command("ring hidden").startswith("ok"):
        pytest.skip("cannot run here: no rings without descriptors (before Linux 6.5)")
    target.obey("register 1 3 4")
    pins = found(process)
    assert len(pins.rings) == 1
    assert not len(pins.ranges(process))
    assert pins.unexplained(process) == 4 * PAGE_SIZE


def test_a_ring_made_after_the_look_is_counted(target: Target, process: Process) -> None:
    pins = found(process)
    target.obey("ring")
    target.obey("register 1 3 4")
    assert pins.unexplained(process) == 4 * PAGE_SIZE
    assert found(process).unexplained(process) == 0


def test_rings_in_memory_of_the_target_are_told(target: Target, process: Process) -> None:
    space = AddressSpace(process)
    space.refresh()
    assert found(process).unmapped_rings(process, space) == 0
    if not target.command("ring unmapped").startswith("ok"):
        pytest.skip("cannot run here: no rings in memory of one's own (before Linux 6.5)")
    space.refresh()
    assert found(process).unmapped_rings(process, space) == 1


def test_descriptors_for_direct_reading_are_counted(
    target: Target, process: Process, tmp_path: Path
) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"F" * PAGE_SIZE)
    assert found(process).direct == 0
    if not target.command(f"open {file}").startswith("ok"):
        pytest.skip("cannot run here: this file system has no direct I/O")
    assert found(process).direct == 1


def test_memory_that_a_network_card_fills_is_told(target: Target, process: Process) -> None:
    space = AddressSpace(process)
    space.refresh()
    pins = found(process)
    assert not pins.shared_with_cards(space)
    if not target.command("card").startswith("ok"):
        pytest.skip("cannot run here: no sockets that share memory (CONFIG_XDP_SOCKETS)")
    space.refresh()
    assert pins.shared_with_cards(space)
    assert pins.unexplained(process) == 0, "the kernel counts it now"


def test_userfaultfds_are_found(target: Target, process: Process) -> None:
    assert found(process).userfaultfds == 0
    target.obey("uffd 0")
    pins = found(process)
    assert (pins.userfaultfds, pins.notes_writes) == (1, False)
    if not target.command(f"uffd {uffd.FEATURES}").startswith("ok"):
        pytest.skip("cannot run here: no write protection by userfaultfd (before Linux 6.7)")
    pins = found(process)
    assert (pins.userfaultfds, pins.notes_writes) == (2, True)


def test_files_that_others_read_for_the_kernel_count_as_read_directly(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They may read past the page cache without O_DIRECT."""
    read, direct = Process.read, []
    with open(tmp_path / "file", "w+") as file, Process(Pid(os.getpid())) as process:
        about = Path(f"/proc/self/fdinfo/{file.fileno()}").read_text()
        mount = about.partition("mnt_id:")[2].split()[0]
        for kind in ("fusectl", "ext4", "fuse.sshfs", "9p"):
            line = f"{mount} 1 0:5 / /mnt rw - {kind} x rw\n".encode()
            monkeypatch.setattr(
                Process, "read",
                lambda self, name, line=line: line if name == "mountinfo" else read(self, name),
            )  # fmt: skip
            direct.append(found(process).direct)
    assert direct[0] == direct[1] < direct[2] == direct[3]


@pytest.fixture
def armed(process: Process, userfaultfd: None) -> Iterator[tuple[UserfaultfdArmer, AddressSpace]]:
    """The target armed by userfaultfd, all its pages protected."""
    space = AddressSpace(process)
    with closing(UserfaultfdArmer(process, space)) as armer:
        with StoppedProcess(process) as stopped:
            armer.arm(stopped)
        armer.scan(space, How(stopped=True))
        armer.scan(space, How(stopped=True))
        yield armer, space


def test_what_a_ring_writes_into_fixed_buffers_is_in_the_scan_or_among_the_pins(
    target: Target, process: Process, request: pytest.FixtureRequest
) -> None:
    target.obey("register 0 3 4")
    armer, space = request.getfixturevalue("armed")
    page = target.info["addr"] // PAGE_SIZE + 4
    before = read_mem(target.pid, page * PAGE_SIZE, PAGE_SIZE)
    target.obey("fixed 0 4 98")
    assert read_mem(target.pid, page * PAGE_SIZE, PAGE_SIZE) != before
    written = armer.scan(space, How(stopped=True)).written
    known = merge(written, found(process).ranges(process))
    assert contains(known, np.array([page], dtype=np.uint64)).all()
    # Else nobody would have to look for pins.
    assert not contains(written, np.array([page], dtype=np.uint64)).any()


def seen_written(armer: UserfaultfdArmer, space: AddressSpace, page: int) -> bool:
    """Whether a scan of the target, which is quiet, says that a page was written."""
    written = armer.scan(space, How(stopped=True)).written
    return bool(contains(written, np.array([page], dtype=np.uint64)).all())


@pytest.fixture
def slow_disk(tmp_path: Path, target: Target) -> Iterator[tuple[Path, Callable[[int], None]]]:
    """A block device, and how to set the bytes that the target may read of it in a second."""
    blkio = Path("/sys/fs/cgroup/blkio")
    (tmp_path / "disk").write_bytes(b"D" * 64 * PAGE_SIZE)
    attach = ["losetup", "--find", "--show", str(tmp_path / "disk")]
    if not (blkio / "blkio.throttle.read_bps_device").exists():
        pytest.skip("cannot run here: no cgroup that throttles block devices")
    done = subprocess.run(attach, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip("cannot run here: no loop devices")
    device, group = Path(done.stdout.strip()), blkio / f"crtrace-{target.pid}"
    number = os.stat(device).st_rdev

    def throttle(rate: int) -> None:
        rule = f"{os.major(number)}:{os.minor(number)} {rate}"
        (group / "blkio.throttle.read_bps_device").write_text(rule)

    group.mkdir()
    try:
        (group / "cgroup.procs").write_text(str(target.pid))
        yield device, throttle
    finally:
        throttle(0)
        (blkio / "cgroup.procs").write_text(str(target.pid))
        group.rmdir()
        subprocess.run(["losetup", "--detach", device], check=True)


def test_a_direct_read_in_flight_over_a_scan_is_in_the_next_or_told(
    target: Target,
    process: Process,
    armed: tuple[UserfaultfdArmer, AddressSpace],
    slow_disk: tuple[Path, Callable[[int], None]],
) -> None:
    """The page is pinned, then armed, then written by the device: that takes no page fault."""
    (armer, space), (device, throttle) = armed, slow_disk
    page = target.info["addr"] // PAGE_SIZE + 9
    target.obey(f"open {device}")
    throttle(1)
    target.obey("submit 9")
    assert seen_written(armer, space, page)
    assert read_mem(target.pid, page * PAGE_SIZE, 1) == b"a"
    throttle(0)
    target.obey("await")
    assert read_mem(target.pid, page * PAGE_SIZE, 1) == b"D"
    assert seen_written(armer, space, page) or found(process).direct == 1


class SlowWriter:
    """See ``slow_writer.py``: in another process, since what the controller does is known."""

    def __init__(self, pid: int, address: int) -> None:
        command = [sys.executable, "-m", "tests.live.slow_writer", str(pid), str(address)]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT
        )
        assert self._process.stdout
        assert self._process.stdout.readline() == "pinned\n"

    def go_on(self) -> None:
        """Let it write."""
        self._process.communicate("go\n", timeout=20)
        assert self._process.returncode == 0


@pytest.mark.usefixtures("userfaultfd")
@pytest.mark.parametrize("when", ["before", "meanwhile"])
def test_what_a_slow_writer_had_in_hand_is_in_the_next_epoch(
    spawn: Spawn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    """It lets go of the lock before it writes: its page can be armed twice by then."""
    target = spawn("layout")
    address = target.ask("areas")["anon_written"]["addr"]
    writers = []

    with judged(target.pid, tmp_path / "chain") as judge:
        judge.take()
        collect = judge.session._collect

        def begin(*args: Any) -> None:
            if not writers:
                writers.append(SlowWriter(target.pid, address))
            collect(*args)

        if when == "before":
            writers.append(SlowWriter(target.pid, address))
        monkeypatch.setattr(judge.session, "_collect", begin)
        judge.take()
        assert read_mem(target.pid, address, 1) != b"L"
        writers[0].go_on()
        assert read_mem(target.pid, address, 1) == b"L"
        judge.take()


@pytest.mark.usefixtures("userfaultfd")
def test_a_descriptor_that_comes_while_an_epoch_is_taken_is_not_overlooked(
    spawn: Spawn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A direct read by it may be under way into what was found written."""
    target, file = spawn("pins"), tmp_path / "file"
    file.write_bytes(bytes(PAGE_SIZE))
    with judged(target.pid, tmp_path / "chain") as judge:
        judge.take()
        member = judge.session._tree.root.target
        assert not member.pins.direct
        collect = judge.session._collect

        def begin(*args: Any) -> None:
            if not target.command(f"open {file}").startswith("ok"):
                pytest.skip("cannot run here: this file system has no direct I/O")
            collect(*args)

        monkeypatch.setattr(judge.session, "_collect", begin)
        judge.take()
        assert len(member.recent)  # what the target wrote to answer, at least
        judge.take()
