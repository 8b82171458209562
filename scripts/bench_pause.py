"""Measure pauses by size, a full dump beside what limits it, and what a target pays.

Everything runs interleaved in one run. For each figure the median, the 99th percentile where there
are enough samples for one, minimum and maximum.
"""

from __future__ import annotations

import argparse
import json
import os
import pwd
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import lz4.block
import numpy as np

from crtrace.capture.attach import attached
from crtrace.capture.session import Session
from crtrace.linux.addrspace import AddressSpace
from crtrace.linux.libc import process_vm_readv
from crtrace.linux.procfs import Process
from crtrace.linux.ptrace import signals_held
from crtrace.linux.stop import StoppedProcess
from crtrace.track import bytecode
from crtrace.track.armer import How
from crtrace.track.dirty import WrittenPages
from crtrace.track.loader import Loading
from crtrace.track.userfaultfd import UserfaultfdArmer
from crtrace.units import CHUNK_BYTES, PAGE_SIZE, Bytes, Pid
from scripts.bench import percentile_99
from tests.live.harness import Target, maps, redis_server, wait_until

MIB, GIB = 1 << 20, 1 << 30
DIRTY = 10 * MIB // PAGE_SIZE
UNPACED = 1 << 30
"""A rate that no processor reaches: the target writes as fast as it can."""
LOAD_SECONDS = 4
POSTGRES_PROGRAMS = ("initdb", "postgres", "pgbench")
UNPRIVILEGED = "nobody"
"""Whom a server runs as that refuses root."""
PGBENCH_SCALE = 10
PROCESSORS = len(os.sched_getaffinity(0))
Samples = dict[str, list[float]]


class Load(NamedTuple):
    """What a load got done."""

    rate: float
    """Operations, or whatever it counts, a second."""
    p99: float | None = None
    """The 99th percentile of their latencies in ms, where it knows them."""


class Absent(Exception):
    """Something cannot be measured here, and why."""


def add(samples: Samples, name: str, value: float) -> None:
    """One more sample."""
    samples.setdefault(name, []).append(value)


@contextmanager
def watched(target: Target, folder: Path) -> Iterator[Session]:
    """A session on a target whose first epoch is taken, into a chain that is removed in the end."""
    with (
        tempfile.TemporaryDirectory(dir=folder) as place,
        attached(Pid(target.pid), Path(place) / "chain") as session,
    ):
        session.checkpoint("start")
        yield session


# --- pauses ---------------------------------------------------------------------------------------


def increments(session: Session, target: Target, samples: Samples, name: str, count: int) -> None:
    """Epochs with 10 MiB of random pages written before each."""
    for _ in range(count):
        target.obey(f"random {DIRTY}")
        _, stats = session.checkpoint("bench")
        add(samples, f"10 MiB of {name}: pause, ms", stats["frozen_time"] / 1000)
        add(samples, f"10 MiB of {name}: stopping, ms", stats["freezing_time"] / 1000)
        add(samples, f"10 MiB of {name}: wall, ms", stats["total_time"] / 1000)


# --- what limits a full dump ----------------------------------------------------------------------


def full_dumps(target: Target, folder: Path, samples: Samples, count: int) -> None:
    """Full dumps, and after each only reading, compressing and writing what is in it."""
    with watched(target, folder) as session:
        for _ in range(count):
            _, stats = session.checkpoint("bench", full=True)
            add(samples, "full dump: wall, ms", stats["total_time"] / 1000)
            add(samples, "full dump: stored, MiB", stats["bytes_stored"] / MIB)
            limits(target, folder, samples)


@contextmanager
def timed(samples: Samples, name: str) -> Iterator[None]:
    """How long the block takes, in ms."""
    began = time.perf_counter()
    yield
    add(samples, f"{name}, ms", (time.perf_counter() - began) * 1000)


