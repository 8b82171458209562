"""Whatever is wrong, crtrace says what, ends with the code that was promised, and harms nobody."""

from __future__ import annotations

import errno
import itertools
import os
import shutil
import signal
import struct
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

import pytest
from xxhash import xxh3_64_intdigest

from crtrace.errors import TargetBusy
from crtrace.image.framing import RecordType
from crtrace.image.reader import Chain
from crtrace.linux.procfs import Process, is_32_bit
from crtrace.units import Pid
from tests.image.tamper import take_apart
from tests.live.conftest import program_of_32_bits
from tests.live.exactness import reader
from tests.live.harness import (
    Target,
    Untouched,
    compile_target,
    layout_mismatches,
    status,
    wait_until,
)
from tests.live.runner import (
    CRTRACE,
    NOBODY,
    Event,
    Result,
    Watching,
    as_nobody,
    await_part,
    judged,
    run,
    verified,
    with_capabilities,
)

Spawn = Callable[..., Target]
KERNEL_THREAD = 0x00200000  # PF_KTHREAD
AREA_PAGES = 4096


@pytest.fixture
def chain(tmp_path: Path) -> Path:
    """Where a chain can be made."""
    return tmp_path / "chain"


def watch_once(pid: int, path: Path, **how: object) -> Result:
    """One epoch."""
    return run("watch", pid, "-o", path, "--count", 1, **how)  # type: ignore[arg-type]


@pytest.fixture
def layout(spawn: Spawn) -> Target:
    """A ``layout`` without memory that nobody can read, which would make every exit code 3."""
    target = spawn("layout")
    for name in {"secret", "guard"} & target.info["areas"].keys():
        target.obey(f"munmap {name}")
    return target


def reserve(target: Target, areas: int) -> None:
    """Have a ``layout`` make so many new areas of 16 MiB."""
    for n in range(areas):
        target.obey(f"mmap big{n} {AREA_PAGES}")


def fill(target: Target, areas: int) -> None:
    """Have it write all of them."""
    for n in range(areas):
        target.obey(f"write big{n} 0 {AREA_PAGES} {n + 1}")


def names(path: Path) -> set[str]:
    """What is in a directory."""
    return set(os.listdir(path))


# --- processes that cannot be watched ---


@pytest.mark.parametrize("command", ["watch", "dump"])
def test_a_process_that_does_not_exist_is_gone(chain: Path, command: str) -> None:
    with subprocess.Popen(["true"]) as child:
        pass
    run(command, child.pid, "-o", chain).expect(10, f"there is no process {child.pid}")
    assert not chain.exists()


@pytest.mark.parametrize("number", [2**22 + 1, 2**31, 2**70])
def test_a_number_that_no_process_can_have_is_refused(chain: Path, number: int) -> None:
    assert watch_once(number, chain).code in (2, 10)


@pytest.mark.parametrize("words", [["0"], ["-1"], ["self"], [], ["1", "2"]])
def test_what_is_no_process_number_is_a_usage_error(words: list[str]) -> None:
    run("watch", *words).expect(2, "Usage:")


def test_the_number_of_a_single_thread_is_a_usage_error(spawn: Spawn, chain: Path) -> None:
    thread = spawn("threads").info["threads"][0]["tid"]
    watch_once(thread, chain).expect(2, str(thread), "thread")


def _kernel_threads() -> Iterator[int]:
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            fields = Path(f"/proc/{entry}/stat").read_text().rpartition(")")[2].split()
            if int(fields[6]) & KERNEL_THREAD:
                yield int(entry)


def test_a_kernel_thread_is_a_usage_error(chain: Path) -> None:
    pid = next(_kernel_threads(), None)
    if pid is None:
        pytest.skip("cannot run here: no kernel thread is visible")
    watch_once(pid, chain).expect(2, f"process {pid}", "is a kernel thread")


def test_a_zombie_is_gone(chain: Path) -> None:
    child = subprocess.Popen(["true"])
    wait_until(lambda: status(child.pid)["State"][0] == "Z", "the child is a zombie")
    result = watch_once(child.pid, chain)
    child.wait()
    result.expect(10, f"process {child.pid} (true) is a zombie")


