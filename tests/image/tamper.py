"""Take an image apart and put it together again with right checksums around wrong contents."""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from xxhash import xxh3_64_intdigest, xxh3_128_digest


@dataclass
class Record:
    """A record, to be changed at will."""

    type: int
    flags: int
    parent: int
    payload: bytearray


@dataclass
class Image:
    """The records of an image but directory and tail, and its hash before the change."""

    all: list[Record]
    hash: bytes

    def records(self, kind: int) -> list[Record]:
        return [record for record in self.all if record.type == kind]

    def add(self, kind: int, payload: bytes, flags: int = 0) -> None:
        self.all.append(Record(kind, flags, 0, bytearray(payload)))

    def insert(self, record: Record) -> None:
        self.all.append(record)

    def remove(self, record: Record) -> None:
        self.all.remove(record)


def take_apart(data: bytes) -> Image:
    records, at = [], 0
    while True:
        kind, flags, length, _, parent, _ = struct.unpack_from("<IIQIIQ", data, at)
        if kind == 13:
            return Image(records, data[-16:])
        payload = bytearray(data[at + 32 : at + 32 + length])
        records.append(Record(kind, flags, parent, payload))
        at += 32 + length + -length % 8


def put_together(
    image: Image, directory: Callable[[bytearray], object] = bytes, total: bytes = b""
) -> bytes:
    """The bytes of the image; ``directory`` may change its rows, ``total`` replaces its hash."""
    out, rows = bytearray(), bytearray()
    for number, record in enumerate(image.all, 1):
        offset, data = len(out), bytes(record.payload)
        head = struct.pack("<IIQII", record.type, record.flags, len(data), number, record.parent)
        checksum = xxh3_64_intdigest(head + data)
        out += head + struct.pack("<Q", checksum) + data + bytes(-len(data) % 8)
        rows += struct.pack(
            "<IIIIQQQ", record.type, number, record.parent, record.flags, offset, len(data),
            checksum,
        )  # fmt: skip
    directory(rows)
    at, count = len(out), len(image.all)
    tail = struct.pack("<QQQ", at, len(rows), at + 32 + len(rows) + 80)
    last = b"\x89crtend\n" + tail + (total or xxh3_128_digest(bytes(rows)))
    for kind, number, payload in ((13, count + 1, bytes(rows)), (14, count + 2, last)):
        head = struct.pack("<IIQII", kind, 0, len(payload), number, 0)
        out += head + struct.pack("<Q", xxh3_64_intdigest(head + payload)) + payload
    return bytes(out)


def rewrite(path: Path, epoch: int, change: Callable[[Image], object]) -> None:
    """Change the image of an epoch and make its index entry fit."""
    image = take_apart((path / f"{epoch:08d}.img").read_bytes())
    change(image)
    enter(path, epoch, put_together(image))


def enter(path: Path, epoch: int, data: bytes, image_hash: bytes = b"") -> None:
    """Put an image in the place of an epoch's, with an index entry for it, or for another hash."""
    (path / f"{epoch:08d}.img").write_bytes(data)
    index = bytearray((path / "chain.idx").read_bytes())
    at = 128 * (epoch + 1)
    index[at + 56 : at + 80] = struct.pack("<Q", len(data)) + (image_hash or data[-16:])
    checksum = xxh3_64_intdigest(bytes(index[16:32] + index[at : at + 120]))
    index[at + 120 : at + 128] = struct.pack("<Q", checksum)
    (path / "chain.idx").write_bytes(index)
