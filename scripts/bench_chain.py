"""Measure chains: reading beside plain reading, long ones beside short ones, bytes stored beside
compressed cores, what storing equal pages once costs, and the memory that each tool takes.

Everything runs interleaved in one run; medians, with minimum and maximum. Times are those of the
work alone, without starting Python.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import lz4.block
import numpy as np

from crtrace.analyze.verify import verify
from crtrace.capture.attach import attached
from crtrace.export.raw import export_raw
from crtrace.image.contents import StoredContents
from crtrace.image.framing import CHUNK_HEAD, HEADER, RecordType
from crtrace.image.places import place
from crtrace.image.reader import Chain
from crtrace.image.records import Cpu, Mm, Task, Thread
from crtrace.image.store import ChainWriter, ImageWriter
from crtrace.image.tables import Vma, VmaFlag, Vmas
from crtrace.rewrite.merge import merge
from crtrace.units import PAGE_SIZE, U64, Bools, Bytes, Pid
from tests.live.harness import Target

FIRST = 1 << 20
"""Number of the first page of chains that are made up."""
LONG, SHORT = 500, 5
MIB = 1 << 20
PEAK = """
import os, sys
pid = os.posix_spawn(sys.argv[1], sys.argv[1:], os.environ, file_actions=[
    (os.POSIX_SPAWN_OPEN, 1, "/dev/null", os.O_WRONLY, 0)])
_, status, usage = os.wait4(pid, 0)
print(usage.ru_maxrss, file=sys.stderr)
sys.exit(os.waitstatus_to_exitcode(status))
"""
"""A process gets the peak of the one that starts it as its own: so a small one does."""
Samples = dict[str, list[float]]


def seconds(work: Callable[[], object]) -> float:
    """How long it takes."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


# --- reading, beside reading without any check --------------------------------------------------


def plain(path: Path) -> int:
    """Read all images and decompress every chunk in one thread; the bytes of contents."""
    total = 0
    for name in sorted(path.glob("*.img")):
        with name.open("rb", buffering=0) as file:
            while head := file.read(HEADER.size):
                kind, _, length, *_ = HEADER.unpack(head)
                payload = memoryview(file.read(length + -length % 8))[:length]
                if kind == RecordType.CHUNK:
                    _, count, codec, _ = CHUNK_HEAD.unpack_from(payload)
                    block = payload[CHUNK_HEAD.size + 8 * count :]
                    size = count * PAGE_SIZE
                    data = lz4.block.decompress(block, uncompressed_size=size) if codec else block
                    total += len(data)
    return total


def check(path: Path) -> None:
    """Verify a chain."""
    with Chain.open(path) as chain:
        if not verify(chain).ok:
            raise SystemExit("the chain is damaged")


def read_all(path: Path) -> None:
    """Every stored page of the newest epoch."""
    with Chain.open(path) as chain:
        for _ in chain.epoch().stored(1):
            pass


def export(path: Path, folder: Path) -> None:
    """The newest epoch as a raw file, on disk."""
    with Chain.open(path) as chain:
        export_raw(chain.epoch(), folder / "raw")


