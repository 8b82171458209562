"""Writes that are no page faults of the target's threads: marked where kprobes are allowed."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from crtrace.linux import bpf
from crtrace.linux.procfs import Process
from crtrace.track import loader
from crtrace.track.armer import Look
from crtrace.track.dirty import (
    BITS,
    NO_PROCESS,
    SHARES,
    TARGET,
    VISITS,
    Coverage,
    WrittenPages,
    vmstat,
)
from crtrace.track.guide import Guide, Unexplained
from crtrace.track.loader import KEY, Loading, Programs
from crtrace.units import PAGE_SIZE, Pid, no_pages
from tests.live.conftest import Spawn
from tests.live.exactness import judged, take_with
from tests.live.harness import Target, compile_target
from tests.live.test_bounded import BOUNDABLE, small_targets_too
from tests.live.test_marks import pages_between
from tests.live.test_ways import Stage

__all__ = ["small_targets_too"]
WRITES = ("writev", "poke", "mem")
BY_OTHERS = {
    "process_vm_writev by another process": "vm_writev",
    "PTRACE_POKEDATA by another process": "poke",
    "/proc/PID/mem by another process": "proc_mem",
    "/proc/self/mem into pages for reading": "forced",
    "process_vm_writev to itself": "own_vm_writev",
    "read past the page cache": "direct",
    "AIO past the page cache": "aio_direct",
    "a CLONE_VM child from before the watch": "sharing_child_from_before",
    "CLONE_VM children that stay": "sharing_child_that_stays",
}


KPROBES = Path("/sys/bus/event_source/devices/kprobe")
BTF = Path("/sys/kernel/btf/vmlinux")


@pytest.fixture(scope="module")
def covering() -> Iterator[Programs]:
    """Programs that mark what others write."""
    with Loading().result() as programs:
        if WrittenPages(programs).coverage is not Coverage.OTHERS:
            assert not (KPROBES.exists() and BTF.exists())
            pytest.skip("cannot run here: no kprobes, or no BTF")
        yield programs


@pytest.fixture(scope="module")
def stage(covering: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    """Scenes that tests of one way after another share."""
    stage = Stage((tmp_path_factory.mktemp("stage") for _ in iter(int, 1)), *BOUNDABLE)
    yield stage
    stage.close()


def outside(how: str, target: Target, address: int, pages: int, byte: int = 7) -> None:
    """Another process does something to the target's pages."""
    program = compile_target("outsider")
    subprocess.run([program, how, str(target.pid), hex(address), str(pages), str(byte)], check=True)


def look(process: Process) -> None:
    """Take the lock of its address space for a moment."""
    with open(f"/proc/{process.pid}/pagemap", "rb", buffering=0) as file:
        file.read(8)


def anonymous(target: Target, name: str = "anon_unwritten") -> int:
    """Where an area of the target is."""
    return int(target.ask("areas")[name]["addr"])


@pytest.mark.parametrize("how", WRITES)
def test_pages_that_others_write_are_marked(spawn: Spawn, covering: Programs, how: str) -> None:
    marks, target = WrittenPages(covering), spawn("layout")
    address = anonymous(target)
    with Process(Pid(target.pid)) as process:
        tgid = marks.add(process)
        space, number = marks.mm_behind(partial(look, process))
        faults = marks.counts(tgid).faults
        outside(how, target, address + 3 * PAGE_SIZE, 2)
        assert marks.written_by_others(space) == 2
        assert marks.counts(tgid).faults == faults
        marks.switch()
        drained = marks.drain()
        marks.leave_mm(space)
    assert pages_between(drained[number], address, 8 * PAGE_SIZE) == {3, 4}
    assert not pages_between(drained.get(tgid, np.empty(0)), address, 8 * PAGE_SIZE)


def test_the_faults_of_a_target_are_marked_once(spawn: Spawn, covering: Programs) -> None:
    marks, target = WrittenPages(covering), spawn("layout")
    with Process(Pid(target.pid)) as process:
        tgid = marks.add(process)
        space, number = marks.mm_behind(partial(look, process))
        target.obey("write anon_unwritten 0 8 5")
        assert marks.counts(tgid).faults >= 8
        assert marks.written_by_others(space) == 0
        marks.leave_mm(space)
        marks.switch()
        assert number not in marks.drain()


def test_who_runs_in_the_memory_and_is_no_target_is_marked(
    spawn: Spawn, covering: Programs
) -> None:
    marks, target = WrittenPages(covering), spawn("layout")
    address = anonymous(target)
    with Process(Pid(target.pid)) as process:
        space, number = marks.mm_behind(partial(look, process))
        target.obey("write anon_unwritten 5 1 5")
        assert marks.written_by_others(space) >= 1
        marks.leave_mm(space)
        marks.switch()
        assert 5 in pages_between(marks.drain()[number], address, 8 * PAGE_SIZE)


