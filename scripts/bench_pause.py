"""Measure pauses by load and by size, wall times beside what limits them, and what a target pays.

Everything runs interleaved in one run. For each figure the median, the 99th percentile where there
are enough samples for one, minimum and maximum.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager, suppress
from pathlib import Path
from unittest import mock

import lz4.block
import numpy as np

from crtrace.capture.attach import attached
from crtrace.capture.session import Session
from crtrace.linux.addrspace import AddressSpace
from crtrace.linux.memory import MemoryReader
from crtrace.linux.procfs import Process
from crtrace.linux.ptrace import signals_held
from crtrace.linux.stop import StoppedProcess
from crtrace.track import bytecode
from crtrace.track.dirty import WrittenPages
from crtrace.track.loader import Loading
from crtrace.track.userfaultfd import UserfaultfdArmer
from crtrace.units import CHUNK_PAGES, PAGE_SIZE, Pid, count_pages
from tests.live.harness import Target, redis_server

MIB, GIB = 1 << 20, 1 << 30
RATES = (0, 50, 200, 500)
"""MB/s that the target writes to random pages meanwhile."""
DIRTY = 10 * MIB // PAGE_SIZE
UNPACED = 1 << 30
"""A rate that no processor reaches: the target writes as fast as it can."""
ENOUGH = 100
"""Samples for a 99th percentile."""
Samples = dict[str, list[float]]


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


def full_dumps(session: Session, target: Target, samples: Samples, count: int) -> None:
    """Full dumps while the target writes at each rate."""
    for _ in range(count):
        for rate in RATES:
            target.obey(f"write {rate}")
            _, stats = session.checkpoint("bench", full=True)
            pages, nanoseconds = map(int, target.obey("write 0").split()) if rate else (0, 1)
            name = f"full dump, {rate} MB/s"
            add(samples, f"{name}: pause, ms", stats["frozen_time"] / 1000)
            add(samples, f"{name}: wall, ms", stats["total_time"] / 1000)
            add(samples, f"{name}: converged", stats["precopy_converged"])
            if rate:
                add(samples, f"{name}: written, MB/s", pages * PAGE_SIZE * 1000 / nanoseconds)


def increments(session: Session, target: Target, samples: Samples, name: str, count: int) -> None:
    """Epochs with 10 MiB of random pages written before each."""
    for _ in range(count):
        target.obey(f"random {DIRTY}")
        _, stats = session.checkpoint("bench")
        add(samples, f"10 MiB of {name}: pause, ms", stats["frozen_time"] / 1000)
        add(samples, f"10 MiB of {name}: stopping, ms", stats["freezing_time"] / 1000)
        add(samples, f"10 MiB of {name}: wall, ms", stats["total_time"] / 1000)


# --- what limits a full dump ----------------------------------------------------------------------


def limits(target: Target, folder: Path, samples: Samples) -> None:
    """Only reading, only compressing, only writing what a full dump of the target is."""
    with closing(Process(Pid(target.pid))) as process:
        space = AddressSpace(process)
        space.refresh()
        largest = max(space.vmas, key=lambda vma: vma.end - vma.start)
        pages = np.array([[largest.first_page, largest.end_page]], dtype=np.uint64)
        parts = [
            np.array([[at, min(at + CHUNK_PAGES, largest.end_page)]], dtype=np.uint64)
            for at in range(largest.first_page, largest.end_page, CHUNK_PAGES)
        ]
        buffer = np.empty((64, CHUNK_PAGES * PAGE_SIZE), dtype=np.uint8)
        buffer[:] = 0
        with closing(MemoryReader(process)) as reader:
            began = time.perf_counter()
            for number, part in enumerate(parts):
                reader.read(part, buffer[number % 64])
            took = time.perf_counter() - began
    add(samples, "limit: process_vm_readv, ms", took * 1000)
    began = time.perf_counter()
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        work = (buffer[number % 64] for number in range(len(parts)))
        sizes = list(pool.map(lambda each: len(lz4.block.compress(each, store_size=False)), work))
    add(samples, "limit: lz4 on all processors, ms", (time.perf_counter() - began) * 1000)
    block = os.urandom(MIB)
    began = time.perf_counter()
    with open(folder / "plain", "wb", buffering=0) as file:
        for _ in range(sum(sizes) // MIB):
            file.write(block)
        os.fdatasync(file.fileno())
    add(samples, "limit: writing and fdatasync, ms", (time.perf_counter() - began) * 1000)
    (folder / "plain").unlink()
    assert count_pages(pages) == target.info["pages"]


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
        armer.scan(space, stopped=False)
        took: dict[str, float] = {}
        for name in ("armed", "unarmed", "armed, marked by BPF"):
            if name != "unarmed":
                armer.scan(space, stopped=False)
            tgid = marks.add(process) if "BPF" in name else 0
            took[name] = int(target.obey(f"touch {pages}")) / pages
            if tgid:
                marks.remove(tgid)
            add(samples, f"first write, {name}, ns", took[name])
    add(samples, "first write: marked / not", took["armed, marked by BPF"] / took["armed"])


def memory_loop(target: Target, seconds: float) -> float:
    """MB/s of a thread that writes to random pages as fast as it can."""
    target.obey(f"write {UNPACED}")
    time.sleep(seconds)
    pages, nanoseconds = map(int, target.obey("write 0").split())
    return pages * PAGE_SIZE * 1000 / nanoseconds


def redis_sets(port: int, seconds: float) -> float:
    """Requests a second of redis-benchmark, a million keys; and its 99th percentile in ms."""
    command = ["redis-benchmark", "-p", str(port), "-t", "set", "-r", "1000000", "-d", "512",
               "-n", str(int(60_000 * seconds)), "--csv"]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    line = next(line for line in done.stdout.splitlines() if line.startswith('"SET"'))
    fields = [float(each) for each in re.findall(r'"([\d.]+)"', line)]
    redis_sets.p99 = fields[5]  # type: ignore[attr-defined]
    return fields[0]


@contextmanager
def every_second(pid: int, folder: Path) -> Iterator[None]:
    """``crtrace watch`` beside the block, after its first epoch."""
    with tempfile.TemporaryDirectory(dir=folder) as place:
        command = [sys.executable, "-P", "-m", "crtrace", "watch", str(pid), "--interval", "1",
                   "--json", "-o", f"{place}/chain"]  # fmt: skip
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        ) as process:
            assert process.stdout
            process.stdout.readline()
            drain = threading.Thread(target=process.stdout.read)
            drain.start()
            try:
                yield
            finally:
                process.terminate()
                drain.join()


def throughput(
    name: str, pid: int, work: Callable[[float], float], folder: Path, samples: Samples
) -> None:
    """A target's rate watched every second, and unwatched."""
    alone = work(4)
    with every_second(pid, folder):
        seen = work(4)
    add(samples, f"{name}: watched / alone", seen / alone)


