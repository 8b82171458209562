"""Writing chains: rounds, threads, locks, permissions, links."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import sys
import threading
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import count, permutations
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from crtrace.analyze.verify import verify
from crtrace.errors import CrtraceError, ImageDamaged, UsageError
from crtrace.image import recordfile, summary
from crtrace.image.losses import Unreadable
from crtrace.image.pagetable import PageTable
from crtrace.image.places import PageKind
from crtrace.image.reader import Chain
from crtrace.image.store import ChainWriter
from crtrace.units import PAGE_SIZE
from tests.image.second_opinion import assert_same
from tests.image.support import (
    SPACE,
    ZERO,
    add_task,
    anon,
    array,
    contents,
    epoch,
    noise,
    numbers,
    page,
    read_all,
    small_chain,
    write,
)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "chain"


def own_entries(path: Path, number: int) -> dict[int, PageKind]:
    """What one image alone says."""
    with Chain.open(path) as chain:
        index = chain.epoch(number).image.page_index(SPACE)
        assert index is not None
        rows = index.rows(0, len(index))
        kinds = rows.places >> np.uint64(48)
        return dict(zip(rows.pages.tolist(), map(PageKind, kinds.tolist()), strict=True))


def test_unchanged_pages_are_not_stored_again(path: Path) -> None:
    with ChainWriter.open(path, create=True) as writer:
        epoch(writer, {1: page(1), 2: page(2), 3: ZERO})
        with writer.begin() as image:
            add_task(image)
            write(image, {1: page(1), 2: page(7), 3: ZERO})
            entry = image.commit({"pages_scanned": 3})
    assert entry.pages_written == 1
    assert own_entries(path, 1) == {2: PageKind.STORED}
    with Chain.open(path) as chain:
        stats = chain.epoch().stats
    assert stats["pages_skipped_parent"] == 2
    assert stats["pages_scanned"] == 3


def test_zero_pages_take_no_space_in_chunks(path: Path) -> None:
    with ChainWriter.open(path, create=True) as writer:
        entry = epoch(writer, dict.fromkeys(range(100), ZERO))
    assert (entry.pages_written, entry.bytes_raw, entry.bytes_stored) == (100, 0, 0)
    assert set(own_entries(path, 0).values()) == {PageKind.ZERO}


def test_a_page_that_becomes_zero_is_not_a_hole(path: Path) -> None:
    with ChainWriter.open(path, create=True) as writer:
        epoch(writer, {1: page(1)})
        epoch(writer, {1: ZERO})
    assert own_entries(path, 1) == {1: PageKind.ZERO}


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_the_last_round_wins_in_whatever_order_threads_come(
    path: Path, order: tuple[int, int]
) -> None:
    rounds = [{1: page(5), 2: page(6)}, {1: page(7)}]
    with ChainWriter.open(path, create=True) as writer, writer.begin() as image:
        add_task(image)
        for at in order:
            write(image, rounds[at], round=at)
        image.commit({})
    assert read_all(path) == [{1: page(7), 2: page(6)}]


@pytest.mark.parametrize("order", list(permutations(range(4))))
def test_contents_that_come_again_are_stored_once(path: Path, order: tuple[int, ...]) -> None:
    """In whatever order the threads come; the last round wins."""
    rounds = [
        {1: page(5), 2: page(6), 3: ZERO},
        {1: page(7), 4: page(8)},
        {1: page(5), 2: page(6), 3: page(6), 4: page(8)},
        {1: page(7), 2: page(6), 3: ZERO, 4: page(9)},
    ]
    with ChainWriter.open(path, create=True) as writer, writer.begin() as image:
        add_task(image)
        for at in order:
            write(image, rounds[at], round=at)
        entry = image.commit({})
    assert read_all(path) == [{1: page(7), 2: page(6), 3: ZERO, 4: page(9)}]
    assert entry.bytes_raw == 5 * PAGE_SIZE


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_a_page_that_gets_its_old_contents_back_leaves_no_entry(
    path: Path, order: tuple[int, int]
) -> None:
    rounds = [{1: page(5)}, {1: page(1)}]
    with ChainWriter.open(path, create=True) as writer:
        epoch(writer, {1: page(1), 2: page(2)})
        with writer.begin() as image:
            add_task(image)
            for at in order:
                write(image, rounds[at], round=at)
            entry = image.commit({})
    assert entry.pages_written == 0
    assert own_entries(path, 1) == {}
    assert read_all(path)[1] == {1: page(1), 2: page(2)}


def test_a_hole_is_the_last_word(path: Path) -> None:
    with ChainWriter.open(path, create=True) as writer:
        epoch(writer, {1: page(1), 2: page(2)})
        with writer.begin() as image:
            add_task(image)
            image.mark_holes(SPACE, numbers([1, 3]))
            write(image, {1: page(9), 3: page(9)}, round=5)
            entry = image.commit({})
    assert entry.pages_hole == 1
    assert own_entries(path, 1) == {1: PageKind.HOLE}
    assert read_all(path)[1] == {2: page(2)}


def test_a_hole_in_a_round_is_overwritten_by_a_later_one(path: Path) -> None:
    with ChainWriter.open(path, create=True) as writer:
        epoch(writer, {1: page(1)})
        with writer.begin() as image:
            add_task(image)
            image.mark_holes(SPACE, numbers([1]), round=0)
            write(image, {1: page(9)}, round=1)
            image.commit({})
    assert read_all(path)[1] == {1: page(9)}


def test_a_full_epoch_stores_everything_and_has_no_holes(path: Path) -> None:
    with ChainWriter.open(path, create=True) as writer:
        epoch(writer, {1: page(1), 2: page(2)})
        entry = epoch(writer, {1: page(1)}, holes=[2], full=True)
        assert len(writer.known[SPACE]) == 1
    assert entry.full
    assert own_entries(path, 1) == {1: PageKind.STORED}
    assert read_all(path)[1] == {1: page(1)}


def test_unreadable_pages_are_listed_as_ranges_with_reasons(path: Path) -> None:
    with ChainWriter.open(path, create=True) as writer, writer.begin() as image:
        add_task(image)
        image.mark_unreadable(SPACE, numbers([5, 6, 9]), 14)
        image.mark_unreadable(SPACE, numbers([7]), 5, reason=1)
        image.commit({})
    with Chain.open(path) as chain:
        table = next(record for _, _, record in chain.epoch().image.records(Unreadable))
    rows = [(row.first, row.count, row.errno, row.reason) for row in table.rows]
    assert rows == [(5, 2, 14, 4), (7, 1, 5, 1), (9, 1, 14, 4)]
    assert set(own_entries(path, 0).values()) == {PageKind.UNREADABLE}


def test_an_unreadable_page_is_stored_once_it_can_be_read(path: Path) -> None:
    with ChainWriter.open(path, create=True) as writer:
        with writer.begin() as image:
            add_task(image)
            image.mark_unreadable(SPACE, numbers([5, 6]), 14)
            image.commit({})
        epoch(writer, {5: page(1)})
    with Chain.open(path) as chain:
        losses = chain.epoch().losses()
    assert [(row.first, row.count) for row in losses] == [(6, 1)]
    assert read_all(path)[1][5] == page(1)


def test_pages_come_in_any_order_and_more_than_a_chunk_at_once(path: Path) -> None:
    pages = {at: page(at + 1) for at in range(1500)}
    shuffled = np.random.default_rng(1).permutation(1500)
    with ChainWriter.open(path, create=True) as writer, writer.begin() as image:
        add_task(image)
        write(image, {int(at): pages[int(at)] for at in shuffled})
        image.commit({})
    assert read_all(path) == [pages]


def test_a_page_twice_in_one_call_is_a_mistake(path: Path) -> None:
    with ChainWriter.open(path, create=True) as writer, writer.begin() as image:
        with pytest.raises(ValueError, match="twice"):
            image.write_pages(SPACE, numbers([1, 1]), array([ZERO, ZERO]))
        with pytest.raises(ValueError, match="shape"):
            image.write_pages(SPACE, numbers([1, 2]), array([ZERO]))


def test_buffers_may_be_reused_at_once(path: Path) -> None:
    pages, data = numbers([1, 2]), array([noise(1), noise(2)]).copy()
    with ChainWriter.open(path, create=True) as writer, writer.begin() as image:
        add_task(image)
        image.write_pages(SPACE, pages, data)
        pages[:], data[:] = 77, 0
        image.commit({})
    assert read_all(path) == [{1: noise(1), 2: noise(2)}]


def test_many_threads_write_one_image(path: Path) -> None:
    pages = {at: page(at % 50) for at in range(8000)}
    with ChainWriter.open(path, create=True) as writer, writer.begin() as image:
        add_task(image)
        lots = np.array_split(np.arange(8000), 80)
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda lot: write(image, {int(at): pages[int(at)] for at in lot}), lots))
        image.commit({})
    assert read_all(path) == [pages]


def test_spaces_are_apart_and_one_that_is_not_named_again_is_gone(path: Path) -> None:
    with ChainWriter.open(path, create=True) as writer:
        with writer.begin() as image:
            add_task(image, [anon(1, 5, object_space=2)])
            write(image, {1: page(1)})
            write(image, {1: page(2)}, space=2)
            image.commit({})
        assert sorted(writer.known) == [1, 2]
        epoch(writer, {})
        assert sorted(writer.known) == [1]
        with writer.begin() as image:
            add_task(image, [anon(1, 5, object_space=2)])
            write(image, {3: page(3)}, space=2)
            image.commit({})
    with Chain.open(path) as chain:
        assert [chain.epoch(number).spaces for number in range(3)] == [[1, 2], [1], [1, 2]]
        assert contents(chain.epoch(0), space=2) == {1: page(2)}
        assert contents(chain.epoch(2), space=2) == {3: page(3)}


def test_an_aborted_epoch_leaves_nothing(path: Path) -> None:
    with ChainWriter.open(path, create=True) as writer:
        epoch(writer, {1: page(1)})
        with writer.begin() as image:
            add_task(image)
            write(image, {1: page(2), 5: page(5)})
            assert (path / "00000001.img.part").exists()
        assert sorted(os.listdir(path)) == ["00000000.img", "chain.idx", "lock"]
        assert len(writer.known[SPACE]) == 1
        with pytest.raises(CrtraceError, match="already finished"):
            write(image, {1: page(2)})
        with pytest.raises(CrtraceError, match="already finished"):
            image.commit({})
        epoch(writer, {1: page(2)})
    assert read_all(path) == [{1: page(1)}, {1: page(2)}]


def test_writes_may_be_short(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel may write less than it was asked to, and end anywhere in any buffer."""
    real, calls = os.pwrite, count()

    def short(fd: int, parts: list[memoryview], offset: int) -> int:
        assert next(calls) < 1000, "it would go on for ever"
        return real(fd, b"".join(parts)[:777], offset)

    monkeypatch.setattr(os, "pwritev", short)
    pages = {at: noise(at) for at in range(5)}
    with ChainWriter.open(path, create=True) as writer:
        epoch(writer, pages)
        monkeypatch.setattr(os, "pwritev", lambda *_: 0)
        with pytest.raises(CrtraceError, match="no space left"):
            epoch(writer, {9: page(9)})
    assert read_all(path) == [pages]


