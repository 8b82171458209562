"""Damage is found, wherever it is, and its cost is told."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from xxhash import xxh3_64_intdigest

from crtrace.analyze.lost import ProcessLoss
from crtrace.analyze.loststate import WHAT
from crtrace.analyze.verify import Report, verify
from crtrace.errors import ChainIncomplete, CrtraceError, FormatTooNew, ImageDamaged, UsageError
from crtrace.export.raw import export_raw
from crtrace.image.lineage import Levels
from crtrace.image.places import LOST, PageKind
from crtrace.image.reader import Chain
from crtrace.image.records import Mm, Task
from crtrace.image.resolve import Run, Source
from crtrace.image.salvage import Salvage
from crtrace.image.store import ChainWriter
from crtrace.units import PAGE_SIZE, U64
from tests.image.support import (
    SPACE,
    ZERO,
    add_task,
    anon,
    contents,
    epoch,
    noise,
    numbers,
    page,
    read_all,
    small_chain,
    write,
)
from tests.image.tamper import Image, enter, put_together, rewrite, take_apart

FIRST, SECOND = "00000000.img", "00000001.img"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return small_chain(tmp_path / "chain")


def check(path: Path, epoch: int | None = None) -> Report:
    with Chain.open(path) as chain:
        return verify(chain, epoch)


def found(path: Path) -> bool:
    """Whether anything is noticed, on opening or by verifying."""
    try:
        report = check(path)
    except (ImageDamaged, FormatTooNew):
        return True
    return not report.ok or bool(report.notices)


def test_a_whole_chain_is_whole(path: Path) -> None:
    calls: list[tuple[int, int]] = []
    with Chain.open(path) as chain:
        report = verify(chain, progress=lambda done, total: calls.append((done, total)))
    size = sum((path / name).stat().st_size for name in os.listdir(path) if name.endswith(".img"))
    assert report.ok
    assert report.epochs == [0, 1, 2]
    assert not report.notices
    assert report.bytes == size
    assert calls[-1] == (size, size)
    assert calls == sorted(calls)
    assert json.loads(json.dumps(report.to_json()))["ok"] is True


def test_every_flipped_bit_is_found(tmp_path: Path) -> None:
    """Every bit of a chain as small as one can be."""
    path = tmp_path / "chain"
    with ChainWriter.open(path, create=True) as writer:
        for pages in ({16: page(1), 17: ZERO}, {16: page(2)}):
            with writer.begin() as image:
                image.add(Mm(space=SPACE), parent=image.add(Task(pid=1)))
                write(image, pages)
                image.mark_holes(SPACE, numbers([17]))
                image.commit({})
    for name in (FIRST, SECOND, "chain.idx"):
        data = bytearray((path / name).read_bytes())
        assert len(data) < 1500
        for bit in range(8 * len(data)):
            data[bit // 8] ^= 1 << bit % 8
            (path / name).write_bytes(data)
            assert found(path), f"bit {bit} of {name}"
            data[bit // 8] ^= 1 << bit % 8
        (path / name).write_bytes(data)
    assert check(path).ok


def test_a_sample_of_bits_and_lengths_of_a_large_chain_is_found(tmp_path: Path) -> None:
    """Others each time: 24 MiB that do not compress, in images of many chunks."""
    path, seed = tmp_path / "chain", random.randrange(1 << 32)
    chance, rng = random.Random(seed), np.random.default_rng(seed)
    with ChainWriter.open(path, create=True) as writer:
        for first in (16, 1016, 2016):
            with writer.begin() as image:
                add_task(image, [anon(16, 5000)], threads=3)
                data = rng.integers(0, 256, (2000, PAGE_SIZE), dtype=np.uint8)
                image.write_pages(SPACE, np.arange(first, first + 2000, dtype=np.uint64), data)
                image.commit({})
    with Chain.open(path) as chain:
        offsets = {
            entry.name: chain.epoch(entry.epoch).image.directory["offset"].tolist()
            for entry in chain.entries
        }
    for _ in range(40):
        name = chance.choice([FIRST, SECOND, "00000002.img"])
        at, bit = chance.randrange((path / name).stat().st_size), chance.randrange(8)
        with open(path / name, "r+b") as file:
            before = os.pread(file.fileno(), 1, at)
            os.pwrite(file.fileno(), bytes([before[0] ^ 1 << bit]), at)
            (damage,) = check(path).damage
            os.pwrite(file.fileno(), before, at)
        assert damage.file == name, f"seed {seed}: bit {bit} at {at:#x}"
        record = [offset for offset in offsets[name] if offset <= at][-1]
        behind = at >= offsets[name][-1]  # in the last record, the directory or the tail
        assert f"offset {record:#x}" in damage.message or behind, f"seed {seed}: {damage}"
    for _ in range(10):
        whole = (path / SECOND).read_bytes()
        os.truncate(path / SECOND, chance.randrange(len(whole)))
        assert [damage.file for damage in check(path).damage] == [SECOND], f"seed {seed}"
        (path / SECOND).write_bytes(whole)
    assert check(path).ok


@pytest.mark.parametrize("name", [FIRST, SECOND, "chain.idx"])
def test_what_damage_leaves_is_right_and_what_it_costs_is_told(path: Path, name: str) -> None:
    """Bytes changed here and there: each page is as it was, or said to be lost."""
    before = read_all(path)
    data = (path / name).read_bytes()
    for at in range(0, len(data), 41):
        (path / name).write_bytes(data[:at] + bytes([data[at] ^ 0x41]) + data[at + 1 :])
        try:
            report = check(path)
        except (ImageDamaged, FormatTooNew):
            continue
        if name != "chain.idx":
            assert report.damage
            assert {damage.file for damage in report.damage} == {name}
            assert all(f"offset {damage.offset:#x}" in damage.message for damage in report.damage
                       if damage.record)  # fmt: skip
        lost = {loss.epoch: loss for loss in report.lost}
        with Chain.open(path) as chain:
            for entry in chain.entries:
                if entry.epoch in lost and lost[entry.epoch].whole:
                    continue
                kept, gone = salvaged(chain, entry.epoch, report)
                whole = before[entry.epoch]
                assert kept == {page: whole[page] for page in whole.keys() - gone}
                loss = lost.get(entry.epoch)
                assert bool(gone & set(range(16, 48))) == bool(loss and loss.processes)
                rows = chain.image(entry).directory
                numbers = report.suspects.records.get(entry.epoch, ())
                state = [n for n in numbers if rows[n - 1]["type"] in WHAT]
                assert bool(state) == bool(loss and loss.state)


def salvaged(chain: Chain, number: int, report: Report) -> tuple[dict[int, bytes], set[int]]:
    """The pages that are still known, and those that are not, of the mapped ones."""
    view = chain.epoch(number, report.suspects)
    pages = numbers(range(16, 48))
    kinds = view.page_kinds(SPACE, pages)
    gone = set(pages[kinds == LOST].tolist())
    held = pages[(kinds == PageKind.STORED) | (kinds == PageKind.ZERO)]
    contents = view.read_pages(SPACE, held)
    return {int(at): row.tobytes() for at, row in zip(held, contents, strict=True)}, gone


@pytest.mark.parametrize("name", [FIRST, SECOND])
def test_every_truncation_is_found_and_none_is_a_traceback(path: Path, name: str) -> None:
    data = (path / name).read_bytes()
    for length in {*range(0, len(data), 97), *range(len(data) - 90, len(data))}:
        (path / name).write_bytes(data[:length])
        report = check(path)
        assert [damage.file for damage in report.damage] == [name]
        assert str(length) in report.damage[0].message


def test_an_appended_byte_is_found(path: Path) -> None:
    with (path / FIRST).open("ab") as image:
        image.write(b"\0")
    assert not check(path).ok


def test_damage_in_a_chunk_tells_what_is_lost_and_to_whom(path: Path) -> None:
    with Chain.open(path) as chain:
        image = chain.epoch(0).image
        number = image.ids(9)[0]
        offset = int(image.directory[number - 1]["offset"])
    data = bytearray((path / FIRST).read_bytes())
    data[offset + 200] ^= 1
    (path / FIRST).write_bytes(data)
    (damage,) = check(path).damage
    assert damage.file == FIRST
    assert damage.record == f"CHUNK {number}"
    assert damage.offset == offset
    assert f"CHUNK {number} at offset {offset:#x}: checksum is" in damage.message
    assert damage.epochs == (0, 1, 2)
    assert damage.pages_lost == 3
    lost = {loss.epoch: loss.processes for loss in check(path).lost}
    whole = ((16 << 12, 17 << 12), (18 << 12, 20 << 12))
    assert lost[0] == (ProcessLoss(100, "target", 3 << 12, whole),)
    # Page 19 is a hole from epoch 1 on.
    rest = ((16 << 12, 17 << 12), (18 << 12, 19 << 12))
    assert lost[1] == lost[2] == (ProcessLoss(100, "target", 2 << 12, rest),)


def test_a_mapping_that_is_lost_as_a_whole_is_in_the_map_of_a_raw_file(
    path: Path, tmp_path: Path
) -> None:
    with Chain.open(path) as chain:
        number = chain.epoch(0).image.ids(9)[0]
        view = chain.epoch(0, Salvage({0: {number}}))
        assert export_raw(view, tmp_path / "raw") == 1
    (row,) = map(json.loads, (tmp_path / "raw.map").read_text().splitlines())
    assert row["missing"] == [[16 << 12, 17 << 12], [18 << 12, 20 << 12]]
    assert not any((tmp_path / "raw").read_bytes())
    assert (tmp_path / "raw").stat().st_size == row["end"] - row["start"]


def test_damage_is_counted_in_every_image_not_only_the_first(path: Path) -> None:
    for name in (FIRST, SECOND, "00000002.img"):
        data = bytearray((path / name).read_bytes())
        data[170] ^= 1
        (path / name).write_bytes(data)
    assert [damage.file for damage in check(path).damage] == [FIRST, SECOND, "00000002.img"]


def test_one_epoch_with_what_it_builds_on(path: Path) -> None:
    data = bytearray((path / "00000002.img").read_bytes())
    data[170] ^= 1
    (path / "00000002.img").write_bytes(data)
    report = check(path, 1)
    assert report.ok
    assert report.epochs == [0, 1]
    assert check(path, -1).epochs == [0, 1, 2]
    assert not check(path, -1).ok
    with pytest.raises(UsageError, match="0 to 2"):
        check(path, 9)


def test_a_missing_image(path: Path) -> None:
    (path / SECOND).unlink()
    with Chain.open(path) as chain:
        assert contents(chain.epoch(0))
        for number in (1, 2):
            with pytest.raises(ChainIncomplete, match=SECOND) as caught:
                contents(chain.epoch(number))
            assert caught.value.exit_code == 21
    report = check(path)
    assert report.damage[0].epochs == (1, 2)


def test_an_image_of_another_chain_or_epoch_is_found(path: Path, tmp_path: Path) -> None:
    other = small_chain(tmp_path / "other")
    whole = (path / SECOND).read_bytes()
    for strange in (other / SECOND, path / "00000002.img"):
        (path / SECOND).write_bytes(strange.read_bytes())
        assert not check(path).ok
    (path / SECOND).write_bytes(whole)
    assert check(path).ok


def test_leftovers_are_notices_and_not_damage(path: Path) -> None:
    (path / "00000007.img.part").write_bytes(b"half")
    shutil.copy(path / SECOND, path / "00000003.img")
    with (path / "chain.idx").open("ab") as index:
        index.write(bytes(40))
    report = check(path)
    assert report.ok
    assert len(report.notices) == 3


def test_a_damaged_last_entry_is_damage_although_the_epoch_never_existed(path: Path) -> None:
    data = bytearray((path / "chain.idx").read_bytes())
    data[-1] ^= 1
    (path / "chain.idx").write_bytes(data)
    report = check(path)
    assert [(damage.file, damage.offset) for damage in report.damage] == [("chain.idx", 3 * 128)]
    assert report.epochs == [0, 1]


def replace_page(image: Image) -> None:
    """Contents that are not those that were hashed, under right checksums."""
    chunk = image.records(9)[0]
    at = chunk.payload.index(noise(1)[:64])
    chunk.payload[at] ^= 1


def point_elsewhere(image: Image) -> None:
    index = image.records(10)[0].payload
    rows = int.from_bytes(index[8:16], "little")
    index[16 + 8 * rows : 20 + 8 * rows] = (2).to_bytes(4, "little")


def wrong_slot(image: Image) -> None:
    index = image.records(10)[0].payload
    rows = int.from_bytes(index[8:16], "little")
    index[16 + 8 * rows + 4] = 9


def unknown_kind(image: Image) -> None:
    index = image.records(10)[0].payload
    rows = int.from_bytes(index[8:16], "little")
    index[16 + 8 * rows + 6] = 9


def lie_about_zero(image: Image) -> None:
    index = image.records(10)[0].payload
    index[-16 * 3] ^= 1


def descending_pages(image: Image) -> None:
    index = image.records(10)[0].payload
    index[16:24], index[24:32] = index[24:32], index[16:24]


def absurd_count(image: Image) -> None:
    image.records(10)[0].payload[8:16] = b"\xff" * 8


def short_index(image: Image) -> None:
    del image.records(10)[0].payload[4:]


def two_indexes(image: Image) -> None:
    image.insert(image.records(10)[0])


def no_index(image: Image) -> None:
    image.remove(image.records(10)[0])


def too_many_pages(image: Image) -> None:
    image.records(9)[0].payload[4:8] = (513).to_bytes(4, "little")


def no_pages(image: Image) -> None:
    image.records(9)[0].payload[4:8] = bytes(4)


def codec_unknown(image: Image) -> None:
    image.records(9)[0].payload[8] = 5


def chunk_of_nothing(image: Image) -> None:
    image.records(9)[0].payload[:] = bytes(3)


def unknown_space_in_mm(image: Image) -> None:
    image.records(4)[0].payload[0] = 77


def stats_no_json(image: Image) -> None:
    image.records(12)[0].payload[:] = b"[" * 100_000


def parent_to_come(image: Image) -> None:
    image.records(3)[0].parent = 1000


def huge_blob(image: Image) -> None:
    image.records(3)[0].payload[72:76] = b"\xff" * 4


LIES: list[Callable[[Image], None]] = [
    replace_page, point_elsewhere, wrong_slot, unknown_kind, lie_about_zero, descending_pages,
    absurd_count, short_index, two_indexes, no_index, too_many_pages, no_pages, codec_unknown,
    chunk_of_nothing, unknown_space_in_mm, stats_no_json, parent_to_come, huge_blob,
]  # fmt: skip


@pytest.mark.parametrize("lie", LIES)
def test_lies_under_right_checksums_are_found(path: Path, lie: Callable[[Image], None]) -> None:
    """What a checksum cannot find: a writer that was wrong, or hostile."""
    rewrite(path, 0, lie)
    report = check(path)
    assert FIRST in [damage.file for damage in report.damage]
    with Chain.open(path) as chain:
        try:
            epoch = chain.epoch(0)
            contents(epoch)
            assert epoch.tasks
            epoch.losses()
        except CrtraceError:
            pass


@pytest.mark.parametrize("lie", [wrong_slot, point_elsewhere])
def test_a_reader_never_takes_one_page_for_another(
    path: Path, lie: Callable[[Image], None]
) -> None:
    rewrite(path, 0, lie)
    with Chain.open(path) as chain, pytest.raises(ImageDamaged, match=r"slot|chunk"):
        contents(chain.epoch(0))


def test_a_slot_of_another_page_is_told_from_the_right_one(path: Path) -> None:
    """Two entries that name each other's slots: every slot exists, none has the right contents."""

    def swap(image: Image) -> None:
        index = image.records(10)[0].payload
        at = 16 + 8 * int.from_bytes(index[8:16], "little")
        first, third = slice(at, at + 8), slice(at + 16, at + 24)
        index[first], index[third] = index[third], index[first]

    rewrite(path, 0, swap)
    damage = check(path, 0).damage[0]
    assert "do not have the hash" in damage.message
    assert damage.pages_lost == 2


