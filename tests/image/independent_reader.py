"""A second reader of chains, written from crtrace/image/FORMAT.md alone.

It imports nothing of crtrace, takes no care to be fast, and checks every rule of that document that
can be checked. What both readers say is therefore what the document says. As a program it prints
for each epoch of a chain how many pages it has, and one hash of them all:

    python tests/image/independent_reader.py DIR
"""

from __future__ import annotations

import json
import os
import stat
import struct
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import lz4.block
import numpy as np
from xxhash import xxh3_64_intdigest, xxh3_128, xxh3_128_digest

PAGE = 4096
NONE = 2**64 - 1
NOTHING = bytes(16)
LAST_PAGE = 2**52

IMAGE, ARCH, TASK, MM, VMAS, FILES, THREAD, CPU = range(1, 9)
CHUNK, PAGE_INDEX, UNREADABLE, STATS, DIRECTORY, TAIL, SUMMARY = range(9, 16)
KNOWN = range(IMAGE, SUMMARY + 1)
PARENTS = {TASK: {None, TASK}, MM: {TASK}, VMAS: {MM}, THREAD: {TASK}, CPU: {THREAD}}
ONE_AT_MOST = (IMAGE, ARCH, FILES, UNREADABLE, STATS)
LIMIT = 256 << 20
LIMITS = dict.fromkeys((IMAGE, ARCH, MM, THREAD, CPU), 1 << 20) | {
    STATS: 4 << 20, TASK: 16 << 20, CHUNK: 16 + 512 * 8 + (2 << 20), PAGE_INDEX: 1 << 63,
}  # fmt: skip
"""Bytes of the longest payloads; of all others ``LIMIT``."""
MOST_LISTED = 1024
VSYSCALL = 0xFFFFFFFFFF600000
USER_END, OBJECT_END = 1 << 56, 1 << 63
MOST_NESTED = 32

STORED, ZERO, HOLE, NOT_READ, INHERITED = range(5)
VDSO, VVAR, VSYSCALL, DEVICE = 3, 4, 5, 9
UNKNOWN_WHEN_ABSENT = (VDSO, VVAR, VSYSCALL, DEVICE)
FILE_BEHIND = 0x4000

Record = tuple[int, int, bytes]
"""Type, id of the parent, payload."""

Pages = dict[int, bytes | None]
"""Contents by page number; None where the page could not be read."""

Row = dict[str, Any]


class Refused(Exception):
    """A reader must not go on."""


class Damaged(Refused):
    """Something is not as the format says that it always is."""


class Incomplete(Refused):
    """Something that the chain needs is not there."""


class TooNew(Refused):
    """This needs a reader of a later version."""


def ensure(right: object, what: str) -> None:
    """Refuse what is not right."""
    if not right:
        raise Damaged(what)


def decoded(data: bytes) -> str:
    """UTF-8 in which a byte that is none stands for itself."""
    ensure(0 not in data, "a text has a zero byte")
    return data.decode("utf-8", "surrogateescape")


def letter(code: int) -> str:
    """A state, which is a letter."""
    ensure(0x20 <= code < 0x7F, "a state is no letter")
    return chr(code)


def printable(value: Any, deep: int) -> bool:
    """Whether a value of JSON is nested at most so deep, and its numbers are none too large."""
    if isinstance(value, int | float):
        return abs(value) < 2**64
    inner = (
        list(value.values() if isinstance(value, dict) else value)
        if (isinstance(value, dict | list))
        else []
    )
    return (deep > 1 or not inner) and all(printable(each, deep - 1) for each in inner)