def limits(target: Target, folder: Path, samples: Samples) -> None:
    """Plain loops over the target's data, each with all that the one before it gave."""
    start, size = largest_mapping(target.pid)
    assert size == target.info["pages"] * PAGE_SIZE
    data = np.zeros(size, dtype=np.uint8)
    data[::PAGE_SIZE] = 1  # zeros alone are not there until they are written
    chunks = np.split(data, range(CHUNK_BYTES, size, CHUNK_BYTES))
    with timed(samples, "limit: process_vm_readv"):
        for number, chunk in enumerate(chunks):
            piece = np.array([[start + number * CHUNK_BYTES, len(chunk)]], dtype=np.uint64)
            got = process_vm_readv(Pid(target.pid), chunk.ctypes.data, len(chunk), piece)
            assert got == len(chunk)
    with ThreadPoolExecutor(PROCESSORS) as pool:
        # Not kept while time counts: fresh memory for all of it would take as long again.
        with timed(samples, "limit: lz4 on all processors"):
            sizes = list(pool.map(lambda chunk: len(compressed(chunk)), chunks))
        blocks = list(pool.map(compressed, chunks))
    add(samples, "limit: compressed, MiB", sum(sizes) / MIB)
    plain = folder / "plain"
    with timed(samples, "limit: writing and fdatasync"), open(plain, "wb", buffering=0) as file:
        for block in blocks:
            file.write(block)
        os.fdatasync(file.fileno())
    plain.unlink()


def compressed(chunk: Bytes) -> bytes:
    """What is stored of a chunk, without crtrace's own code."""
    block: bytes = lz4.block.compress(chunk, store_size=False)
    return block


def largest_mapping(pid: int) -> tuple[int, int]:
    """Address and size of the mapping that has the data."""
    vma = max(maps(pid), key=lambda vma: vma.end - vma.start)
    return vma.start, vma.end - vma.start


# --- what a target pays ---------------------------------------------------------------------------


def first_writes(target: Target, samples: Samples) -> None:
    """The first write to each armed page, with and without BPF looking on."""
    pages = target.info["pages"]
    with ExitStack() as stack:
        process = stack.enter_context(closing(Process(Pid(target.pid))))
        marks = WrittenPages(stack.enter_context(Loading().result()))
        space = AddressSpace(process)
        armer = stack.enter_context(closing(UserfaultfdArmer(process, space)))
        with signals_held(), StoppedProcess(process) as stopped:
            armer.arm(stopped)
        armer.scan(space, How(stopped=False))
        took: dict[str, float] = {}
        for name in ("armed", "unarmed", "armed, marked by BPF"):
            if name != "unarmed":
                armer.scan(space, How(stopped=False))
            tgid = marks.add(process) if "BPF" in name else 0
            took[name] = int(target.obey(f"touch {pages}")) / pages
            if tgid:
                marks.remove(tgid)
            add(samples, f"first write, {name}, ns", took[name])
    add(samples, "first write: marked / not", took["armed, marked by BPF"] / took["armed"])


def memory_loop(target: Target) -> Load:
    """A thread that writes to random pages as fast as it can, in MB/s."""
    target.obey(f"write {UNPACED}")
    time.sleep(LOAD_SECONDS)
    pages, nanoseconds = map(int, target.obey("write 0").split())
    return Load(pages * PAGE_SIZE * 1000 / nanoseconds)


def redis_sets(port: int) -> Load:
    """redis-benchmark, a million keys."""
    command = ["redis-benchmark", "-p", str(port), "-t", "set", "-r", "1000000", "-d", "512",
               "-n", str(60_000 * LOAD_SECONDS), "--csv"]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    line = next(line for line in done.stdout.splitlines() if line.startswith('"SET"'))
    fields = [float(each) for each in re.findall(r'"([\d.]+)"', line)]
    return Load(rate=fields[0], p99=fields[5])


