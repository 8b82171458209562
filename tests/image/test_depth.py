"""A chain may be long: its newest epoch is read through summaries, exactly and in few steps."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crtrace.analyze.verify import verify
from crtrace.image import imagefile, layers, summary
from crtrace.image.places import PAGE_LIMIT
from crtrace.image.reader import Chain
from crtrace.image.store import ChainWriter
from tests.image.support import (
    SPACE,
    add_task,
    apply_step,
    contents,
    epoch,
    noise,
    numbers,
    page,
    write,
)
from tests.image.tamper import Image, rewrite

SUMMARY = 15


@pytest.fixture(scope="module")
def long_chain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Epoch *n* writes page 1000 + n % 300; 600 epochs."""
    path = tmp_path_factory.mktemp("long") / "chain"
    with ChainWriter.open(path, create=True) as writer:
        epoch(writer, {at: page(at) for at in range(1000, 1300)})
        for number in range(1, 600):
            epoch(writer, {1000 + number % 300: page(5000 + number)})
    return path


def expected(number: int) -> dict[int, bytes]:
    memory = {at: page(at) for at in range(1000, 1300)}
    for each in range(1, number + 1):
        memory[1000 + each % 300] = page(5000 + each)
    return memory


@pytest.mark.parametrize("number", [0, 7, 8, 9, 63, 64, 65, 511, 512, 513, 599])
def test_any_epoch_of_a_long_chain_is_exact(long_chain: Path, number: int) -> None:
    with Chain.open(long_chain) as chain:
        assert contents(chain.epoch(number)) == expected(number)