class Fields:
    """A payload, read from its beginning to its end."""

    def __init__(self, payload: bytes) -> None:
        self.payload = payload
        self.at = 0

    def raw(self, length: int) -> bytes:
        ensure(length <= len(self.payload) - self.at, "a payload is too short for its fields")
        self.at += length
        return self.payload[self.at - length : self.at]

    def take(self, layout: str) -> tuple[Any, ...]:
        return struct.unpack("<" + layout, self.raw(struct.calcsize("<" + layout)))

    def u32(self) -> int:
        return int(self.take("I")[0])

    def count(self, size: int) -> int:
        """A number of things that take at least ``size`` bytes each."""
        number = self.u32()
        ensure(number <= MOST_LISTED, "a list is too long")
        ensure(number * size <= len(self.payload) - self.at, "a list is longer than its payload")
        return number

    def padded(self, length: int, unit: int) -> bytes:
        data = self.raw(length)
        ensure(not any(self.raw(-length % unit)), "padding is not zero")
        return data

    def blob(self) -> bytes:
        return self.padded(self.u32(), 4)

    def text(self) -> str:
        return decoded(self.blob())

    def named(self, layout: str, names: str) -> Row:
        return dict(zip(names.split(), self.take(layout), strict=True))

    def table(self, layout: str, names: str) -> list[Row]:
        """Rows with the bytes that their pairs "…_at" and "…_length" point to in the heap."""
        count, size, heap_length = self.take("IIQ")
        rows = self.rows(layout, names, count, size)
        heap = self.raw(heap_length)
        strings = set()
        total = 0
        for row in rows:
            for name in [key.removesuffix("_at") for key in row if key.endswith("_at")]:
                start, length = row.pop(name + "_at"), row.pop(name + "_length")
                ensure(start + length <= len(heap), "a row points outside of the heap")
                total += length
                ensure(total <= LIMIT, "rows name too much")
                strings |= {(start, start + length)} if length else set()
                row[name] = heap[start : start + length]
        apart = all(one[1] <= two[0] for one, two in pairwise(sorted(strings)))
        ensure(apart, "strings overlap in the heap")
        return rows

    def rows(self, layout: str, names: str, count: int, size: int) -> list[Row]:
        """The known fields of rows of a size that they give themselves."""
        ensure(size >= struct.calcsize("<" + layout) and size % 8 == 0, "size of rows")
        table = self.raw(count * size)
        parts = (table[at : at + size] for at in range(0, len(table), size))
        return [Fields(part).named(layout, names) for part in parts]


class Entry(NamedTuple):
    """What an index says of a page."""

    kind: int
    epoch: int  # of the image that says it
    chunk: int  # for inherited pages the other space
    slot: int
    hash: bytes


Index = dict[int, Entry]


@dataclass
class Summary:
    """What several images say of one space."""

    base: int
    entries: Index = field(default_factory=dict)
    end: int = 0


def ascending(numbers: Iterable[int], end: int = LAST_PAGE) -> bool:
    """Whether these are page numbers, each greater than the one before, the last below ``end``."""
    column = [*numbers]
    return column == sorted(set(column)) and (not column or column[-1] < end)


def columns(payload: bytes, at: int, count: int, *, epochs: bool = False) -> Iterable[Any]:
    """Rows of page number, place, hash and, if there is that column, epoch."""
    ensure(len(payload) == at + count * (40 if epochs else 32), "an index has a wrong length")
    numbers = np.frombuffer(payload, "<u8", count, at).tolist()
    ensure(ascending(numbers), "page numbers of an index do not ascend")
    places = struct.iter_unpack("<IHH", payload[at + 8 * count : at + 16 * count])
    start = at + 16 * count
    hashes = [payload[start + 16 * row : start + 16 * row + 16] for row in range(count)]
    last = np.frombuffer(payload, "<u8", count if epochs else 0, start + 16 * count * epochs)
    return zip(numbers, places, hashes, last.tolist() if epochs else [0] * count, strict=True)


def entry_of(place: tuple[int, int, int], digest: bytes, epoch: int) -> Entry:
    """An entry, whose fields must suit its kind."""
    chunk, slot, kind = place
    ensure(kind <= INHERITED, "unknown kind of page")
    ensure(kind == STORED or slot == 0, "a page without a slot has one")
    ensure(kind in {STORED, INHERITED} or chunk == 0, "a page without a chunk has one")
    ensure(kind not in {HOLE, NOT_READ} or digest == NOTHING, "hash of nothing")
    ensure(kind != ZERO or digest == xxh3_128_digest(bytes(PAGE)), "wrong hash of a zero page")
    return Entry(kind, epoch, chunk, slot, digest)


