"""What the command line promises to people and to the scripts that they write."""

from __future__ import annotations

import os
import re
import shutil
import signal
import stat
import subprocess
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner

from crtrace.capture.session import Session
from crtrace.cli import cli
from crtrace.errors import TargetBusy
from crtrace.image.reader import Chain
from crtrace.track.choose import VARIABLE
from crtrace.track.dirty import Coverage
from crtrace.units import human_bytes
from tests.live.exactness import judged, reader
from tests.live.harness import Target, Untouched, read_mem, status, stopped
from tests.live.runner import (
    CRTRACE,
    Event,
    Result,
    Watching,
    as_nobody,
    await_part,
    run,
    verified,
)

Spawn = Callable[..., Target]
STATISTICS = (
    *("freezing_time", "frozen_time", "memdump_time", "memwrite_time", "pages_scanned"),
    *("pages_skipped_parent", "pages_written", "precopy_rounds", "pages_residual", "pages_hole"),
    *("pages_unreadable", "bpf_pages", "bpf_missed", "bpf_lost_events", "bytes_raw"),
    "bytes_stored",
)
BIG = ("writer", "--mib", 128, "--fill", 1, "--running", 0)
"""A quarter of a GiB: its first image takes long enough for anything to happen meanwhile."""


@pytest.fixture
def chain(tmp_path: Path) -> Path:
    """Where a chain can be made."""
    return tmp_path / "chain"


@pytest.fixture(scope="module")
def written() -> Iterator[tuple[Path, list[Event]]]:
    """A chain of three epochs in a place that everybody can reach, and what watch told of it."""
    with tempfile.TemporaryDirectory() as folder, Target("writer", "--mib", 2) as target:
        os.chmod(folder, 0o755)
        path = Path(folder) / "chain"
        options = ("--count", 3, "--interval", 0.1, "--json")
        events = run("watch", target.pid, "-o", path, *options).expect(0).events
        yield path, events


# --- watch: where, how often, how long ---


def test_watch_makes_a_directory_named_after_the_process(spawn: Spawn, tmp_path: Path) -> None:
    target = spawn("threads")
    result = run("watch", target.pid, "--count", 1, cwd=tmp_path).expect(0)
    assert f"watching {target.pid} (threads) into crtrace-{target.pid}" in result.stderr
    assert os.listdir(tmp_path) == [f"crtrace-{target.pid}"]
    assert verified(tmp_path / f"crtrace-{target.pid}") == [0]


def test_watch_stops_after_count_epochs_and_leaves_no_trace(spawn: Spawn, chain: Path) -> None:
    target = spawn("threads")
    snapshot = Untouched(target.pid)
    options = ("--count", 4, "--interval", 0.05, "--json")
    result = run("watch", target.pid, "-o", chain, *options).expect(0)
    assert [event["event"] for event in result.events] == ["checkpoint"] * 4 + ["end"]
    assert [event["epoch"] for event in result.of("checkpoint")] == [0, 1, 2, 3]
    assert (result.events[-1]["why"], result.events[-1]["epochs"]) == ("count", 4)
    snapshot.assert_same()
    assert verified(chain) == [0, 1, 2, 3]
    target.terminate_and_check()


def test_no_wait_of_the_target_ends_because_it_is_watched(spawn: Spawn, chain: Path) -> None:
    target = spawn("sleepers")
    snapshot = Untouched(target.pid)
    run("watch", target.pid, "-o", chain, "--count", 6, "--interval", 0.02).expect(0)
    report = target.ask("report")
    disturbed = {name: sleeper["returns"] for name, sleeper in report.items()}
    assert not {name: times for name, times in disturbed.items() if times}
    snapshot.assert_same(ignore=["registers"])  # its main thread has just answered
    target.terminate_and_check()


def test_registers_and_memory_of_a_busy_target_stay_its_own(spawn: Spawn, chain: Path) -> None:
    target = spawn("tiny", "--rate", 40)
    run("watch", target.pid, "-o", chain, "--count", 10, "--interval", 0.02).expect(0)
    target.obey("check")
    target.terminate_and_check()


