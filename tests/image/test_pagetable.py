"""The page table against a dict."""

from __future__ import annotations

import tracemalloc
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from crtrace.image.pagetable import SLAB_REGIONS, PageTable
from crtrace.units import U64, contains, to_ranges
from tests.image.support import numbers

# Few regions so that pages meet, one of them far away, as a stack is from a heap.
NUMBERS = st.integers(0, 3000) | st.integers(2**35, 2**35 + 600)
PAGES = st.sets(NUMBERS, max_size=40)
STEPS = st.lists(st.tuples(st.sampled_from(["store", "drop"]), PAGES), max_size=12)


def hashes_of(pages: U64, step: int = 0) -> U64:
    """Something different for each page and step."""
    return np.stack((pages * np.uint64(2) + np.uint64(1), np.full_like(pages, step + 1)), axis=1)


def apply(steps: list[tuple[str, set[int]]]) -> tuple[PageTable, dict[int, tuple[int, int]]]:
    table, model = PageTable(), {}
    for at, (what, chosen) in enumerate(steps):
        pages = numbers(chosen)
        if what == "store":
            table.store(pages, hashes_of(pages, at))
            model.update({page: (page * 2 + 1, at + 1) for page in chosen})
        else:
            table.drop(pages)
            model = {page: value for page, value in model.items() if page not in chosen}
    return table, model


@given(steps=STEPS, asked=st.lists(NUMBERS))
def test_it_holds_what_a_dict_would_hold(
    steps: list[tuple[str, set[int]]], asked: list[int]
) -> None:
    table, model = apply(steps)
    pages = numbers([*asked, *model])
    known, hashes = table.lookup(pages)
    assert len(table) == len(model)
    assert known.tolist() == [int(page) in model for page in pages]
    assert list(map(tuple, hashes.tolist())) == [model.get(int(page), (0, 0)) for page in pages]


@given(steps=STEPS, present=PAGES)
def test_absent_pages_are_those_outside_of_the_ranges(
    steps: list[tuple[str, set[int]]], present: set[int]
) -> None:
    table, model = apply(steps)
    absent = table.absent_from(to_ranges(numbers(sorted(present))))
    assert absent.tolist() == sorted(model.keys() - present)


def test_ranges_may_span_regions_that_are_not_there() -> None:
    table = PageTable()
    pages = numbers([10, 5000, 90_000])
    table.store(pages, hashes_of(pages))
    assert table.absent_from(numbers([0, 2**40]).reshape(1, 2)).tolist() == []
    assert table.absent_from(numbers([11, 5000]).reshape(1, 2)).tolist() == [10, 5000, 90_000]
    assert table.absent_from(numbers([11, 5001]).reshape(1, 2)).tolist() == [10, 90_000]
    assert table.absent_from(numbers([0, 11, 600, 700]).reshape(2, 2)).tolist() == [5000, 90_000]


def test_it_grows_over_several_slabs() -> None:
    count = (2 * SLAB_REGIONS + 3) * 512
    rng = np.random.default_rng(5)
    pages = rng.permutation(np.arange(1 << 30, (1 << 30) + count, dtype=np.uint64))
    table = PageTable()
    for part in np.array_split(pages, 7):
        table.store(part, hashes_of(part))
    known, hashes = table.lookup(pages)
    assert known.all()
    assert (hashes == hashes_of(pages)).all()
    assert len(table) == count


def test_it_takes_about_17_bytes_a_page() -> None:
    count = 4 * SLAB_REGIONS * 512
    pages = np.arange(count, dtype=np.uint64)
    tracemalloc.start()
    table = PageTable()
    for start in range(0, count, 1 << 16):
        part = pages[start : start + (1 << 16)]
        table.store(part, hashes_of(part))
    held = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert len(table) == count
    assert held / count < 17.5


def test_threads_store_and_look_up_different_pages() -> None:
    table = PageTable()
    lots = [np.arange(at, 400_000, 8, dtype=np.uint64) for at in range(8)]

    def work(pages: U64) -> bool:
        for part in np.array_split(pages, 40):
            table.store(part, hashes_of(part))
            known, hashes = table.lookup(part)
            if not known.all() or (hashes != hashes_of(part)).any():
                return False
        return True

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(work, lots))
    assert len(table) == 400_000


@given(present=PAGES, asked=PAGES)
def test_absence_agrees_with_contains(present: set[int], asked: set[int]) -> None:
    table, pages = PageTable(), numbers(sorted(asked))
    table.store(pages, hashes_of(pages))
    ranges = to_ranges(numbers(sorted(present)))
    assert table.absent_from(ranges).tolist() == pages[~contains(ranges, pages)].tolist()
