"""``chain.idx``: which epochs exist. Fixed-size entries, each with its own checksum."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Self

from xxhash import xxh3_64_intdigest

from crtrace.errors import CrtraceError, FormatTooNew, ImageDamaged
from crtrace.faults import point
from crtrace.image.chaindir import (
    INDEX_NAME,
    PART,
    ChainDir,
    explained,
    image_name,
    is_image_name,
    no_space,
)
from crtrace.image.framing import HEADER as RECORD_HEADER
from crtrace.image.framing import MAJOR, MINOR
from crtrace.image.header import NO_EPOCH, NO_ID

INDEX_MAGIC = b"\x89crtidx\n"
HEADER = struct.Struct("<8sII16sQ80s")
ENTRY = struct.Struct("<Q16s16sQIIQ16sQQQQQ")
SUM = struct.Struct("<Q")
ENTRY_SIZE = 128
IS_FULL = 1
MAX_ENTRIES = 1 << 20
MAX_EPOCH, MAX_GENERATION = (1 << 63) - 1, (1 << 31) - 1
_PIECE = ENTRY_SIZE << 13


@dataclass(frozen=True, slots=True, kw_only=True)
class IndexEntry:
    """One committed epoch, as the index has it."""

    epoch: int
    image_id: bytes
    parent_id: bytes = NO_ID
    parent_epoch: int = NO_EPOCH
    flags: int = IS_FULL
    generation: int = 0
    """How often the chain had been thinned out when the image was written."""
    length: int
    image_hash: bytes
    wall_ns: int = 0
    pages_written: int = 0
    pages_hole: int = 0
    bytes_raw: int = 0
    bytes_stored: int = 0

    @property
    def name(self) -> str:
        """The name of the image's file."""
        return image_name(self.epoch, self.generation)

    @property
    def full(self) -> bool:
        """Whether the image needs no parent."""
        return bool(self.flags & IS_FULL)

    def pack(self, chain_id: bytes) -> bytes:
        """The 128 bytes of the entry in that chain."""
        data = ENTRY.pack(
            self.epoch, self.image_id, self.parent_id, self.parent_epoch, self.flags,
            self.generation, self.length, self.image_hash, self.wall_ns, self.pages_written,
            self.pages_hole, self.bytes_raw, self.bytes_stored,
        )  # fmt: skip
        return data + SUM.pack(xxh3_64_intdigest(chain_id + data))

    @classmethod
    def unpack(cls, data: bytes, chain_id: bytes) -> Self | None:
        """The entry, or None when its checksum is not that of an entry of this chain."""
        body = data[: ENTRY.size]
        if SUM.unpack(data[ENTRY.size :])[0] != xxh3_64_intdigest(chain_id + body):
            return None
        (epoch, image_id, parent_id, parent_epoch, flags, generation, length, image_hash, wall_ns,
         written, holes, raw, stored) = ENTRY.unpack(body)  # fmt: skip
        return cls(
            epoch=epoch, image_id=image_id, parent_id=parent_id, parent_epoch=parent_epoch,
            flags=flags, generation=generation, length=length, image_hash=image_hash,
            wall_ns=wall_ns, pages_written=written, pages_hole=holes, bytes_raw=raw,
            bytes_stored=stored,
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Fault:
    """Something wrong with the index: its header, or ``entries`` that follow one another.

    ``harmless``: what a commit that was cut short leaves.
    """

    offset: int
    message: str
    harmless: bool
    entries: int = 1


@dataclass(frozen=True, slots=True)
class ChainIndex:
    """The contents of ``chain.idx``; ``end`` is where the next entry goes."""

    chain_id: bytes
    created_ns: int
    entries: tuple[IndexEntry, ...]
    faults: tuple[Fault, ...]
    end: int

    @property
    def generation(self) -> int:
        """The newest generation of images."""
        return max((entry.generation for entry in self.entries), default=0)

    @property
    def header_fault(self) -> Fault | None:
        """What is wrong with the header."""
        return next((fault for fault in self.faults if fault.offset == 0), None)

    @property
    def broken(self) -> bool:
        """Whether something is wrong that a writer cut short cannot have left so."""
        return not all(fault.harmless for fault in self.faults)

    @classmethod
    def read(cls, directory: ChainDir) -> Self:
        """Raises ``ImageDamaged`` when nothing in it can be believed; else what is wrong becomes
        ``faults``."""
        path = directory.path / INDEX_NAME
        with explained("reading", path):
            fd = directory.open_file(INDEX_NAME)
            try:
                size = os.fstat(fd).st_size
                if size >= ENTRY_SIZE * (MAX_ENTRIES + 2):
                    raise ImageDamaged(
                        f"{path} has {size} bytes, more than {MAX_ENTRIES} entries take"
                    )
                header = os.pread(fd, ENTRY_SIZE, 0)
                first = os.pread(fd, ENTRY_SIZE, ENTRY_SIZE)
                chain_id, created_ns, damage = _read_header(header, first, directory)
                entries, faults, end = _parse(_entries(fd), chain_id)
            finally:
                os.close(fd)
        return cls(chain_id, created_ns, tuple(entries), (*damage, *faults), end)

    def lost(self, names: Iterable[str]) -> list[str]:
        """Of the ``names`` of a directory, the images whose entries are lost.

        A commit that was cut short leaves the image of the next epoch without an entry; ``prune``
        leaves other images of epochs that there are.
        """
        after = self.entries[-1].epoch + 1 if self.entries else 0
        expected = {image_name(after, self.generation)}
        return [
            name
            for name in names
            if is_image_name(name) and int(name.split(".")[0]) >= after and name not in expected
        ]


def _entries(fd: int) -> Iterator[tuple[int, bytes]]:
    """Offset and bytes of each entry; the last one may have fewer than it should."""
    at = ENTRY_SIZE
    while data := os.pread(fd, _PIECE, at):
        for start in range(0, len(data), ENTRY_SIZE):
            yield at + start, data[start : start + ENTRY_SIZE]
        at += len(data)


def pack_header(chain_id: bytes, created_ns: int) -> bytes:
    """The first 128 bytes of ``chain.idx``."""
    data = HEADER.pack(INDEX_MAGIC, MAJOR, MINOR, chain_id, created_ns, b"")
    return data + SUM.pack(xxh3_64_intdigest(data))


def _read_header(
    data: bytes, entry: bytes, directory: ChainDir
) -> tuple[bytes, int, tuple[Fault, ...]]:
    """Chain id, time of creation, and what is wrong. ``entry`` is what follows the header: if it
    is right with a chain id, that is the chain's, whatever the header says."""
    path = directory.path / INDEX_NAME
    if len(data) < ENTRY_SIZE:
        raise _unusable(f"{path} has {len(data)} bytes, its header alone takes {ENTRY_SIZE}")
    magic, major, minor, chain_id, created_ns, reserved = HEADER.unpack(data[: HEADER.size])
    found, expected = SUM.unpack(data[HEADER.size :])[0], xxh3_64_intdigest(data[: HEADER.size])
    if found != expected:
        message = f"header checksum is {expected:016x}, expected {found:016x}"
        for candidate in (chain_id, _id_of_an_image(directory)):
            if len(entry) == ENTRY_SIZE and IndexEntry.unpack(entry, candidate):
                return candidate, 0, (Fault(0, message, harmless=False),)
        raise _unusable(f"{path}: {message}")
    if magic != INDEX_MAGIC:
        raise _unusable(f"{path}: magic is {magic.hex()}, expected {INDEX_MAGIC.hex()}")
    if major != MAJOR:
        raise FormatTooNew(
            f"{path}: format version is {major}.{minor}; this crtrace reads version {MAJOR}",
            hint="use the crtrace that wrote the chain, or a later one",
        )
    if any(reserved):
        raise _unusable(f"{path}: reserved bytes of the header are not zero")
    return chain_id, created_ns, ()


def _unusable(message: str) -> ImageDamaged:
    return ImageDamaged(
        message, hint="without its index a chain cannot be read: put a copy of it in place"
    )


def _id_of_an_image(directory: ChainDir) -> bytes:
    """What the oldest image says is the chain's id, unchecked."""
    name = next(filter(is_image_name, directory.names()), None)
    if name is None:
        return NO_ID
    fd = directory.open_file(name)
    try:
        return os.pread(fd, len(NO_ID), RECORD_HEADER.size + 16)
    finally:
        os.close(fd)


def _parse(
    pieces: Iterable[tuple[int, bytes]], chain_id: bytes
) -> tuple[list[IndexEntry], list[Fault], int]:
    """The entries, what is wrong, and where the next entry goes."""
    entries: list[IndexEntry] = []
    faults: list[Fault] = []
    end = ENTRY_SIZE
    for offset, data in pieces:
        if len(data) < ENTRY_SIZE:
            faults.append(Fault(offset, f"{len(data)} bytes of an entry cut short", True))
            break
        entry = IndexEntry.unpack(data, chain_id)
        message = _wrong(entry, entries)
        if entry is not None and not message:
            entries.append(entry)
            end = offset + ENTRY_SIZE
        elif faults and faults[-1].offset + faults[-1].entries * ENTRY_SIZE == offset:
            faults[-1] = replace(faults[-1], entries=faults[-1].entries + 1, harmless=False)
        else:
            faults.append(Fault(offset, message, _torn(data)))
    # Behind an entry that was cut short there is no other.
    faults = [replace(each, harmless=each.harmless and each.offset >= end) for each in faults]
    return entries, faults, end


def _torn(data: bytes) -> bool:
    """Whether the file grew for the entry, and only a part of it, or nothing, was written.

    The checksum of a whole entry may be zero as well, once in 2^64 times.
    """
    return not any(data[: ENTRY_SIZE // 2]) or not any(data[-SUM.size :])


def _wrong(entry: IndexEntry | None, before: list[IndexEntry]) -> str:
    if entry is None:
        return "the checksum of the entry is wrong"
    if entry.epoch > MAX_EPOCH or entry.generation > MAX_GENERATION:
        return f"epoch {entry.epoch}, generation {entry.generation} are more than may be"
    if before and entry.epoch <= before[-1].epoch:
        return f"epoch {entry.epoch} follows epoch {before[-1].epoch}"
    if entry.flags & ~IS_FULL:
        return f"flags are {entry.flags:#x}, expected 0 or 1"
    if not entry.full and entry.parent_epoch >= entry.epoch:
        return f"epoch {entry.epoch} has the later epoch {entry.parent_epoch} as its parent"
    return ""


class EntryMayExist(CrtraceError):
    """An entry could neither be brought to disk nor be taken back: its image has to stay."""


class IndexFile:
    """``chain.idx`` open for appending."""

    def __init__(self, directory: ChainDir, index: ChainIndex) -> None:
        self._path = directory.path / INDEX_NAME
        self._chain_id = index.chain_id
        self._end = index.end
        self._fd = directory.open_file(INDEX_NAME, os.O_RDWR)
        try:
            with explained("writing", self._path):
                # What follows the last whole entry never existed: FORMAT.md, "chain.idx". And a
                # killed writer may not have come to sync that entry: not after the next one.
                self._cut()
        except BaseException:
            os.close(self._fd)
            raise

    def append(self, entry: IndexEntry) -> None:
        """Write the entry: when this returns, the epoch exists; when it raises, it does not."""
        data = entry.pack(self._chain_id)
        with explained("writing", self._path):
            try:
                point("pwrite of the index entry")
                if os.pwrite(self._fd, data, self._end) != len(data):
                    raise no_space()
                point("fdatasync of the index")
                os.fdatasync(self._fd)
            except BaseException:
                self._take_back(entry)
                raise
        self._end += len(data)

    def _take_back(self, entry: IndexEntry) -> None:
        try:
            self._cut()
        except OSError as error:
            raise EntryMayExist(
                f"{self._path} cannot be written any more ({error.strerror}): epoch {entry.epoch} "
                "may exist all the same",
                hint="the chain is whole with it and without it; see the kernel log",
            ) from error

    def _cut(self) -> None:
        """Take back what follows the entries: on disk too, before the image it names is removed."""
        os.ftruncate(self._fd, self._end)
        os.fdatasync(self._fd)

    def close(self) -> None:
        """Close the file."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def write_index(
    directory: ChainDir, chain_id: bytes, created_ns: int, entries: Iterable[IndexEntry] = ()
) -> None:
    """Make a ``chain.idx``, or replace the one there is: whole, or not at all."""
    data = pack_header(chain_id, created_ns)
    data += b"".join(entry.pack(chain_id) for entry in entries)
    fd = directory.create(INDEX_NAME + PART)
    try:
        with explained("writing", directory.path / INDEX_NAME):
            point("pwrite of the index")
            if os.pwrite(fd, data, 0) != len(data):
                raise no_space()
        directory.publish(fd, INDEX_NAME)
    except BaseException:
        directory.remove(INDEX_NAME + PART)
        raise
    finally:
        os.close(fd)


def field_dict(entry: IndexEntry) -> dict[str, Any]:
    """The entry for JSON: ids and hash in hexadecimal, no parent as None."""
    parent = None if entry.full else entry.parent_epoch
    return {
        "epoch": entry.epoch,
        "full": entry.full,
        "parent_epoch": parent,
        "image_id": entry.image_id.hex(),
        "image_hash": entry.image_hash.hex(),
        "wall_ns": entry.wall_ns,
        "length": entry.length,
        "pages_written": entry.pages_written,
        "pages_hole": entry.pages_hole,
        "bytes_raw": entry.bytes_raw,
        "bytes_stored": entry.bytes_stored,
    }
