"""Measure crtrace as its users have it, beside the tools they would use otherwise.

In each run a fresh target is filled, then every measurement is made on it in turn; each run begins
with another one, so that no measurement always has the best place. crtrace is started as a
subprocess and only its JSON is believed for what it alone knows; times are also taken from
outside, and the target itself says for how long it was kept from running. ``scripts/bench`` is the
way to start this.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import select
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Self

from tests.live.harness import CFLAGS, ENVIRONMENT, Target, compile_target

TREE = Path(__file__).resolve().parents[1]
MIB = 1 << 20
PAGE = 4096
RATES = (50, 200, 500)
"""MB/s that the target writes to random pages during a full dump."""
TICK_US = 200
RUN_BYTES = 10 * MIB
PATIENCE = 600
"""Seconds after which a subprocess that says nothing is given up."""
IN_MEMORY = ("tmpfs", "ramfs", "devtmpfs")
CRIU_OLDEST = (3, 15)
"""The first to print its statistics."""
ENOUGH = 100
"""Samples for a 99th percentile."""

Sample = dict[str, float]
"""What one measurement gave, by the names in ``METRICS``."""

# What each number is, and its unit. µs of crtrace's statistics become ms.
METRICS: dict[str, tuple[str, str]] = {
    "frozen": ("pause (frozen_time)", "ms"),
    "freezing": ("stopping all threads (freezing_time)", "ms"),
    "gap": ("largest gap seen by the target", "ms"),
    "gap_off": ("largest gap, less waiting for a processor", "ms"),
    "total": ("wall time (total_time)", "ms"),
    "wall": ("wall time seen from outside", "ms"),
    "startup": ("start of the program, of that", "ms"),
    "wall_synced": ("the same and fsync", "ms"),
    "rounds": ("pre-copy rounds", ""),
    "converged": ("pre-copy converged (1: yes)", ""),
    "residual": ("pages copied in the pause", "pages"),
    "pages": ("pages written", "pages"),
    "zero": ("of them zeros", "pages"),
    "raw": ("bytes raw", "MiB"),
    "stored": ("bytes stored", "MiB"),
    "rate": ("written by the target meanwhile", "MB/s"),
    "memory": ("peak memory of the controller (VmHWM)", "MiB"),
    "memory_start": ("largest process, with the start-up (ru_maxrss)", "MiB"),
    "detach_gap": ("largest gap seen by the target at the end", "ms"),
    "detach_gap_off": ("the same, less waiting for a processor", "ms"),
}


class Trouble(Exception):
    """The measurement cannot go on, and why."""


class Interrupted(BaseException):
    """A signal asked for the end."""

    def __init__(self, signum: int) -> None:
        super().__init__(signum)
        self.signum = signum


def note(text: str) -> None:
    """A line for people, on stderr."""
    print(f"bench: {text}", file=sys.stderr, flush=True)


# --- the machine ----------------------------------------------------------------------------------


def filesystem(path: Path) -> tuple[str, str]:
    """Type and source of the file system that holds ``path``."""
    best, found = -1, ("unknown", "unknown")
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        before, _, after = line.partition(" - ")
        point = Path(re.sub(r"\\(\d{3})", lambda m: chr(int(m[1], 8)), before.split()[4]))
        # Of two mounts on one point the later covers the earlier.
        if path.is_relative_to(point) and len(point.parts) >= best:
            best, found = len(point.parts), (after.split()[0], after.split()[1])
    return found


def field_of(path: str, name: str) -> str:
    """The value after ``NAME:`` in a file of such lines, empty if there is none."""
    found = re.search(rf"^{name}\s*:\s*(.*)$", Path(path).read_text(), re.MULTILINE)
    return found[1] if found else ""


def mib_of(path: str, name: str) -> float:
    """A value in kB, as MiB."""
    return int(field_of(path, name).split()[0]) / 1024


def machine(folder: Path) -> dict[str, Any]:
    """What the numbers depend on."""
    huge = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    chosen = re.search(r"\[(\w+)\]", huge.read_text()) if huge.exists() else None
    kind, source = filesystem(folder)
    return {
        "kernel": os.uname().release,
        "architecture": os.uname().machine,
        "processor": field_of("/proc/cpuinfo", "model name"),
        "cores": len(os.sched_getaffinity(0)),
        "memory_mib": round(mib_of("/proc/meminfo", "MemTotal")),
        "load_before": os.getloadavg()[0],
        "transparent_hugepages": chosen[1] if chosen else "none",
        "output_directory": str(folder),
        "output_filesystem": kind,
        "output_device": source,
    }


def processor_ticks() -> tuple[int, int]:
    """Ticks of all processors since boot: those a hypervisor took for others, and all."""
    ticks = [int(word) for word in Path("/proc/stat").read_text().split()[1:9]]
    return ticks[7], sum(ticks)


def output_of(*command: str | Path) -> str:
    """A command's stdout, empty if it fails or is not there."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()