def test_a_hash_changed_in_a_page_index_is_damage_of_the_index(path: Path) -> None:
    with Chain.open(path) as chain:
        image = chain.epoch(0).image
        number = image.index_id(SPACE)
        end = int(image.directory[number - 1]["offset"] + image.directory[number - 1]["length"])
    data = bytearray((path / FIRST).read_bytes())
    data[end + 31] ^= 1
    (path / FIRST).write_bytes(data)
    (damage,) = check(path).damage
    assert damage.record == f"PAGE_INDEX {number}"
    assert "checksum is" in damage.message
    with Chain.open(path) as chain, pytest.raises(ImageDamaged, match="checksum is"):
        contents(chain.epoch(0))


def test_the_image_hash_is_checked_on_both_sides(path: Path) -> None:
    data = (path / FIRST).read_bytes()
    image = take_apart(data)
    enter(path, 0, put_together(image, total=bytes(16)))
    assert "DIRECTORY" in check(path).damage[0].message
    enter(path, 0, data, bytes(16))
    assert "index entry expects" in check(path).damage[0].message
    enter(path, 0, data)
    assert check(path).ok


def set_field(row: int, at: int, value: int) -> Callable[[bytearray], None]:
    def change(rows: bytearray) -> None:
        rows[40 * row + at] = value

    return change


