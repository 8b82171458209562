"""The judge is judged: targets answer and notice corruption, snapshots notice every change."""

from __future__ import annotations

import os
import re
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from crtrace.units import PAGE_SIZE
from tests.live.harness import (
    SOURCES,
    Target,
    Untouched,
    blocked_in,
    compile_target,
    flip_byte,
    layout_mismatches,
    maps,
    python_numpy_target,
    read_mem,
    redis_server,
    resident_private_pages,
    shadow_mismatches,
    smaps,
    sqlite_target,
    status,
    stopped,
    tasks,
    wait_until,
    write_mem,
)

Spawn = Callable[..., Target]
NO_TARGETS = {"without", "outsider"}
"""Programs that start others, or meddle with them."""
C_TARGETS = sorted({path.stem for path in SOURCES.glob("*.c")} - NO_TARGETS)


def progress(target: Target, key: str) -> int:
    """A counter of the target's "stats"."""
    return int(target.ask("stats")[key])


def await_progress(target: Target, key: str, by: int = 100) -> None:
    """Return when the counter has grown."""
    goal = progress(target, key) + by
    wait_until(lambda: progress(target, key) >= goal, f"{key} grows by {by}")


# --- every target ---


@pytest.mark.parametrize("name", C_TARGETS)
def test_every_target_starts_refuses_nonsense_and_ends_well(spawn: Spawn, name: str) -> None:
    target = spawn(name)
    assert target.info
    assert target.command("nonsense").startswith("bad")
    target.terminate_and_check()


@pytest.mark.parametrize("name", C_TARGETS)
def test_quit_ends_a_target_with_its_own_check(spawn: Spawn, name: str) -> None:
    target = spawn(name)
    target.obey("quit")
    assert target.process.wait(60) == 0


def test_a_target_works_without_command_fifo(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "ready")
    process = subprocess.Popen([compile_target("writer"), tmp_path / "ready", "--mib", "1"])
    with open(tmp_path / "ready") as ready:
        assert ready.readline().startswith("ready {")
        process.terminate()
        assert process.wait(60) == 0


def test_a_target_that_cannot_start_tells_why() -> None:
    with (
        pytest.raises(AssertionError, match=r"ended with 2; .*--threads"),
        Target("writer", "--threads", 0),
    ):
        pass


def test_a_target_is_gone_after_its_block() -> None:
    with Target("sleepers") as target:
        os.kill(target.pid, signal.SIGSTOP)
    assert target.process.returncode == -signal.SIGKILL


def test_programs_are_rebuilt_only_when_sources_are_newer() -> None:
    program = compile_target("threads")
    built = program.stat().st_mtime_ns
    assert compile_target("threads").stat().st_mtime_ns == built
    os.utime(program, (0, 0))
    assert compile_target("threads").stat().st_mtime_ns >= built


# --- writer and tiny ---


@pytest.mark.parametrize("name", ["writer", "tiny"])
@pytest.mark.parametrize("side", ["data", "shadow"])
def test_a_corrupted_byte_fails_the_check(spawn: Spawn, name: str, side: str) -> None:
    # Few writes to many pages, so that none repairs the damage in time.
    target = spawn(name, "--rate", 1)
    target.obey("check")
    flip_byte(target.pid, target.info["areas"][0][side] + 12345)
    assert target.command("check") == "bad"
    assert target.terminate() == 1
    assert f"{target.info['areas'][0]['data'] + 12345 // 8 * 8:#x}" in target.stderr


def test_writer_stops_goes_and_counts(spawn: Spawn) -> None:
    target = spawn("writer", "--running", 0)
    assert target.ask("stats") == {"writes": 0, "running": False}
    target.obey("go")
    await_progress(target, "writes", 100000)
    target.obey("stop")
    assert target.ask("stats") == target.ask("stats")
    target.obey("check")
    assert not target.ask("stats")["running"]
    assert shadow_mismatches(lambda at, n: read_mem(target.pid, at, n), target.info) == []
    target.terminate_and_check()


def test_writer_keeps_to_its_rate(spawn: Spawn) -> None:
    target = spawn("writer", "--rate", 40, "--threads", 4)
    before = progress(target, "writes")
    assert target.process.poll() is None
    signal.sigtimedwait([], 0.5)
    pages = progress(target, "writes") - before
    assert 0.2 < pages * PAGE_SIZE / 40e6 < 1.0