def test_the_clock_of_watch_keeps_its_interval(spawn: Spawn, chain: Path) -> None:
    options = ("--count", 5, "--interval", 0.2, "--json")
    result = run("watch", spawn("threads").pid, "-o", chain, *options).expect(0)
    at = [event["wall_ns"] / 1e9 for event in result.of("checkpoint")]
    # The first comes at once; that it may take long does not delay the others.
    assert 0.6 < at[-1] - at[0] < 1.6


def test_a_second_watch_goes_on_with_the_chain(spawn: Spawn, chain: Path) -> None:
    target = spawn("writer", "--mib", 8, "--fill", 1, "--running", 0)
    once = ("--count", 1, "--json")
    first = run("watch", target.pid, "-o", chain, *once).expect(0).of("checkpoint")[0]
    second = run("watch", target.pid, "-o", chain, *once).expect(0).of("checkpoint")[0]
    assert (first["epoch"], first["full"]) == (0, True)
    assert (second["epoch"], second["full"]) == (1, False)
    assert first["pages_written"] > 2048
    assert second["pages_written"] < 20
    assert verified(chain) == [0, 1]


# --- watch: signals ---


def test_without_interval_epochs_come_only_when_asked_for(spawn: Spawn, chain: Path) -> None:
    with Watching(spawn("threads").pid, chain, "--interval", 0) as watching:
        assert watching.event("checkpoint")["reason"] == "start"
        for epoch in (1, 2, 3):
            with pytest.raises(AssertionError, match="no event"):
                watching.event(timeout=0.1)
            watching.signal(signal.SIGUSR1)
            event = watching.event("checkpoint")
            assert (event["epoch"], event["reason"]) == (epoch, "request")
        watching.signal(signal.SIGINT)
        assert watching.wait().expect(0).events[-1]["why"] == "signal"


def test_with_an_interval_an_epoch_can_be_asked_for_too(spawn: Spawn, chain: Path) -> None:
    with Watching(spawn("threads").pid, chain, "--interval", 3600) as watching:
        watching.event("checkpoint")
        watching.signal(signal.SIGUSR1)
        assert watching.event("checkpoint")["reason"] == "request"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_finishes_the_epoch_under_way(
    spawn: Spawn, chain: Path, number: signal.Signals
) -> None:
    target = spawn(*BIG)
    with Watching(target.pid, chain) as watching:
        await_part(chain, 0, 4 << 20)
        watching.signal(number)
        result = watching.wait().expect(0)
    assert [event["event"] for event in result.events] == ["checkpoint", "end"]
    assert result.events[-1]["why"] == "signal"
    assert verified(chain) == [0]
    target.terminate_and_check()


def assert_stopped_at_once(result: Result) -> None:
    """It ended by the second of two signals; which of two that come at once that is, is open."""
    assert result.code in (128 + signal.SIGINT, 128 + signal.SIGTERM), result.stderr
    assert "committed epochs are whole" in result.stderr


@pytest.mark.parametrize("mib", [1, 10, 20, 32])
def test_the_second_signal_stops_at_once(spawn: Spawn, chain: Path, mib: int) -> None:
    target = spawn(*BIG)
    with Watching(target.pid, chain) as watching:
        await_part(chain, 0, mib << 20)
        watching.signal(signal.SIGINT, signal.SIGTERM)
        result = watching.wait(5)
    assert_stopped_at_once(result)
    assert result.events == []
    assert verified(chain) == []
    assert set(os.listdir(chain)) == {"chain.idx", "lock"}
    assert status(target.pid)["TracerPid"] == "0"
    target.terminate_and_check()


def test_the_second_signal_leaves_committed_epochs_whole(spawn: Spawn, chain: Path) -> None:
    target = spawn("layout")
    with Watching(target.pid, chain, "--interval", 0) as watching:
        watching.event("checkpoint")
        for n in range(8):
            target.obey(f"mmap big{n} 4096")
            target.obey(f"write big{n} 0 4096 {n + 1}")
        watching.signal(signal.SIGUSR1)
        await_part(chain, 1, 1 << 20)
        watching.signal(signal.SIGTERM, signal.SIGINT)
        result = watching.wait(5)
    assert_stopped_at_once(result)
    assert verified(chain) == [0]
    target.terminate_and_check()