def test_crtrace_does_not_watch_itself(chain: Path) -> None:
    command = ["sh", "-c", 'out=$1; shift; exec "$@" watch $$ -o "$out"', "sh", str(chain)]
    done = subprocess.run(
        [*command, *CRTRACE], capture_output=True, text=True, cwd="/", timeout=60, check=False
    )
    result = judged(command, done.returncode, done.stdout, done.stderr)
    result.expect(2, "is crtrace itself")


@contextmanager
def under_gdb(pid: int) -> Iterator[int]:
    """The process is stopped by gdb, whose number is given."""
    with subprocess.Popen(
        ["gdb", "-nx", "-q", "-p", str(pid)], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ) as gdb:  # fmt: skip
        wait_until(lambda: status(pid)["TracerPid"] == str(gdb.pid), "gdb is attached")
        yield gdb.pid
        gdb.communicate(b"detach\nquit\n")


@pytest.mark.parametrize("command", ["watch", "dump"])
def test_a_process_under_gdb_is_busy_and_gdb_is_named(
    spawn: Spawn, chain: Path, command: str
) -> None:
    target = spawn("threads")
    with under_gdb(target.pid) as gdb:
        result = run(command, target.pid, "-o", chain)
        assert status(target.pid)["TracerPid"] == str(gdb)
    result.expect(13, f"already traced by process {gdb} (gdb)", "end that debugger")
    target.terminate_and_check()


def test_a_32_bit_program_is_refused(tmp_path: Path, chain: Path) -> None:
    process = subprocess.Popen([program_of_32_bits(tmp_path)])
    try:
        result = watch_once(process.pid, chain)
        assert process.poll() is None
    finally:
        process.kill()
        process.wait()
    result.expect(2, f"process {process.pid} (pause) is a 32-bit program")