def test_writer_fills_and_churns(spawn: Spawn) -> None:
    target = spawn("writer", "--fill", 1, "--mib", 8, "--running", 0)
    assert len(resident_private_pages(target.pid)) >= 2 * 8 * 256
    before = maps(target.pid)
    target.obey("churn 1000")
    assert maps(target.pid) != before
    target.terminate_and_check()


def test_a_stopped_writer_agrees_but_for_words_in_flight(spawn: Spawn) -> None:
    target = spawn("writer", "--threads", 4, "--mib", 4)
    for _ in range(10):
        await_progress(target, "writes", 1000)
        with stopped(target.pid):
            assert shadow_mismatches(lambda at, n: read_mem(target.pid, at, n), target.info) == []
    target.terminate_and_check()


def test_a_torn_reading_of_a_running_writer_is_noticed(spawn: Spawn) -> None:
    target = spawn("writer", "--threads", 2, "--mib", 16)
    await_progress(target, "writes", 100000)
    assert shadow_mismatches(lambda at, n: read_mem(target.pid, at, n), target.info)


@pytest.mark.parametrize(
    ("place", "comparison"),
    [
        ("$rdi", 1),
        ("$r13", 2),
        ("*(long *)($rsp - 88)", 4),
        ("$xmm3.v4_int32[0]", 5),
        ("$ymm3.v8_int32[7]", 5),
        ("$mxcsr", 6),
    ],
)
def test_tiny_notices_changed_registers(spawn: Spawn, place: str, comparison: int) -> None:
    if "ymm" in place and " avx " not in Path("/proc/cpuinfo").read_text():
        pytest.skip("cannot run here: the processor has no AVX")
    target = spawn("tiny")
    await_progress(target, "turns", 1000)
    tid = target.info["tids"]["registers"]
    script = f"python [t.switch() for t in gdb.selected_inferior().threads() if t.ptid[1] == {tid}]"
    gdb = ["gdb", "-q", "-batch", "-p", str(target.pid), "-ex", script]
    change = [*gdb, "-ex", f"set {place} = {place} ^ 0x4000"]

    def noticed() -> bool:
        # Just before its loop sets the register anew, a change is lost.
        run_gdb(change)
        limit = time.monotonic() + 1.0
        while target.command("check") != "bad":
            if time.monotonic() > limit:
                return False
            time.sleep(0.01)
        return True

    wait_until(noticed, "the change is noticed")
    # Changed in the middle of a turn, it may be a later comparison that tells.
    (noticed_by,) = re.findall(r"registers differ: comparison (\d)", target.stderr)
    assert int(noticed_by) in range(1, 7) if comparison < 4 else int(noticed_by) == comparison
    assert target.terminate() == 1


def test_tiny_survives_stops(spawn: Spawn) -> None:
    target = spawn("tiny")
    for _ in range(20):
        await_progress(target, "turns", 10)
        with stopped(target.pid):
            pass
    target.obey("check")
    target.terminate_and_check()


# --- layout ---

CHANGES = (
    "write anon_written 3 5 100",
    "write file_private 0 2 101",
    "write file_shared 8 2 102",
    "write anon_shared 40 2 103",
    "half anon_unwritten 7 2",
    "zero anon_written 20 4",
    "read zero_read 0 64",
    "dontneed anon_written 10 4",
    "dontneed file_private 1 1",
    "dontneed memfd_shared 0 2",
    "punch memfd_shared 4 2",
    "punch anon_shared 1 1",
    "pwrite memfd_shared 10 2 104",
    "pwrite file_shared 10 2 105",
    "fixed anon_written 30 4",
    "mmap fresh 32",
    "write fresh 1 4 106",
    "mremap fresh",
    "mremap fresh 64",
    "mremap anon_partial 8",
    "mremap deleted_private",
    "munmap dontneed",
    "brk +16",
    "write brk 60 10 107",
    "brk -8",
    "mprotect prot_none rw",
    "write prot_none 3 1 108",
    "mprotect prot_none none",
    "mprotect fresh ro",
    "write stack 2 3 109",
    "write thp 600 100 110",
    "fork 8",
)