def crtrace_version() -> dict[str, str]:
    """The version and, in a git clone, the commit."""
    # The clone may belong to the user who called sudo, which git would not trust.
    git = ["git", "-c", f"safe.directory={TREE}", "-C", str(TREE)]
    return {
        "version": output_of(*crtrace("--version")).split()[-1],
        "commit": output_of(*git, "describe", "--always", "--dirty", "--exclude=*"),
    }


# --- processes ------------------------------------------------------------------------------------


def crtrace(*arguments: object) -> list[str]:
    """The command line that ``scripts/crtrace`` ends in."""
    return [sys.executable, "-P", "-m", "crtrace", *map(str, arguments)]


def elapsed_ms(since: float) -> float:
    """Milliseconds since a moment of the monotonic clock."""
    return (time.monotonic() - since) * 1000


def await_readable(fd: int, what: str) -> None:
    """Return once there is something to read."""
    if not select.select([fd], [], [], PATIENCE)[0]:
        raise Trouble(f"{what}: nothing for {PATIENCE} s")


def kill_group(process: subprocess.Popen[bytes]) -> None:
    """End a process that leads a group, and whatever else is left of the group."""
    if process.returncode is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


class Watch:
    """``crtrace watch`` as a user would start it, asked for epochs by SIGUSR1.

    Leaving the block asks it to end and waits; after an error it is killed, which it must stand.
    """

    def __init__(self, pid: int, chain: Path) -> None:
        self._command = crtrace("watch", pid, "--json", "--interval", 0, "-o", chain)
        self._stderr = chain.with_suffix(".stderr")
        self._pending = b""
        self.memory_mib = self.largest_process_mib = 0.0

    def __enter__(self) -> Self:
        self._since = time.monotonic()
        with open(self._stderr, "wb") as stderr:
            self._process = subprocess.Popen(
                self._command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=stderr,
                start_new_session=True,  # a Ctrl-C is for this program to answer
            )  # fmt: skip
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            if error is None:
                self._end()
        finally:
            kill_group(self._process)
            if self._process.stdout:
                self._process.stdout.close()

    def request(self) -> None:
        """Ask for an epoch now."""
        self._since = time.monotonic()
        self._process.send_signal(signal.SIGUSR1)

    def checkpoint(self) -> Sample:
        """The next epoch; its wall time is since the request, or since the start."""
        event = self._event()
        wall = elapsed_ms(self._since)
        if event.get("event") != "checkpoint":
            raise self._trouble(f"said {event}")
        return {
            "frozen": event["frozen_time"] / 1000,
            "freezing": event["freezing_time"] / 1000,
            "total": event["total_time"] / 1000,
            "wall": wall,
            "rounds": event["precopy_rounds"],
            "converged": event["precopy_converged"],
            "residual": event["pages_residual"],
            "pages": event["pages_written"],
            "zero": event["pages_zero"],
            "raw": event["bytes_raw"] / MIB,
            "stored": event["bytes_stored"] / MIB,
        }

    def _event(self) -> dict[str, Any]:
        assert self._process.stdout
        fd = self._process.stdout.fileno()
        while b"\n" not in self._pending:
            await_readable(fd, "crtrace watch")
            part = os.read(fd, 65536)
            if not part:
                raise self._trouble("ended")
            self._pending += part
        line, _, self._pending = self._pending.partition(b"\n")
        event: dict[str, Any] = json.loads(line)
        return event

    def _end(self) -> None:
        self.memory_mib = mib_of(f"/proc/{self._process.pid}/status", "VmHWM")
        self._process.send_signal(signal.SIGTERM)
        if (event := self._event()).get("event") != "end":
            raise self._trouble(f"said {event}")
        pidfd = os.pidfd_open(self._process.pid)
        try:
            await_readable(pidfd, "crtrace watch, at its end")
        finally:
            os.close(pidfd)
        _, status, usage = os.wait4(self._process.pid, 0)
        self._process.returncode = os.waitstatus_to_exitcode(status)
        self.largest_process_mib = usage.ru_maxrss / 1024
        if self._process.returncode:
            raise self._trouble(f"ended with {self._process.returncode}")

    def _trouble(self, what: str) -> Trouble:
        return Trouble(f"crtrace watch {what}: {self._stderr.read_text(errors='replace').strip()}")


