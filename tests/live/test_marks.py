"""What BPF marks, against what targets are known to write."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from crtrace.errors import TargetGone
from crtrace.linux import bpf
from crtrace.linux.addrspace import EVERYTHING, AddressSpace
from crtrace.linux.libc import kernel_version
from crtrace.linux.procfs import Process
from crtrace.linux.ptrace import signals_held
from crtrace.linux.stop import StoppedProcess
from crtrace.track import bytecode
from crtrace.track.armer import How
from crtrace.track.bytecode import Bytecode, cache_key, keep, recall
from crtrace.track.dirty import CHILD, TARGET, WrittenPages
from crtrace.track.loader import (
    COVERING,
    LOCKS,
    MIGRATING,
    RAW_TRACEPOINTS,
    RESOLVER,
    TRACEPOINTS,
    Loading,
    Programs,
    bpf_sources,
    kernel_types,
)
from crtrace.track.userfaultfd import UserfaultfdArmer
from crtrace.units import PAGE_SIZE, U64, Pid
from tests.live.conftest import Spawn, skip_unless_visits_are_told
from tests.live.exactness import judged
from tests.live.harness import compile_target, wait_until
from tests.live.runner import CRTRACE, run, verified


@pytest.fixture
def programs() -> Iterator[Programs]:
    """Freshly loaded programs: maps are empty and detached afterwards."""
    with Loading().result() as loaded:
        yield loaded


def pages_between(marked: U64, start: int, size: int) -> set[int]:
    """The marked pages within a range of addresses, counted from its start."""
    first = start // PAGE_SIZE
    inside = marked[(marked >= first) & (marked < first + size // PAGE_SIZE)]
    return {int(page) - first for page in inside}


def test_bpf_compiles_without_warnings() -> None:
    """The compiler's process is silent: what clang has to say comes on its stderr."""
    command = [sys.executable, "-m", "crtrace.track.loader"]
    done = subprocess.run(command, capture_output=True, check=False)
    assert (done.returncode, done.stderr) == (0, b"")
    names = {each.name.rpartition("__")[2] for each in Bytecode.unpack(done.stdout).programs}
    always = {*RAW_TRACEPOINTS, *(name for _, name in TRACEPOINTS), RESOLVER, MIGRATING}
    assert names - {*LOCKS, COVERING} == always
    assert names & {*LOCKS} == (set() if kernel_version() < (5, 12) else {*LOCKS})
    assert bool(kernel_types()) == (COVERING in names)
    assert (bpf_sources() / "track.c").is_file()


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A place of our own for compiled code."""
    monkeypatch.setattr(bytecode, "SHARED_CACHE", tmp_path / "cache")
    return tmp_path / "cache"


def origins(count: int) -> list[str]:
    """Where the code of so many loads came from, in one word each."""
    found = []
    for _ in range(count):
        with Loading().result() as programs:
            found.append(programs.origin.split()[0])
    return found


def test_code_is_compiled_once(cache: Path) -> None:
    assert origins(3) == ["compiled", "kept", "kept"]
    (file,) = cache.iterdir()
    assert file.stat().st_mode & 0o777 == 0o600


def test_code_that_anybody_else_may_have_written_is_not_used(cache: Path) -> None:
    assert origins(1) == ["compiled"]
    (file,) = cache.iterdir()
    for path, mode, owner in ((cache, 0o777, 0), (file, 0o620, 0), (file, 0o600, 65534)):
        path.chmod(mode)
        os.chown(path, owner, 0)
        assert recall(cache_key(bpf_sources())) is None
        path.chmod(0o700 if path == cache else 0o600)
        os.chown(path, 0, 0)
        assert recall(cache_key(bpf_sources()))
    file.rename(cache / "elsewhere")
    file.symlink_to(cache / "elsewhere")
    assert recall(cache_key(bpf_sources())) is None


@pytest.mark.parametrize("change", ["cut", "flipped", "of other sources"])
def test_code_that_is_not_what_was_kept_is_compiled_anew(cache: Path, change: str) -> None:
    assert origins(1) == ["compiled"]
    (file,) = cache.iterdir()
    data = bytearray(file.read_bytes())
    if change == "cut":
        del data[-10:]
    elif change == "flipped":
        data[len(data) // 2] ^= 1
    else:
        data[:32] = b"0" * 32
    file.write_bytes(data)
    assert origins(2) == ["compiled", "kept"]


def test_code_that_the_kernel_refuses_is_compiled_anew(cache: Path) -> None:
    assert origins(1) == ["compiled"]
    key = cache_key(bpf_sources())
    code = recall(key)
    assert code
    programs = [replace(each, code=each.code[:-8]) for each in code.programs]  # without an exit
    with pytest.raises(OSError, match="for program"):
        bpf.load_program(programs[0].name, programs[0].kind, programs[0].bound([3] * 6))
    keep(key, replace(code, programs=tuple(programs)))
    assert origins(2) == ["compiled", "kept"]


def test_code_can_be_kept_nowhere(cache: Path) -> None:
    cache.write_text("in the way")
    assert origins(2) == ["compiled", "compiled"]


def test_several_processes_are_told_apart(spawn: Spawn, programs: Programs) -> None:
    marks = WrittenPages(programs)
    targets = [spawn("layout") for _ in range(3)]
    with ExitStack() as stack:
        numbers = [marks.add(stack.enter_context(Process(Pid(target.pid)))) for target in targets]
        assert len(set(numbers)) == 3
        for at, target in enumerate(targets):
            target.obey(f"write anon_unwritten {2 * at} {at + 1} 5")
        marks.switch()
        drained = marks.drain()
    for at, (number, target) in enumerate(zip(numbers, targets, strict=True)):
        area = target.ask("areas")["anon_unwritten"]
        written = pages_between(drained[number], area["addr"], area["pages"] * PAGE_SIZE)
        assert written == set(range(2 * at, 3 * at + 1))


@pytest.mark.parametrize("reaped", [False, True])
def test_a_process_that_ends_while_it_is_looked_up_is_gone(
    spawn: Spawn, programs: Programs, reaped: bool
) -> None:
    target = spawn("layout")
    with Process(Pid(target.pid)) as process:
        status = process.status

        def and_ends() -> dict[str, str]:
            before = status()
            target.process.kill()
            wait_until(lambda: not process.alive(), "its end")
            if reaped:
                target.process.wait()
            return before

        process.status = and_ends  # type: ignore[method-assign]
        with pytest.raises(TargetGone):
            WrittenPages(programs).add(process)


def test_marks_of_the_next_generation_are_kept_apart(spawn: Spawn, programs: Programs) -> None:
    marks = WrittenPages(programs)
    target = spawn("layout")
    area = target.ask("areas")["anon_unwritten"]
    with Process(Pid(target.pid)) as process:
        number = marks.add(process)
        seen = []
        for page in range(4):
            target.obey(f"write anon_unwritten {page} 1 5")
            marks.switch()
            pages = marks.drain().get(number, np.empty(0, dtype=np.uint64))
            seen.append(pages_between(pages, area["addr"], area["pages"] * PAGE_SIZE))
    assert seen == [{0}, {1}, {2}, {3}]


def test_the_first_faults_of_children_are_seen(spawn: Spawn, programs: Programs) -> None:
    marks = WrittenPages(programs)
    target = spawn("spawner")
    with Process(Pid(target.pid)) as process:
        number = marks.add(process, follow=True)
        children = target.ask("fork 5 32") + target.ask("threads 2 32 3") + target.ask("tree 3 16")
        assert set(marks.targets()) >= {number, *(child["pid"] for child in children)}
        marks.switch()
        drained = marks.drain()
    for child in children:
        pages = child["pages"]
        for area in ("inherited", "fresh"):
            written = pages_between(drained[child["pid"]], child[area], pages * PAGE_SIZE)
            assert written == set(range(pages)), f"{area} of {child}"
    target.obey("reap")
    wait_until(lambda: set(marks.targets()) == {number}, "children that ended are targets no more")
    assert marks.lost_children() == 0


def test_pages_without_room_in_the_map_are_counted(spawn: Spawn) -> None:
    with Loading(regions=4).result() as programs:
        marks = WrittenPages(programs)
        target = spawn("writer", "--mib", 64, "--running", 0, "--huge", 0)
        with Process(Pid(target.pid)) as process:
            number = marks.add(process)
            target.obey("go")
            wait_until(lambda: marks.counts(number).lost > 100, "losses are counted")


@pytest.mark.usefixtures("userfaultfd")
def test_no_mark_is_lost_to_a_switch(spawn: Spawn, programs: Programs) -> None:
    """That comes between the two steps of marking the first page of a region."""
    target, marks = spawn("bench", "--mib", 1024), WrittenPages(programs)
    with ExitStack() as stack:
        process = stack.enter_context(Process(Pid(target.pid)))
        space = AddressSpace(process)
        armer = stack.enter_context(closing(UserfaultfdArmer(process, space)))
        with signals_held(), StoppedProcess(process) as stopped:
            armer.arm(stopped)
        number = marks.add(process)
        armer.scan(space, How(stopped=False))
        target.obey("write 300")
        until = time.monotonic() + 5
        while time.monotonic() < until:
            armer.scan(space, How(stopped=False))
            marks.switch()
            marks.drain()
        target.obey("write 0")
        counts = marks.counts(number)
    assert counts.faults > 100
    assert counts.lost == 0


def test_a_number_that_is_another_child_s_by_now_stays_marked(programs: Programs) -> None:
    marks, entry = WrittenPages(programs), np.zeros(1, dtype=TARGET)
    number = np.array([7], dtype=np.uint32)  # nobody's: the kernel's own threads are there
    for flags, stays in ((CHILD, True), (0, False)):
        entry["flags"] = flags
        bpf.update(programs.maps["targets"], number, entry)
        marks.remove(7, ended=True)
        assert (7 in marks.targets()) is stays


def test_behind_a_mark_that_is_under_way_there_may_be_others(
    programs: Programs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Then a scan has to look everywhere."""
    marks, ring = WrittenPages(programs), programs.ring
    data = np.array([16, 1, 5, 16 | 1 << 31, 1, 6, 16, 1, 7], dtype=np.uint64)  # three records
    monkeypatch.setattr(ring, "_data", data.copy())
    monkeypatch.setattr(ring, "_consumer", np.zeros(1, dtype=np.uint64))
    monkeypatch.setattr(ring, "_producer", np.array([data.nbytes], dtype=np.uint64))
    assert marks.regions([1]).tolist() == EVERYTHING.tolist()
    data[3] = 16
    ring._data[: len(data)] = data
    assert marks.regions([1]).tolist() == [[5 * 512, 8 * 512]]