@pytest.mark.parametrize(
    "change",
    [
        set_field(1, 16, 8),  # an offset
        set_field(1, 4, 9),  # an id
        set_field(1, 31, 0xFF),  # a length of many exabytes
        lambda rows: rows.clear(),
    ],
)
def test_a_directory_that_lies_is_refused(
    path: Path, change: Callable[[bytearray], object]
) -> None:
    image = take_apart((path / FIRST).read_bytes())
    enter(path, 0, put_together(image, change))
    assert re.search("back to back|or there is none|record header", check(path).damage[0].message)


def test_rewriting_without_a_lie_changes_no_byte(path: Path) -> None:
    """So what the tests above find is the lie, and two writers agree on the format."""
    before = {name: (path / name).read_bytes() for name in (FIRST, "chain.idx")}
    rewrite(path, 0, lambda image: None)
    assert before == {name: (path / name).read_bytes() for name in before}


def test_an_image_that_was_replaced_still_serves_its_children(path: Path) -> None:
    """As after ``prune``: same image id, other contents, the old hash on record."""

    def replace(image: Image) -> None:
        image.records(1)[0].payload[80:96] = image.hash

    rewrite(path, 0, replace)
    assert check(path).ok
    rewrite(path, 0, lambda image: image.records(1)[0].payload.__setitem__(80, 0))
    assert not check(path).ok