class Directory:
    """A directory and its files, none of them behind a symbolic link."""

    def __init__(self, path: Path) -> None:
        flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
        try:
            self.fd = os.open(path, flags)
        except OSError as error:
            raise Incomplete(f"{path}: {error}") from error

    def read(self, name: str, length: int | None = None) -> bytes:
        """A whole file, which must be of this length if one is given."""
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        try:
            fd = os.open(name, flags, dir_fd=self.fd)
        except FileNotFoundError as error:
            raise Incomplete(f"{name} is missing") from error
        except OSError as error:
            raise Damaged(f"{name}: {error}") from error
        with open(fd, "rb") as file:
            status = os.fstat(fd)
            ensure(stat.S_ISREG(status.st_mode), f"{name} is no regular file")
            ensure(length in {None, status.st_size}, f"{name} has a wrong length")
            return file.read(status.st_size)


class Image:
    """One image: its records, checked as far as that goes without its parent."""

    def __init__(self, data: bytes, entry: Row) -> None:
        self.data, self.entry, self.epoch = data, entry, int(entry["epoch"])
        self.head = self._head()
        self.records: dict[int, Record] = {}
        self.arch: Row = {}
        self._read_records(*self._read_tail())
        self._check_records()
        self.chunks = {id: self._chunk(payload) for id, _, payload in self.of(CHUNK)}
        self.spaces = self._spaces()
        self.summaries = self._summaries()
        self.unreadable = self._unreadable()
        self.files = self._files()
        self.tasks = self._tasks()
        self.stats = [self._stats(payload) for _, _, payload in self.of(STATS)]
        self._check_references()
        self._check_entry()

    def of(self, kind: int, parent: int | None = None) -> list[Record]:
        """Id, parent and payload of the records of one type."""
        return [
            (id, above, payload)
            for id, (type, above, payload) in self.records.items()
            if type == kind and parent in {None, above}
        ]

    # --- records ---

    def _record(self, at: int, end: int) -> tuple[tuple[int, ...], bytes]:
        """Fields of a record header and the payload, which end before ``end``."""
        ensure(at % 8 == 0 and at + 32 <= end, "a record lies outside of its image")
        *head, checksum = struct.unpack_from("<IIQIIQ", self.data, at)
        type, flags, length, _, _ = head
        ensure(length <= end - at - 32, "a payload ends outside of its image")
        ensure(length <= LIMITS.get(type, LIMIT), "a payload is too long")
        payload = self.data[at + 32 : at + 32 + length]
        right = xxh3_64_intdigest(self.data[at : at + 24] + payload) == checksum
        ensure(right, "checksum of a record")
        padding = self.data[at + 32 + length : at + 32 + length + -length % 8]
        ensure(len(padding) == -length % 8 and not any(padding), "padding is not zero")
        if flags & ~1:
            raise TooNew(f"flags {flags:#x} of a record")
        return (*head, checksum), payload

    def _head(self) -> Row:
        """The IMAGE record, which is read first because it tells the version."""
        (type, _, _, id, parent, _), payload = self._record(0, len(self.data))
        ensure((type, id, parent) == (IMAGE, 1, 0), "the first record is not IMAGE")
        fields = Fields(payload)
        magic, major, _ = fields.take("8sII")
        ensure(magic == b"\x89crtimg\n", "magic of an image")
        if major != 1:
            raise TooNew(f"version {major} of an image")
        names = "chain id parent_id parent_hash replaced epoch parent_epoch kind zero wall boot"
        head = fields.named("16s16s16s16s16sQQIIQQ", names)
        head["boot_id"] = fields.raw(16)
        head["texts"] = tuple(fields.text() for _ in range(5))
        ensure(head["kind"] <= 1 and head["zero"] == 0, "kind of an image")
        return head

    def _read_tail(self) -> tuple[int, bytes]:
        """Where the directory lies, and its payload."""
        size = len(self.data)
        ensure(size >= 80, "an image is too short")
        (type, flags, _, last, parent, _), tail = self._record(size - 80, size)
        ensure((type, flags, len(tail), parent) == (TAIL, 0, 48, 0), "there is no tail")
        magic, at, length, total, digest = struct.unpack("<8sQQQ16s", tail)
        ensure(magic == b"\x89crtend\n" and total == size, "the tail is wrong")
        ensure(at + 32 + length + -length % 8 == size - 80, "the tail is not after the directory")
        (type, flags, found, id, parent, _), rows = self._record(at, size - 80)
        right = (DIRECTORY, 0, length, 0, last)
        ensure((type, flags, found, parent, id + 1) == right, "there is no directory")
        ensure(length == 40 * (id - 1), "the directory has a wrong length")
        ensure(xxh3_128_digest(rows) == digest == self.entry["hash"], "hash of an image")
        return at, rows

    def _read_records(self, end: int, rows: bytes) -> None:
        """All records before the directory, back to back, each as its row says."""
        at = 0
        for number, row in enumerate(struct.iter_unpack("<IIIIQQQ", rows), 1):
            type, id, parent, flags, offset, length, checksum = row
            ensure((id, offset) == (number, at), "records do not lie back to back")
            found, payload = self._record(at, end)
            ensure(found == (type, flags, length, id, parent, checksum), "row of the directory")
            if (type not in KNOWN or type == SUMMARY) and not flags & 1:
                raise TooNew(f"record type {type}")
            self.records[id] = (type, parent, payload)
            at += 32 + length + -length % 8
        ensure(at == end, "the directory does not follow the last record")

    def _check_records(self) -> None:
        types = {id: type for id, (type, _, _) in self.records.items()}
        for id, (type, parent, _) in self.records.items():
            ensure(parent < id, "a record belongs to a later one")
            ensure(type not in {DIRECTORY, TAIL}, "a directory amid the records")
            right = type not in KNOWN or types.get(parent) in PARENTS.get(type, {None})
            ensure(right, f"parent of a record of type {type}")
        for kind in ONE_AT_MOST:
            ensure(len(self.of(kind)) <= 1, f"more than one record of type {kind}")
        for _, _, payload in self.of(ARCH):
            fields = Fields(payload)
            self.arch = fields.named("IIQI", "page_size xsave_size xcr0 ticks")
            self.arch["machine"] = fields.text()
            if self.arch["page_size"] != PAGE:
                raise TooNew("page size")

    # --- pages ---

    def _chunk(self, payload: bytes) -> list[bytes]:
        """The pages in the slots of a chunk."""
        fields = Fields(payload)
        _, count, codec, zero = fields.take("IIII")
        ensure(1 <= count <= 512 and codec <= 1 and zero == 0, "head of a chunk")
        numbers = fields.take(f"{count}Q")
        ensure(ascending(numbers), "page numbers of a chunk do not ascend")
        block = payload[fields.at :]
        if codec == 1:
            try:
                block = lz4.block.decompress(block, uncompressed_size=count * PAGE)
            except lz4.block.LZ4BlockError as error:
                raise Damaged("a block is not LZ4") from error
        ensure(len(block) == count * PAGE, "a block has a wrong length")
        return [block[at : at + PAGE] for at in range(0, len(block), PAGE)]

    def _spaces(self) -> dict[int, Index]:
        spaces: dict[int, Index] = {}
        for _, _, payload in self.of(PAGE_INDEX):
            space, zero, count = Fields(payload).take("IIQ")
            ensure(zero == 0 and space not in spaces, "more than one page index of a space")
            rows = columns(payload, 16, count)
            spaces[space] = {n: entry_of(place, hash, self.epoch) for n, place, hash, _ in rows}
            for entry in spaces[space].values():
                self._check_place(entry)
        return spaces

    def _check_place(self, entry: Entry) -> None:
        if entry.kind == STORED:
            page = self.stored(entry)
            ensure(xxh3_128_digest(page) == entry.hash, "hash of a page")
        full = self.head["kind"] == 0
        ensure(not full or entry.kind not in {HOLE, INHERITED}, "a full image refers to others")

    def stored(self, entry: Entry) -> bytes:
        """The page in a slot."""
        slots = self.chunks.get(entry.chunk, [])
        ensure(entry.slot < len(slots), "there is no such slot")
        return slots[entry.slot]

    def _summaries(self) -> dict[int, Summary]:
        found: dict[int, Summary] = {}
        for _, _, payload in self.of(SUMMARY):
            space, zero, base, first, end, count = Fields(payload).take("IIQQQQ")
            summary = found.setdefault(space, Summary(base))
            right = zero == 0 and count <= 65536 and (base, first) == (summary.base, summary.end)
            ensure(right and first < end <= LAST_PAGE, "summaries with a gap or another base")
            summary.end = end
            for number, place, digest, epoch in columns(payload, 40, count, epochs=True):
                ensure(first <= number < end, "a summary of other pages")
                summary.entries[number] = entry_of(place, digest, epoch)
        for summary in found.values():
            ensure(summary.end == LAST_PAGE, "the last summary of a space is missing")
        return found

    def _unreadable(self) -> list[Row]:
        """The ranges, which must name the very pages that the page indexes have."""
        rows: list[Row] = []
        for _, _, payload in self.of(UNREADABLE):
            fields = Fields(payload)
            names = "space errno first count reason zero"
            rows = fields.rows("IiQQII", names, *fields.take("II"))
        ends = [(row["space"], row["first"], row["first"] + row["count"]) for row in rows]
        ensure(all(first < end <= LAST_PAGE for _, first, end in ends), "unreadable: no pages")
        in_order = all((a, end) <= (b, first) for (a, _, end), (b, first, _) in pairwise(ends))
        ensure(in_order, "unreadable: order")
        pages = {
            (space, number)
            for space, index in self.spaces.items()
            for number, entry in index.items()
            if entry.kind == NOT_READ
        }
        ensure(sum(row["count"] for row in rows) == len(pages), "number of unreadable pages")
        named = {(row["space"], row["first"] + at) for row in rows for at in range(row["count"])}
        ensure(named == pages, "unreadable pages")
        ensure(not any(row["zero"] for row in rows), "unreadable: reserved")
        return rows

    # --- processes ---

    def _files(self) -> dict[int, Row]:
        rows: list[Row] = []
        names = "id flags device inode size mtime space path_at path_length"
        names += " build_id_at build_id_length zero"
        for _, _, payload in self.of(FILES):
            rows = Fields(payload).table("IIQQQqIIIIII", names)
        for row in rows:
            row["path"] = decoded(row["path"])
            ensure(row.pop("zero") == 0 and len(row["build_id"]) <= 64, "row of a file")
        files = {row["id"]: row for row in rows}
        ensure(len(files) == len(rows) and 0 not in files, "ids of files")
        return files

    def _tasks(self) -> dict[int, Row]:
        """Tasks by the ids of their records."""
        return {id: self._task(id, above, payload) for id, above, payload in self.of(TASK)}

    def _task(self, id: int, above: int, payload: bytes) -> Row:
        fields = Fields(payload)
        task = fields.named("IIIIIIQ", "pid ppid pgid sid terminal state start_time")
        task |= {"uid": fields.take("4I"), "gid": fields.take("4I")}
        task |= fields.named("iI", "exit_status seccomp")
        task["state"] = letter(task["state"])
        task["ns_pids"] = tuple(fields.u32() for _ in range(fields.count(4)))
        numbers = (*task["ns_pids"], *(task[name] for name in ("pid", "ppid", "pgid", "sid")))
        ensure(max(numbers) < 2**31, "number of a process")
        task |= {name: fields.text() for name in ("comm", "cwd", "root", "cgroup")}
        task["cmdline"] = fields.blob()
        count = fields.count(12)
        task["namespaces"] = tuple((fields.text(), *fields.take("Q")) for _ in range(count))
        mms = [self._mm(*record) for record in self.of(MM, id)]
        ensure(len(mms) <= 1, "a task with two address spaces")
        task["parent"], task["mm"] = above, mms[0] if mms else None
        task["threads"] = [self._thread(*record) for record in self.of(THREAD, id)]
        return task

    def _mm(self, id: int, _: int, payload: bytes) -> Row:
        fields = Fields(payload)
        names = "space exe start_code end_code start_data end_data start_brk brk start_stack"
        names += " arg_start arg_end env_start env_end vma_count flags"
        mm = fields.named("II13Q", names)
        mm |= {"auxv": fields.blob(), "ldt": fields.blob()}
        tables = [self._vmas(payload) for _, _, payload in self.of(VMAS, id)]
        ensure(len(tables) <= 1, "an address space with two lists of mappings")
        mm["vmas"] = tables[0] if tables else []
        return mm

    def _vmas(self, payload: bytes) -> list[Row]:
        names = "start end offset flags kind file space name_at name_length"
        rows = Fields(payload).table("QQQIIIIII", names)
        before = 0
        for row in rows:
            ensure(before <= row["start"] < row["end"], "mappings are not in order")
            whole = (row["start"] | row["end"] | row["offset"]) % PAGE == 0
            ensure(whole, "a mapping begins or ends within a page")
            before, size = row["end"], row["end"] - row["start"]
            low = row["end"] <= USER_END or (row["start"], size) == (VSYSCALL, PAGE)
            ensure(low, "a mapping is where none can be")
            within = not row["space"] or row["offset"] + size <= OBJECT_END
            ensure(within, "a mapping is beyond its object")
            row["name"] = decoded(row["name"])
        return rows

    def _thread(self, id: int, _: int, payload: bytes) -> Row:
        fields = Fields(payload)
        thread = fields.named("IIIIQQq", "tid ns_tid state zero blocked pending syscall")
        ensure(thread.pop("zero") == 0, "a thread's reserved field")
        ensure(max(thread["tid"], thread["ns_tid"]) < 2**31, "number of a thread")
        thread["state"], thread["comm"] = letter(thread["state"]), fields.text()
        sets = [self._registers(payload) for _, _, payload in self.of(CPU, id)]
        ensure(len(sets) <= 1, "a thread with two CPU records")
        thread["registers"] = sets[0] if sets else ()
        return thread

    def _registers(self, payload: bytes) -> tuple[tuple[int, bytes], ...]:
        fields = Fields(payload)
        count, zero = fields.count(8), fields.u32()
        sets = tuple((fields.u32(), fields.padded(fields.u32(), 8)) for _ in range(count))
        sizes = {1: 216, 2: 512}
        ensure(zero == 0, "a reserved field of registers")
        ensure(all(len(data) == sizes.get(kind, len(data)) for kind, data in sets), "registers")
        return sets

    def _stats(self, payload: bytes) -> Row:
        try:
            stats = json.loads(payload.decode())
        except (ValueError, RecursionError) as error:
            raise Damaged("STATS is not JSON") from error
        ensure(isinstance(stats, dict), "STATS is not an object")
        ensure(printable(stats, MOST_NESTED), "STATS is too deep, or a number too large")
        limits, paid = stats.get("limits", []), stats.get("paid", {})
        ensure(isinstance(limits, list) and isinstance(paid, dict), "known fields of STATS")
        ensure(all(isinstance(limit, str) for limit in limits), "limits in STATS")
        times = [value for name, value in stats.items() if name.endswith("_time")]
        ensure(all(isinstance(value, int | float | None) for value in times), "times in STATS")
        return dict(stats)

    # --- what must fit together ---

    def _check_references(self) -> None:
        mms = [task["mm"] for task in self.tasks.values() if task["mm"]]
        vmas = [vma for mm in mms for vma in mm["vmas"]]
        named = {mm["space"] for mm in mms}
        ensure(0 not in named, "a task without a space")
        named |= {row["space"] for row in [*vmas, *self.files.values()]} - {0}
        ensure(named <= self.spaces.keys(), "a space without a page index")
        known = self.spaces.keys()
        ensure(self.summaries.keys() <= known, "a summary of a space that does not exist")
        files = {mm["exe"] for mm in mms} | {vma["file"] for vma in vmas}
        ensure(files <= self.files.keys() | {0}, "there is no such file")

    def _check_entry(self) -> None:
        """The index entry says of the image what the image says of itself."""
        head, entry = self.head, self.entry
        for name in ("chain", "id", "epoch", "parent_id", "parent_epoch", "wall"):
            ensure(head[name] == entry[name], f"{name} is not as in the index entry")
        full = head["kind"] == 0
        ensure(full == bool(entry["flags"] & 1), "full or not")
        none = (head["parent_id"], head["parent_hash"], head["parent_epoch"])
        if full:
            ensure(none == (NOTHING, NOTHING, NONE), "a full image has a parent")
        else:
            ensure(head["parent_epoch"] < self.epoch, "the parent is not earlier")
        kinds = [entry.kind for index in self.spaces.values() for entry in index.values()]
        written = kinds.count(STORED) + kinds.count(ZERO)
        ensure((written, kinds.count(HOLE)) == (entry["pages"], entry["holes"]), "page counts")
        raw = PAGE * sum(len(slots) for slots in self.chunks.values())
        ensure(raw == entry["raw"], "bytes in chunks")