def test_layout_has_every_kind_of_mapping_as_promised(spawn: Spawn, hugetlb_pages: int) -> None:
    target = spawn("layout")
    kinds = {"anon_written", "file_private", "file_shared", "anon_shared", "memfd_shared", "sysv"}
    kinds |= {"prot_none", "read_only", "deleted_private", "reserve", "stack", "brk", "thp"}
    kinds |= {"zero_written", "dontneed", "hugetlb"}
    assert kinds <= target.info["areas"].keys()
    assert hugetlb_pages
    assert layout_mismatches(lambda at, n: read_mem(target.pid, at, n), target) == []
    target.terminate_and_check()


def test_layout_stays_as_promised_through_every_change(spawn: Spawn) -> None:
    target = spawn("layout")
    for change in CHANGES:
        target.obey(change)
        wrong = layout_mismatches(lambda at, n: read_mem(target.pid, at, n), target)
        assert not wrong, f"after {change}"
    target.obey("check")
    target.terminate_and_check()


@pytest.mark.parametrize(
    "order",
    ["write prot_none 0 1 1", "write guard 2 1 1", "write anon_written 60 5 1", "munmap stack"],
)
def test_layout_refuses_what_would_kill_it(spawn: Spawn, order: str) -> None:
    target = spawn("layout")
    assert target.command(order).startswith("bad")
    target.terminate_and_check()


def test_layout_notices_corruption_even_under_prot_none(spawn: Spawn) -> None:
    target = spawn("layout")
    flip_byte(target.pid, target.info["areas"]["prot_none"]["addr"] + 5000)
    wrong = layout_mismatches(lambda at, n: read_mem(target.pid, at, n), target)
    assert wrong == ["prot_none page 1"]
    assert target.command("check") == "bad"
    assert target.terminate() == 1
    assert "prot_none page 1" in target.stderr


def test_layout_child_has_its_own_memory(spawn: Spawn) -> None:
    target = spawn("layout")
    area = target.info["areas"]["anon_written"]
    child = int(target.obey("fork 4"))
    mine, its = (read_mem(pid, area["addr"], PAGE_SIZE) for pid in (target.pid, child))
    assert mine != its
    assert struct.unpack_from("<Q", its, 8) == (77,)
    target.terminate_and_check()
    assert not Path(f"/proc/{child}").exists()


def test_layout_becomes_another_target_by_exec(spawn: Spawn) -> None:
    target = spawn("layout")
    target.obey(f"exec {compile_target('tiny')}")
    assert target.await_ready()["pid"] == target.pid
    target.obey("check")
    target.terminate_and_check()


def test_resident_private_pages_are_those_written(spawn: Spawn) -> None:
    target = spawn("layout")
    resident = set(resident_private_pages(target.pid).tolist())

    def found(name: str) -> list[int]:
        area = target.info["areas"][name]
        first = area["addr"] // PAGE_SIZE
        return [page for page in range(min(area["pages"], 64)) if first + page in resident]

    assert found("anon_written") == found("prot_none") == found("zero_written") == [*range(64)]
    assert found("anon_unwritten") == found("zero_read") == found("file_clean") == []
    assert found("anon_shared") == found("file_shared") == []
    assert found("anon_partial") == [2, 3, 4, 5, 6, 10, 11, 12]
    assert found("dontneed") == [*range(4), *range(12, 64)]
    assert found("file_private") == [1, 5, 6, 7]
    assert found("reserve_used") == [1, 2]


# --- threads, sleepers, spawner ---


def test_threads_are_where_they_say(spawn: Spawn) -> None:
    target = spawn("threads", "--threads", 8)
    assert [thread["marker"] for thread in target.info["threads"]] == [0x1000 + i for i in range(8)]
    for thread in target.info["threads"]:
        assert read_mem(target.pid, thread["at"], 8) == struct.pack("<q", thread["marker"])
        assert bool(blocked_in(target.pid, thread["tid"])) == (thread["function"] != "worker_spin")
    assert read_mem(target.pid, target.info["global_marker"], 8) == struct.pack("<q", 0x5EED)
    target.obey("check")
    target.terminate_and_check()


