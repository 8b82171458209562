"""Equal pages are stored once in an epoch, whoever wrote them."""

from __future__ import annotations

import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from crtrace.image import contents as contents_module
from crtrace.image.contents import StoredContents
from crtrace.image.places import chunks, slots
from crtrace.image.reader import Chain
from crtrace.image.store import ChainWriter
from crtrace.units import PAGE_SIZE, U64
from tests.image.support import SPACE, add_task, contents, noise, page, write


def some_hashes(count: int) -> U64:
    return np.random.default_rng(1).integers(0, 2**64, size=(count, 2), dtype=np.uint64)


def test_each_of_many_contents_is_claimed_once_and_found_again() -> None:
    """Against a dict; the table grows several times meanwhile."""
    pool, random = some_hashes(9000), np.random.default_rng(2)
    table, first = StoredContents(), {}
    for chunk in range(1, 60):
        picked = random.integers(0, len(pool), size=512)
        places, new = table.claim(pool[picked], chunk)
        found = zip(picked.tolist(), chunks(places).tolist(), slots(places).tolist(), new.tolist(),
                    strict=True)  # fmt: skip
        slot = 0
        for which, where, at, stored in found:
            if which not in first:
                first[which] = (chunk, slot)
                assert stored
                slot += 1
            else:
                assert not stored
            assert (where, at) == first[which]
    assert len(first) > 8000


def test_half_a_hash_in_common_is_not_enough() -> None:
    hashes = np.array([[7, 1], [7, 2], [9, 1]], dtype=np.uint64)
    table = StoredContents()
    places, new = table.claim(hashes, 1)
    assert len(set(places.tolist())) == 3
    assert new.all()
    again, new = table.claim(hashes[::-1], 2)
    assert new.tolist() == [False, True, False], "of two such, one is known again"
    assert again[[0, 2]].tolist() == places[[2, 0]].tolist()


def test_a_full_table_learns_no_more_and_forgets_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contents_module, "MOST", 3000)
    pool, table = some_hashes(4096), StoredContents()
    for chunk in range(8):
        assert table.claim(pool[512 * chunk : 512 * (chunk + 1)], chunk)[1].all()
    for chunk in range(8):
        new = table.claim(pool[512 * chunk : 512 * (chunk + 1)], 9)[1]
        assert new.all() if chunk >= 3000 // 512 else not new.any()


def test_a_full_table_takes_40_mib() -> None:
    pool = some_hashes(contents_module.MOST).reshape(-1, 512, 2)
    tracemalloc.start()
    table = StoredContents()
    for chunk, hashes in enumerate(pool):
        assert table.claim(hashes, chunk)[1].all()
    taken = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert 39 << 20 < taken < 41 << 20
    assert not table.claim(pool[7], 9999)[1].any()


def test_equal_pages_of_all_spaces_and_calls_are_stored_once(tmp_path: Path) -> None:
    with ChainWriter.open(tmp_path, create=True) as writer, writer.begin() as image:
        for space in (SPACE, 2):
            add_task(image, pid=100 + space, space=space)
        write(image, {1: noise(1), 2: noise(1), 3: noise(2)})
        write(image, {9: noise(2), 10: noise(3)}, round=1)
        write(image, {1: noise(1), 7: noise(3)}, space=2)
        stats: dict[str, int] = {}
        entry = image.commit(stats)
    assert entry.bytes_raw == 3 * PAGE_SIZE
    assert stats["pages_equal"] == 4
    with Chain.open(tmp_path) as chain:
        view = chain.epoch()
        assert contents(view) == {
            1: noise(1), 2: noise(1), 3: noise(2), 9: noise(2), 10: noise(3),
        }  # fmt: skip
        assert contents(view, space=2) == {1: noise(1), 7: noise(3)}


def test_threads_that_meet_store_equal_pages_once(tmp_path: Path) -> None:
    with ChainWriter.open(tmp_path, create=True) as writer, writer.begin() as image:
        add_task(image)
        with ThreadPoolExecutor(8) as pool:
            for first in range(0, 64 * 40, 64):
                pool.submit(write, image, {first + at: page(1 + at) for at in range(64)})
        entry = image.commit({})
    assert entry.pages_written == 64 * 40
    assert entry.bytes_raw == 64 * PAGE_SIZE
    with Chain.open(tmp_path) as chain:
        assert contents(chain.epoch()) == {at: page(1 + at % 64) for at in range(64 * 40)}