def redis(folder: Path, samples: Samples) -> None:
    """The same of Redis, with its latency."""
    if not shutil.which("redis-benchmark"):
        print("redis-benchmark is not installed", file=sys.stderr)
        return
    latency = []

    def work(seconds: float) -> float:
        rate = redis_sets(server.port, seconds)
        latency.append(redis_sets.p99)  # type: ignore[attr-defined]
        return rate

    with redis_server(folder) as server:
        work(4)  # so that most keys are there
        latency.clear()
        throughput("Redis SET", server.pid, work, folder, samples)
    add(samples, "Redis SET: p99 latency, watched / alone", latency[1] / latency[0])


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


def measure(options: argparse.Namespace, folder: Path) -> Samples:
    """Every sample, by name."""
    samples: Samples = {}
    sizes = {f"{gib} GiB": gib << 10 for gib in (1, options.large) if gib}
    for number in range(options.runs):
        print(f"run {number + 1} of {options.runs}", file=sys.stderr)
        with Target("bench", "--mib", 1024) as target:
            with watched(target, folder) as session:
                full_dumps(session, target, samples, options.dumps)
            limits(target, folder, samples)
            first_writes(target, samples)
            throughput("memory loop", target.pid, lambda s: memory_loop(target, s), folder, samples)
            starts(target, samples, folder)
        redis(folder, samples)
        for name, mib in sizes.items():
            with Target("bench", "--mib", mib) as target:
                with watched(target, folder) as session:
                    increments(session, target, samples, name, options.epochs)
                controller(target, folder, samples, name)
    return samples


def ratios(samples: Samples, large: int) -> Samples:
    """What is to be read off, from the medians."""
    middle = {name: statistics.median(values) for name, values in samples.items()}
    found = {}
    bound = max(value for name, value in middle.items() if name.startswith("limit:"))
    found["full dump: wall / its slowest limit"] = [middle["full dump, 0 MB/s: wall, ms"] / bound]
    if large:
        for what in ("pause", "wall"):
            small, big = (f"10 MiB of {size} GiB: {what}, ms" for size in (1, large))
            found[f"10 MiB: {what} of {large} GiB / of 1 GiB"] = [middle[big] / middle[small]]
    return found


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="scripts/bench-pause", description=__doc__)
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--dumps", type=int, default=15, help="full dumps a run, at each rate")
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
        samples = measure(options, Path(folder))
    samples |= ratios(samples, options.large)
    if options.json:
        shown = {name: str(value) for name, value in vars(options).items()}
        print(json.dumps({"schema_version": 1, "options": shown, "samples": samples}))
        return
    print(f"{'':<58}{'median':>10}{'p99':>10}{'min':>10}{'max':>10}")
    for name, values in samples.items():
        last = f"{np.percentile(values, 99):10.2f}" if len(values) >= ENOUGH else f"{'–':>10}"
        middle = statistics.median(values)
        print(f"{name:<58}{middle:10.2f}{last}{min(values):10.2f}{max(values):10.2f}")


if __name__ == "__main__":
    main()