def test_sleepers_sleep_until_woken(spawn: Spawn) -> None:
    target = spawn("sleepers")
    assert all(sleeper["returns"] == 0 for sleeper in target.info.values())
    can_wake = [name for name, sleeper in target.info.items() if sleeper["can_wake"]]
    for name in can_wake * 2:
        target.obey(f"wake {name}")
    report = target.ask("report")
    assert {report[name]["returns"] for name in can_wake} == {2}
    target.terminate_and_check()


def test_sleepers_tell_of_spurious_returns(spawn: Spawn) -> None:
    """SIGSTOP, too, ends these waits with EINTR: signal(7)."""
    target = spawn("sleepers")
    with stopped(target.pid):
        pass
    report = target.ask("report")
    disturbed = {name for name, sleeper in report.items() if sleeper["returns"]}
    assert {"epoll_wait", "sigtimedwait", "semtimedop"} <= disturbed
    assert not {"nanosleep", "futex", "read_pipe", "poll"} & disturbed
    assert target.terminate() == 1
    assert "epoll_wait returned 1 times, woken 0 times" in target.stderr


@pytest.mark.parametrize(
    ("order", "children", "threads"),
    [
        ("fork 4 300", 4, 1),
        ("threads 2 300 3", 2, 4),
        ("tree 3 300", 3, 1),
        ("vfork 2 300", 2, 1),
        ("clonevm 300", 1, 1),
    ],
)
def test_spawner_children_wrote_what_they_report(
    spawn: Spawn, order: str, children: int, threads: int
) -> None:
    target = spawn("spawner")
    reports = target.ask(order)
    assert len({child["pid"] for child in reports}) == children
    for child in reports:
        assert len(tasks(child["pid"])) == threads
        for addr in filter(None, (child["inherited"], child["fresh"])):
            page = np.frombuffer(read_mem(child["pid"], addr, PAGE_SIZE), dtype=np.uint64)
            assert page[1] == child["seed"]
    target.obey("reap")
    assert target.ask("fork 1 10")
    target.terminate_and_check()


def test_spawner_notices_a_corrupted_child(spawn: Spawn) -> None:
    target = spawn("spawner")
    child = target.ask("fork 2 10")[1]
    flip_byte(child["pid"], child["fresh"] + 777)
    assert target.terminate() == 1
    assert f"{child['pid']}: page 0" in target.stderr


# --- real programs ---


def test_redis_answers(tmp_path: Path) -> None:
    items = {f"key {i}": os.urandom(100) for i in range(1000)}
    with redis_server(tmp_path) as redis:
        redis.set_many(items)
        assert redis.dbsize() == 1000
        assert redis.get("key 7") == items["key 7"]
        assert redis.get("no such key") is None
        assert status(redis.pid)["Name"] == "redis-server"
    assert not Path(f"/proc/{redis.pid}").exists()


def test_numpy_target_works_and_notices_corruption() -> None:
    with python_numpy_target() as target:
        assert target.process.args[0] == sys.executable  # type: ignore[index]
        await_progress(target, "updates")
        target.obey("check")
        with pytest.raises(AssertionError, match="nonsense: bad"):
            target.obey("nonsense")
        target.terminate_and_check()
    with python_numpy_target() as target:
        write_mem(target.pid, target.info["areas"][0]["shadow"] + 2**20, b"\1" * 2**20)
        assert target.terminate() == 1


def test_sqlite_target_works_and_notices_corruption() -> None:
    with sqlite_target() as target:
        await_progress(target, "moves")
        target.obey("check")
        target.terminate_and_check()
    with sqlite_target() as target:
        # Text of the rows: the pages of the database are on the heap, in no fixed place.
        needle, row = b"account 4321 " * 8, None
        with stopped(target.pid):
            for vma, fields in smaps(target.pid):
                if not vma.perms.startswith("rw") or fields["Rss"] == "0 kB":
                    continue
                at = read_mem(target.pid, vma.start, vma.end - vma.start).find(needle)
                if at >= 0:
                    row = vma.start + at
                    write_mem(target.pid, row - 256, bytes(512))
        assert row
        assert target.terminate() != 0


# --- the snapshots ---