def test_changes_of_the_address_space_are_counted(spawn: Spawn, programs: Programs) -> None:
    marks = WrittenPages(programs)
    skip_unless_visits_are_told(marks)
    target = spawn("layout")
    with Process(Pid(target.pid)) as process:
        number = marks.add(process)
        for change in ("brk +4", "brk -4", "mmap extra 8", "mremap anon_written", "munmap extra"):
            before = marks.counts(number).map_changes
            target.obey(change)
            assert marks.counts(number).map_changes > before, change
        before = marks.counts(number).map_changes
        target.obey("write anon_written 0 8 3")
        assert marks.counts(number).map_changes == before


@pytest.mark.usefixtures("userfaultfd")
def test_bpf_and_scan_agree_on_scattered_writes(spawn: Spawn, tmp_path: Path) -> None:
    target = spawn("writer", "--mib", 64, "--threads", 2, "--rate", 20, "--fill", 1)
    with judged(target.pid, tmp_path / "chain") as judge:
        for _ in range(4):
            judge.take()
    for stats in judge.stats[1:]:
        assert stats["bpf_pages"] > 100
        assert stats["bpf_missed"] == 0
        assert stats["bpf_lost_events"] == 0


@pytest.mark.usefixtures("userfaultfd")
def test_watch_works_from_inside_a_pid_namespace(tmp_path: Path) -> None:
    """Both the watcher and its target have other numbers there than the kernel counts by."""
    fifo = tmp_path / "ready"
    os.mkfifo(fifo)
    writer = compile_target("writer")
    watch = " ".join(CRTRACE)
    script = (
        f"exec 3<>{fifo}; {writer} {fifo} --mib 8 --rate 20 & target=$!;"
        f"read -r line <&3;"
        f"{watch} watch $target -o {tmp_path}/chain --count 4 --interval 0.3 --json;"
        "code=$?; kill $target; wait $target; exit $((code * 10 + $?))"
    )
    done = subprocess.run(
        ["unshare", "--pid", "--fork", "--mount-proc", "sh", "-c", script],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert verified(tmp_path / "chain") == [0, 1, 2, 3]
    (shown,) = run("show", tmp_path / "chain", "--json").expect(0).events
    assert shown["stats"]["bpf_pages"] > 50
    assert shown["stats"]["bpf_missed"] == 0
