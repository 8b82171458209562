"""FORMAT.md is enough: a reader made of its tables alone reads what the writer wrote."""

from __future__ import annotations

import re
from pathlib import Path

import lz4.block
import pytest
import xxhash

from crtrace.image import chainindex, framing, header, records, tables
from tests.image.support import noise, page, read_all, small_chain

FORMAT = Path(framing.__file__).with_name("FORMAT.md").read_text()


def number(data: bytes, at: int, size: int) -> int:
    return int.from_bytes(data[at : at + size], "little")


class SecondReader:
    """As a stranger would write it, slowly and simply."""

    def __init__(self, path: Path) -> None:
        self.path = path
        index = (path / "chain.idx").read_bytes()
        assert index[:8] == b"\x89crtidx\n"
        assert number(index, 120, 8) == xxhash.xxh3_64_intdigest(index[:120])
        self.chain = index[16:32]
        self.entries = [index[at : at + 128] for at in range(128, len(index), 128)]

    def image(self, at: int) -> bytes:
        entry = self.entries[at]
        assert number(entry, 120, 8) == xxhash.xxh3_64_intdigest(self.chain + entry[:120])
        data = (self.path / f"{number(entry, 0, 8):08d}.img").read_bytes()
        assert len(data) == number(entry, 56, 8)
        assert data[-48:-40] == b"\x89crtend\n"
        assert data[-16:] == entry[64:80]
        return data

    def records(self, data: bytes) -> list[tuple[int, int, bytes]]:
        directory, length = number(data, len(data) - 40, 8), number(data, len(data) - 32, 8)
        rows = data[directory + 32 : directory + 32 + length]
        assert xxhash.xxh3_128_digest(rows) == data[-16:]
        found = []
        for at in range(0, length, 40):
            kind, ident = number(rows, at, 4), number(rows, at + 4, 4)
            offset, size = number(rows, at + 16, 8), number(rows, at + 24, 8)
            payload = data[offset + 32 : offset + 32 + size]
            total = xxhash.xxh3_64_intdigest(data[offset : offset + 24] + payload)
            assert total == number(rows, at + 32, 8) == number(data, offset + 24, 8)
            found.append((kind, ident, payload))
        return found

    def pages(self, at: int, space: int) -> dict[int, bytes]:
        """The pages of an epoch: the parent's, then what this image changes."""
        entry, data = self.entries[at], self.image(at)
        found = self.records(data)
        memory: dict[int, bytes] = {}
        if not number(entry, 48, 4) & 1:
            memory = self.pages(number(entry, 40, 8), space)
        chunks = {ident: self.chunk(payload) for kind, ident, payload in found if kind == 9}
        for kind, _, index in found:
            if kind != 10 or number(index, 0, 4) != space:
                continue
            count = number(index, 8, 8)
            for row in range(count):
                where = number(index, 16 + 8 * row, 8)
                place = 16 + 8 * count + 8 * row
                chunk, slot = number(index, place, 4), number(index, place + 4, 2)
                what = number(index, place + 6, 2)
                memory.pop(where, None)
                if what == 0:
                    memory[where] = chunks[chunk][slot]
                    digest = index[16 + 16 * count + 16 * row :][:16]
                    assert digest == xxhash.xxh3_128_digest(memory[where])
                elif what == 1:
                    memory[where] = bytes(4096)
        return memory

    @staticmethod
    def chunk(payload: bytes) -> list[bytes]:
        count, codec = number(payload, 4, 4), number(payload, 8, 4)
        block = payload[16 + 8 * count :]
        raw = lz4.block.decompress(block, uncompressed_size=count * 4096) if codec else block
        return [raw[at : at + 4096] for at in range(0, count * 4096, 4096)]


def test_a_reader_made_from_the_document_reads_the_same(tmp_path: Path) -> None:
    path = small_chain(tmp_path / "chain")
    reader = SecondReader(path)
    expected = read_all(path)
    assert expected[0][18] == noise(1)
    assert expected[2][32] == page(9)
    assert [reader.pages(at, 1) for at in range(3)] == expected


def rows_of(heading: str) -> list[tuple[int, int]]:
    """Offset and size of every row of the table after a heading."""
    section = FORMAT.split(f"\n### {heading}")[1].split("\n##")[0]
    return [(int(a), int(b)) for a, b in re.findall(r"^\| (\d+) \| (\d+) \|", section, re.M)]


@pytest.mark.parametrize(
    ("heading", "size"),
    [
        ("`chain.idx`", chainindex.ENTRY_SIZE),
        ("Record header", framing.HEADER.size),
        ("1 IMAGE", header.ImageHeader.FIXED.size),
        ("2 ARCH", records.Arch.FIXED.size),
        ("3 TASK", records.Task.FIXED.size),
        ("4 MM", records.Mm.FIXED.size),
        ("5 VMAS", tables.VMA_ROW.size),
        ("6 FILES", tables.FILE_ROW.size),
        ("7 THREAD", records.Thread.FIXED.size),
        ("9 CHUNK", framing.CHUNK_HEAD.size),
        ("13 DIRECTORY", framing.DIRECTORY_ROW.itemsize),
        ("14 TAIL", framing.TAIL.size),
    ],
)
def test_the_tables_have_no_gaps_and_the_sizes_of_the_code(heading: str, size: int) -> None:
    rows = rows_of(heading)
    end = 0
    for offset, length in rows:
        assert offset in (end, 0), f"a gap before offset {offset}"
        end = offset + length
    assert end == size


def test_the_document_names_every_record_type_and_magic() -> None:
    for kind in framing.RecordType:
        assert f"\n### {kind.value} {kind.name}" in FORMAT
    for magic in (framing.IMAGE_MAGIC, framing.TAIL_MAGIC, chainindex.INDEX_MAGIC):
        assert magic.hex(" ") in FORMAT


def test_the_document_has_the_numbers_of_flags_and_kinds() -> None:
    for start, expected in (
        ("u32 flags: 1 read", tables.VmaFlag),
        ("u32 kind: 0 anonymous", tables.VmaKind),
        ("u32 flags: 1 deleted", tables.FileFlag),
    ):
        line = FORMAT[FORMAT.index(start) :].split("|")[0].split(":")[1]
        listed = [int(word, 0) for word in re.findall(r"(0x[0-9a-f]+|\b\d+) [a-zA-Z]", line)]
        assert listed == [member.value for member in expected]