# --- what watch and dump print ---


def test_every_checkpoint_carries_the_promised_statistics(
    written: tuple[Path, list[Event]],
) -> None:
    events = [event for event in written[1] if event["event"] == "checkpoint"]
    assert len(events) == 3
    for event in events:
        assert set(STATISTICS) <= event.keys()
        unknown = {"bpf_missed"} if event["full"] else set()
        numbers = {name: event[name] for name in STATISTICS if name not in unknown}
        assert all(isinstance(value, int) and value >= 0 for value in numbers.values()), numbers
        assert event["bytes_stored"] <= 1.01 * event["bytes_raw"] + 4096
        assert event["bpf_lost_events"] == 0
        assert event["frozen_time"] > 0


def test_the_statistics_agree_with_list_and_show(written: tuple[Path, list[Event]]) -> None:
    path, events = written
    (listing,) = run("list", path, "--json").expect(0).events
    for event, row in zip(events[:-1], listing["epochs"], strict=True):
        for name in ("epoch", "full", "reason", "wall_ns", "pages_written", "bytes_stored"):
            assert row[name] == event[name]
        assert row["pause_us"] == event["frozen_time"]
        (shown,) = run("show", path, "--epoch", row["epoch"], "--json").expect(0).events
        told = {name: event[name] for name in STATISTICS}
        assert {name: shown["stats"][name] for name in STATISTICS} == told
        assert shown["stats"]["bpf_coverage"] in set(Coverage)


def test_without_json_a_line_is_told_for_each_epoch(spawn: Spawn, chain: Path) -> None:
    result = run(
        "watch", spawn("threads").pid, "-o", chain, "--count", 2, "--interval", 0.05
    ).expect(0)
    lines = result.stdout.splitlines()
    assert len(lines) == 3
    assert re.match(r"epoch +0  full \(start\) +\d+ pages written .*pause +[\d.]+ ms$", lines[0])
    assert re.match(r"epoch +1  \+ +\d+ pages written ", lines[1])
    assert lines[2] == "2 epochs written"
    assert "\033" not in result.stdout + result.stderr


ENDED = 128 + signal.SIGPIPE
"""The exit code of who had more to say."""


@pytest.mark.usefixtures("userfaultfd")
@pytest.mark.parametrize(("milliseconds", "rounds"), [(3, 4), (10, 2)])
def test_a_shorter_pause_takes_more_rounds(
    spawn: Spawn, chain: Path, monkeypatch: pytest.MonkeyPatch, milliseconds: int, rounds: int
) -> None:
    monkeypatch.setenv(VARIABLE, "userfaultfd")
    target = spawn("layout")
    with judged(target.pid, chain, max_pause_ms=milliseconds) as judge:
        judge.take()
        left = iter([4000, 2000, 1900])  # pages, before each round
        monkeypatch.setattr(judge.session, "_uncopied", lambda work: next(left, 0))
        judge.take()
    assert judge.stats[-1]["precopy_rounds"] == rounds