@contextmanager
def every_second(pid: int, folder: Path, *options: str) -> Iterator[list[dict[str, Any]]]:
    """``crtrace watch`` beside the block, after its first epoch; afterwards, all that it said."""
    events: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(dir=folder) as place, tempfile.TemporaryFile("w+") as said:
        command = [sys.executable, "-P", "-m", "crtrace", "watch", str(pid), "--interval", "1",
                   *options, "--json", "-o", f"{place}/chain"]  # fmt: skip
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=said, text=True) as process:
            lines = process.stdout
            assert lines
            lines.readline()
            drain = threading.Thread(target=lambda: events.extend(map(json.loads, lines)))
            drain.start()
            try:
                yield events
            finally:
                process.terminate()
                drain.join()
        if process.returncode:
            said.seek(0)
            raise RuntimeError(f"crtrace watch ended with {process.returncode}: {said.read()}")


def throughput(
    name: str, pid: int, work: Callable[[], Load], folder: Path, samples: Samples, *options: str
) -> None:
    """A target's rate and latency watched every second, beside those of it alone."""
    got: dict[bool, Load] = {}
    turns = len(samples.get(f"{name}: alone, a second", []))
    for watch in (False, True) if turns % 2 == 0 else (True, False):
        if not watch:
            got[watch] = work()
            continue
        with every_second(pid, folder, *options) as events:
            got[watch] = work()
        for event in events:
            if event["event"] == "checkpoint":
                add(samples, f"{name}: pause, ms", event["frozen_time"] / 1000)
    alone, seen = got[False], got[True]
    add(samples, f"{name}: alone, a second", alone.rate)
    add(samples, f"{name}: watched / alone", seen.rate / alone.rate)
    if alone.p99 and seen.p99:
        add(samples, f"{name}: p99 latency alone, ms", alone.p99)
        add(samples, f"{name}: p99 latency, watched / alone", seen.p99 / alone.p99)


def redis(folder: Path, samples: Samples) -> None:
    """The same of Redis."""
    for program in ("redis-server", "redis-benchmark"):
        if not shutil.which(program):
            raise Absent(f"no {program} on PATH")
    with redis_server(folder) as server:
        work = partial(redis_sets, server.port)
        work()  # so that most keys are there
        throughput("Redis SET", server.pid, work, folder, samples)


# --- PostgreSQL -----------------------------------------------------------------------------------


def unprivileged(command: Sequence[object], log: Path) -> subprocess.Popen[bytes]:
    """Start a program as a user who may do nothing; what it says goes to a file."""
    with open(log, "wb") as said:
        return subprocess.Popen(
            list(map(str, command)), user=UNPRIVILEGED, group=pwd.getpwnam(UNPRIVILEGED).pw_gid,
            extra_groups=[], env={**os.environ, "LC_ALL": "C"}, cwd="/",
            stdin=subprocess.DEVNULL, stdout=said, stderr=said, start_new_session=True,
        )  # fmt: skip


def run_unprivileged(command: Sequence[object], log: Path) -> str:
    """Run a program to its end; what it said."""
    status = unprivileged(command, log).wait()
    said = log.read_text(errors="replace")
    if status:
        last = said.strip().rpartition("\n")[2]
        raise RuntimeError(f"{command[0]} ended with {status}: {last}")
    return said


def postgres_programs() -> Path:
    """The directory of a server's programs; Debian has one for each version."""
    places = [*Path("/usr/lib/postgresql").glob("*/bin"), *map(Path, os.get_exec_path())]
    for place in places:
        if all((place / name).exists() for name in POSTGRES_PROGRAMS):
            return place
    raise Absent(f"no {', '.join(POSTGRES_PROGRAMS)} in /usr/lib/postgresql/*/bin or on PATH")


@contextmanager
def postgres_server(programs: Path, place: Path) -> Iterator[int]:
    """A PostgreSQL server as it is by default, but for being reached by a socket only."""
    data, log = place / "data", place / "server.log"
    initdb = [programs / "initdb", "-D", data, "-A", "trust", "-U", UNPRIVILEGED]
    try:
        run_unprivileged(initdb, log)
    except RuntimeError as error:  # such as a directory that is not for everybody to enter
        raise Absent(str(error)) from error
    server = unprivileged(
        [programs / "postgres", "-D", data, "-k", place, "-c", "listen_addresses="], log
    )

    def ready() -> bool:
        assert server.poll() is None, log.read_text()
        return "ready to accept connections" in log.read_text()

    try:
        wait_until(ready, "PostgreSQL is ready")
        yield server.pid
    finally:
        server.send_signal(signal.SIGINT)  # its fast shutdown
        server.wait()


