"""From addresses to contents, through mappings, objects, files and several epochs."""

from __future__ import annotations

import os
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from crtrace.errors import CrtraceError, ImageDamaged, UsageError
from crtrace.image.filepool import OPEN_FILES
from crtrace.image.pageindex import FENCE_ROWS, PageIndex
from crtrace.image.reader import Chain
from crtrace.image.records import Arch, Task
from crtrace.image.resolve import Source
from crtrace.image.store import ChainWriter
from crtrace.image.tables import FileInfo, Files, Vma, VmaKind, Vmas
from crtrace.units import PAGE_SIZE
from tests.image.support import (
    RW,
    SPACE,
    ZERO,
    add_task,
    anon,
    contents,
    epoch,
    noise,
    numbers,
    page,
    small_chain,
    write,
)

OBJECT = 2
LIB = FileInfo(id=1, path="/lib/libfoo.so", size=1 << 20, build_id=b"\x01" * 20)
MEMFD = FileInfo(id=2, path="/memfd:x (deleted)", flags=3, object_space=OBJECT)


def mapping(first: int, count: int, **fields: object) -> Vma:
    start, end = first * PAGE_SIZE, (first + count) * PAGE_SIZE
    return Vma(start=start, end=end, flags=RW, **fields)  # type: ignore[arg-type]


VMAS = [
    anon(10, 10),
    mapping(30, 6, kind=VmaKind.FILE, file=1, pgoff=0x3000),
    mapping(40, 6, kind=VmaKind.FILE, file=2, pgoff=2 * PAGE_SIZE, object_space=OBJECT),
    mapping(50, 2, kind=VmaKind.VVAR),
    mapping(52, 2, kind=VmaKind.VDSO),
]
S, Z, O, F, U = Source.STORED, Source.ZERO, Source.OBJECT, Source.FILE, Source.UNREADABLE  # noqa: E741


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """One epoch with a mapping of every sort."""
    path = tmp_path / "chain"
    with ChainWriter.open(path, create=True) as writer, writer.begin() as image:
        image.add(Arch(machine="x86_64"))
        add_task(image, VMAS, files=Files((LIB, MEMFD)))
        write(image, {number: page(number) for number in (11, 12, 31, 41, 53)} | {14: ZERO})
        # Object pages 2 to 7 are mapped at 40 to 45.
        write(image, {1: page(91), 3: page(93), 4: page(94), 5: ZERO}, space=OBJECT)
        image.mark_unreadable(SPACE, numbers([15, 16]), 14)
        image.mark_unreadable(OBJECT, numbers([7]), 5)
        image.commit({"frozen_time": 5})
    return path