def test_a_long_chain_takes_few_steps_and_opens_few_images(
    long_chain: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = []
    real = imagefile.Image.__init__
    monkeypatch.setattr(
        imagefile.Image, "__init__", lambda *args: (opened.append(args[2].epoch), real(*args))[1]
    )
    with Chain.open(long_chain) as chain:
        view = chain.epoch(500)
        assert len(view.lineage) == 501
        # 500 = 7 * 64 + 6 * 8 + 4, and the full one.
        assert len(view.layers(SPACE)) == 7 + 6 + 4 + 1
        assert len(opened) == 18
        view.read_pages(SPACE, numbers([1000 + 499 % 300]))
        assert len(opened) <= 19


def test_the_whole_long_chain_verifies(long_chain: Path) -> None:
    with Chain.open(long_chain) as chain:
        report = verify(chain)
        assert report.ok, report.damage
        per_kind = [len(chain.image(chain.entry(at)).ids(SUMMARY)) for at in (1, 7, 8, 64, 512)]
    assert per_kind == [0, 0, 1, 1, 1]


def test_the_writer_goes_on_from_a_long_chain(long_chain: Path, tmp_path: Path) -> None:
    with Chain.open(long_chain) as chain:
        known = {int(at): 0 for at in chain.epoch().index(SPACE).pages}
    with ChainWriter.open(long_chain) as writer:
        assert len(writer.known[SPACE]) == len(known) == 300
        pages = numbers(sorted(known))
        assert writer.known[SPACE].lookup(pages)[0].all()


def lie(change: str) -> Iterator[tuple[int, bytes]]:
    """Offsets and bytes that make a summary say something else."""
    fields = {"space": (0, 4), "base": (8, 8), "first": (16, 8), "end": (24, 8), "epoch": (-8, 8)}
    at, size = fields[change]
    yield at, (3).to_bytes(size, "little")


@pytest.mark.parametrize("change", ["space", "base", "first", "end", "epoch", "place", "missing"])
def test_a_summary_that_lies_is_found(tmp_path: Path, change: str) -> None:
    with ChainWriter.open(tmp_path, create=True) as writer:
        for number in range(9):
            epoch(writer, {at: noise(10 * number + at) for at in range(number, 12)})
    with Chain.open(tmp_path) as chain:
        before = contents(chain.epoch(8))

    def alter(image: object) -> None:
        (record,) = image.records(SUMMARY)  # type: ignore[attr-defined]
        count = int.from_bytes(record.payload[32:40], "little")
        if change == "place":
            record.payload[40 + 8 * count] ^= 1
        elif change == "missing":
            image.remove(record)  # type: ignore[attr-defined]
        else:
            for at, data in lie(change):
                record.payload[at : at + len(data) or None] = data

    rewrite(tmp_path, 8, alter)
    with Chain.open(tmp_path) as chain:
        report = verify(chain)
        if change == "missing":
            assert report.ok
        else:
            assert [damage.record.split()[0] for damage in report.damage] == ["SUMMARY"]
            assert report.damage[0].pages_lost == 0
        if change not in ("place", "epoch", "base"):
            assert contents(chain.epoch(8)) == before


@pytest.mark.parametrize("left_out", [0, 1])
def test_a_summary_of_a_whole_space_that_leaves_something_out_is_found(
    tmp_path: Path, left_out: int
) -> None:
    """Also when nothing is left of the image in which it was."""
    with ChainWriter.open(tmp_path, create=True) as writer:
        for number in range(9):
            with writer.begin() as image:
                add_task(image)
                if number > 1:
                    add_task(image, pid=200, space=2)
                    write(image, {min(number, 3): noise(number)}, space=2)
                image.commit({})

    def alter(image: Image) -> None:
        (record,) = (each for each in image.records(SUMMARY) if each.payload[0] == 2)
        assert (record.payload[8:16], record.payload[32]) == (bytes([255] * 8), 2)
        columns = (40, 8), (56, 8), (72, 16), (104, 8)
        kept = (record.payload[at + size * (1 - left_out) :][:size] for at, size in columns)
        record.payload[32:] = (1).to_bytes(8, "little") + b"".join(kept)

    with Chain.open(tmp_path) as chain:
        assert verify(chain).ok
    rewrite(tmp_path, 8, alter)
    with Chain.open(tmp_path) as chain:
        assert [damage.record.split()[0] for damage in verify(chain).damage] == ["SUMMARY"]


OPERATION = st.tuples(
    st.sampled_from(["write", "hole", "space", "drop", "full"]),
    st.sets(st.integers(0, 40), max_size=6),
    st.integers(0, 5),
)


@settings(max_examples=60, deadline=None)
@given(steps=st.lists(OPERATION, min_size=8, max_size=40), fan_out=st.sampled_from([2, 3]))
def test_summaries_change_nothing_that_is_read(
    steps: list[tuple[str, set[int], int]], fan_out: int
) -> None:
    """Many short spans, spaces that come, go and come again, against a dict."""
    with (
        pytest.MonkeyPatch.context() as patch,
        tempfile.TemporaryDirectory() as scratch,
    ):
        patch.setattr(summary, "FAN_OUT", fan_out)
        memory: dict[int, dict[int, bytes]] = {SPACE: {}}
        states = []
        with ChainWriter.open(scratch, create=True) as writer:
            for kind, pages, seed in steps:
                apply_step(writer, memory, kind, pages, seed)
                states.append({space: dict(held) for space, held in memory.items()})
        with Chain.open(scratch) as chain:
            assert verify(chain).ok
            for number, state in enumerate(states):
                view = chain.epoch(number)
                assert {space: contents(view, space=space) for space in view.spaces} == state
                walked = chain.epoch(number)
                with pytest.MonkeyPatch.context() as without:
                    without.setattr(layers, "summary_layer", lambda *args: None)
                    for space in walked.spaces:
                        assert len(walked.layers(space)) >= len(view.layers(space))
                        assert contents(walked, space=space) == state[space]


def test_a_summary_of_many_rows_has_several_parts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(summary, "FAN_OUT", 2)
    monkeypatch.setattr(summary, "SUMMARY_ROWS", 1000)
    zeros = np.zeros((512, 4096), dtype=np.uint8)
    with ChainWriter.open(tmp_path, create=True) as writer:
        for number in range(3):
            with writer.begin() as image:
                add_task(image)
                first = 3000 * number
                for at in range(0, 30_000 if number else 1000, 500):
                    pages = np.arange(first + at, first + at + 500, dtype=np.uint64) * 2
                    image.write_pages(SPACE, pages.astype(np.uint64), zeros[:500])
                image.commit({})
    with Chain.open(tmp_path) as chain:
        assert verify(chain).ok
        parts = chain.image(chain.entry(2)).summary(SPACE)
        assert len(parts) > 20
        assert (parts[0].first, parts[-1].end) == (0, PAGE_LIMIT)
        view = chain.epoch(2)
        assert len(view.layers(SPACE)) == 2
        merged = view.index(SPACE).pages
        assert merged.tolist() == sorted({*range(0, 2000, 2), *range(6000, 72000, 2)})
        for at in (0, 5999, 6000, 6001, 40_000, 71_998, 71_999, 10**9):
            follow = merged[merged >= at]
            assert view.at_or_after(SPACE, at) == (follow[0] if len(follow) else PAGE_LIMIT)
