"""Chains of random epochs against a dict that plays the target's memory."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from unittest import mock

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from crtrace.analyze.verify import verify
from crtrace.image.places import PageKind
from crtrace.image.reader import Chain
from crtrace.image.store import ChainWriter
from tests.image.support import SPACE, ZERO, add_task, contents, noise, numbers, page, write

PAGES = st.integers(1000, 1030) | st.integers(2**34, 2**34 + 5)
# Few values, so that pages often get what they had, and zeros often enough.
VALUES = st.sampled_from([ZERO, page(1), page(2), page(3), noise(1)])
ROUND = st.dictionaries(PAGES, VALUES, max_size=12)


@dataclass
class Step:
    """One epoch: rounds of writes, then pages that vanish, then whether it is committed."""

    rounds: list[dict[int, bytes]]
    vanish: set[int] = field(default_factory=set)
    fail: set[int] = field(default_factory=set)
    full: bool = False
    commit: bool = True
    reopen: bool = False


STEPS = st.lists(
    st.builds(
        Step, rounds=st.lists(ROUND, min_size=1, max_size=4), vanish=st.sets(PAGES, max_size=6),
        fail=st.sets(PAGES, max_size=2), full=st.sampled_from([False] * 5 + [True]),
        commit=st.sampled_from([True] * 4 + [False]), reopen=st.booleans(),
    ),
    min_size=1, max_size=6,
)  # fmt: skip


class Play:
    """Runs steps on a chain and on the model, and keeps what each committed epoch should be."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.writer = ChainWriter.open(path, create=True)
        self.memory: dict[int, bytes] = {}
        self.expected: list[dict[int, bytes]] = []

    def run(self, step: Step, order: list[int]) -> None:
        if step.reopen:
            self.writer.close()
            self.writer = ChainWriter.open(self.path)
        memory = {} if step.full or not self.expected else dict(self.memory)
        image = self.writer.begin(full=step.full)
        add_task(image)
        # Threads finish in any order; the number of the round decides, not the order.
        for at in order:
            if at < len(step.rounds):
                write(image, step.rounds[at], round=at)
        for pages in step.rounds:
            memory.update(pages)
        vanish, fail = sorted(step.vanish), sorted(step.fail - step.vanish)
        image.mark_holes(SPACE, numbers(vanish))
        image.mark_unreadable(SPACE, numbers(fail), 14)
        for number in vanish:
            memory.pop(number, None)
        memory.update(dict.fromkeys(fail, b""))
        if step.commit:
            image.commit({})
            self.memory = memory
            self.expected.append(memory)
        else:
            image.abort()

    def check_known(self) -> None:
        """The writer's table is what the newest epoch holds."""
        table = self.writer.known.get(SPACE)
        present = sorted(self.expected[-1]) if self.expected else []
        assert (len(table) if table else 0) == len(present)
        if table:
            assert table.lookup(numbers(present))[0].all()


@settings(max_examples=150, deadline=None)
@given(steps=STEPS, order=st.permutations(range(4)), kept=st.sampled_from([3, 1 << 18]))
def test_every_epoch_reads_as_the_memory_was(
    steps: list[Step], order: list[int], kept: int
) -> None:
    """Whether all fits into memory or nearly nothing does."""
    with tempfile.TemporaryDirectory() as name, mock.patch("crtrace.image.pending.KEPT", kept):
        play = Play(Path(name) / "chain")
        for step in steps:
            play.run(step, order)
            play.check_known()
        play.writer.close()
        with Chain.open(play.path) as chain:
            assert len(chain.entries) == len(play.expected)
            for number, expected in enumerate(play.expected):
                check_epoch(chain, number, expected)
            report = verify(chain)
            assert report.ok, report.damage
            assert not report.notices


def check_epoch(chain: Chain, number: int, expected: dict[int, bytes]) -> None:
    epoch = chain.epoch(number)
    index = epoch.index(SPACE)
    assert index.pages.tolist() == sorted(expected)
    held = contents(epoch)
    for at, data in expected.items():
        assert held[at] == (data or ZERO)
    asked = numbers([*range(998, 1033), *range(2**34 - 1, 2**34 + 7)])
    kinds = epoch.page_kinds(SPACE, asked).tolist()
    for at, kind in zip(asked.tolist(), kinds, strict=True):
        assert kind == expected_kind(expected.get(at))
    lost = {row.first + at for row in epoch.losses() for at in range(row.count)}
    assert lost == {at for at, data in expected.items() if not data}


def expected_kind(data: bytes | None) -> PageKind:
    if data is None:
        return PageKind.HOLE
    if not data:
        return PageKind.UNREADABLE
    return PageKind.ZERO if data == ZERO else PageKind.STORED


def test_a_large_epoch_spans_chunks_windows_and_merges(tmp_path: Path) -> None:
    """More rows than one search, one merge step and one chunk hold, over several images."""
    count, path = 300_000, tmp_path / "chain"
    pages = np.arange(10_000, 10_000 + 2 * count, 2, dtype=np.uint64)
    zeros = np.zeros((4096, 4096), dtype=np.uint8)
    with ChainWriter.open(path, create=True) as writer:
        with writer.begin() as image:
            add_task(image)
            for part in np.array_split(pages, count // 4096 + 1):
                image.write_pages(SPACE, part, zeros[: len(part)])
            image.commit({})
        with writer.begin() as image:
            add_task(image)
            changed = pages[::1000]
            write(image, {int(at): page(int(at)) for at in changed})
            image.mark_holes(SPACE, pages[5::1000])
            image.commit({})
    with Chain.open(path) as chain:
        epoch = chain.epoch()
        expected = np.delete(pages, np.arange(5, count, 1000))
        assert (epoch.index(SPACE).pages == expected).all()
        kinds = epoch.page_kinds(SPACE, pages)
        assert (kinds[::1000] == PageKind.STORED).all()
        assert (kinds[5::1000] == PageKind.HOLE).all()
        assert (kinds[7::1000] == PageKind.ZERO).all()
        assert not (epoch.page_kinds(SPACE, pages + np.uint64(1)) != PageKind.HOLE).any()
        data = epoch.read_pages(SPACE, changed)
        assert data.tobytes() == b"".join(page(int(at)) for at in changed)