def run_quietly(command: Sequence[str], log: Path) -> int:
    """Run a command to its end; its exit status. On the way out nothing of it is left."""
    with open(log, "wb") as output:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
        )
    try:
        return process.wait(PATIENCE)
    except subprocess.TimeoutExpired:
        raise Trouble(f"{command[0]}: not done after {PATIENCE} s") from None
    finally:
        kill_group(process)


# --- other tools ----------------------------------------------------------------------------------


@dataclass
class Peer:
    """Another tool that writes a process to disk and lets it go on."""

    name: str
    program: str | None
    arguments: Callable[[str, str], list[str]]
    """The rest of the command line, for a process and a directory."""
    version: str = ""
    absent: str = ""
    """Why there are no numbers of it, or empty."""
    remark: str = ""
    """What else its numbers depend on, or empty."""

    def command(self, pid: str, folder: str) -> list[str]:
        """The command line for a process and a directory."""
        return [self.program or self.name, *self.arguments(pid, folder)]

    def facts(self) -> dict[str, Any]:
        """What it is and how it was started."""
        return {
            "present": not self.absent,
            "absent": self.absent or None,
            "version": self.version,
            "remark": self.remark or None,
            "command": shlex.join(self.command("PID", "DIR")),
        }


def find_gcore() -> Peer:
    """gdb's gcore."""
    peer = Peer(
        "gcore", shutil.which("gcore"), lambda pid, folder: ["-o", f"{folder}/core", pid]
    )  # fmt: skip
    if not peer.program or not shutil.which("gdb"):
        peer.absent = "no gcore and gdb on PATH"
    else:
        peer.version = output_of("gdb", "--version").partition("\n")[0]
    return peer


def find_criu(given: str | None) -> Peer:
    """CRIU, as named on the command line or found."""
    path = f"{os.environ.get('PATH', os.defpath)}:/usr/local/sbin:/usr/sbin"
    program = shutil.which(given or "criu", path=path)
    peer = Peer(
        "criu", program,
        lambda pid, folder: ["dump", "--leave-running", "--display-stats", "--tree", pid,
                             "--images-dir", folder],
    )  # fmt: skip
    if not program:
        if given:
            raise Trouble(f"--criu: {given} is no program")
        peer.absent = "no criu on PATH; --criu names one"
        return peer
    peer.version = " ".join(output_of(program, "--version").split())
    number = re.search(r"(\d+)\.(\d+)", peer.version)
    if not number or (int(number[1]), int(number[2])) < CRIU_OLDEST:
        peer.absent = f"version {peer.version or 'unknown'} is older than 3.15"
    tracks = subprocess.run(
        [program, "check", "--feature", "mem_dirty_track"], capture_output=True, check=False
    )
    peer.remark = (
        "one plain dump, no pre-dump before it"
        if tracks.returncode == 0
        else "no pre-dumps: this kernel does not track soft-dirty pages"
    )
    return peer


