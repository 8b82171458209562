"""Range arrays against plain sets of page numbers."""

from __future__ import annotations

from unittest.mock import patch

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from crtrace import units
from crtrace.units import U64

PAGES = st.sets(st.integers(0, 40))
FAR = 2**52 - 64


def ranges_of(pages: set[int], base: int = 0) -> U64:
    return units.to_ranges(np.array(sorted(pages), dtype=np.uint64) + np.uint64(base))


def pages_of(ranges: U64, base: int = 0) -> set[int]:
    return {int(page) - base for start, end in ranges for page in range(int(start), int(end))}


def assert_range_array(ranges: U64) -> None:
    assert ranges.dtype == np.uint64
    assert ranges.shape[1:] == (2,)
    assert (ranges[:, 0] < ranges[:, 1]).all()
    assert (ranges[1:, 0] >= ranges[:-1, 1]).all()


@pytest.mark.parametrize("base", [0, FAR])
@given(pages=PAGES)
def test_to_ranges_and_expand_are_inverse(base: int, pages: set[int]) -> None:
    ranges = ranges_of(pages, base)
    assert_range_array(ranges)
    assert (ranges[1:, 0] > ranges[:-1, 1]).all(), "neighbours are not joined"
    assert units.expand(ranges).tolist() == sorted(page + base for page in pages)
    assert units.expand(ranges).dtype == np.uint64
    assert units.count_pages(ranges) == len(pages)


@pytest.mark.parametrize("few", [0, units.FEW])
@pytest.mark.parametrize("base", [0, FAR])
@given(a=PAGES, b=PAGES)
def test_set_operations(few: int, base: int, a: set[int], b: set[int]) -> None:
    left, right = ranges_of(a, base), ranges_of(b, base)
    with patch.object(units, "FEW", few):
        found = (
            (units.intersect(left, right), a & b),
            (units.subtract(left, right), a - b),
            (units.merge(left, right), a | b),
        )
    for result, expected in found:
        assert_range_array(result)
        assert pages_of(result, base) == expected


@given(values=st.lists(st.integers(0, 40)))
def test_distinct_values_ascend(values: list[int]) -> None:
    found = units.distinct(np.array(values, dtype=np.uint64))
    assert found.tolist() == sorted(set(values))
    assert found.dtype == np.uint64


@pytest.mark.parametrize("few", [0, units.FEW])
@given(rows=st.lists(st.tuples(st.integers(0, 40), st.integers(1, 9))))
def test_merge_takes_overlapping_ranges_in_any_order(few: int, rows: list[tuple[int, int]]) -> None:
    array = np.array([(at, at + n) for at, n in rows], dtype=np.uint64).reshape(-1, 2)
    with patch.object(units, "FEW", few):
        merged = units.merge(array)
    assert_range_array(merged)
    assert (merged[1:, 0] > merged[:-1, 1]).all(), "neighbours are not joined"
    assert pages_of(merged) == {page for at, n in rows for page in range(at, at + n)}


@given(a=PAGES, asked=st.lists(st.integers(0, 45)))
def test_contains(a: set[int], asked: list[int]) -> None:
    found = units.contains(ranges_of(a), np.array(asked, dtype=np.uint64))
    assert found.tolist() == [page in a for page in asked]


def test_nothing_is_an_empty_range_array() -> None:
    assert_range_array(units.no_pages())
    assert len(units.merge()) == 0
    assert units.count_pages(units.no_pages()) == 0
    assert units.expand(units.no_pages()).dtype == np.uint64


def test_a_page_array_is_a_region() -> None:
    assert units.PAGE_SIZE == 4096
    assert units.CHUNK_BYTES == units.REGION_PAGES * units.PAGE_SIZE == 2 << 20


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (1536 * 1024, "1.5 MiB"),
        (3 << 30, "3.0 GiB"),
        (5 << 40, "5.0 TiB"),
        (-2048, "-2.0 KiB"),
    ],
)
def test_human_bytes(count: int, text: str) -> None:
    assert units.human_bytes(count) == text
