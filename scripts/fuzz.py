"""Feed hostile images to everything that reads images; see ``scripts/fuzz``.

*records*: payloads of every record type, changed or random, to the functions that unpack them.
*chains*: small whole chains, changed in any place, to every command that reads. Most changes are
sealed again with right checksums, so that they reach what lies behind.

The only answers allowed are success and a ``CrtraceError``, within seconds and within some memory
(a limit on the address space, so that it cannot be overstepped unseen), with nothing on stdout that
a terminal might obey and nothing written but the output that was asked for. Anything else is a
finding: it is reduced to the fewest changes that still cause it and saved.

Changes are random, but know the format: numbers become those at which something begins or ends,
parts move to other places, records change type and owner. That is simple, reaches every field with
few tries, and an execution can be had again from seed and number alone. Coverage-guided fuzzing is
there as well, for records: ``--atheris`` where that package is installed, which the project does
not ask for.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import re
import resource
import shutil
import signal
import struct
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn
from unittest import mock

from click.testing import CliRunner
from xxhash import xxh3_64_intdigest

from crtrace.cli import cli
from crtrace.cli.output import Failure
from crtrace.errors import CrtraceError
from crtrace.image.chainindex import ENTRY, HEADER, SUM
from crtrace.image.chunk import unpack_chunk
from crtrace.image.directory import unpack_directory
from crtrace.image.imagefile import RECORDS
from crtrace.image.reader import Chain
from crtrace.image.records import Arch, Cpu, Mm, Task, Thread
from crtrace.image.store import ChainWriter
from crtrace.image.tables import FileInfo, Files, Vma, VmaFlag, VmaKind, Vmas
from crtrace.units import PAGE_SIZE
from tests.image import tamper
from tests.image.support import RW, ZERO, add_task, anon, noise, numbers, page, write

PATIENCE = 5.0
"""Seconds of processor time that one execution may take."""
MEMORY = 256 << 20
"""Bytes of address space that an execution may add to what is there when it begins."""
MOST_CHANGES = 4
CHAIN_FILE = re.compile(r"lock|chain\.idx(\.part)?|[\d.]+\.img(\.part)?|spool-\d\.part")
SPACE, OBJECT, CHILD = 1, 2, 3
EDGES = sorted(
    {base + near for base in (0, *(1 << bit for bit in (4, 7, 8, 9, 12, 15, 16, 31, 32, 47, 52,
     56, 57, 63, 64))) for near in (-1, 0, 1) if 0 <= base + near < 1 << 64}
)  # fmt: skip


class Hang(BaseException):
    """An execution took too long. No ``Exception``, so that nothing but us catches it."""


class Wrong(Exception):
    """An answer that no reader may give."""


# --- chains to begin with -------------------------------------------------------------------


def _rich(path: Path) -> None:
    """A tree with files, objects, losses, inherited pages, a zombie; one image on another."""
    vmas = [
        anon(16, 40),
        Vma(start=64 << 12, end=72 << 12, pgoff=4096, flags=5, kind=VmaKind.FILE, file=1,
            name="/usr/bin/program"),
        Vma(start=80 << 12, end=88 << 12, flags=RW | VmaFlag.SHARED, kind=VmaKind.SHM, file=2,
            object_space=OBJECT, name="/dev/shm/x (deleted)"),
        Vma(start=90 << 12, end=94 << 12, flags=RW | VmaFlag.FILE_BEHIND, kind=VmaKind.FILE,
            file=2, object_space=OBJECT, pgoff=4 << 12, name="/on/disk"),
        Vma(start=100 << 12, end=102 << 12, flags=5, kind=VmaKind.VDSO, name="[vdso]"),
    ]  # fmt: skip
    files = Files(
        (
            FileInfo(id=1, path="/usr/bin/program", build_id=bytes(range(20))),
            FileInfo(id=2, flags=4, path="/dev/shm/x", object_space=OBJECT),
        )
    )
    stats = {"frozen_time": 1234, "limits": ["a limit"], "paid": {"faults": 5, "delay": 1.5}}
    with ChainWriter.open(path, create=True) as writer:
        for number in range(3):
            with writer.begin(reason="dump", kernel="6.18") as image:
                image.add(Arch(machine="x86_64", xstate_size=832, xfeatures=7))
                add_task(image, vmas, files=files, threads=2)
                write(image, {16 + at: page(number * 9 + at) for at in range(9)})
                write(image, {30: noise(number), 31: ZERO, 66: page(5), 90: page(6)})
                write(image, {at: page(at + number) for at in range(8)}, space=OBJECT)
                image.mark_unreadable(SPACE, numbers([40, 41, 44]), 14)
                image.mark_holes(SPACE, numbers([17]) if number else numbers([]))
                if number:
                    image.inherit(CHILD, SPACE)
                    parent = image.add(Task(pid=200, ns_pids=(200, 2), namespaces=(("pid", 9),)))
                    mm = image.add(Mm(space=CHILD, auxv=bytes(32)), parent=parent)
                    image.add(Vmas((anon(16, 40),)), parent=mm)
                    thread = image.add(Thread(tid=200), parent=parent)
                    image.add(Cpu(((1, bytes(216)), (0x202, bytes(832)))), parent=thread)
                    write(image, {18: page(number * 9 + 2), 19: page(77)}, space=CHILD)
                image.add(Task(pid=300, state="Z", exit_status=256))
                image.commit(dict(stats))


def _many(path: Path) -> None:
    """Many mappings, scattered pages, two full images."""
    vmas = [anon(16 + 4 * at, 3) for at in range(24)]
    with ChainWriter.open(path, create=True) as writer:
        for number in range(2):
            with writer.begin(full=True) as image:
                add_task(image, vmas, threads=4)
                write(image, {16 + 8 * at: page(at + number) for at in range(12)})
                image.commit({})


def _long(path: Path) -> None:
    """An epoch that sums up those before it, and one more."""
    with ChainWriter.open(path, create=True) as writer:
        for number in range(10):
            with writer.begin() as image:
                add_task(image, [anon(16, 40)])
                write(image, {16 + number: noise(number), 30: page(number), 31 + number: page(1)})
                image.mark_holes(SPACE, numbers([14 + number]))
                image.commit({})


@dataclass
class Epoch:
    """An image taken apart, and its index entry as the numbers of ``ENTRY``."""

    image: tamper.Image
    entry: list[Any]
    rows: Callable[[bytearray], object] = bytes
    tail: Callable[[bytearray], object] = bytes


@dataclass
class Hostile:
    """A chain to be changed at will; ``files`` has the bytes when it is sealed."""

    header: bytearray
    epochs: list[Epoch]
    seal: bool = True
    after: list[Callable[[dict[str, bytes]], None]] = field(default_factory=list)

    @classmethod
    def of(cls, files: dict[str, bytes]) -> Hostile:
        """The chain in some files."""
        index = files["chain.idx"]
        epochs = []
        for at in range(128, len(index), 128):
            entry = list(ENTRY.unpack(index[at : at + ENTRY.size]))
            image = tamper.take_apart(files[f"{entry[0]:08d}.img"])
            epochs.append(Epoch(image, entry))
        return cls(bytearray(index[:120]), epochs)

    def files(self) -> dict[str, bytes]:
        """Names and contents, with right checksums and links around whatever was changed."""
        index = bytearray(self.header) + SUM.pack(xxh3_64_intdigest(bytes(self.header)))
        chain_id = bytes(self.header[16:32])
        found: dict[str, bytes] = {}
        hashes: dict[bytes, bytes] = {}
        for number, epoch in enumerate(self.epochs):
            first = epoch.image.all[0].payload if epoch.image.all else bytearray()
            parent = bytes(first[48:64])
            if parent in hashes:
                first[64:80] = hashes[parent]
            data = bytearray(tamper.put_together(epoch.image, epoch.rows))
            if epoch.tail is not bytes:
                epoch.tail(data)
                data[-56:-48] = SUM.pack(xxh3_64_intdigest(bytes(data[-80:-56] + data[-48:])))
            entry = list(epoch.entry)
            entry[6], entry[7] = entry[6] if entry[6] >= 1 << 40 else len(data), bytes(data[-16:])
            hashes[bytes(entry[1])] = bytes(data[-16:])
            packed = ENTRY.pack(*entry)
            index += packed + SUM.pack(xxh3_64_intdigest(chain_id + packed))
            found[f"{number:08d}.img"] = bytes(data)
        found["chain.idx"] = bytes(index)
        for change in self.after:
            change(found)
        return found


# --- changes --------------------------------------------------------------------------------


def change_bytes(data: bytearray, rng: random.Random, others: Sequence[bytes] = ()) -> None:
    """One change that knows where numbers may be."""
    if not data:
        data += rng.randbytes(rng.randrange(1, 40))
        return
    # The beginnings are where lengths and counts are.
    reach = min(len(data), rng.choice((16, 64, 256, len(data))))
    width = rng.choice((1, 2, 4, 4, 8, 8))
    at = rng.randrange(reach) // width * width
    kind = rng.randrange(8)
    if kind < 3:
        number = rng.choice((*EDGES, len(data), len(data) // 8, rng.getrandbits(64)))
        data[at : at + width] = (number % (1 << 8 * width)).to_bytes(width, "little")
    elif kind == 3:
        number = int.from_bytes(data[at : at + width], "little") + rng.choice((-8, -1, 1, 8, 4096))
        data[at : at + width] = (number % (1 << 8 * width)).to_bytes(width, "little")
    elif kind == 4:
        data[at] ^= 1 << rng.randrange(8)
    elif kind == 5:
        del data[at : at + rng.choice((width, 8, 4096, len(data)))]
    elif kind == 6:
        start = rng.randrange(len(data)) // width * width
        data[at:at] = data[start : start + rng.choice((width, 48, 64, 512))]
    else:
        other = rng.choice(others) if others else bytes(data)
        start = rng.randrange(len(other) + 1) // width * width
        part = other[start : start + rng.choice((width, 16, 48, 256))]
        data[at : at + len(part)] = part


def change_chain(chain: Hostile, rng: random.Random) -> None:
    """One change somewhere in a chain."""
    epoch = rng.choice(chain.epochs)
    change = rng.choices(
        (_payload, _header, _order, _entry, _rows, _tail, _index, _raw), (12, 3, 2, 2, 1, 1, 1, 1)
    )[0]
    change(chain, epoch, rng)


def _payload(chain: Hostile, epoch: Epoch, rng: random.Random) -> None:
    kind = rng.choice(sorted({record.type for record in epoch.image.all}) or [1])
    same = [record for each in chain.epochs for record in each.image.records(kind)]
    own = epoch.image.records(kind)
    if own:
        change_bytes(rng.choice(own).payload, rng, [bytes(record.payload) for record in same])


def _header(chain: Hostile, epoch: Epoch, rng: random.Random) -> None:
    if not epoch.image.all:
        return
    record = rng.choice(epoch.image.all)
    name = rng.choice(("type", "parent", "parent", "flags"))
    small = rng.randrange(len(epoch.image.all) + 3)
    setattr(record, name, rng.choice((small, small, rng.randrange(16), 2**31, 2**32 - 1)))


def _order(chain: Hostile, epoch: Epoch, rng: random.Random) -> None:
    records = epoch.image.all
    if not records:
        return
    other = rng.choice(rng.choice(chain.epochs).image.all or records)
    twin = tamper.Record(other.type, other.flags, other.parent, bytearray(other.payload))
    at = rng.randrange(len(records))
    kind = rng.randrange(4)
    if kind == 0:
        del records[at]
    elif kind == 1:
        records.insert(at, twin)
    elif kind == 2:
        records.append(twin)
    else:
        records[at], records[-1] = records[-1], records[at]


def _entry(chain: Hostile, epoch: Epoch, rng: random.Random) -> None:
    at = rng.choice((0, 3, 3, 4, 6, 8, 9, 10, 11, 12))
    limit = 32 if at == 4 else 64
    others = [other.entry[at] for other in chain.epochs]
    near = epoch.entry[at] + rng.choice((-1, 1))
    epoch.entry[at] = rng.choice((*others, near, *EDGES)) % (1 << limit)
    if at == 3 and rng.randrange(2):
        # A link that the image confirms.
        epoch.entry[2] = rng.choice(chain.epochs).entry[1]
        payload = epoch.image.all[0].payload if epoch.image.all else bytearray()
        payload[48:64] = epoch.entry[2]
        payload[104:112] = struct.pack("<Q", epoch.entry[3])


def _rows(chain: Hostile, epoch: Epoch, rng: random.Random) -> None:
    seed = rng.getrandbits(32)
    epoch.rows = lambda rows: change_bytes(rows, random.Random(seed))


def _tail(chain: Hostile, epoch: Epoch, rng: random.Random) -> None:
    at, value = rng.choice((-40, -32, -24)), rng.choice(EDGES)

    def change(data: bytearray) -> None:
        data[at : at + 8] = struct.pack("<Q", value)

    epoch.tail = change


def _index(chain: Hostile, epoch: Epoch, rng: random.Random) -> None:
    if rng.randrange(3):
        chain.epochs.insert(rng.randrange(len(chain.epochs) + 1), epoch)
    elif rng.randrange(2) and len(chain.epochs) > 1:
        chain.epochs.remove(epoch)
    else:
        chain.header[: HEADER.size] = (chain.header + bytes(8))[: HEADER.size]
        change_bytes(chain.header, rng)
        chain.header[:] = chain.header[:120].ljust(120, b"\0")


def _raw(chain: Hostile, epoch: Epoch, rng: random.Random) -> None:
    """Bytes of a file, its checksums left as they were."""
    seed = rng.getrandbits(32)

    def change(files: dict[str, bytes]) -> None:
        inner = random.Random(seed)
        name = inner.choice(sorted(files))
        data = bytearray(files[name])
        change_bytes(data, inner)
        files[name] = bytes(data)

    chain.after.append(change)


# --- what is asked of a hostile chain --------------------------------------------------------


@contextlib.contextmanager
def bounded() -> Iterator[None]:
    """Warnings are errors, and time is limited, within the block."""

    def late(number: int, frame: FrameType | None) -> NoReturn:
        raise Hang

    before = signal.signal(signal.SIGPROF, late)
    # Again and again: what is raised while an object is taken down is lost.
    signal.setitimer(signal.ITIMER_PROF, PATIENCE, 1.0)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


class Guard:
    """An audit hook that refuses to open anything for writing outside of a directory."""

    def __init__(self) -> None:
        self.inside: str | None = None
        sys.addaudithook(self)

    def __call__(self, event: str, args: tuple[Any, ...]) -> None:
        if event == "open" and self.inside and isinstance(args[0], str | bytes | os.PathLike):
            changes = (args[2] or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC)
            name = os.fsdecode(args[0])
            # Names without a directory are those of files of a chain, relative to the chain's.
            if changes and not name.startswith(self.inside) and not CHAIN_FILE.fullmatch(name):
                raise Wrong(f"{name} was opened for writing")


def check_text(text: str) -> None:
    """Raise ``Wrong`` for what a terminal might obey."""
    if strange := {c for c in text if not (c.isprintable() or c == "\n")}:
        raise Wrong(f"control characters on stdout: {strange!r}")


def check_json(text: str) -> None:
    """Raise ``Wrong`` for what is not one JSON object a line."""

    def refuse(name: str) -> NoReturn:
        raise Wrong(f"{name} in JSON")

    for line in text.splitlines():
        if not isinstance(json.loads(line, parse_constant=refuse), dict):
            raise Wrong("no JSON object")


def run(*arguments: str) -> None:
    """Run a command as the program does, and judge what it says."""
    result = CliRunner().invoke(cli, arguments)
    error = result.exception
    if isinstance(error, CrtraceError | Failure):
        check_text("".join(str(error).split("\n")) if isinstance(error, Failure) else "")
    elif error is not None and not isinstance(error, SystemExit):
        raise error
    (check_json if "--json" in arguments else check_text)(result.stdout)


def read_everything(path: Path, out: Path) -> None:
    """Everything that reads a chain, all epochs; exports go to the directory ``out``.

    What is printed is JSON or not, as the contents of the index have it: both would take long.
    """
    form = ["--json"] if sum((path / "chain.idx").read_bytes()) % 2 else []
    for command in ("list", "verify"):
        run(command, str(path), *form)
    with contextlib.suppress(CrtraceError), Chain.open(path) as chain:
        for entry in chain.entries[:6]:
            number = f"--epoch={entry.epoch}"
            run("show", str(path), number, *form)
            for kind in ("core", "raw"):
                run("export", str(path), number, f"--format={kind}", "-o", str(out / kind))
            run("export", str(path), number, "--salvage", "-o", str(out / "salvaged"), *form)
            run("diff", str(path), str(chain.entries[0].epoch), str(entry.epoch))
            with contextlib.suppress(CrtraceError):
                read_pages(chain, entry.epoch)
    run("diff", str(path), "-2", "-1", "--pages")
    run("merge", str(path), "--into", str(out / "merged"), *form)
    for name in ("merged", "copy"):
        shutil.rmtree(out / name, ignore_errors=True)
    copy = shutil.copytree(path, out / "copy", symlinks=True)
    run("prune", str(copy), "--keep=2", "--keep-every=2", *form)
    shutil.rmtree(copy)


def read_pages(chain: Chain, number: int) -> None:
    """Every page that an epoch lists, and its losses."""
    epoch = chain.epoch(number)
    for space in epoch.spaces:
        with contextlib.suppress(CrtraceError):
            for part in epoch.index_parts(space):
                for at in range(0, len(part.pages), 512):
                    epoch.read_pages(space, part.pages[at : at + 512])
    epoch.losses()


# --- the two kinds of fuzzing ----------------------------------------------------------------


class Records:
    """Payloads to what unpacks them."""

    def __init__(self, seeds: list[dict[str, bytes]], scratch: Path) -> None:
        del scratch
        self.targets: dict[str, Callable[[bytes], object]] = {
            kind.TYPE.name: partial(kind.unpack, where="here") for kind in RECORDS.values()
        }
        self.targets["CHUNK"] = lambda data: unpack_chunk(data, "here")
        self.targets["DIRECTORY"] = self._directory
        self.valid: dict[str, list[bytes]] = {name: [] for name in self.targets}
        for files in seeds:
            for epoch in Hostile.of(files).epochs:
                for name, kind in self._numbers():
                    self.valid[name] += [bytes(r.payload) for r in epoch.image.records(kind)]
                tail = tamper.put_together(epoch.image)
                start, length = struct.unpack_from("<QQ", tail, len(tail) - 40)
                self.valid["DIRECTORY"].append(tail[start + 32 : start + 32 + length])

    def _numbers(self) -> list[tuple[str, int]]:
        known = {kind.TYPE.name: int(kind.TYPE) for kind in RECORDS.values()}
        return [*known.items(), ("CHUNK", 9)]

    @staticmethod
    def _directory(data: bytes) -> object:
        data = data[: len(data) // 40 * 40]  # as the tail's length was checked
        last = struct.unpack_from("<QQ", data, len(data) - 24) if data else (0, 0)
        end = last[0] + 32 + last[1] + -last[1] % 8
        return unpack_directory(data, min(end, 2**63 - 1), "here")

    def make(self, rng: random.Random, changes: list[int]) -> tuple[str, bytes]:
        """A type and a payload for it."""
        name = rng.choice(sorted(self.targets))
        if not rng.randrange(20):
            return name, rng.randbytes(rng.randrange(200))
        data = bytearray(rng.choice(self.valid[name]))
        for seed in changes:
            change_bytes(data, random.Random(seed), self.valid[name])
        return name, bytes(data)

    def execute(self, case: tuple[str, bytes]) -> None:
        with bounded(), contextlib.suppress(CrtraceError):
            self.targets[case[0]](case[1])

    @staticmethod
    def save(case: tuple[str, bytes], path: Path) -> None:
        path.with_suffix(f".{case[0]}").write_bytes(case[1])


class Chains:
    """Whole chains to every command that reads."""

    def __init__(self, seeds: list[dict[str, bytes]], scratch: Path) -> None:
        self.seeds = seeds
        self.path, self.out = scratch / "chain", scratch / "out"
        self.out.mkdir()
        self.guard = Guard()

    def make(self, rng: random.Random, changes: list[int]) -> dict[str, bytes]:
        """The files of a chain."""
        chain = Hostile.of(rng.choice(self.seeds))
        for seed in changes:
            change_chain(chain, random.Random(seed))
        return chain.files()

    def execute(self, case: dict[str, bytes]) -> None:
        shutil.rmtree(self.path, ignore_errors=True)
        self.save(case, self.path)
        self.guard.inside = str(self.out)
        try:
            with bounded():
                read_everything(self.path, self.out)
        finally:
            self.guard.inside = None
        self._check_untouched(case)

    def _check_untouched(self, case: dict[str, bytes]) -> None:
        left = set(os.listdir(self.out)) - {"core", "raw", "raw.map", "salvaged"}
        if left or {name: (self.path / name).read_bytes() for name in case} != case:
            raise Wrong(f"the chain was changed, or something is left over: {left}")

    @staticmethod
    def save(case: dict[str, bytes], path: Path) -> None:
        path.mkdir(exist_ok=True)
        for name, data in case.items():
            (path / name).write_bytes(data)


KINDS: dict[str, Callable[[list[dict[str, bytes]], Path], Any]] = {
    "records": Records,
    "chains": Chains,
}


def failure(kind: Any, case: Any) -> str:
    """Execute a case: what is wrong and where; nothing: an empty text."""
    try:
        with limited_memory(MEMORY):
            kind.execute(case)
    except (Exception, Hang) as error:
        frames = traceback.extract_tb(error.__traceback__)
        inner = [frame for frame in frames if "/crtrace/" in frame.filename] or frames
        where = f"{Path(inner[-1].filename).name}:{inner[-1].name}"
        # Where a slow loop is interrupted is chance.
        return "Hang" if isinstance(error, Hang) else f"{type(error).__name__} in {where}: {error}"
    return ""


def reduce(kind: Any, make: Callable[[list[int]], Any], changes: list[int]) -> list[int]:
    """The fewest of the changes that still fail."""
    for change in list(changes):
        fewer = [other for other in changes if other != change]
        if failure(kind, make(fewer)):
            changes = fewer
    return changes


def fuzz(
    name: str, kind: Any, seed: int, done: Callable[[int, float], bool], found: dict[str, Path],
    keep: Path, only: int | None = None,
) -> int:  # fmt: skip
    """Execute until ``done(number, seconds)``; the number of executions."""
    start, number = time.monotonic(), only or 0
    while not done(number - (only or 0), time.monotonic() - start):
        choice = f"{seed} {name} {number}"
        rng = random.Random(choice)
        changes = [rng.getrandbits(48) for _ in range(rng.randint(1, MOST_CHANGES))]

        def make(changes: list[int], choice: str = choice) -> Any:
            return kind.make(random.Random(f"{choice} case"), changes)

        if message := failure(kind, make(changes)):
            place = message.split(":")[0] + ":" + ":".join(message.split(":")[1:2])
            if place not in found:
                keep.mkdir(exist_ok=True)
                found[place] = keep / f"{name}-{seed}-{number}"
                kind.save(make(reduce(kind, make, changes)), found[place])
                print(f"{name} {number}: {message}; kept in {found[place]}*", flush=True)
        number += 1
    return number - (only or 0)


def with_atheris(records: Records, arguments: argparse.Namespace) -> NoReturn:
    """Coverage-guided, in atheris's own loop, which ends the process."""
    import atheris  # type: ignore[import-not-found,import-untyped,unused-ignore]

    names = sorted(records.targets)

    def one(data: bytes) -> None:
        if data:
            records.execute((names[data[0] % len(names)], data[1:]))

    corpus = Path(tempfile.mkdtemp(prefix="crtrace-corpus-"))
    for at, name in enumerate(names):
        for number, data in enumerate(records.valid[name]):
            (corpus / f"{name}-{number}").write_bytes(bytes([at]) + data)
    atheris.instrument_all()
    seconds = f"-max_total_time={round(arguments.seconds)}"
    atheris.Setup([sys.argv[0], seconds, f"-seed={arguments.seed}", "-timeout=5", str(corpus)], one)
    atheris.Fuzz()
    raise SystemExit(0)