def test_what_is_half_way_through_an_execve_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel makes the auxiliary vector entry by entry; the page size is about the fourth."""
    whole, reads = Path("/proc/self/auxv").read_bytes(), []
    narrow = struct.pack("<8I", 32, 0xF7F0_0000, 16, 5, 6, 4096, 17, 100)

    def read(process: Process, name: str) -> bytes:
        reads.append(name)
        return vectors[min(len(reads), len(vectors)) - 1]

    monkeypatch.setattr(Process, "read", read)
    with Process(Pid(os.getppid())) as process:
        vectors = [bytes(len(whole)), whole[:16].ljust(len(whole), b"\0"), whole]
        assert not is_32_bit(process)
        assert reads == ["auxv"] * 3
        vectors = [bytes(32), narrow[:4].ljust(32, b"\0"), narrow]
        reads.clear()
        assert is_32_bit(process)
        assert reads == ["auxv"] * 3


def test_who_is_looked_at_late_in_an_execve_has_not_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    """Between two steps of it nobody is seen; a busy machine may have us wait before that look."""
    alive, clock = iter([False, False, True, True]), itertools.count()
    with Process(Pid(os.getppid())) as process:
        monkeypatch.setattr(Process, "alive", lambda process: next(alive))
        monkeypatch.setattr(Process, "_others", lambda process: {None})
        monkeypatch.setattr(time, "monotonic", lambda: float(next(clock)))
        assert isinstance(process.gone(), TargetBusy)


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOENT])
def test_who_has_no_mounts_for_a_moment_calls_execve(number: int) -> None:
    with Process(Pid(os.getppid())) as process:
        assert isinstance(process.explain(OSError(number, "none"), "mountinfo"), TargetBusy)


# --- privileges and the kernel ---


@pytest.mark.parametrize("command", ["watch", "dump"])
def test_without_privileges_the_missing_ones_are_named(
    spawn: Spawn, chain: Path, command: str
) -> None:
    target = spawn("threads")
    result = run(command, target.pid, "-o", chain, before=as_nobody())
    result.expect(11, "CAP_SYS_PTRACE", "CAP_BPF", "run as root")
    assert not chain.exists()


ENOUGH = "sys_ptrace", "bpf", "perfmon", "checkpoint_restore", "dac_read_search"


@pytest.mark.usefixtures("userfaultfd")
def test_the_capabilities_that_readme_names_are_enough(spawn: Spawn, chain: Path) -> None:
    os.chown(chain.parent, NOBODY, NOBODY)
    others = spawn("threads")
    options = "-o", chain, "--count", 2, "--interval", 0.1
    with subprocess.Popen([*with_capabilities(), "sleep", "60"]) as own:
        run("watch", own.pid, *options, before=with_capabilities(*ENOUGH)).expect(0)
        own.kill()
    assert verified(chain) == [0, 1]
    shutil.rmtree(chain)
    refused = watch_once(others.pid, chain, before=with_capabilities(*ENOUGH))
    refused.expect(11, f"/proc/{others.pid}/mem", "CAP_DAC_OVERRIDE")
    more = with_capabilities(*ENOUGH, "dac_override")
    run("watch", others.pid, *options, before=more).expect(0)
    assert verified(chain) == [0, 1]
    others.terminate_and_check()


@pytest.mark.usefixtures("userfaultfd")
def test_a_sandbox_takes_one_more_capability(spawn: Spawn, chain: Path) -> None:
    os.chown(chain.parent, NOBODY, NOBODY)
    target = spawn("corners", "--in", "seccomp_kill")
    snapshot = Untouched(target.pid)
    before = with_capabilities(*ENOUGH, "dac_override")
    result = watch_once(target.pid, chain, before=before)
    result.expect(11, "sandbox", "CAP_SYS_ADMIN", "CRTRACE_ARMER=compare")
    snapshot.assert_same()
    watch_once(target.pid, chain, before=before, env={"CRTRACE_ARMER": "compare"}).expect(0)
    more = with_capabilities(*ENOUGH, "dac_override", "sys_admin")
    watch_once(target.pid, chain, before=more).expect(0)
    target.obey("check")


def test_without_kernel_headers_the_feature_is_missing(
    spawn: Spawn, chain: Path, tmp_path: Path
) -> None:
    target = spawn("threads")
    snapshot = Untouched(target.pid)
    nowhere = {"BCC_KERNEL_SOURCE": str(tmp_path / "nowhere")}
    result = watch_once(target.pid, chain, env=nowhere)
    result.expect(12, "BPF programs cannot be loaded", str(tmp_path / "nowhere"), "crtrace check")
    snapshot.assert_same()
    (report,) = run("check", "--json", env=nowhere).expect(12).events
    assert not report["works"]


# --- where the chain is to be ---


def test_an_output_that_is_a_file_is_a_usage_error(spawn: Spawn, chain: Path) -> None:
    chain.write_text("not mine")
    watch_once(spawn("threads").pid, chain).expect(2, f"{chain} is no directory")
    assert chain.read_text() == "not mine"


def test_an_output_below_nothing_names_the_path(spawn: Spawn, chain: Path) -> None:
    below = chain / "missing" / "chain"
    watch_once(spawn("threads").pid, below).expect(1, "no such file or directory", str(below))


@pytest.mark.parametrize("slash", ["", "/"])
def test_an_output_that_is_a_link_is_not_followed(spawn: Spawn, tmp_path: Path, slash: str) -> None:
    (tmp_path / "real").mkdir()
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "real")
    result = run("watch", spawn("threads").pid, "-o", f"{link}{slash}", "--count", 1)
    result.expect(2, str(link), "symbolic links are not followed")
    assert names(tmp_path / "real") == set()


def test_an_output_with_other_files_in_it_is_left_alone(spawn: Spawn, chain: Path) -> None:
    chain.mkdir()
    (chain / "letter").write_text("dear")
    watch_once(spawn("threads").pid, chain).expect(2, f"{chain} has files in it and is no chain")
    assert names(chain) == {"letter"}


def test_an_output_that_others_may_write_is_refused(spawn: Spawn, chain: Path) -> None:
    chain.mkdir()
    chain.chmod(0o777)
    result = watch_once(spawn("threads").pid, chain)
    result.expect(2, f"{chain} can be written by other users", "chmod go-w")


def test_an_output_that_may_not_be_made_is_a_matter_of_permission(spawn: Spawn) -> None:
    """A user with everything that watching takes, but no say over other people's directories."""
    path = Path("/not-for-everybody")
    result = watch_once(spawn("threads").pid, path, before=with_capabilities(*ENOUGH))
    result.expect(11, f"permission denied while making {path}")
    assert not path.exists()


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """An empty file system of 8 MiB."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=8m,mode=0700", "tmpfs", place],
        capture_output=True,
        check=False,
    )
    if mounted.returncode:
        pytest.skip("cannot run here: a file system cannot be mounted")
    yield place
    subprocess.run(["umount", "-l", place], check=True)


def test_an_output_on_a_read_only_file_system_says_so(spawn: Spawn, disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
    result = watch_once(spawn("threads").pid, disk / "chain")
    result.expect(1, "read-only file system", str(disk / "chain"))


def test_the_chain_of_another_process_is_not_continued(spawn: Spawn, chain: Path) -> None:
    one, other = spawn("threads"), spawn("layout")
    watch_once(one.pid, chain).expect(0)
    before = {name: (chain / name).read_bytes() for name in names(chain) - {"lock"}}
    result = watch_once(other.pid, chain)
    result.expect(2, f"{chain} holds images of another process: threads, {one.pid}", "-o")
    assert before == {name: (chain / name).read_bytes() for name in names(chain) - {"lock"}}


def test_a_chain_that_is_being_written_is_not_written_twice(spawn: Spawn, chain: Path) -> None:
    target = spawn("threads")
    with Watching(target.pid, chain, "--interval", 0) as watching:
        watching.event("checkpoint")
        result = run("dump", target.pid, "-o", chain)
        result.expect(1, f"{chain} is being written by pid {watching.pid}")
        watching.signal(signal.SIGINT)
        watching.wait().expect(0)
    assert verified(chain) == [0]


@pytest.mark.parametrize(
    "options",
    [
        ("--interval", "nan"),
        ("--interval", "-1"),
        ("--interval", "soon"),
        ("--count", "0"),
        ("--max-pause", "0"),
        ("--max-pause", "nan"),
        ("--no-such-option",),
    ],
)
def test_options_that_make_no_sense_are_usage_errors(
    spawn: Spawn, chain: Path, options: tuple[str, ...]
) -> None:
    result = run("watch", spawn("tiny").pid, "-o", chain, "--count", 2, *options)
    result.expect(2, options[0])
    assert not chain.exists()


def test_an_interval_of_years_is_a_long_wait_and_no_error(spawn: Spawn, chain: Path) -> None:
    with Watching(spawn("threads").pid, chain, "--interval", "1e9") as watching:
        watching.event("checkpoint")
        watching.signal(signal.SIGUSR1)
        watching.event("checkpoint")
        watching.signal(signal.SIGTERM)
        watching.wait().expect(0)


# --- a full disk ---


def test_a_full_disk_costs_the_epoch_under_way_and_nothing_else(layout: Target, disk: Path) -> None:
    target, chain = layout, disk / "chain"
    reserve(target, 3)
    snapshot = Untouched(target.pid)
    with Watching(target.pid, chain, "--interval", 0) as watching:
        watching.event("checkpoint")
        fill(target, 3)
        watching.signal(signal.SIGUSR1)
        result = watching.wait()
    result.expect(1, "no space left on device while writing", "committed epochs are whole")
    assert [event["event"] for event in result.events] == ["checkpoint"]
    assert names(chain) == {"00000000.img", "chain.idx", "lock"}
    assert verified(chain) == [0]
    snapshot.assert_same(ignore=["registers"])  # its main thread has just answered
    target.terminate_and_check()


def test_after_a_full_disk_the_chain_goes_on(layout: Target, disk: Path) -> None:
    target, chain = layout, disk / "chain"
    watch_once(target.pid, chain).expect(0)
    reserve(target, 3)
    fill(target, 3)
    run("dump", target.pid, "-o", chain).expect(1, "no space left on device")
    for n in range(3):
        target.obey(f"munmap big{n}")
    target.obey("write anon_written 3 5 100")
    run("dump", target.pid, "-o", chain).expect(0)
    assert verified(chain) == [0, 1]
    assert image_mismatches(chain, -1, target) == []


def test_a_disk_too_small_for_the_first_image_leaves_an_empty_chain(
    spawn: Spawn, disk: Path
) -> None:
    target, chain = spawn("writer", "--mib", 64, "--fill", 1, "--running", 0), disk / "chain"
    snapshot = Untouched(target.pid)
    watch_once(target.pid, chain).expect(1, "no space left on device")
    assert names(chain) == {"chain.idx", "lock"}
    assert verified(chain) == []
    run("show", chain).expect(2, "has no epoch yet")
    snapshot.assert_same()
    target.terminate_and_check()


# --- the target goes away ---


def test_a_target_killed_during_its_first_image_is_gone(spawn: Spawn, chain: Path) -> None:
    target = spawn("writer", "--mib", 128, "--fill", 1, "--running", 0)
    with Watching(target.pid, chain) as watching:
        await_part(chain, 0, 4 << 20)
        target.process.kill()
        result = watching.wait()
    result.expect(10, f"process {target.pid} exited before its first epoch was complete")
    assert not result.of("checkpoint")
    assert names(chain) == {"chain.idx", "lock"}


def test_a_target_killed_during_a_later_image_leaves_the_earlier_ones(
    layout: Target, chain: Path
) -> None:
    target = layout
    with Watching(target.pid, chain, "--interval", 0) as watching:
        watching.event("checkpoint")
        reserve(target, 8)
        fill(target, 8)
        watching.signal(signal.SIGUSR1)
        await_part(chain, 1, 1 << 20)
        target.process.kill()
        result = watching.wait().expect(0)
    assert result.events[-1]["event"] == "exit"
    assert result.events[-1]["epochs"] == 1
    assert verified(chain) == [0]


@pytest.mark.parametrize(("number", "expected"), [(signal.SIGTERM, 0), (signal.SIGKILL, -9)])
def test_the_exit_of_the_target_is_told_with_its_status(
    spawn: Spawn, chain: Path, number: signal.Signals, expected: int
) -> None:
    target = spawn("threads")
    with Watching(target.pid, chain, "--interval", 0) as watching:
        watching.event("checkpoint")
        target.process.send_signal(number)
        result = watching.wait().expect(0)
    (last,) = result.of("exit")
    assert last == result.events[-1]
    assert (last["pid"], last["epochs"]) == (target.pid, 1)
    assert target.process.wait() == expected
    assert last["status"] == expected
    assert verified(chain) == [0]


# --- the target becomes another program ---


def image_mismatches(chain: Path, epoch: int, target: Target) -> list[str]:
    """Pages of an epoch that are not what a ``layout``, which has changed nothing since, has."""
    with Chain.open(chain) as opened:
        return layout_mismatches(reader(opened.epoch(epoch)), target)


def test_an_exec_is_followed_by_a_full_epoch_of_the_new_program(
    layout: Target, chain: Path
) -> None:
    with Watching(layout.pid, chain, "--interval", 0) as watching:
        watching.event("checkpoint")
        layout.obey(f"exec {compile_target('threads')}")
        info = layout.await_ready()
        event = watching.event("exec")
        full = watching.event("checkpoint")
        watching.signal(signal.SIGUSR1)
        last = watching.event("checkpoint")
        watching.signal(signal.SIGINT)
        watching.wait().expect(0)
    assert (event["pid"], event["comm"]) == (layout.pid, "threads")
    assert (full["full"], full["reason"]) == (True, "exec")
    assert (last["full"], last["reason"]) == (False, "request")
    assert verified(chain) == [0, 1, 2]
    with Chain.open(chain) as opened:
        read = reader(opened.epoch(-1))
        for thread in info["threads"]:
            assert read(thread["at"], 8) == thread["marker"].to_bytes(8, "little")
    layout.terminate_and_check()


def test_execs_at_any_moment_never_mix_two_programs(layout: Target, chain: Path) -> None:
    with Watching(layout.pid, chain, "--interval", 0.01) as watching:
        watching.event("checkpoint")
        for _ in range(15):
            layout.obey(f"exec {compile_target('layout')}")
            layout.await_ready()
            layout.obey("write anon_written 0 64 50")
        watching.signal(signal.SIGUSR1)
        while watching.event().get("reason") != "request":
            pass
        assert image_mismatches(chain, -1, layout) == []
        watching.signal(signal.SIGINT)
        result = watching.wait()
    assert result.code in (0, 3), result.stderr  # 3: of new layouts, not all can be read
    assert_full_after_exec(result.events)
    assert verified(chain) == [event["epoch"] for event in result.of("checkpoint")]
    layout.terminate_and_check()


def assert_full_after_exec(events: list[Event]) -> None:
    """Every exec is followed by a full epoch, and no other epoch but the first is full."""
    execs, full = 0, [events[0]["epoch"]]
    for before, after in pairwise(event for event in events if event["event"] != "delayed"):
        if before["event"] == "exec" and after["event"] == "checkpoint":
            assert (after["full"], after["reason"]) == (True, "exec")
            full.append(after["epoch"])
            execs += 1
    assert execs
    assert full == [e["epoch"] for e in events if e["event"] == "checkpoint" and e["full"]]


def test_a_storm_of_other_processes_does_not_end_the_watch(spawn: Spawn, chain: Path) -> None:
    """They fill the queue of process events while crtrace is busy, here: while it stands still."""
    with Watching(spawn("threads").pid, chain, "--interval", 0) as watching:
        watching.event("checkpoint")
        os.kill(watching.pid, signal.SIGSTOP)
        storm = "i=0; while [ $i -lt 2000 ]; do (:); i=$((i+1)); done"
        subprocess.run(["sh", "-c", storm], check=True)
        os.kill(watching.pid, signal.SIGCONT)
        watching.signal(signal.SIGUSR1)
        watching.event("checkpoint")
        watching.signal(signal.SIGINT)
        watching.wait().expect(0)
    assert verified(chain) == [0, 1]


# --- damaged, incomplete and strange chains ---


@pytest.fixture(scope="module")
def three_epochs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A chain of three epochs of ``threads``."""
    path = tmp_path_factory.mktemp("errors") / "chain"
    with Target("threads") as target:
        run("watch", target.pid, "-o", path, "--count", 3, "--interval", 0.05).expect(0)
    return path