def test_no_more_space_is_kept_than_the_image_takes(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reserved = []
    real = os.posix_fallocate

    def noted(fd: int, start: int, length: int) -> None:
        reserved.append((start, start + length))
        real(fd, start, length)

    monkeypatch.setattr(recordfile, "SMALL", 1 << 16)
    monkeypatch.setattr(recordfile, "RESERVE", 1 << 22)
    monkeypatch.setattr(os, "posix_fallocate", noted)
    pages = {at: noise(at) for at in range(100)}
    with ChainWriter.open(path, create=True) as writer:
        epoch(writer, pages)
        length = writer.entries[0].length
    assert reserved[0][0] == 1 << 16 < length < reserved[0][1]
    assert len(reserved) == 1
    found = (path / "00000000.img").stat()
    assert found.st_size == length
    assert found.st_blocks * 512 < length + (1 << 16)
    assert read_all(path) == [pages]


def test_abort_waits_for_threads_that_write(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or they would write to a descriptor that may by then be another file."""
    real, inside, go_on = os.pwritev, threading.Event(), threading.Event()

    def slow(*args: Any) -> int:
        inside.set()
        assert go_on.wait(10)
        return real(*args)

    with ChainWriter.open(path, create=True) as writer, ThreadPoolExecutor(2) as pool:
        image = writer.begin()
        monkeypatch.setattr(os, "pwritev", slow)
        writing = pool.submit(write, image, {1: page(1)})
        assert inside.wait(10)
        aborting = pool.submit(image.abort)
        with pytest.raises(TimeoutError):
            aborting.result(timeout=0.2)
        go_on.set()
        aborting.result(timeout=10)
        writing.result(timeout=10)
    assert sorted(os.listdir(path)) == ["chain.idx", "lock"]


def out_of_memory(*_: object) -> None:
    raise MemoryError


def test_a_failure_in_a_thread_fails_the_commit(path: Path) -> None:
    """A worker's error may get lost; the epoch it belongs to must not be committed."""
    with ChainWriter.open(path, create=True) as writer:
        epoch(writer, {1: page(1)})
        image = writer.begin()
        add_task(image)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(os, "pwritev", out_of_memory)
            with pytest.raises(MemoryError):
                write(image, {2: page(2)})
        with pytest.raises(CrtraceError, match="lacks record"):
            image.commit({})
        epoch(writer, {3: page(3)})
    assert read_all(path) == [{1: page(1)}, {1: page(1), 3: page(3)}]


def test_a_writer_that_did_not_learn_an_epoch_is_closed(path: Path) -> None:
    with ChainWriter.open(path, create=True) as writer:
        epoch(writer, {1: page(1)})
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(PageTable, "store", out_of_memory)
            with pytest.raises(MemoryError):
                epoch(writer, {2: page(2)})
        with pytest.raises(CrtraceError, match="closed"):
            writer.begin()
    with ChainWriter.open(path) as writer:
        assert len(writer.known[SPACE]) == 2
    assert read_all(path)[1] == {1: page(1), 2: page(2)}


def test_one_epoch_at_a_time(path: Path) -> None:
    with ChainWriter.open(path, create=True) as writer:
        image = writer.begin()
        with pytest.raises(CrtraceError, match="already writing"):
            writer.begin()
        image.abort()
        writer.begin().abort()
    with pytest.raises(CrtraceError, match="closed"):
        writer.begin()


def test_a_chain_goes_on_where_it_was_left(path: Path) -> None:
    small_chain(path)
    before = read_all(path)
    with ChainWriter.open(path) as writer:
        assert [entry.epoch for entry in writer.entries] == [0, 1, 2]
        entry = epoch(writer, {18: noise(1), 30: page(1)})
    assert entry.pages_written == 1, "a page that the chain has was stored again"
    assert read_all(path) == [*before, {**before[-1], 30: page(1)}]


def test_modes(path: Path) -> None:
    old = os.umask(0)
    try:
        small_chain(path)
    finally:
        os.umask(old)
    assert stat.S_IMODE(path.stat().st_mode) == 0o700
    modes = {name: stat.S_IMODE((path / name).stat().st_mode) for name in os.listdir(path)}
    assert set(modes.values()) == {0o600}
    assert len(modes) == 5


def test_a_second_writer_is_told_who_has_the_chain(path: Path) -> None:
    with ChainWriter.open(path, create=True):
        with pytest.raises(CrtraceError, match=f"being written by pid {os.getpid()}") as caught:
            ChainWriter.open(path)
        assert caught.value.exit_code == 1
        assert caught.value.hint
    ChainWriter.open(path).close()


def test_readers_need_no_lock(path: Path) -> None:
    with ChainWriter.open(path, create=True) as writer:
        epoch(writer, {1: page(1)})
        with writer.begin():
            assert read_all(path) == [{1: page(1)}]


def test_leftovers_of_a_killed_writer_are_removed(path: Path) -> None:
    small_chain(path)
    whole = read_all(path)
    (path / "00000003.img.part").write_bytes(b"half")
    with (path / "chain.idx").open("ab") as index:
        index.write(b"\x03" + bytes(99))
    assert read_all(path) == whole
    with ChainWriter.open(path) as writer:
        assert not list(path.glob("*.part"))
        assert (path / "chain.idx").stat().st_size == 4 * 128
        epoch(writer, {1: page(1)})
    assert len(read_all(path)) == 4


@pytest.mark.parametrize(
    ("tail", "cut"),
    [(bytes(128), True), (b"\x03" + bytes(127), True), (bytes(64) + b"\x03" * 64, True),
     (b"\x03" * 128, False)],
)  # fmt: skip
def test_a_last_entry_that_is_wrong_never_existed(path: Path, tail: bytes, cut: bool) -> None:
    small_chain(path)
    with (path / "chain.idx").open("ab") as index:
        index.write(tail)
    with Chain.open(path) as chain:
        assert len(chain.entries) == 3
        assert [fault.harmless for fault in chain.index.faults] == [cut]
    if cut:
        ChainWriter.open(path).close()
        assert (path / "chain.idx").stat().st_size == 4 * 128
        return
    with pytest.raises(ImageDamaged, match="offset 0x200") as caught:
        ChainWriter.open(path)
    assert "verify" in caught.value.hint
    assert (path / "chain.idx").stat().st_size == 5 * 128


def test_a_writer_does_not_go_on_where_committed_epochs_were_damaged(path: Path) -> None:
    """One bit in each of the last entries: they are not a commit that was cut short."""
    for flipped in (1, 2, 3):
        small_chain(path)
        data = bytearray((path / "chain.idx").read_bytes())
        for number in range(flipped):
            data[(3 - number) * 128 + 70] ^= 1
        (path / "chain.idx").write_bytes(data)
        before = {file.name: file.read_bytes() for file in path.iterdir()}
        with pytest.raises(ImageDamaged, match="checksum of the entry"):
            ChainWriter.open(path)
        with Chain.open(path) as chain:
            (fault,) = chain.index.faults
            assert (fault.offset, fault.entries) == ((4 - flipped) * 128, flipped)
        assert {file.name: file.read_bytes() for file in path.iterdir()} == before
        shutil.rmtree(path)


@pytest.mark.parametrize("missing", [1, 2, 3])
def test_an_index_that_lost_its_end_is_told_from_a_commit_cut_short(
    path: Path, missing: int
) -> None:
    """One image without an entry may be that of a commit cut short, and is removed; two never."""
    small_chain(path)
    with (path / "chain.idx").open("r+b") as index:
        index.truncate((4 - missing) * 128)
    before = sorted(file.name for file in path.iterdir())
    if missing == 1:
        ChainWriter.open(path).close()
        assert not (path / "00000002.img").exists()
        return
    with pytest.raises(ImageDamaged, match=r"no entries for .*00000002\.img"):
        ChainWriter.open(path)
    with Chain.open(path) as chain:
        report = verify(chain)
    assert [damage.file for damage in report.damage] == ["chain.idx"] * (missing - 1)
    assert "00000002.img is there" in report.damage[-1].message
    assert sorted(file.name for file in path.iterdir()) == before


def test_an_index_is_read_in_little_memory(path: Path) -> None:
    """However long a hole it has; and one that is longer than may be is refused."""
    small_chain(path)
    os.truncate(path / "chain.idx", 1 << 22)
    tracemalloc.start()
    with Chain.open(path) as chain:
        (fault,) = chain.index.faults
    assert tracemalloc.get_traced_memory()[1] < 4 << 20
    tracemalloc.stop()
    assert (fault.entries, fault.harmless) == ((1 << 15) - 4, False)
    os.truncate(path / "chain.idx", 1 << 40)
    with pytest.raises(ImageDamaged, match="more than 1048576 entries"):
        Chain.open(path)


@pytest.mark.parametrize("at", [0, 8, 20, 40, 125])
def test_a_chain_can_be_read_although_the_header_of_its_index_is_damaged(
    path: Path, at: int
) -> None:
    """The chain id stands in every image as well, and the entries tell whether it is right."""
    small_chain(path)
    whole = read_all(path)
    data = bytearray((path / "chain.idx").read_bytes())
    data[at] ^= 1
    (path / "chain.idx").write_bytes(data)
    with Chain.open(path, salvage=True) as chain:
        assert [contents(chain.epoch(number)) for number in range(3)] == whole
        (damage,) = verify(chain).damage
        assert (damage.file, damage.record, damage.offset) == ("chain.idx", "header", 0)
        assert not verify(chain).lost
    for use in (Chain.open, ChainWriter.open):
        with pytest.raises(ImageDamaged, match="header checksum"):
            use(path)
    for image in path.glob("*.img"):
        image.unlink()
    if at == 20:
        with pytest.raises(ImageDamaged, match="header checksum"):
            Chain.open(path, salvage=True)


@pytest.mark.parametrize(("epoch", "generation"), [(1 << 63, 0), ((1 << 64) - 1, 0), (3, 1 << 31)])
def test_numbers_that_leave_no_room_for_more_are_refused(
    path: Path, epoch: int, generation: int
) -> None:
    small_chain(path)
    with Chain.open(path) as chain:
        last, chain_id = chain.entries[-1], chain.chain_id
    odd = replace(last, epoch=epoch, generation=generation)
    with (path / "chain.idx").open("ab") as index:
        index.write(odd.pack(chain_id))
    with Chain.open(path) as chain:
        assert [entry.epoch for entry in chain.entries] == [0, 1, 2]
        (fault,) = chain.index.faults
    assert "more than may be" in fault.message
    with pytest.raises(ImageDamaged):
        ChainWriter.open(path)


def test_a_wrong_entry_in_the_middle_is_damage(path: Path) -> None:
    small_chain(path)
    data = bytearray((path / "chain.idx").read_bytes())
    data[2 * 128 + 70] ^= 1
    (path / "chain.idx").write_bytes(data)
    with pytest.raises(ImageDamaged, match="offset 0x100"):
        ChainWriter.open(path)
    with Chain.open(path) as chain:
        assert [entry.epoch for entry in chain.entries] == [0, 2]
        assert contents(chain.epoch(0))


def test_an_entry_of_another_chain_is_not_accepted(tmp_path: Path) -> None:
    one, two = small_chain(tmp_path / "one", 1), small_chain(tmp_path / "two", 2)
    with (one / "chain.idx").open("ab") as index:
        index.write((two / "chain.idx").read_bytes()[2 * 128 :])
    with Chain.open(one) as chain:
        assert [entry.epoch for entry in chain.entries] == [0]


def test_a_link_in_place_of_the_directory_is_refused(tmp_path: Path) -> None:
    real, link = small_chain(tmp_path / "real"), tmp_path / "link"
    link.symlink_to(real)
    for name in (link, f"{link}/"):
        with pytest.raises(UsageError, match="no directory") as caught:
            Chain.open(name)
        assert "link" in caught.value.hint
        with pytest.raises(CrtraceError):
            ChainWriter.open(name, create=True)
    dangling = tmp_path / "dangling"
    dangling.symlink_to(tmp_path / "nowhere")
    with pytest.raises(CrtraceError):
        ChainWriter.open(dangling, create=True)
    assert not (tmp_path / "nowhere").exists()


@pytest.mark.parametrize("name", ["chain.idx", "00000001.img", "lock"])
def test_links_and_fifos_in_place_of_files_are_refused(path: Path, name: str) -> None:
    small_chain(path)
    (path / name).rename(path.parent / "elsewhere")
    before = (path.parent / "elsewhere").read_bytes()
    for make in (lambda: (path / name).symlink_to(path.parent / "elsewhere"), None):
        if make:
            make()
        else:
            os.mkfifo(path / name)
        with pytest.raises(ImageDamaged, match=r"link|regular"):
            ChainWriter.open(path)
        (path / name).unlink()
    assert (path.parent / "elsewhere").read_bytes() == before


def test_a_link_in_place_of_a_new_image_is_not_followed(path: Path) -> None:
    victim = path.parent / "victim"
    victim.write_bytes(b"precious")
    small_chain(path)
    with ChainWriter.open(path) as writer:
        (path / "00000003.img.part").symlink_to(victim)
        with pytest.raises(CrtraceError, match=r"00000003\.img\.part"):
            writer.begin()
        (path / "00000003.img.part").unlink()
        (path / "00000003.img").symlink_to(victim)
        epoch(writer, {1: page(1)})
    assert victim.read_bytes() == b"precious"
    assert not (path / "00000003.img").is_symlink()


def test_a_directory_with_other_things_in_it_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(UsageError, match="no chain"):
        ChainWriter.open(tmp_path, create=True)
    assert os.listdir(tmp_path) == ["thesis.tex"]


def test_a_directory_that_others_may_write_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o777)
    with pytest.raises(UsageError, match="other users"):
        ChainWriter.open(tmp_path, create=True)


def test_the_directory_above_need_not_be_readable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nobody = os.geteuid() or 65534
    above = tmp_path / "above"
    above.mkdir()
    if nobody != os.geteuid():
        os.chown(above, nobody, nobody)
    above.chmod(0o300)
    tmp_path.chmod(0o711)
    monkeypatch.chdir(tmp_path)  # so that nothing further above is looked at
    before = os.geteuid()
    os.seteuid(nobody)
    try:
        small_chain(Path("above/chain"))
    finally:
        os.seteuid(before)
        above.chmod(0o700)
    assert len(read_all(above / "chain")) == 3


def test_no_directory_is_no_chain(tmp_path: Path) -> None:
    with pytest.raises(UsageError):
        Chain.open(tmp_path / "nothing")
    with pytest.raises(UsageError, match=r"chain\.idx"):
        Chain.open(tmp_path)
    with pytest.raises(UsageError, match=r"chain\.idx"):
        ChainWriter.open(tmp_path)
    assert os.listdir(tmp_path) == []


def test_no_descriptor_is_left_open(path: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    small_chain(path)
    read_all(path)
    (path / "chain.idx").write_bytes(b"")
    for kind in (Chain, ChainWriter):
        with pytest.raises(ImageDamaged):
            kind.open(path)
    assert len(os.listdir("/proc/self/fd")) == before


def test_spaces_finished_one_after_the_other_are_as_those_that_are_not(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They share contents, in one image and in what it sums up."""
    monkeypatch.setattr(summary, "FAN_OUT", 2)
    expected: dict[int, dict[int, bytes]] = {1: {}, 2: {}, 3: {}}
    for number in range(3):
        with ChainWriter.open(path, create=True) as writer, writer.begin() as image:
            for space, held in expected.items():
                add_task(image, pid=space, space=space)
                new = {1: noise(number), 10 + number: page(space), 20: page(7 + number)}
                held.update(new)
                write(image, new, space=space)
                if space < 3:
                    image.mark_unreadable(space, numbers([30 + number]), 5)
                    image.settle(space)
                    write(image, {40: noise(90), 41 + number: ZERO}, space=space)
                    held.update({40: noise(90), 41 + number: ZERO, 30 + number: ZERO})
                if space == 1:
                    image.finish(space)
            with pytest.raises(CrtraceError, match=f"{number:08d}.img: PAGE_INDEX .* already"):
                write(image, {50: page(50)}, space=1)
            add_task(image, pid=9, space=1)
            image.commit({})
    found = assert_same(path)[2]
    with Chain.open(path) as chain:
        assert verify(chain).ok
        assert chain.image(chain.entry(2)).summary_ids.keys() == {1, 2, 3}
        view = chain.epoch(2)
        assert {space: contents(view, space=space) for space in view.spaces} == expected
    assert found.keys() == {1, 2, 3}


LIMITED = """
import resource, sys
from itertools import count, permutations
from pathlib import Path
from typing import Any
from tests.image.support import *
path = Path(sys.argv[1])
with ChainWriter.open(path) as writer:
    resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000))
    try:
        epoch(writer, {at: noise(at) for at in range(20)})
    except Exception as error:
        print(type(error).__name__, error)
    epoch(writer, {90: page(90)})
"""


def test_a_file_size_limit_is_an_error_and_the_chain_goes_on(path: Path) -> None:
    small_chain(path)
    before = read_all(path)
    run = subprocess.run(
        [sys.executable, "-c", LIMITED, path], capture_output=True, text=True, check=True
    )
    assert run.stdout.startswith("CrtraceError file too large while writing")
    assert read_all(path) == [*before, {**before[-1], 90: page(90)}]