def test_an_end_before_the_first_epoch_says_why_there_is_none(
    spawn: Spawn, chain: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: object, **__: object) -> None:
        raise TargetBusy("thread 1 does not stop", hint="try later")

    monkeypatch.setattr(Session, "checkpoint", never)
    target = spawn("threads")
    timer = threading.Timer(1, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    result = CliRunner().invoke(cli, ["watch", str(target.pid), "-o", str(chain)])
    timer.join()
    assert result.exit_code == 0, result.output
    assert "epoch delayed: thread 1 does not stop\n               try later" in result.stderr
    assert result.stderr.endswith("no epoch was written: thread 1 does not stop\n")


def first_line_of(*args: object) -> tuple[str, int, str]:
    """Read one line of stdout and close the pipe, as ``| head -1`` does."""
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(
            [*CRTRACE, *map(str, args)], stdout=subprocess.PIPE, stderr=errors, text=True, cwd="/"
        )
        assert process.stdout
        line = process.stdout.readline()
        process.stdout.close()
        code = process.wait(20)
        errors.seek(0)
        return line, code, errors.read()


def test_a_reader_that_has_seen_enough_ends_watch_in_peace(spawn: Spawn, chain: Path) -> None:
    target = spawn("threads")
    snapshot = Untouched(target.pid)
    line, code, errors = first_line_of("watch", target.pid, "-o", chain, "--interval", 0.05)
    assert line.startswith("epoch    0")
    assert (code, "Traceback" in errors, "Exception" in errors) == (ENDED, False, False), errors
    snapshot.assert_same()
    assert verified(chain)[:2] == [0, 1]


@pytest.mark.parametrize("command", ["list", "show", "verify", "diff", "diff --pages"])
def test_a_reader_that_has_seen_enough_ends_reading_commands_in_peace(
    written: tuple[Path, list[Event]], command: str
) -> None:
    verb, *options = command.split()
    epochs = (0, 2) if verb == "diff" else ()
    line, code, errors = first_line_of(verb, written[0], *epochs, *options)
    assert line
    assert (code, errors) in [(ENDED, ""), (0, "")]  # it may have said all by then


@pytest.mark.parametrize("command", ["list", "show", "verify", "diff", "diff --pages"])
def test_a_reader_that_is_not_there_ends_reading_commands(
    written: tuple[Path, list[Event]], command: str
) -> None:
    """So that damage that could not be told is not taken for none."""
    verb, *options = command.split()
    epochs = ("0", "2") if verb == "diff" else ()
    theirs, ours = os.pipe()
    os.close(theirs)
    done = subprocess.run(
        [*CRTRACE, verb, written[0], *epochs, *options],
        stdout=ours, stderr=subprocess.PIPE, text=True, timeout=20, check=False,
    )  # fmt: skip
    os.close(ours)
    assert (done.returncode, done.stderr) == (ENDED, "")


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_stdout_that_takes_nothing_is_an_error(
    written: tuple[Path, list[Event]], unbuffered: str
) -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [*CRTRACE, "list", written[0]],
            stdout=full, stderr=subprocess.PIPE, text=True, timeout=20, check=False,
            env={**os.environ, "PYTHONUNBUFFERED": unbuffered},
        )  # fmt: skip
    assert done.returncode == 1, done.stderr
    assert "No space left on device" in done.stderr
    assert "Exception" not in done.stderr


# --- dump ---


def test_a_second_dump_stores_only_what_differs_by_content(spawn: Spawn, chain: Path) -> None:
    target = spawn("writer", "--mib", 16, "--fill", 1)
    with stopped(target.pid):
        (first,) = run("dump", target.pid, "-o", chain, "--json").expect(0).events
        assert status(target.pid)["State"][0] == "T"
        (second,) = run("dump", target.pid, "-o", chain, "--json").expect(0).events
        assert status(target.pid)["State"][0] == "T"
        with Chain.open(chain) as opened:
            for epoch in (0, 1):
                read = reader(opened.epoch(epoch))
                for area in target.info["areas"]:
                    now = read_mem(target.pid, area["data"], area["bytes"])
                    assert read(area["data"], area["bytes"]) == now
    assert (first["epoch"], first["full"], first["reason"]) == (0, True, "dump")
    assert (second["epoch"], second["full"], second["reason"]) == (1, False, "dump")
    assert first["pages_written"] > 8192
    assert second["pages_written"] <= 4
    assert second["bytes_stored"] < 1 << 14 < 1 << 22 < first["bytes_stored"]
    assert second["pages_skipped_parent"] > 8192
    assert verified(chain) == [0, 1]
    target.terminate_and_check()


def test_a_dump_leaves_no_trace(spawn: Spawn, chain: Path) -> None:
    target = spawn("threads")
    snapshot = Untouched(target.pid)
    result = run("dump", target.pid, "-o", chain).expect(0)
    assert re.fullmatch(r"epoch +0  full \(dump\) .*\n", result.stdout)
    snapshot.assert_same()


