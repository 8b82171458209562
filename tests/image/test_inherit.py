"""Pages that a child still shares with its parent are stored once, and stay what they were."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crtrace.analyze.verify import verify
from crtrace.errors import ImageDamaged
from crtrace.image.places import PageKind, place
from crtrace.image.reader import Chain
from crtrace.image.store import ChainWriter, ImageWriter
from tests.image.support import SPACE, add_task, array, noise, numbers, page

Memory = dict[int, bytes]
PAGES = range(100, 120)


def put(image: ImageWriter, space: int, memory: Memory, round: int = 0) -> None:
    image.write_pages(space, numbers(sorted(memory)), array(memory[at] for at in sorted(memory)),
                      round=round)  # fmt: skip


def commit(image: ImageWriter, spaces: list[int]) -> None:
    for space in spaces:
        add_task(image, pid=100 + space, space=space)
    image.commit({})


def held(chain: Chain, epoch: int, space: int) -> Memory:
    view = chain.epoch(epoch)
    rows = view.index(space)
    return {int(at): view.read_pages(space, numbers([at]))[0].tobytes() for at in rows.pages}


@dataclass
class Step:
    """One epoch: who forks, whom it is written by and what, and who is gone."""

    forks: list[int]
    writes: list[tuple[int, int, int]]
    late: list[tuple[int, int, int]]
    exits: list[int]
    full: bool


WRITES = st.lists(
    st.tuples(st.integers(0, 5), st.sampled_from(PAGES), st.integers(0, 6)), max_size=12
)
STEPS = st.lists(
    st.builds(
        Step, forks=st.lists(st.integers(0, 5), max_size=3), writes=WRITES, late=WRITES,
        exits=st.lists(st.integers(1, 5), max_size=1), full=st.sampled_from([False] * 4 + [True]),
    ),
    min_size=1, max_size=6,
)  # fmt: skip


@settings(max_examples=150, deadline=None)
@given(steps=STEPS)
def test_any_family_reads_as_it_was(steps: list[Step]) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "chain"
        family: dict[int, Memory] = {SPACE: {at: noise(at) for at in PAGES}}
        expected: list[dict[int, Memory]] = []
        next_space = SPACE + 1
        with ChainWriter.open(path, create=True) as chain:
            for step in steps:
                image = chain.begin(full=step.full)
                origins: dict[int, int] = {}
                for at in step.exits:
                    if len(family) > 1:
                        family.pop(sorted(family)[at % len(family)])
                for at in step.forks:
                    parent = sorted(family)[at % len(family)]
                    family[next_space] = dict(family[parent])
                    origins[next_space] = parent
                    next_space += 1
                for at, number, value in step.writes:
                    family[sorted(family)[at % len(family)]][number] = page(value)
                for space in sorted(family):
                    if space in origins:
                        image.inherit(space, origins[space])
                    put(image, space, family[space])
                for at, number, value in step.late:
                    space = sorted(family)[at % len(family)]
                    family[space][number] = page(value)
                    put(image, space, {number: page(value)}, round=1)
                    put(image, space, {number: family[space][number]}, round=1)
                commit(image, sorted(family))
                expected.append({space: dict(memory) for space, memory in family.items()})
        with Chain.open(path) as reader:
            for number, spaces in enumerate(expected):
                assert {space: held(reader, number, space) for space in spaces} == spaces
            assert verify(reader).ok


@pytest.mark.parametrize("same_image", [True, False])
def test_what_a_child_shares_takes_no_room(tmp_path: Path, same_image: bool) -> None:
    memory = {at: noise(at) for at in PAGES}
    with ChainWriter.open(tmp_path, create=True) as chain:
        image = chain.begin()
        put(image, SPACE, memory)
        if not same_image:
            commit(image, [SPACE])
            image = chain.begin()
        image.inherit(2, SPACE)
        child = memory | {PAGES[3]: noise(99)}
        put(image, 2, child)
        add_task(image)
        add_task(image, pid=101, space=2)
        stats: dict[str, int] = {}
        image.commit(stats)
    shared = stats["pages_equal" if same_image else "pages_inherited"]
    assert shared == len(memory) - 1
    assert stats["bytes_raw"] == 4096 * (1 + len(memory) * same_image)
    with Chain.open(tmp_path) as reader:
        assert held(reader, -1, 2) == child
        assert verify(reader).ok


def test_a_lie_about_what_is_inherited_is_damage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = {at: noise(at) for at in PAGES}
    with ChainWriter.open(tmp_path, create=True) as chain:
        image = chain.begin()
        put(image, SPACE, memory)
        commit(image, [SPACE])
        image = chain.begin()
        pending = image._space(2)
        wrong = np.full((1, 2), 7, dtype=np.uint64)
        there = np.full(1, place(PageKind.INHERITED, SPACE))
        pending.add(0, numbers([PAGES[0]]), there, wrong)
        commit(image, [SPACE, 2])
        image = chain.begin()
        image._space(3).add(0, numbers([5]), there, wrong)
        commit(image, [SPACE, 2, 3])
    with Chain.open(tmp_path) as reader:
        report = verify(reader)
        assert [(each.file, each.pages_lost) for each in report.damage] == [
            ("00000001.img", 1), ("00000002.img", 1)
        ]  # fmt: skip
        with pytest.raises(ImageDamaged, match="inherits pages that space 1 has not"):
            reader.epoch(-1).read_pages(3, numbers([5]))