class Chain:
    """The epochs of a directory."""

    def __init__(self, path: Path, *, summaries: bool = False) -> None:
        self.directory = Directory(path)
        self.summaries = summaries
        self.entries: dict[int, Row] = {}
        self.lost = 0
        self.images: dict[int, Image] = {}
        self.indexes: dict[tuple[int, int], Index] = {}
        self._read_index(self.directory.read("chain.idx"))

    def close(self) -> None:
        os.close(self.directory.fd)

    def _read_index(self, data: bytes) -> None:
        ensure(len(data) >= 128 and data[:8] == b"\x89crtidx\n", "chain.idx is no index")
        ensure(data[120:128] == checksum(data[:120]), "checksum of chain.idx")
        if struct.unpack_from("<I", data, 8) != (1,):
            raise TooNew("version of chain.idx")
        ensure(not any(data[40:120]), "reserved bytes of chain.idx")
        chain, before = data[16:32], -1
        whole = len(data) // 128
        for number in range(1, whole):
            block = data[number * 128 : number * 128 + 128]
            if block[120:] != checksum(chain + block[:120]):
                self.lost += number < whole - 1
                continue
            entry = self._entry(chain, block)
            full, epoch = entry["flags"] & 1, entry["epoch"]
            right = epoch > before and not entry["flags"] & ~1
            if right and (full or entry["parent_epoch"] < epoch):
                self.entries[epoch] = entry
                before = epoch
            else:
                self.lost += 1

    @staticmethod
    def _entry(chain: bytes, block: bytes) -> Row:
        names = "epoch id parent_id parent_epoch flags generation length hash wall"
        names += " pages holes raw stored"
        return Fields(block).named("Q16s16sQIIQ16sQQQQQ", names) | {"chain": chain}

    def image(self, epoch: int) -> Image:
        """The image of an epoch; its lineage has been checked."""
        new: list[Image] = []
        at: int | None = epoch
        while at is not None and at not in self.images:
            new.append(self._load(at))
            at = new[-1].head["parent_epoch"] if new[-1].head["kind"] == 1 else None
        for image in reversed(new):
            head = image.head
            if head["kind"] == 1:
                parent = self.images[head["parent_epoch"]]
                hashes = {parent.entry["hash"], parent.head["replaced"]} - {NOTHING}
                right = head["parent_id"] == parent.head["id"] and head["parent_hash"] in hashes
                ensure(right, "an image was made on top of another one")
            self.images[image.epoch] = image
        return self.images[epoch]

    def _load(self, epoch: int) -> Image:
        if epoch not in self.entries:
            raise Incomplete(f"there is no epoch {epoch}")
        entry = self.entries[epoch]
        generation = f".{entry['generation']}" if entry["generation"] else ""
        name = f"{epoch:08d}{generation}.img"
        return Image(self.directory.read(name, entry["length"]), entry)

    def parent(self, epoch: int) -> Image | None:
        """The image that one builds on, if it does."""
        head = self.image(epoch).head
        return None if head["kind"] == 0 else self.image(head["parent_epoch"])

    def lineage(self, epoch: int) -> list[int]:
        """The epoch, its parent, and so on."""
        epochs, image = [epoch], self.parent(epoch)
        while image:
            epochs.append(image.epoch)
            image = self.parent(image.epoch)
        return epochs

    def usable(self, epoch: int, space: int) -> Summary | None:
        """What sums up the space from this image on, if the reader uses that and may."""
        summary = self.image(epoch).summaries.get(space)
        if not self.summaries or summary is None:
            return None
        lineage = self.lineage(epoch)
        epochs = {entry.epoch for entry in summary.entries.values()}
        if summary.base == NONE:
            oldest = min(epochs, default=epoch)
            lineage = [number for number in lineage if number >= oldest]
        elif summary.base in lineage[1:]:
            lineage = lineage[: lineage.index(summary.base)]
        else:
            return None
        made = self.entries[epoch]["generation"]
        again = any(self.entries[number]["generation"] > made for number in lineage)
        return None if again or not epochs <= {*lineage} else summary

    def index(self, epoch: int, space: int) -> Index:
        """The newest entry of every page of a space, holes among them."""
        if (epoch, space) in self.indexes:
            return self.indexes[epoch, space]
        found: Index = {}
        image: Image | None = self.image(epoch)
        while image and space in image.spaces:
            summary = self.usable(image.epoch, space)
            found = (summary.entries if summary else image.spaces[space]) | found
            if summary is None:
                image = self.parent(image.epoch)
            else:
                image = None if summary.base == NONE else self.image(summary.base)
        self.indexes[epoch, space] = found
        return found

    def _contents(self, number: int, entry: Entry) -> bytes | None:
        while entry.kind == INHERITED:
            parent = self.parent(entry.epoch)
            index = self.index(parent.epoch, entry.chunk) if parent else {}
            above = index.get(number)
            if above is None or above.kind in {HOLE, NOT_READ}:
                raise Damaged("an inherited page has no contents in the parent")
            ensure(above.hash == entry.hash, "hash of an inherited page")
            entry = above
        if entry.kind == STORED:
            return self.image(entry.epoch).stored(entry)
        return bytes(PAGE) if entry.kind == ZERO else None

    def space(self, epoch: int, space: int) -> Pages:
        """Every page that has an entry which is no hole."""
        if space not in self.image(epoch).spaces:
            raise Incomplete(f"epoch {epoch} has no space {space}")
        index = sorted(self.index(epoch, space).items())
        return {n: self._contents(n, entry) for n, entry in index if entry.kind != HOLE}

    def epoch(self, epoch: int) -> dict[int, Pages]:
        """Every page of every space."""
        return {space: self.space(epoch, space) for space in sorted(self.image(epoch).spaces)}