def write_plainly(size: int, folder: Path) -> None:
    """A file of that size, on disk."""
    data = bytes(range(256)) * 4096
    with (folder / "plain").open("wb", buffering=0) as file:
        for _ in range(size // len(data)):
            file.write(data)
        os.fdatasync(file.fileno())


def merged(path: Path, folder: Path) -> None:
    """The newest epoch as one image, read back."""
    with Chain.open(path) as chain:
        merge(chain.epoch(), folder / "merged")
    shutil.rmtree(folder / "merged")


def reading(path: Path, folder: Path, samples: Samples) -> None:
    """One round."""
    raw = 0

    def read() -> None:
        nonlocal raw
        raw = plain(path)

    base = seconds(read)
    with Chain.open(path) as chain:
        newest = sum(len(part.pages) for part in chain.epoch().index_parts(1)) * PAGE_SIZE
    samples.setdefault("plain reading with lz4, MiB/s", []).append(raw / MIB / base)
    for name, work, size in (
        ("reading all pages of an epoch", lambda: read_all(path), newest),
        ("verify", lambda: check(path), raw),
        ("writing as much to disk, nothing read", lambda: write_plainly(newest, folder), newest),
        ("export raw, on disk", lambda: export(path, folder), newest),
        ("merge, on disk and read back", lambda: merged(path, folder), newest),
    ):
        rate = size / seconds(work)
        samples.setdefault(f"{name}, MiB/s", []).append(rate / MIB)
        samples.setdefault(f"{name}: time per byte / plain", []).append(raw / base / rate)


# --- what is stored -------------------------------------------------------------------------------


def zstd_of_core(pid: int, folder: Path) -> tuple[int, int]:
    """The size of a core that gcore writes, and what zstd -3 makes of it."""
    command = ["gcore", "-o", str(folder / "core"), str(pid)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    core = folder / f"core.{pid}"
    subprocess.run(["zstd", "-q", "-3", "-f", str(core), "-o", f"{core}.zst"], check=True)
    sizes = core.stat().st_size, Path(f"{core}.zst").stat().st_size
    core.unlink()
    Path(f"{core}.zst").unlink()
    return sizes


def stored(options: argparse.Namespace, folder: Path, samples: Samples) -> Path:
    """Watch a target, write a core of it after each epoch; its chain."""
    path = folder / "real"
    tools = shutil.which("gcore") and shutil.which("zstd")
    if not tools:
        print("gcore or zstd is not installed: no cores beside the chain", file=sys.stderr)
    totals = np.zeros(4)
    with (
        Target("bench", "--mib", options.mib) as target,
        attached(Pid(target.pid), path) as session,
    ):
        for number in range(SHORT):
            if number:
                target.obey(f"random {target.info['pages'] // 20}")
            entry, stats = session.checkpoint("bench")
            cores = zstd_of_core(target.pid, folder) if tools else (0, 0)
            totals += entry.length, stats["pages_written"] * PAGE_SIZE, *cores
    samples["chain: MiB stored"] = [totals[0] / MIB]
    samples["chain: stored / written"] = [totals[0] / totals[1]]
    if tools:
        samples["chain: stored / cores by gcore"] = [totals[0] / totals[2]]
        samples["chain: stored / these cores by zstd -3"] = [totals[0] / totals[3]]
    return path


class Forgetful(StoredContents):
    """Stores equal pages again."""

    def claim(self, hashes: U64, chunk: int) -> tuple[U64, Bools]:
        slots = np.arange(len(hashes), dtype=np.uint64) << np.uint64(32)
        return slots + place(0, chunk), np.ones(len(hashes), dtype=np.bool_)


def savings(options: argparse.Namespace, folder: Path, samples: Samples) -> None:
    """Full epochs with and without the search for equal pages, in turn."""
    with (
        Target("bench", "--mib", options.mib) as target,
        attached(Pid(target.pid), folder / "savings") as session,
    ):
        session.checkpoint("warm")
        for number in range(4 * options.runs):
            took = {}
            kinds = (StoredContents, Forgetful)
            for kind in kinds if number % 2 else kinds[::-1]:
                with mock.patch("crtrace.image.imagewriter.StoredContents", kind):
                    _, stats = session.checkpoint("bench", full=True)
                took[kind] = stats["total_time"]
            ratio = took[StoredContents] / took[Forgetful]
            samples.setdefault("full epoch: wall / without search for equal pages", []).append(
                ratio
            )


# --- depth ----------------------------------------------------------------------------------------


def pages_of(rng: np.random.Generator, count: int) -> Bytes:
    """Contents half of which compress away."""
    data = np.zeros((count, PAGE_SIZE), dtype=np.uint8)
    data[:, : PAGE_SIZE // 2] = rng.integers(0, 256, (count, PAGE_SIZE // 2), dtype=np.uint8)
    return data


@contextmanager
def image_of(writer: ChainWriter, total: int) -> Iterator[ImageWriter]:
    """The next epoch of a process of ``total`` pages; its pages are to be written."""
    start, end = FIRST * PAGE_SIZE, (FIRST + total) * PAGE_SIZE
    vma = Vma(start=start, end=end, flags=VmaFlag.READ | VmaFlag.WRITE)
    with writer.begin() as image:
        task = image.add(Task(pid=1, comm="made-up"))
        image.add(Vmas((vma,)), parent=image.add(Mm(space=1), parent=task))
        image.add(Cpu(((1, bytes(216)),)), parent=image.add(Thread(tid=1), parent=task))
        yield image
        image.commit({})


def epoch(writer: ChainWriter, pages: U64, data: Bytes, total: int) -> None:
    """Commit an epoch with these pages."""
    with image_of(writer, total) as image:
        image.write_pages(1, pages, data)


def make_chains(folder: Path, shape: str, total: int) -> tuple[Path, Path]:
    """A long and a short chain with the same contents in the end.

    ``scattered``: every epoch writes 64 pages anywhere; ``hot``: of a sixteenth of the memory.
    """
    rng = np.random.default_rng(1)
    reach = total if shape == "scattered" else total // 16
    long, short = folder / f"{shape}-long", folder / f"{shape}-short"
    first = np.arange(FIRST, FIRST + total, dtype=np.uint64)
    data = pages_of(rng, total)
    with (
        mock.patch("os.fdatasync"), mock.patch("os.fsync"),
        ChainWriter.open(long, create=True) as one, ChainWriter.open(short, create=True) as other,
    ):  # fmt: skip
        for writer in (one, other):
            epoch(writer, first, data, total)
        held: dict[int, bytes] = {}
        for number in range(1, LONG):
            at = np.sort(rng.choice(reach, 64, replace=False))
            new = pages_of(rng, 64)
            epoch(one, first[at], new, total)
            held.update(zip(at.tolist(), (page.tobytes() for page in new), strict=True))
            if number % (LONG // (SHORT - 1)) == 0 or number == LONG - 1:
                at = np.array(sorted(held))
                new = np.frombuffer(b"".join(held[each] for each in at), dtype=np.uint8)
                if len(at):
                    epoch(other, first[at], new.reshape(-1, PAGE_SIZE), total)
                held.clear()
    return long, short


def random_pages(path: Path, count: int, total: int) -> None:
    """Open the newest epoch and read pages anywhere."""
    pages = np.array(sorted(random.Random(3).sample(range(total), count)), dtype=np.uint64)
    with Chain.open(path) as chain:
        chain.epoch().read_pages(1, pages + np.uint64(FIRST))


def depth(chains: dict[str, tuple[Path, Path]], total: int, samples: Samples) -> None:
    """One round."""
    for shape, (long, short) in chains.items():
        for name, work in (
            ("open and read 1 page", lambda path: random_pages(path, 1, total)),
            ("open and read 1000 pages", lambda path: random_pages(path, 1000, total)),
            ("open and read all", read_all),
        ):
            slow, fast = (seconds(lambda: work(path)) for path in (long, short))  # noqa: B023
            title = f"{shape}, {LONG} epochs: {name}"
            samples.setdefault(f"{title}, ms", []).append(slow * 1000)
            samples.setdefault(f"{title}, / {SHORT} epochs", []).append(slow / fast)
        for command in ("show", "export --format raw -o {out}", "export --format core -o {out}"):
            slow, fast = (seconds(lambda: as_users_do(command, path)) for path in (long, short))  # noqa: B023
            title = f"{shape}, {LONG} epochs: crtrace {command.removesuffix(' -o {out}')}"
            samples.setdefault(f"{title}, / {SHORT} epochs", []).append(slow / fast)


def as_users_do(command: str, path: Path) -> None:
    """Run a command on the newest epoch of a chain, from its start to its end."""
    name, *rest = command.format(out=path.with_name("out")).split()
    run = [sys.executable, "-P", "-m", "crtrace", name, str(path), *rest]
    subprocess.run(run, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


# --- memory ---------------------------------------------------------------------------------------


def memory(gib: int, folder: Path, samples: Samples) -> None:
    """The largest resident size of every tool on a chain of ``gib`` GiB and ten epochs."""
    path, total = folder / "large", gib * (1 << 30) // PAGE_SIZE
    rng = np.random.default_rng(2)
    with ChainWriter.open(path, create=True) as writer:
        fill(writer, rng, total)
        for _ in range(9):
            at = np.sort(rng.choice(total, 4096, replace=False)).astype(np.uint64)
            epoch(writer, at + np.uint64(FIRST), pages_of(rng, 4096), total)
    run = [sys.executable, "-m", "crtrace"]
    for name, arguments in {
        "list": ("list", path), "show": ("show", path), "verify": ("verify", path),
        "diff": ("diff", path, 0, 9),
        "export core": ("export", path, "-o", folder / "out"),
        "export raw": ("export", path, "--format", "raw", "-o", folder / "out"),
        "merge": ("merge", path, "--into", folder / "one"),
        "prune": ("prune", path, "--keep", 2),
    }.items():  # fmt: skip
        command = [*run, *map(str, arguments)]
        done = subprocess.run(
            [sys.executable, "-S", "-c", PEAK, *command], capture_output=True, text=True, check=True
        )
        samples[f"{gib} GiB: {name}, MiB resident"] = [int(done.stderr.split()[-1]) / 1024]


def fill(writer: ChainWriter, rng: np.random.Generator, total: int) -> None:
    """A first epoch whose pages are all different, without making each of them at random."""
    sample = pages_of(rng, 4096)
    with image_of(writer, total) as image:
        for start in range(0, total, 4096):
            pages = np.arange(FIRST + start, FIRST + start + 4096, dtype=np.uint64)
            sample[:, :8] = pages.view(np.uint8).reshape(-1, 8)
            image.write_pages(1, pages, sample)


# --- all of it ------------------------------------------------------------------------------------


@contextmanager
def scratch(where: Path | None) -> Iterator[Path]:
    """A directory that is removed in the end."""
    with tempfile.TemporaryDirectory(prefix="crtrace-bench-", dir=where) as folder:
        yield Path(folder)


def measure(options: argparse.Namespace, folder: Path) -> Samples:
    """Every sample, by name."""
    samples: Samples = {}
    total = options.mib * MIB // PAGE_SIZE
    real = stored(options, folder, samples)
    savings(options, folder, samples)
    made_up = folder / "made-up"
    with ChainWriter.open(made_up, create=True) as writer:
        fill(writer, np.random.default_rng(4), total)
    chains = {shape: make_chains(folder, shape, total // 4) for shape in ("scattered", "hot")}
    for number in range(options.runs):
        print(f"run {number + 1} of {options.runs}", file=sys.stderr)
        reading(made_up, folder, samples)
        depth(chains, total // 4, samples)
    check(real)
    if options.large:
        memory(options.large, folder, samples)
    return samples


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="scripts/bench-chain", description=__doc__)
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--mib", type=int, default=512, help="size of the targets")
    parser.add_argument("--large", type=int, default=4, metavar="GIB", help="0: no such chain")
    parser.add_argument("--dir", type=Path, help="where the chains go")
    parser.add_argument("--json", action="store_true")
    return parser.parse_args(arguments)


def main() -> None:
    """Measure and print."""
    options = parse(sys.argv[1:])
    with scratch(options.dir) as folder:
        samples = measure(options, folder)
    if options.json:
        shown = {name: str(value) for name, value in vars(options).items()}
        print(json.dumps({"schema_version": 1, "options": shown, "samples": samples}))
        return
    for name, values in samples.items():
        middle = statistics.median(values)
        print(f"{name:<60} {middle:10.2f}  ({min(values):.2f}–{max(values):.2f})")


if __name__ == "__main__":
    main()