def criu_times(said: str) -> Sample:
    """What CRIU's statistics tell of the pause, in ms."""
    names = {"frozen": "Frozen time", "freezing": "Freezing time"}
    found = {key: re.search(rf"{name}: (\d+) us", said) for key, name in names.items()}
    return {key: int(match[1]) / 1000 for key, match in found.items() if match}


# --- measurements ---------------------------------------------------------------------------------


class Bench:
    """One run: a target, a directory, and everything that is measured with them."""

    def __init__(self, target: Target, folder: Path, results: Results, dumps: int) -> None:
        self._target = target
        self._folder = folder
        self._results = results
        self._dumps = dumps
        self._pages = target.info["pages"]

    def quiet(self) -> None:
        """The gaps when nobody does anything: what the others' are to be compared with."""
        self._gap()
        time.sleep(1)
        self._results.add("quiet", self._gap())

    def full_dumps(self) -> None:
        """Full dumps while the target is idle and while it writes at each rate, in turn."""
        for _ in range(self._dumps):
            for rate in (0, *RATES):
                self._full_dump(rate)

    def increments(self) -> None:
        """Increments of a target that writes only when it is told to."""
        run_pages = min(RUN_BYTES // PAGE, self._pages)
        with self._watching() as (watch, _):
            for _ in range(self._dumps):
                self._increment(watch, "random", f"random {self._pages // 100}")
                self._increment(watch, "run", f"run {run_pages}")

    def peer(self, peer: Peer) -> None:
        """Another tool's dump. One that fails is left out from then on."""
        if peer.absent:
            return
        folder = self._folder / peer.name
        folder.mkdir()
        log = self._folder / f"{peer.name}.log"
        command = peer.command(str(self._target.pid), str(folder))
        self._gap()
        began = time.monotonic()
        status = run_quietly(command, log)
        sample = {"wall": elapsed_ms(began)}
        size = sync(folder)
        sample |= {"wall_synced": elapsed_ms(began), "stored": size / MIB} | self._gap()
        sample |= criu_times(log.read_text(errors="replace"))
        shutil.rmtree(folder)
        if status or not size:
            said = log.read_text(errors="replace").strip().splitlines()[-3:]
            peer.absent = f"failed with {status}: {' | '.join(said)}"
            self._results.drop(peer.name)
            note(f"{peer.name} {peer.absent}")
            return
        self._results.add(peer.name, sample)

    def _increment(self, watch: Watch, name: str, command: str) -> None:
        self._target.obey(command)
        self._gap()
        watch.request()
        self._results.add(name, watch.checkpoint() | self._gap())

    def _full_dump(self, rate: int) -> None:
        if rate:
            self._target.obey(f"write {rate}")
        with self._watching() as (_, full):
            pass
        if rate:
            pages, nanoseconds = map(int, self._target.obey("write 0").split())
            full["rate"] = pages * PAGE * 1000 / nanoseconds
        self._results.add(full_name(rate), full)

    @contextmanager
    def _watching(self) -> Iterator[tuple[Watch, Sample]]:
        """A watch whose full dump is done, and what that took: all of it once the block is left."""
        chain = self._folder / "chain"
        self._gap()
        with Watch(self._target.pid, chain) as watch:
            full = watch.checkpoint() | self._gap()
            full["startup"] = full["wall"] - full["total"]
            yield watch, full
        full |= {"memory": watch.memory_mib, "memory_start": watch.largest_process_mib}
        full |= {f"detach_{key}": value for key, value in self._gap().items()}
        shutil.rmtree(chain)

    def _gap(self) -> Sample:
        """The largest gap between ticks since this was asked before, in ms."""
        every, off = map(int, self._target.obey("gap").split())
        return {"gap": every / 1e6, "gap_off": off / 1e6}


def sync(folder: Path) -> int:
    """Put the files of a directory on disk; the bytes that they take there."""
    size = 0
    for path in folder.rglob("*"):
        with open(path, "rb") as file:
            os.fsync(file.fileno())
            size += os.fstat(file.fileno()).st_blocks * 512
    return size


def full_name(rate: int) -> str:
    """The name of full dumps while so many MB/s are written."""
    return f"full_{rate}" if rate else "full"


@dataclass
class Results:
    """Samples of each run by the name of what was measured."""

    runs: list[dict[str, list[Sample]]] = field(default_factory=list)

    def begin_run(self) -> None:
        """What is added belongs to the next run."""
        self.runs.append({})

    def add(self, name: str, sample: Sample) -> None:
        """Keep what a measurement gave."""
        self.runs[-1].setdefault(name, []).append(sample)

    def drop(self, name: str) -> None:
        """Forget what runs gave: it is not comparable."""
        for run in self.runs:
            run.pop(name, None)

    def values(self, name: str, metric: str) -> list[float]:
        """A number of every sample, in order; empty if it was not measured."""
        return [value for run in self._by_run(name, metric) for value in run]

    def ratios(self, above: tuple[str, str], below: tuple[str, str]) -> list[float]:
        """The quotient of two numbers in each run, of their medians there."""
        pairs = zip(self._by_run(*above), self._by_run(*below), strict=True)
        middles = [(statistics.median(a), statistics.median(b)) for a, b in pairs if a and b]
        return [a / b for a, b in middles if b]

    def _by_run(self, name: str, metric: str) -> list[list[float]]:
        return [[each[metric] for each in run.get(name, []) if metric in each] for run in self.runs]


def measure(options: argparse.Namespace, folder: Path, peers: list[Peer]) -> Results:
    """All runs."""
    results = Results()
    for run in range(options.runs):
        with scratch(folder / f"run{run}") as place, start_target(options) as target:
            results.begin_run()
            bench = Bench(target, place, results, options.dumps)
            steps = list(steps_of(bench, peers))
            for title, step in steps[run % len(steps) :] + steps[: run % len(steps)]:
                note(f"run {run + 1} of {options.runs}: {title}")
                step()
    return results


def steps_of(bench: Bench, peers: list[Peer]) -> Iterator[tuple[str, Callable[[], None]]]:
    """What a run measures, each with its title."""
    yield "nothing", bench.quiet
    yield "crtrace, full dumps", bench.full_dumps
    yield "crtrace, increments", bench.increments
    for peer in peers:
        if not peer.absent:
            yield peer.name, partial(bench.peer, peer)


def start_target(options: argparse.Namespace) -> Target:
    """``tests/targets/bench.c``, filled."""
    # Whatever stdout is, it is not to be among what a peer has to dump.
    silent = ["/bin/sh", "-c", 'exec "$@" >/dev/null', "sh", str(compile_target("bench"))]
    return Target(silent, "--mib", options.size, "--tick", TICK_US)


@contextmanager
def scratch(path: Path) -> Iterator[Path]:
    """A directory that is gone afterwards."""
    path.mkdir()
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


# --- the report -----------------------------------------------------------------------------------


def titles(pages: int) -> dict[str, str]:
    """What was measured, by name, in the order of the report."""
    run_pages = min(RUN_BYTES // PAGE, pages)
    return {
        "quiet": "nothing: the target alone",
        "full": "crtrace, full dump, target idle",
        **{full_name(rate): f"crtrace, full dump, target writes {rate} MB/s" for rate in RATES},
        "random": f"crtrace, increment, 1 % of the pages written ({pages // 100}, random)",
        "run": f"crtrace, increment, {run_pages * PAGE / MIB:g} MiB written in a row",
        "gcore": "gcore",
        "criu": "criu dump --leave-running",
    }


PAUSES = {
    "full": "full dump, target idle",
    **{full_name(rate): f"full dump, {rate} MB/s written" for rate in RATES},
    "random": "increment, 1 % of the pages",
    "run": "increment, pages in a row",
}
"""What crtrace pauses the target for, by name."""

RATIOS: dict[str, tuple[tuple[str, str], tuple[str, str]]] = {
    "crtrace full wall / gcore wall": (("full", "wall"), ("gcore", "wall")),
    "crtrace full total_time / gcore wall": (("full", "total"), ("gcore", "wall")),
    "crtrace full wall / gcore wall with fsync": (("full", "wall"), ("gcore", "wall_synced")),
    "crtrace full total_time / gcore wall with fsync": (
        ("full", "total"),
        ("gcore", "wall_synced"),
    ),
    "gcore gap / crtrace full pause": (("gcore", "gap"), ("full", "frozen")),
    "gcore gap / crtrace full gap": (("gcore", "gap"), ("full", "gap")),
    "the same, both less waiting": (("gcore", "gap_off"), ("full", "gap_off")),
    "gcore gap / crtrace 1 % pause": (("gcore", "gap"), ("random", "frozen")),
    "gcore gap / crtrace 1 % gap": (("gcore", "gap"), ("random", "gap")),
    "crtrace full wall / criu wall": (("full", "wall"), ("criu", "wall")),
    "crtrace full total_time / criu wall": (("full", "total"), ("criu", "wall")),
    "crtrace full total_time / criu wall with fsync": (("full", "total"), ("criu", "wall_synced")),
    "crtrace full wall / criu wall with fsync": (("full", "wall"), ("criu", "wall_synced")),
    "criu gap / crtrace full gap": (("criu", "gap"), ("full", "gap")),
    "the same of criu, both less waiting": (("criu", "gap_off"), ("full", "gap_off")),
    **{
        f"criu frozen_time / pause of {title}": (("criu", "frozen"), (name, "frozen"))
        for name, title in PAUSES.items()
    },
    "crtrace full bytes stored / raw": (("full", "stored"), ("full", "raw")),
    "gcore bytes stored / crtrace full bytes stored": (("gcore", "stored"), ("full", "stored")),
}


def percentile_99(values: list[float]) -> float | None:
    """The 99th percentile, of too few values None."""
    if len(values) < ENOUGH:
        return None
    return statistics.quantiles(values, n=100, method="inclusive")[-1]


def summary(values: list[float], unit: str = "") -> dict[str, Any]:
    """Median, minimum and maximum, 99th percentile of enough values, and where they come from."""
    return {
        "unit": unit,
        "median": statistics.median(values),
        "p99": percentile_99(values),
        "min": min(values),
        "max": max(values),
        "values": values,
    }


def report(
    options: argparse.Namespace, facts: dict[str, Any], results: Results
) -> dict[str, Any]:  # fmt: skip
    """Everything, as one object."""
    measured = {}
    for name, title in titles(options.size * MIB // PAGE).items():
        numbers = {
            metric: summary(values, unit)
            for metric, (_, unit) in METRICS.items()
            if (values := results.values(name, metric))
        }
        if numbers:
            measured[name] = {"title": title, "numbers": numbers}
    ratios = {
        name: summary(values) for name, pair in RATIOS.items() if (values := results.ratios(*pair))
    }
    return {"schema_version": 1, **facts, "measured": measured, "ratios": ratios}


def facts_of(options: argparse.Namespace, folder: Path, peers: list[Peer]) -> dict[str, Any]:
    """What was measured where and with what."""
    return {
        "machine": machine(folder),
        "crtrace": {
            **crtrace_version(),
            "command": "crtrace watch PID --json --interval 0 -o DIR",
        },
        "target": {
            "mib": options.size,
            "contents": "half of each page random, half zeros",
            "tick_us": TICK_US,
            "compiler_flags": CFLAGS,
            "environment": ENVIRONMENT,
        },
        "runs": options.runs,
        "dumps": options.dumps,
        "peers": {peer.name: peer.facts() for peer in peers},
    }


def print_report(whole: dict[str, Any]) -> None:
    """The same for people."""
    for line in [*facts_lines(whole), *table_lines(whole)]:
        print(line)


def facts_lines(whole: dict[str, Any]) -> Iterator[str]:
    """What the table's numbers depend on."""
    at, own, target = whole["machine"], whole["crtrace"], whole["target"]
    yield f"machine   {at['cores']} cores, {at['processor'] or at['architecture']}"
    yield f"          {at['memory_mib']} MiB, transparent huge pages: {at['transparent_hugepages']}"
    yield f"          Linux {at['kernel']}"
    yield f"          load average {at['load_before']:.2f} before, {at['load_after']:.2f} after;"
    yield f"          {at['stolen_percent']:.1f} % of the processors' time went to other machines"
    yield f"output    {at['output_directory']} ({at['output_filesystem']}, {at['output_device']})"
    yield f"crtrace   {own['version']} {own['commit'] and 'commit ' + own['commit']}"
    yield f"          {own['command']}"
    for name, peer in whole["peers"].items():
        yield f"{name:<10}{peer['absent'] or peer['version']}"
        if peer["present"]:
            yield f"          {peer['command']}"
        if peer["present"] and peer["remark"]:
            yield f"          {peer['remark']}"
    yield f"target    {target['mib']} MiB, {target['contents']}; ticks every {target['tick_us']} µs"
    yield f"runs      {whole['runs']}, each on a fresh target, beginning with another measurement;"
    yield f"          {whole['dumps']} full dumps and increments of each kind a run"
    yield ""
    yield "crtrace's wall times end when the image is on disk; a peer's do when it exits, and"
    yield "with fsync when its files are on disk. Full dumps seen from outside include the start of"
    yield "the program. A gap includes a tick; it is measured by a thread of the target that sleeps"
    yield "between ticks, so it also has what that thread waits for a processor that is busy."


def table_lines(whole: dict[str, Any]) -> Iterator[str]:
    """The pauses, then everything."""
    heads = ("p50", "p99", "min", "max", "n")
    yield ""
    yield f"{'':<58}" + "".join(f"{head:>10}" for head in heads)
    yield from pause_lines(whole["measured"])
    for measured in whole["measured"].values():
        yield measured["title"]
        for metric, numbers in measured["numbers"].items():
            yield row(METRICS[metric][0], numbers)
    if whole["ratios"]:
        yield "ratios, taken in each run of its medians"
        for name, numbers in whole["ratios"].items():
            yield row(name, numbers)


def pause_lines(measured: dict[str, Any]) -> Iterator[str]:
    """For how long each stops the target."""
    yield "pauses"
    peers = {"gcore": "gcore, largest gap seen by the target", "criu": "criu, frozen_time"}
    for name, title in (PAUSES | peers).items():
        if name in measured:
            numbers = measured[name]["numbers"]
            yield row(title, numbers.get("frozen") or numbers["gap"])


def row(title: str, numbers: dict[str, Any]) -> str:
    """One line of the table."""
    figures = [numbers[which] for which in ("median", "p99", "min", "max")]
    columns = [*map(figure, figures), str(len(numbers["values"]))]
    return f"  {title:<56}{''.join(f'{each:>10}' for each in columns)}  {numbers['unit']}".rstrip()


def figure(value: float | None) -> str:
    """A number with three digits or more; a dash for none."""
    if value is None:
        return "–"
    if value == int(value) and abs(value) < 1e9:
        return str(int(value))
    decimals = 0 if abs(value) >= 1000 else 1 if abs(value) >= 100 else 2 if abs(value) >= 1 else 3
    return f"{value:.{decimals}f}"


# --- the command ----------------------------------------------------------------------------------


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="scripts/bench", description="Measure crtrace beside gcore and CRIU, in one run."
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--runs", type=int, metavar="N", help="default 5")
    parser.add_argument(
        "--dumps", type=int, metavar="N",
        help="full dumps and increments of each kind a run, default 20: a p99 takes 100 in all",
    )  # fmt: skip
    parser.add_argument("--size", type=int, metavar="MIB", help="the target's data, default 1024")
    parser.add_argument(
        "--quick", action="store_true", help="one run of one dump each of 128 MiB, unless told"
    )
    parser.add_argument(
        "--dir", type=Path, metavar="DIR",
        help="write images below DIR; by default the first of the usual places that is on disk",
    )  # fmt: skip
    parser.add_argument("--criu", metavar="PATH", help="the criu to compare with, 3.15 or later")
    options = parser.parse_args(arguments)
    if options.runs is None:
        options.runs = 1 if options.quick else 5
    if options.dumps is None:
        options.dumps = 1 if options.quick else 20
    if options.size is None:
        options.size = 128 if options.quick else 1024
    if options.runs < 1 or options.dumps < 1 or options.size < 16:
        parser.error("at least one run, one dump and 16 MiB")
    return options


def choose_directory(given: Path | None) -> Path:
    """Where to write: what was asked for, or a place that is not in memory."""
    if given:
        return given.resolve(strict=True)
    places = [Path(tempfile.gettempdir()), Path("/var/tmp"), TREE]
    for place in places:
        if place.is_dir() and filesystem(place.resolve())[0] not in IN_MEMORY:
            return place.resolve()
    raise Trouble("the usual places are all in memory; choose one on disk with --dir")


def refuse_too_small(place: Path, size: int) -> None:
    """A benchmark of a machine out of memory or disk would measure that."""
    memory = mib_of("/proc/meminfo", "MemAvailable")
    if memory < 2 * size + 512:
        raise Trouble(f"{size} MiB are too much for {memory:.0f} MiB of memory; see --size")
    disk = shutil.disk_usage(place).free / MIB
    if disk < 3 * size:
        raise Trouble(f"{disk:.0f} MiB are free at {place}, too few; see --size and --dir")


def raise_interrupted(signum: int, frame: FrameType | None) -> None:
    """The signal handler: everything is undone on the way out, and once is enough."""
    for each in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(each, signal.SIG_IGN)
    raise Interrupted(signum)


def bench(options: argparse.Namespace) -> None:
    """Measure and report."""
    place = choose_directory(options.dir)
    refuse_too_small(place, options.size)
    if filesystem(place)[0] in IN_MEMORY:
        note(f"{place} is in memory: wall times are not those of a disk")
    peers = [find_gcore(), find_criu(options.criu)]
    with tempfile.TemporaryDirectory(prefix="crtrace-bench-", dir=place) as folder:
        facts = facts_of(options, Path(folder), peers)
        before = processor_ticks()
        results = measure(options, Path(folder), peers)
    taken, every = (now - then for now, then in zip(processor_ticks(), before, strict=True))
    facts["machine"] |= {"load_after": os.getloadavg()[0], "stolen_percent": 100 * taken / every}
    facts["peers"] = {peer.name: peer.facts() for peer in peers}  # one may have failed meanwhile
    whole = report(options, facts, results)
    if options.json:
        print(json.dumps(whole))
    else:
        print_report(whole)


def main(arguments: Iterable[str]) -> int:
    """The exit code: 0, 1 for failures, 128+n after a signal."""
    options = parse(list(arguments))
    for each in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(each, raise_interrupted)
    try:
        bench(options)
    except Interrupted as stop:
        note("interrupted")
        return 128 + stop.signum
    except (Trouble, AssertionError, OSError, subprocess.SubprocessError) as error:
        note(str(error))
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