@pytest.fixture
def copy(three_epochs: Path, chain: Path) -> Path:
    """A copy of it, to be damaged."""
    return Path(shutil.copytree(three_epochs, chain))


def read_with(command: str, path: Path, *options: object) -> Result:
    """One of the reading commands."""
    out = ["-o", path.with_name("exported")] if command == "export" else []
    return run(command, path, *out, *options)


def flip(path: Path, at: int = 20) -> None:
    """Change the byte at an offset."""
    data = bytearray(path.read_bytes())
    data[at] ^= 0x10
    path.write_bytes(data)


def shorten(path: Path) -> None:
    """Leave less than a header."""
    os.truncate(path, 24)


def truncate(path: Path) -> None:
    """Cut the second half off."""
    os.truncate(path, path.stat().st_size // 2)


def make_link(path: Path) -> None:
    """Put a symbolic link to the file in its place."""
    elsewhere = path.with_name("elsewhere")
    path.rename(elsewhere)
    path.symlink_to(elsewhere)


def make_fifo(path: Path) -> None:
    """Put something that blocks whoever opens it in place of the file."""
    path.unlink()
    os.mkfifo(path)


READERS = ("list", "show", "verify", "export")


@pytest.mark.parametrize("command", READERS)
def test_a_damaged_index_is_told_by_every_command(copy: Path, command: str) -> None:
    flip(copy / "chain.idx")
    if command == "verify":
        assert "chain.idx, header at offset 0x0" in read_with(command, copy).expect(20).stdout
    else:
        read_with(command, copy).expect(20, str(copy / "chain.idx"), "verify")
    if command == "export":
        read_with(command, copy, "--salvage").expect(0)


@pytest.mark.parametrize("damage", [shorten, make_link, make_fifo])
def test_an_index_of_another_kind_is_damage(copy: Path, damage: Callable[[Path], None]) -> None:
    damage(copy / "chain.idx")
    read_with("list", copy).expect(20, str(copy / "chain.idx"))


@pytest.mark.parametrize(
    ("command", "damage"),
    [
        ("show", truncate),
        ("verify", truncate),
        ("export", truncate),
        ("show", make_link),
        ("verify", make_fifo),
    ],
)
def test_an_image_that_cannot_be_opened_is_damage(
    copy: Path, command: str, damage: Callable[[Path], None]
) -> None:
    damage(copy / "00000002.img")
    result = read_with(command, copy)
    assert result.code == 20, result.stderr
    assert "00000002.img" in result.stdout + result.stderr


@pytest.mark.parametrize("command", ["verify", "export"])
def test_one_changed_byte_of_a_page_is_damage_to_all_that_need_it(copy: Path, command: str) -> None:
    image = copy / "00000000.img"
    chunk = take_apart(image.read_bytes()).records(RecordType.CHUNK)[0]
    flip(image, image.read_bytes().index(bytes(chunk.payload)) + len(chunk.payload) // 2)
    result = read_with(command, copy, "--epoch", 1)
    assert result.code == 20
    assert "00000000.img" in result.stdout + result.stderr
    assert not copy.with_name("exported").exists()


def test_verify_says_which_epochs_damage_costs(copy: Path) -> None:
    truncate(copy / "00000001.img")
    result = run("verify", copy, "--json").expect(20)
    (report,) = result.events
    assert not report["ok"]
    assert {"00000001.img"} == {damage["file"] for damage in report["damage"]}
    assert report["damage"][0]["epochs"] == [1, 2]
    run("verify", copy, "--epoch", 0).expect(0)


def test_list_shows_the_whole_epochs_beside_a_damaged_one(copy: Path) -> None:
    truncate(copy / "00000001.img")
    (listing,) = run("list", copy, "--json").expect(0).events
    damaged = {row["epoch"]: row["damage"] for row in listing["epochs"]}
    assert list(damaged) == [0, 1, 2]
    assert (damaged[0], damaged[2]) == (None, None)
    assert "00000001.img" in damaged[1]
    assert "damaged" in run("list", copy).expect(0).stdout.splitlines()[2]


@pytest.mark.parametrize("command", ["show", "verify", "export"])
def test_a_missing_image_makes_the_chain_incomplete(copy: Path, command: str) -> None:
    (copy / "00000001.img").unlink()
    result = read_with(command, copy)
    assert result.code == 21, result.stderr
    assert "00000001.img" in result.stdout + result.stderr


@pytest.mark.parametrize("command", ["list", "verify"])
def test_a_later_format_is_too_new(copy: Path, command: str) -> None:
    index = copy / "chain.idx"
    data = bytearray(index.read_bytes())
    struct.pack_into("<I", data, 8, 99)
    struct.pack_into("<Q", data, 120, xxh3_64_intdigest(bytes(data[:120])))
    index.write_bytes(data)
    read_with(command, copy).expect(22, "99", "use the crtrace that wrote the chain")


@pytest.mark.parametrize(
    ("command", "epoch"), [("show", 3), ("show", -4), ("verify", 3), ("export", 3)]
)
def test_an_unknown_epoch_is_a_usage_error(three_epochs: Path, command: str, epoch: int) -> None:
    result = read_with(command, three_epochs, "--epoch", epoch)
    result.expect(2, f"has no epoch {epoch}; it has 0 to 2")


@pytest.mark.parametrize("command", READERS)
def test_a_directory_that_is_no_chain_is_a_usage_error(tmp_path: Path, command: str) -> None:
    read_with(command, tmp_path / "nothing").expect(2, "nothing is no directory")
    (tmp_path / "empty").mkdir()
    read_with(command, tmp_path / "empty").expect(2, "empty is no chain")


def test_a_damaged_chain_is_not_built_upon(copy: Path, spawn: Spawn) -> None:
    flip(copy / "chain.idx", 128 + 128 + 5)
    before = (copy / "chain.idx").read_bytes()
    watch_once(spawn("threads").pid, copy).expect(20, "chain.idx", "begin a new chain")
    assert (copy / "chain.idx").read_bytes() == before


def test_an_export_to_where_nothing_can_be_is_told_and_leaves_nothing(
    three_epochs: Path, tmp_path: Path
) -> None:
    nowhere = tmp_path / "missing" / "core"
    run("export", three_epochs, "-o", nowhere).expect(1, "no such file", str(nowhere))
    run("export", three_epochs, "-o", tmp_path).expect(1, "is a directory", str(tmp_path))
    assert names(tmp_path) == set()


def test_an_export_onto_a_full_disk_leaves_nothing(spawn: Spawn, chain: Path, disk: Path) -> None:
    watch_once(spawn("writer", "--mib", 16, "--fill", 1).pid, chain).expect(0)
    run("export", chain, "-o", disk / "core").expect(1, "no space left", str(disk / "core"))
    assert names(disk) == set()


@pytest.mark.usefixtures("userfaultfd")
def test_a_target_that_tracks_its_own_writes_is_busy(spawn: Spawn, tmp_path: Path) -> None:
    target = spawn("lazy", "--async", 1)
    path = tmp_path / "chain"
    run("watch", target.pid, "-o", path, "--count", 1).expect(
        13, "tracked by a userfaultfd already"
    )
    compare = {"CRTRACE_ARMER": "compare"}
    run("watch", target.pid, "-o", path, "--count", 2, "--interval", 0.1, env=compare).expect(0)
    assert verified(path) == [0, 1]