# --- reading commands ---


def test_list_has_a_line_for_each_epoch(written: tuple[Path, list[Event]]) -> None:
    lines = run("list", written[0]).expect(0).stdout.splitlines()
    assert len(lines) == 4
    assert lines[0].split()[:2] == ["epoch", "time"]
    assert [line.split()[0] for line in lines[1:]] == ["0", "1", "2"]
    assert [line.split()[3] for line in lines[1:]] == ["full", "+", "+"]


@pytest.mark.usefixtures("userfaultfd")
def test_show_says_how_writes_were_noted(written: tuple[Path, list[Event]]) -> None:
    (facts,) = run("show", written[0], "--json").expect(0).events
    assert facts["armer"] == "userfaultfd"


def test_show_describes_the_process(written: tuple[Path, list[Event]]) -> None:
    path, _ = written
    (facts,) = run("show", path, "--json").expect(0).events
    (task,) = facts["tasks"]
    assert (facts["epoch"], task["comm"]) == (2, "writer")
    assert facts["kernel"] == os.uname().release
    assert len(task["threads"]) == 3
    assert {"[heap]", "[stack]"} <= {vma["name"] for vma in task["vmas"]}
    text = run("show", path).expect(0).stdout
    assert text.startswith("epoch 2 (interval), builds on epoch 1; Linux ")
    assert f"process {task['pid']} writer" in text
    for thread in task["threads"]:
        assert f"{thread['tid']}  writer" in text
    rows = [line.split() for line in text.splitlines()]
    for vma in task["vmas"]:
        place, size = f"{vma['start']:x}-{vma['end']:x}", human_bytes(vma["end"] - vma["start"])
        assert [row[1:4] for row in rows if row[:1] == [place]] == [[vma["perms"], *size.split()]]
    for file in facts["files"]:
        assert any(row[-1:] == [file["path"]] and "no" in row for row in rows)


def test_epochs_can_be_counted_from_the_end(written: tuple[Path, list[Event]]) -> None:
    for number, expected in ((0, 0), (2, 2), (-1, 2), (-3, 0)):
        (facts,) = run("show", written[0], "--epoch", number, "--json").expect(0).events
        assert facts["epoch"] == expected


def test_verify_counts_what_it_has_seen(written: tuple[Path, list[Event]]) -> None:
    path, _ = written
    (report,) = run("verify", path, "--json").expect(0).events
    assert (report["ok"], report["epochs"], report["damage"]) == (True, [0, 1, 2], [])
    size = sum(image.stat().st_size for image in path.glob("*.img"))
    assert report["bytes"] == size
    text = run("verify", path).expect(0).stdout
    assert text.startswith(f"3 epochs, {report['records']} records, {report['pages']} pages, ")
    assert text.endswith(": whole\n")


@pytest.mark.parametrize("kind", ["core", "raw"])
def test_export_says_what_it_wrote(
    written: tuple[Path, list[Event]], tmp_path: Path, kind: str
) -> None:
    out = tmp_path / "exported"
    options = ("--format", kind, "--epoch", 1, "-o", out)
    (report,) = run("export", written[0], *options, "--json").expect(0).events
    assert (report["epoch"], report["format"], report["path"]) == (1, kind, str(out))
    assert report["bytes"] == out.stat().st_size > 0
    assert report["parts"] > 0
    text = run("export", written[0], *options).expect(0).stdout
    assert text == f"epoch 1 as {kind} in {out}\n"


def test_a_terabyte_of_reserve_costs_no_time(spawn: Spawn, chain: Path, tmp_path: Path) -> None:
    """Runtimes and sanitizers reserve address space that they never use."""
    target = spawn("layout")
    reserve = target.info["areas"]["reserve"]
    assert reserve["pages"] << 12 == 1 << 40
    assert run("dump", target.pid, "-o", chain).code in (0, 3)
    (facts,) = run("show", chain, "--json", timeout=10).expect(0).events
    inside = [v for v in facts["tasks"][0]["vmas"] if v["start"] == reserve["addr"]]
    assert inside[0]["bytes"]["stored"] == 0
    run("export", chain, "-o", tmp_path / "core", timeout=10).expect(0)
    assert (tmp_path / "core").stat().st_blocks << 9 < 64 << 20