def test_stopped_stops_every_thread_and_lets_it_go(spawn: Spawn) -> None:
    target = spawn("writer", "--threads", 4)
    with stopped(target.pid):
        assert {status(target.pid, tid)["State"][0] for tid in tasks(target.pid)} == {"T"}
        data = read_mem(target.pid, target.info["control"][0], 24)
        assert read_mem(target.pid, target.info["control"][0], 24) == data
    await_progress(target, "writes")
    target.terminate_and_check()


def test_untouched_is_content_with_a_busy_target(spawn: Spawn) -> None:
    target = spawn("tiny")
    snapshot = Untouched(target.pid)
    await_progress(target, "turns")
    target.obey("check")
    snapshot.assert_same(ignore=["registers"])  # the writer sleeps until another time


def run_gdb(command: list[str]) -> None:
    """With a gdb that is older than the processor, writing registers can fail."""
    done = subprocess.run(command, check=False, capture_output=True)
    if b"Couldn't write extended state status: Bad address" in done.stderr:
        pytest.skip("cannot run here: this gdb cannot write the registers of this processor")
    assert done.returncode == 0, done.stderr


@pytest.fixture
def gdb_call(spawn: Spawn) -> Callable[[str], list[str]]:
    """Make a target run one expression, and give back what a snapshot finds changed."""

    def call(expression: str) -> list[str]:
        target = spawn("threads", "--threads", 3)
        snapshot = Untouched(target.pid)
        gdb = ["gdb", "-q", "-batch", "-p", str(target.pid), "-ex", "set confirm off"]
        run_gdb([*gdb, "-ex", f"print {expression}"])
        return snapshot.differences()

    return call


@pytest.mark.parametrize(
    ("expression", "field"),
    [
        ("(int)dup(1)", "fds"),
        ("(int)fcntl(1, 2, 1)", "fds"),  # F_SETFD: close on exec
        ("(void*)mmap(0, 4096, 3, 0x22, -1, 0)", "mappings"),
        ("(int)madvise(((long)$sp) & ~4095, 4096, 16)", "vma_flags"),  # DONTDUMP
        ('(int)chdir("/")', "cwd"),
        ("(void*)signal(10, 1)", "SigIgn"),
        ("(int)pthread_sigmask(0, (long[16]){512}, 0)", "masks"),
        ("(int)prctl(38, 1, 0, 0, 0)", "NoNewPrivs"),
        ("(int)timer_create(0, 0, (long[4]){0})", "timers"),
        ("(int)fork()", "children"),
        ("(int)unshare(0x4000000)", "namespaces"),  # CLONE_NEWUTS
    ],
)
def test_untouched_notices(
    gdb_call: Callable[[str], list[str]], expression: str, field: str
) -> None:
    found = gdb_call(expression)
    assert any(line.startswith(f"{field} ") for line in found), found


def test_untouched_notices_nothing_after_a_mere_attach(
    gdb_call: Callable[[str], list[str]],
) -> None:
    assert gdb_call("1 + 1") == []


def test_untouched_notices_a_stop_and_a_tracer(spawn: Spawn) -> None:
    target = spawn("sleepers")
    snapshot = Untouched(target.pid)
    with stopped(target.pid), pytest.raises(AssertionError, match="'live' -> 'stopped'"):
        snapshot.assert_same()
    tracer = subprocess.Popen(
        ["gdb", "-q", "-p", str(target.pid)], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL
    )
    with tracer:
        wait_until(lambda: status(target.pid)["TracerPid"] != "0", "gdb is attached")
        assert f"TracerPid : '0' -> '{tracer.pid}'" in snapshot.differences()
        tracer.communicate(b"detach\nquit\n")
    assert not [line for line in snapshot.differences() if line.startswith("TracerPid")]


def test_untouched_notices_a_thread_that_waits_elsewhere(spawn: Spawn) -> None:
    target = spawn("writer", "--running", 0)
    wait_until(lambda: bool(blocked_in(target.pid, target.pid)), "it waits")
    snapshot = Untouched(target.pid)
    snapshot.assert_same()
    snapshot.fields["registers"][str(target.pid)] = "0 0x3"
    assert len(snapshot.differences()) == 1
    snapshot.assert_same(ignore=["registers"])
    with pytest.raises(AssertionError, match="no such fields"):
        snapshot.assert_same(ignore=["register"])