def pgbench_updates(pgbench: Sequence[object], place: Path) -> Load:
    """pgbench's simple updates, each a durable transaction, by four clients a processor."""
    log = place / "transactions"
    said = run_unprivileged(
        [*pgbench, "-N", "-n", "-M", "prepared", "-c", 4 * PROCESSORS, "-j", PROCESSORS,
         "-T", LOAD_SECONDS, "-l", f"--log-prefix={log}", "postgres"],
        place / "pgbench.log",
    )  # fmt: skip
    took: list[int] = []
    for path in place.glob(f"{log.name}.*"):  # one of each thread
        took += [int(line.split()[2]) for line in path.read_text().splitlines()]
        path.unlink()
    rate = re.search(r"^tps = ([\d.]+)", said, re.MULTILINE)
    assert rate, said
    return Load(rate=float(rate[1]), p99=float(np.percentile(took, 99)) / 1000)


def postgres(folder: Path, samples: Samples) -> None:
    """The same of PostgreSQL, with all processes of its server."""
    programs = postgres_programs()
    # Not in the folder, where nobody else may go.
    with tempfile.TemporaryDirectory(prefix="crtrace-bench-", dir=folder.parent) as scratch:
        place = Path(scratch)
        shutil.chown(place, UNPRIVILEGED)
        with postgres_server(programs, place) as pid:
            pgbench = [programs / "pgbench", "-h", place, "-U", UNPRIVILEGED]
            run_unprivileged(
                [*pgbench, "-i", "-q", "-s", PGBENCH_SCALE, "postgres"], place / "pgbench.log"
            )
            work = partial(pgbench_updates, pgbench, place)
            work()  # so that its caches are filled
            throughput("pgbench -N", pid, work, folder, samples, "--tree")


# --- what crtrace takes ---------------------------------------------------------------------------


def starts(target: Target, samples: Samples, folder: Path) -> None:
    """From the command line to the first epoch's registers, with and without compiled code."""
    for name, cache in (("compiling", folder / "cache"), ("code kept", folder / "cache")):
        with mock.patch.object(bytecode, "SHARED_CACHE", cache):
            environment = {**os.environ, "CRTRACE_FAULT": f"count:{folder}/points"}
            script = (
                "import runpy, sys; from pathlib import Path; from crtrace.track import bytecode;"
                f"bytecode.SHARED_CACHE = Path({str(cache)!r});"
                "runpy.run_module('crtrace', run_name='__main__', alter_sys=True)"
            )
            command = [sys.executable, "-P", "-c", script, "watch", str(target.pid), "--count", "1",
                       "-o", f"{folder}/start-chain"]  # fmt: skip
            began = time.perf_counter()
            with subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL,
                                  stdout=subprocess.DEVNULL) as process:  # fmt: skip
                while not _armed(folder / "points"):
                    time.sleep(0.001)
                add(samples, f"start to first armed page, {name}, s", time.perf_counter() - began)
                process.wait()
        shutil.rmtree(folder / "start-chain")
        (folder / "points").unlink()
    shutil.rmtree(folder / "cache")


def _armed(log: Path) -> bool:
    with suppress(FileNotFoundError):
        return "PAGEMAP_SCAN, arming" in log.read_text()
    return False


def controller(target: Target, folder: Path, samples: Samples, name: str) -> None:
    """Memory of ``watch`` at its largest, and its processor time while it waits."""
    with tempfile.TemporaryDirectory(dir=folder) as place:
        command = [sys.executable, "-P", "-m", "crtrace", "watch", str(target.pid), "--interval",
                   "0", "--json", "-o", f"{place}/chain"]  # fmt: skip
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        ) as process:
            assert process.stdout
            process.stdout.readline()
            before = _processor_seconds(process.pid)
            time.sleep(2)
            share = (_processor_seconds(process.pid) - before) / 2
            status = Path(f"/proc/{process.pid}/status").read_text()
            process.terminate()
            process.wait()
    peak = int(re.findall(r"VmHWM:\s+(\d+)", status)[0]) / 1024
    add(samples, f"controller of {name}: peak, MiB", peak)
    add(samples, f"controller of {name}: processor between epochs, %", 100 * share)