def test_an_unknown_record_that_is_optional_is_passed_over(path: Path) -> None:
    rewrite(path, 2, lambda image: image.add(4000, b"from the future", flags=1))
    report = check(path)
    assert report.ok
    with Chain.open(path) as chain:
        assert contents(chain.epoch(2))[16] == page(1)


@pytest.mark.parametrize(
    ("kind", "flags"), [(4000, 0), (4000, 2), (12, 2), (16, 0), (15, 0), (0, 0)]
)
def test_an_unknown_record_that_is_required_is_too_new(path: Path, kind: int, flags: int) -> None:
    rewrite(path, 2, lambda image: image.add(kind, b"{}", flags=flags))
    with Chain.open(path) as chain, pytest.raises(FormatTooNew) as caught:
        chain.epoch(2)
    assert caught.value.exit_code == 22
    with pytest.raises(FormatTooNew):
        check(path)


def test_another_major_version_is_too_new(path: Path) -> None:
    rewrite(path, 2, lambda image: image.records(1)[0].payload.__setitem__(8, 2))
    with Chain.open(path) as chain, pytest.raises(FormatTooNew, match=r"version is 2\.0"):
        chain.epoch(2)
    data = bytearray((path / "chain.idx").read_bytes())
    data[8] = 2
    data[120:128] = xxh3_64_intdigest(bytes(data[:120])).to_bytes(8, "little")
    (path / "chain.idx").write_bytes(data)
    with pytest.raises(FormatTooNew):
        Chain.open(path)