SHOW_IMPORTS = {"PYTHONPROFILEIMPORTTIME": "1"}
READERS = [
    ("list",),
    ("show",),
    ("verify",),
    ("diff", "-2", "-1"),
    ("diff", "-2", "-1", "--pages"),
    ("export", "-o", "core"),
    ("export", "--format", "raw", "-o", "raw"),
]


@pytest.fixture
def readable(written: tuple[Path, list[Event]]) -> Iterator[Path]:
    """A directory of nobody's with a copy of the chain that everybody may read."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o777)
        copied = Path(shutil.copytree(written[0], Path(folder) / "chain"))
        copied.chmod(0o755)
        for file in copied.iterdir():
            file.chmod(0o644)
        yield Path(folder)


def imported_by(result: Result) -> set[str]:
    """The modules that a run with SHOW_IMPORTS took in."""
    found = set(re.findall(r"^import time: .*\| +(\S+)$", result.stderr, re.M))
    assert "crtrace.cli" in found
    return found


def machinery(imported: set[str]) -> set[str]:
    """Those modules that only watching needs."""
    roots = ("bcc", "pyroute2", "crtrace.linux", "crtrace.track", "crtrace.capture")
    return {name for name in imported for root in roots if f"{name}.".startswith(f"{root}.")}


@pytest.mark.parametrize("command", READERS, ids=" ".join)
def test_reading_needs_neither_privileges_nor_the_machinery_of_watching(
    readable: Path, command: tuple[str, ...]
) -> None:
    verb, *options = command
    result = run(
        verb, "chain", *options,
        before=as_nobody(), cwd=readable, env=SHOW_IMPORTS,
    ).expect(0)  # fmt: skip
    assert "crtrace.image.reader" in imported_by(result)
    assert not machinery(imported_by(result))


def test_help_needs_no_privileges_and_none_of_the_machinery() -> None:
    result = run("--help", before=as_nobody(), env=SHOW_IMPORTS).expect(0)
    for command in ("check", "watch", "dump", "list", "show", "diff", "verify", "export", "demo"):
        assert f"\n  {command} " in result.stdout
    assert not machinery(imported_by(result))


# --- who may read what is written ---


def mode(path: Path) -> int:
    """Its permission bits."""
    return stat.S_IMODE(path.stat().st_mode)


def test_whatever_the_umask_only_the_owner_reads_what_is_written(
    spawn: Spawn, chain: Path, tmp_path: Path
) -> None:
    target = spawn("threads")
    run("watch", target.pid, "-o", chain, "--count", 2, "--interval", 0.05, umask=0).expect(0)
    assert mode(chain) == 0o700
    assert {file.name: mode(file) for file in chain.iterdir()} == dict.fromkeys(
        ("00000000.img", "00000001.img", "chain.idx", "lock"), 0o600
    )
    for kind in ("core", "raw"):
        run("export", chain, "--format", kind, "-o", tmp_path / kind, umask=0).expect(0)
    written = {path.name: mode(path) for path in tmp_path.iterdir() if path != chain}
    assert len(written) >= 2
    assert set(written.values()) == {0o600}


# --- demo ---


def test_the_demo_proves_itself(chain: Path) -> None:
    (report,) = run("demo", "--json", "-o", chain, timeout=60).expect(0).events
    assert report["exact"] is True
    assert len(report["epochs"]) == 10
    assert all(row["pages_compared"] > 1000 and not row["wrong"] for row in report["epochs"])
    assert verified(chain) == [*range(10)]


def test_the_debug_log_has_the_time_of_the_compile(spawn: Spawn, chain: Path) -> None:
    target = spawn("threads")
    result = run("dump", target.pid, "-o", chain, env={"CRTRACE_DEBUG": "1"}).expect(0)
    assert re.search(r"BPF: code .* ready after \d\.\d{3} s", result.stderr)
    assert "compiled" not in run("dump", target.pid, "-o", chain).expect(0).stderr