def reads_as(spaces: dict[int, Pages], mm: Row, address: int) -> tuple[Any, ...]:
    """What the page at an address reads as, where ``spaces`` are the pages of the epoch.

    ("not mapped",), ("bytes", contents), ("unreadable",), ("unknown",), ("zeros",), or
    ("file", id, offset of the page).
    """
    for vma in mm["vmas"]:
        if vma["start"] <= address < vma["end"]:
            return reads_within(spaces, mm["space"], vma, address // PAGE)
    return ("not mapped",)


def reads_within(spaces: dict[int, Pages], space: int, vma: Row, number: int) -> tuple[Any, ...]:
    """The same for a page that a mapping holds."""
    offset = vma["offset"] + number * PAGE - vma["start"]
    places = [(space, number)]
    if vma["space"]:
        places.append((vma["space"], offset // PAGE))
    for where, page in places:
        if page in spaces[where]:
            contents = spaces[where][page]
            return ("unreadable",) if contents is None else ("bytes", contents)
    if vma["kind"] in UNKNOWN_WHEN_ABSENT:
        return ("unknown",)
    from_file = vma["flags"] & FILE_BEHIND if vma["space"] else vma["file"]
    return ("file", vma["file"], offset) if from_file else ("zeros",)


def checksum(data: bytes) -> bytes:
    """A 64-bit hash as the format stores it."""
    return struct.pack("<Q", xxh3_64_intdigest(data))


def digest(spaces: dict[int, Pages]) -> str:
    """One hash of all pages of an epoch: of space, page number and contents, in order."""
    total = xxh3_128()
    for space, pages in sorted(spaces.items()):
        for number, contents in sorted(pages.items()):
            total.update(struct.pack("<IQ", space, number) + (contents or b"unreadable"))
    return total.hexdigest()


def main(path: str) -> int:
    """Print a line for each epoch; the exit code tells whether something was refused."""
    try:
        chain = Chain(Path(path))
    except Refused as error:
        print(f"{path}: {type(error).__name__}: {error}")
        return 1
    bad = chain.lost
    for epoch in chain.entries:
        try:
            spaces = chain.epoch(epoch)
            print(f"{epoch}: {sum(map(len, spaces.values()))} pages, {digest(spaces)}")
        except Refused as error:
            print(f"{epoch}: {type(error).__name__}: {error}")
            bad += 1
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