def _processor_seconds(pid: int) -> float:
    lines = [path.read_text() for path in Path(f"/proc/{pid}/task").glob("*/schedstat")]
    return sum(int(line.split()[0]) for line in lines) / 1e9


# --- all of it ------------------------------------------------------------------------------------


def measure(options: argparse.Namespace, folder: Path) -> tuple[Samples, dict[str, str]]:
    """Every sample, by name, and what is absent and why."""
    samples: Samples = {}
    absent: dict[str, str] = {}
    sizes = {f"{gib} GiB": gib << 10 for gib in (1, options.large) if gib}
    for number in range(options.runs):
        print(f"run {number + 1} of {options.runs}", file=sys.stderr)
        with Target("bench", "--mib", 1024) as target:
            full_dumps(target, folder, samples, options.dumps)
            first_writes(target, samples)
            throughput("memory loop", target.pid, partial(memory_loop, target), folder, samples)
            starts(target, samples, folder)
        for name, server in (("Redis", redis), ("PostgreSQL", postgres)):
            try:
                server(folder, samples)
            except Absent as reason:
                absent[name] = str(reason)
        for name, mib in sizes.items():
            with Target("bench", "--mib", mib) as target:
                with watched(target, folder) as session:
                    increments(session, target, samples, name, options.epochs)
                controller(target, folder, samples, name)
    return samples, absent


def ratios(samples: Samples, large: int) -> Samples:
    """What is to be read off, from the medians."""
    middle = {name: statistics.median(values) for name, values in samples.items()}
    found = {}
    bound = max(value for name, value in middle.items() if re.match("limit:.*, ms", name))
    found["full dump: wall / its slowest limit"] = [middle["full dump: wall, ms"] / bound]
    if large:
        for what in ("pause", "wall"):
            small, big = (f"10 MiB of {size} GiB: {what}, ms" for size in (1, large))
            found[f"10 MiB: {what} of {large} GiB / of 1 GiB"] = [middle[big] / middle[small]]
    return found


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="scripts/bench-pause", description=__doc__)
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--dumps", type=int, default=5, help="full dumps a run, with their limits")
    parser.add_argument("--epochs", type=int, default=15, help="increments a run, of each size")
    parser.add_argument("--large", type=int, default=16, metavar="GIB", help="0: no such target")
    parser.add_argument("--dir", type=Path, help="where the chains go")
    parser.add_argument("--json", action="store_true")
    return parser.parse_args(arguments)


def main() -> None:
    """Measure and print."""
    # Where scripts/setup has put a redis-server.
    os.environ["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    options = parse(sys.argv[1:])
    with tempfile.TemporaryDirectory(prefix="crtrace-bench-", dir=options.dir) as folder:
        samples, absent = measure(options, Path(folder))
    report(samples | ratios(samples, options.large), absent, options)


def report(samples: Samples, absent: dict[str, str], options: argparse.Namespace) -> None:
    """Print what was measured: a table, or one object if ``options.json``."""
    if options.json:
        shown = {name: str(value) for name, value in vars(options).items()}
        print(
            json.dumps(
                {"schema_version": 1, "options": shown, "samples": samples, "absent": absent}
            )
        )
        return
    width = max(58, *map(len, samples))
    print(f"{'':<{width}}{'median':>10}{'p99':>10}{'min':>10}{'max':>10}")
    for name, values in samples.items():
        tail = percentile_99(values)
        last = f"{'–':>10}" if tail is None else f"{tail:10.2f}"
        middle = statistics.median(values)
        print(f"{name:<{width}}{middle:10.2f}{last}{min(values):10.2f}{max(values):10.2f}")
    for name, reason in absent.items():
        print(f"{name:<{width}}absent: {reason}")


if __name__ == "__main__":
    main()