def looked_up(chain: Chain, damage: Salvage | None = None) -> tuple[list[Run], int]:
    """The runs of the first mapping of epoch 0, and how many pages were looked up for them."""
    view = chain.epoch(0, damage)
    asked: list[int] = []
    find = view.locate

    def counted(space: int, pages: U64) -> tuple[Levels, U64]:
        asked.append(len(pages))
        return find(space, pages)

    with mock.patch.object(view, "locate", counted):
        runs = list(view.memory_runs(view.tasks[0], view.tasks[0].vmas[0]))
    return runs, sum(asked)


def test_what_a_lost_index_costs_is_told_without_looking_at_each_page(tmp_path: Path) -> None:
    path, tib = tmp_path / "chain", 1 << 28
    with ChainWriter.open(path, create=True) as writer:
        epoch(writer, {16: page(1)}, vmas=[anon(16, tib)])
    with Chain.open(path) as chain:
        number = chain.epoch(0).image.index_id(SPACE)
        assert looked_up(chain)[1] < 100
        offset = int(chain.epoch(0).image.directory[number - 1]["offset"])
    data = bytearray((path / FIRST).read_bytes())
    data[offset + 40] ^= 1
    (path / FIRST).write_bytes(data)
    with Chain.open(path) as chain:
        runs, asked = looked_up(chain, Salvage({0: {number}}))
        assert runs == [Run(16 << 12, tib, Source.LOST)]
        assert asked < 100
        (loss,) = verify(chain).lost
    assert loss.processes[0].bytes == tib << 12


def test_scattered_pages_are_not_looked_up_with_all_between_them(tmp_path: Path) -> None:
    path = tmp_path / "chain"
    pages = {16 + 40_000 * at: page(at + 1) for at in range(200)}
    with ChainWriter.open(path, create=True) as writer:
        epoch(writer, pages, vmas=[anon(16, 200 * 40_000)])
    with Chain.open(path) as chain:
        runs, asked = looked_up(chain)
    assert [run.addr >> 12 for run in runs if run.source is Source.STORED] == list(pages)
    assert asked < 200 * 100