def runs(path: Path, number: int) -> list[tuple[int, int, Source]]:
    with Chain.open(path) as chain:
        view = chain.epoch()
        task = view.tasks[0]
        found = list(view.memory_runs(task, task.vmas[number]))
    return [(run.addr // PAGE_SIZE, run.npages, run.source) for run in found]


def test_where_the_pages_of_each_mapping_come_from(path: Path) -> None:
    assert runs(path, 0) == [
        (10, 1, Z), (11, 2, S), (13, 2, Z), (15, 2, U), (17, 3, Z),
    ]  # fmt: skip
    assert runs(path, 1) == [(30, 1, F), (31, 1, S), (32, 4, F)]
    assert runs(path, 2) == [
        (40, 1, Z), (41, 1, S), (42, 1, O), (43, 2, Z), (45, 1, U),
    ]  # fmt: skip
    assert runs(path, 3) == [(50, 2, U)], "what was not recorded of vvar is unknown, not zero"
    assert runs(path, 4) == [(52, 1, U), (53, 1, S)]


def test_memory_reads_across_pages_and_mappings(path: Path) -> None:
    with Chain.open(path) as chain:
        view = chain.epoch()
        task = view.tasks[0]
        own = ZERO + page(11) + page(12) + ZERO + ZERO
        assert view.read_memory(task, 10 * PAGE_SIZE, len(own)) == own
        assert view.read_memory(task, 10 * PAGE_SIZE + 4090, 20) == own[4090:4110]
        assert view.read_memory(task, 11 * PAGE_SIZE + 8, 1) == page(11)[8:9]
        shared = ZERO + page(41) + page(94) + ZERO
        assert view.read_memory(task, 40 * PAGE_SIZE, len(shared)) == shared
        assert view.read_memory(task, 10 * PAGE_SIZE, 0) == b""


@pytest.mark.parametrize(
    ("first", "text"),
    [
        (5, "nothing is mapped at 0x5000"),
        (14, "0xf000 could not be read"),
        (30, "0x1e000 are in /lib/libfoo.so"),
        (45, "0x2d000 could not be read"),
        (50, "0x32000 could not be read"),
    ],
)
def test_memory_that_is_not_there_is_an_error_that_says_why(
    path: Path, first: int, text: str
) -> None:
    with Chain.open(path) as chain:
        view = chain.epoch()
        with pytest.raises(CrtraceError, match=text):
            view.read_memory(view.tasks[0], first * PAGE_SIZE, 2 * PAGE_SIZE)


def test_memory_across_neighbouring_mappings(tmp_path: Path) -> None:
    path = tmp_path / "chain"
    with ChainWriter.open(path, create=True) as writer:
        epoch(writer, {10: noise(1), 11: noise(2)}, vmas=[anon(10, 1), anon(11, 1)])
    with Chain.open(path) as chain:
        view = chain.epoch()
        data = view.read_memory(view.tasks[0], 10 * PAGE_SIZE + 100, PAGE_SIZE)
    assert data == (noise(1) + noise(2))[100 : 100 + PAGE_SIZE]


def test_a_huge_reservation_is_one_run_and_little_memory(tmp_path: Path) -> None:
    path, count = tmp_path / "chain", 1 << 24
    with ChainWriter.open(path, create=True) as writer:
        epoch(writer, {20: page(1), count - 1: page(2)}, vmas=[anon(16, count)])
    tracemalloc.start()
    assert runs(path, 0) == [
        (16, 4, Z), (20, 1, S), (21, count - 22, Z), (count - 1, 1, S), (count, 16, Z),
    ]  # fmt: skip
    assert tracemalloc.get_traced_memory()[1] < 8 << 20
    tracemalloc.stop()


def test_tasks_come_with_their_threads_registers_and_mappings(path: Path) -> None:
    with ChainWriter.open(path) as writer, writer.begin() as image:
        add_task(image, [anon(10, 3)], threads=3)
        parent = image.add(Task(pid=200, state="Z", exit_status=256), parent=2)
        assert parent
        add_task(image, [anon(99, 1)], pid=300, space=5)
        image.commit({})
    with Chain.open(path) as chain:
        view = chain.epoch()
        first, zombie, last = view.tasks
        assert [thread.thread.tid for thread in view.threads(first)] == [100, 101, 102]
        assert all(thread.cpu and len(thread.cpu.get(1)) == 216 for thread in first.threads)
        assert first.threads[0].cpu
        assert first.threads[0].cpu.get(0x202) == b""
        assert (zombie.task.exit_status, zombie.mm, zombie.vmas) == (256, None, ())
        assert zombie.parent == 2
        assert last.mm
        assert (last.mm.space, view.vmas(last)[0].pages) == (5, 1)
        with pytest.raises(CrtraceError, match="pid 200 has no memory"):
            list(view.memory_runs(zombie, anon(0, 1)))
        assert chain.epoch(0).arch == Arch(machine="x86_64")
        assert chain.epoch(0).stats["frozen_time"] == 5
        assert chain.epoch(0).files == {1: LIB, 2: MEMFD}


def test_epochs_are_numbered_from_either_end(tmp_path: Path) -> None:
    path = small_chain(tmp_path / "chain")
    with Chain.open(path) as chain:
        numbers = {at: chain.epoch(at).header.epoch for at in (0, 2, -1, -3)}
        assert numbers == {0: 0, 2: 2, -1: 2, -3: 0}
        for at in (3, -4):
            with pytest.raises(UsageError, match="it has 0 to 2"):
                chain.epoch(at)
        assert [len(chain.epoch(at).lineage) for at in range(3)] == [1, 2, 3]


def test_a_chain_without_epochs(tmp_path: Path) -> None:
    ChainWriter.open(tmp_path / "chain", create=True).close()
    with Chain.open(tmp_path / "chain") as chain:
        assert chain.entries == ()
        with pytest.raises(UsageError, match="no epoch yet"):
            chain.epoch()


def test_a_space_that_does_not_exist_is_damage(path: Path) -> None:
    with Chain.open(path) as chain, pytest.raises(ImageDamaged, match="space 9"):
        chain.epoch().read_pages(9, numbers([1]))


def test_pages_without_contents_read_as_zeros(path: Path) -> None:
    with Chain.open(path) as chain:
        data = chain.epoch().read_pages(SPACE, numbers([5, 11, 14, 15, 2**51]))
    assert [row.tobytes() == ZERO for row in data] == [True, False, True, True, True]


def test_a_long_chain_needs_few_descriptors(tmp_path: Path) -> None:
    path, count = tmp_path / "chain", OPEN_FILES + 40
    with ChainWriter.open(path, create=True) as writer:
        for number in range(count):
            epoch(writer, {number: page(number + 1)})
    before = len(os.listdir("/proc/self/fd"))
    with Chain.open(path) as chain:
        held = contents(chain.epoch())
        assert len(os.listdir("/proc/self/fd")) <= before + OPEN_FILES + 2
    assert held == {number: page(number + 1) for number in range(count)}


def test_a_chain_made_of_many_epochs_is_streamed(tmp_path: Path) -> None:
    """Merging the page indexes takes memory for a window of them, not for all."""
    path, count = tmp_path / "chain", 400_000
    zeros = np.zeros((512, PAGE_SIZE), dtype=np.uint8)
    with ChainWriter.open(path, create=True) as writer:
        for shift in range(3):
            with writer.begin(full=not shift) as image:
                add_task(image)
                pages = np.arange(shift * count // 2, shift * count // 2 + count, dtype=np.uint64)
                for part in np.array_split(pages, count // 512 + 1):
                    image.write_pages(SPACE, part, zeros[: len(part)])
                image.commit({})
    with Chain.open(path) as chain:
        view = chain.epoch()
        tracemalloc.start()
        total = sum(len(part.pages) for part in view.index_parts(SPACE))
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert total == 2 * count
    assert peak < 40 << 20


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page index of many windows, and of more than one piece when it is checked."""
    path = tmp_path_factory.mktemp("large") / "chain"
    zeros = np.zeros((512, PAGE_SIZE), dtype=np.uint8)
    with ChainWriter.open(path, create=True) as writer, writer.begin() as image:
        add_task(image)
        for part in np.array_split(np.arange(0, 3 * 280_000, 3, dtype=np.uint64), 600):
            image.write_pages(SPACE, part, zeros[: len(part)])
        image.commit({})
    return path


def test_single_pages_are_found_at_every_window_edge(large: Path) -> None:
    with Chain.open(large) as chain:
        index = chain.epoch().image.page_index(SPACE)
        assert index
        assert index.fences.tolist() == list(range(0, 3 * 280_000, 3 * 1024))
        for edge in range(0, 280_000, 1024):
            for row in range(max(edge - 3, 0), edge + 3):
                found, _, rows = index.find(numbers([3 * row]))
                assert (found.tolist(), rows.tolist()) == ([True], [row])
                assert not index.find(numbers([3 * row + 1]))[0].any()
                assert len(index.between(3 * row, 3 * row + 4).pages) == 2


def test_an_open_index_takes_next_to_nothing(tmp_path: Path) -> None:
    """Some bytes for each 1024 pages, not some for each; while it is read, one piece more."""

    def opened(count: int) -> tuple[int, int]:
        """The memory that an index of so many pages takes, and took at most."""
        path = tmp_path / str(count)
        with ChainWriter.open(path, create=True) as writer, writer.begin() as image:
            add_task(image)
            image.mark_zeros(SPACE, np.arange(count, dtype=np.uint64))
            image.commit({})
        with Chain.open(path) as chain:
            image = chain.image(chain.entries[0])
            tracemalloc.start()
            assert len(image.page_index(SPACE)) == count
            taken = tracemalloc.get_traced_memory()
            tracemalloc.stop()
        return taken

    small, large = opened(1 << 19), opened(1 << 21)
    assert large[0] - small[0] < 64 << 10
    assert large[1] - small[1] < 256 << 10


@pytest.fixture
def index(large: Path) -> Iterator[PageIndex]:
    """That of a large image."""
    with Chain.open(large) as chain:
        found = chain.epoch().image.page_index(SPACE)
        assert found
        yield found


@pytest.fixture
def read(index: PageIndex, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many bytes each read of the index took."""
    sizes: list[int] = []
    image = index._image
    real = image.span
    monkeypatch.setattr(
        image, "span", lambda *args: (sizes.append(args[2]), real(*args))[1], raising=False
    )
    return sizes


def test_a_search_for_pages_in_order_reads_each_block_once(
    index: PageIndex, read: list[int]
) -> None:
    for number in range(3, 3 * 20_000, 21):
        assert index.find(numbers([number]))[2].tolist() == [number // 3]
        assert index.at_or_after(number - 1) == number
    blocks = 20_000 // FENCE_ROWS + 1
    assert blocks <= len(read) <= 3 * blocks  # of two columns; at a border one more


def test_a_search_for_pages_far_apart_reads_little(index: PageIndex, read: list[int]) -> None:
    asked = numbers([3, 3 * 140_000, 3 * 279_999])
    found, _, rows = index.find(asked)
    assert found.all()
    assert rows.tolist() == [1, 140_000, 279_999]
    assert len(index.hashes(rows)) == 3
    assert read
    assert sum(read) < 1 << 20


def test_two_tables_of_mappings_do_not_mix(path: Path) -> None:
    with Chain.open(path) as chain:
        image = chain.epoch().image
        assert [len(table.rows) for _, _, table in image.records(Vmas)] == [5]