@contextlib.contextmanager
def limited_memory(more: int) -> Iterator[None]:
    """Let the address space grow by so many bytes and no more."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * PAGE_SIZE + more, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def make_seeds(scratch: Path) -> list[dict[str, bytes]]:
    """The files of some chains, the same each time."""
    seeds, same = [], random.Random(0)
    for build in (_rich, _many, _long):
        path = scratch / build.__name__
        with (
            mock.patch("os.urandom", same.randbytes),
            mock.patch("time.time_ns", return_value=10**18),
            mock.patch("time.clock_gettime_ns", return_value=10**9),
        ):
            build(path)
        names = [entry.name for entry in path.iterdir() if entry.name != "lock"]
        seeds.append({name: (path / name).read_bytes() for name in sorted(names)})
    return seeds


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="scripts/fuzz", description=__doc__.split("\n\n")[0])
    parser.add_argument("what", nargs="*", choices=[*KINDS, []], help="records, chains or both")
    parser.add_argument("--seconds", type=float, default=60, help="for each (60)")
    parser.add_argument("--executions", type=int, help="so many of each, however long it takes")
    parser.add_argument("--seed", type=int, default=1, help="another one does something else (1)")
    parser.add_argument("--only", type=int, metavar="N", help="just execution N of that seed")
    parser.add_argument("--keep", type=Path, default=Path("fuzz-findings"), metavar="DIR")
    parser.add_argument("--atheris", action="store_true", help="records, guided by coverage")
    return parser.parse_args()


def main() -> int:
    """Run; 1 when something was found."""
    arguments = parse()
    most = 1 if arguments.only is not None else arguments.executions

    def done(number: int, seconds: float) -> bool:
        return number >= most if most is not None else seconds >= arguments.seconds

    found: dict[str, Path] = {}
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="crtrace-fuzz-", dir=memory) as name:
        scratch = Path(name)
        seeds = make_seeds(scratch)
        if arguments.atheris:
            with_atheris(Records(seeds, scratch), arguments)
        kinds = {what: KINDS[what](seeds, scratch) for what in arguments.what or KINDS}
        for what, kind in kinds.items():
            start = time.monotonic()
            number = fuzz(
                what, kind, arguments.seed, done, found, arguments.keep.absolute(), arguments.only
            )  # fmt: skip
            rate = number / max(time.monotonic() - start, 1e-9)
            print(f"{what}: {number} executions, {rate:.0f} a second", flush=True)
    print(f"{len(found)} findings")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