@pytest.mark.parametrize(
    ("how", "plain"), [*((how, True) for how in (*WRITES, "look")), ("page_out", False)]
)
def test_what_changes_memory_by_faults_only_is_no_evidence(
    spawn: Spawn, covering: Programs, how: str, plain: bool
) -> None:
    marks, target = WrittenPages(covering), spawn("layout")
    address = anonymous(target, "anon_written")
    with Process(Pid(target.pid)) as process:
        space, _ = marks.mm_behind(partial(look, process))
        before, foreign = marks.evidence(space, []), marks.foreign_visits(space)
        outside(how, target, address, 4)
        assert marks.foreign_visits(space) > foreign
        assert (marks.evidence(space, []) == before) == (plain and marks.spares_plain)
        before = marks.evidence(space, [])
        target.obey("brk +4")  # its own change of what is mapped
        assert marks.evidence(space, []) != before
        marks.leave_mm(space)


def test_without_covering_every_visit_is_evidence(spawn: Spawn) -> None:
    target = spawn("layout")
    with Loading(covering=False).result() as programs, Process(Pid(target.pid)) as process:
        marks = WrittenPages(programs)
        assert marks.coverage is Coverage.FAULTS
        space, _ = marks.mm_behind(partial(look, process))
        before = marks.evidence(space, [])
        outside("look", target, 0, 0)
        assert marks.evidence(space, []) != before


ELEMENTS = {"visits": (np.uint64, VISITS), "targets": (np.uint32, TARGET)}


def counted(marks: WrittenPages, table: str, key: int, **values: int) -> None:
    """Let BPF have counted so, of an address space or of a process."""
    key_type, value_type = ELEMENTS[table]
    value = np.zeros(1, dtype=value_type)
    for name, number in values.items():
        value[name] = number
    bpf.update(marks._maps[table], np.array([key], dtype=key_type), value)


def test_a_plain_visit_that_is_under_way_equals_nothing() -> None:
    with Loading(covering=False).result() as programs:
        marks = WrittenPages(programs)
        counted(marks, "visits", 99, all=5, begun=3)
        guide = Guide(marks, 99, NO_PROCESS)
        basis = guide.basis([], 0)
        guide.everything_seen(basis)
        assert guide.holds(guide.basis([], 0))
        counted(marks, "visits", 99, all=5, begun=4, plain=1)
        assert not guide.holds(guide.basis([], 0))
        guide.everything_seen(guide.basis([], 0))
        assert not guide.holds(guide.basis([], 0))
        counted(marks, "visits", 99, all=5, begun=4)
        guide.everything_seen(guide.basis([], 0))
        guide.paused([])
        assert guide.holds(guide.basis([], 0))
        counted(marks, "visits", 99, all=5, begun=5)  # between the scan of a pause and what follows
        guide.paused([])
        assert not guide.holds(guide.basis([], 0))


def test_a_fault_between_the_scan_of_a_pause_and_what_follows_is_looked_for() -> None:
    with Loading(covering=False).result() as programs:
        marks = WrittenPages(programs)
        guide = Guide(marks, 99, NO_PROCESS)
        counted(marks, "targets", 7, faults=1)
        basis = guide.basis([7], 0)
        guide.everything_seen(basis)
        guide.paused([7])
        assert guide.holds(basis)
        counted(marks, "targets", 7, faults=2)
        guide.paused([7])
        assert not guide.holds(basis)
        # To look at everything while it goes on does not help.
        guide.looked_ahead(basis)
        assert not guide.judge(Unexplained(0, 0), basis, basis)
        assert not guide.holds(basis)


@pytest.mark.parametrize(("flags", "unexplained"), [(SHARES, 0), (0, 1)])
def test_what_a_child_in_the_same_memory_writes_is_not_late(flags: int, unexplained: int) -> None:
    """That nobody has met yet."""
    with Loading(covering=False).result() as programs:
        marks = WrittenPages(programs)
        counted(marks, "targets", 7, flags=flags)
        key, word = np.zeros(1, dtype=KEY), np.zeros(1, dtype=BITS)
        key["number"], key["region"], word["word"][0, 0] = 7, 5, 1
        bpf.update(marks._maps["written0"], key, word)
        look = Look(np.array([[5 * 512, 5 * 512 + 1]], dtype=np.uint64), no_pages())
        guide = Guide(marks, 99, NO_PROCESS)
        assert guide.unexplained(look, [1], no_pages()) == (unexplained, 0)


def test_counters_of_the_kernel_are_read_to_the_last() -> None:
    lines = [line.split() for line in Path("/proc/vmstat").read_bytes().splitlines()]
    expected = {name: int(value) > 0 for name, value in lines}
    found = [value > 0 for value in vmstat(*expected)]
    assert any(found[-8:])
    assert found[-8:] == list(expected.values())[-8:]
    # Some come and go.
    assert sum(a != b for a, b in zip(expected.values(), found, strict=True)) < len(lines) / 20
    assert vmstat(b"no such counter") == [0]


def test_a_plain_visit_that_is_under_way_may_write_at_any_time(covering: Programs) -> None:
    marks = WrittenPages(covering)
    if not marks.spares_plain:
        pytest.skip(
            "cannot run here: the kernel does not count the runs of probes that were missed"
        )
    counted(marks, "visits", 99, begun=3)
    assert marks.written_meanwhile(99, []) == marks.written_meanwhile(99, [])
    counted(marks, "visits", 99, begun=3, plain=1)
    assert marks.written_meanwhile(99, []) != marks.written_meanwhile(99, [])
    marks.leave_mm(99)


def test_a_probe_that_marks_nothing_is_no_coverage(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the layout of structs were that of another kernel."""
    types = loader.kernel_types()
    if not types:
        pytest.skip("cannot run here: the kernel has no BTF")
    wrong = ["-DVMA_MM_OFFSET=8", *types[1:]]
    compile_with(f"loader.kernel_types = lambda: {wrong}", monkeypatch)
    with Loading().result() as programs:
        assert WrittenPages(programs).coverage is Coverage.FAULTS


def compile_with(change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let BPF programs be compiled anew, after a change in the compiler's process."""
    code = f"""
import sys
from crtrace.track import loader
{change}
sys.stdout.buffer.write(loader._compile().pack())
"""
    command = [sys.executable, "-c", code]
    monkeypatch.setattr(loader, "recall", lambda key: None)
    monkeypatch.setattr(loader, "keep", lambda key, code: None)
    monkeypatch.setattr(
        loader, "_compiler",
        lambda: subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE),
    )  # fmt: skip


def test_a_kernel_that_tells_of_no_visits_is_enough(
    spawn: Spawn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As before Linux 5.12: everything is scanned, and maps are read, each time."""
    compile_with("loader.kernel_version = lambda: (5, 10)", monkeypatch)
    target = spawn("layout")
    with judged(target.pid, tmp_path / "chain") as judge:
        judge.take()
        for command in ("write anon_written 0 8 5", "brk +4", "write anon_unwritten 0 8 6"):
            target.obey(command)
            judge.take()
    for stats in judge.stats:
        assert stats["bpf_coverage"] == "page faults, and nobody tells of visits by others"
        assert stats["scans_bounded"] == 0
    assert judge.stats[-1]["bpf_pages"] >= 8


@pytest.mark.usefixtures("userfaultfd", "covering")
@pytest.mark.parametrize("way", BY_OTHERS.values(), ids=BY_OTHERS)
def test_no_write_of_others_is_missed(stage: Stage, way: str) -> None:
    with stage.lend() as it:
        it.take()
        for _ in range(2):
            if lacking := it.do(way):
                pytest.skip(f"cannot run here: {lacking}")
            stats = it.take()
            assert stats["bpf_missed"] == 0
            assert stats["bpf_coverage"] == "page faults, writes by others"


@pytest.mark.usefixtures("userfaultfd", "covering", "small_targets_too")
@pytest.mark.parametrize("step", ["_pause", "_look_back"])
def test_scans_stay_bounded_while_others_write(spawn: Spawn, tmp_path: Path, step: str) -> None:
    target = spawn("layout")
    areas = target.ask("areas")
    with judged(target.pid, tmp_path / "chain") as judge:
        judge.take()
        for turn, how in enumerate((*WRITES, "look")):
            for area in ("anon_written", "anon_unwritten"):
                act = partial(outside, how, target, areas[area]["addr"], 4, turn + 1)
                take_with(judge, act, step)
            judge.take()
    for stats in judge.stats[1:]:
        assert stats["scans_bounded"] == 1
        assert stats["pages_late"] == 0
        assert stats["bpf_missed"] == 0


@pytest.mark.usefixtures("userfaultfd", "small_targets_too")
def test_a_visit_is_followed_by_a_scan_of_everything_without_coverage(
    spawn: Spawn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(WrittenPages, "_covers_others", lambda marks: False)
    target = spawn("layout")
    address = anonymous(target, "anon_written")
    with judged(target.pid, tmp_path / "chain") as judge:
        judge.take()
        take_with(judge, partial(outside, "writev", target, address, 4), "_pause")
        judge.take()
    assert [stats["scans_bounded"] for stats in judge.stats] == [1, 0, 1]
    assert judge.stats[-1]["bpf_coverage"] == "page faults"
