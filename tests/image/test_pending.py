"""What comes of pages that are said several things of: the last round decides, in any order."""

from __future__ import annotations

import os
import tempfile
from contextlib import closing
from unittest import mock

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from crtrace.image import pending
from crtrace.image.chaindir import ChainDir
from crtrace.image.pending import PendingSpace, Piece, PieceElsewhere
from crtrace.image.places import PAGE_LIMIT, PageKind, place
from crtrace.image.spool import PiecesFile
from tests.image.support import numbers

PIECES = st.lists(
    st.tuples(
        st.integers(0, 3),
        st.sets(st.one_of(st.integers(0, 60), st.integers(PAGE_LIMIT - 5, PAGE_LIMIT - 1)),
                min_size=1, max_size=20),
        st.booleans(),
    ),
    max_size=12,
)  # fmt: skip


@given(PIECES, st.integers(1, 30), st.integers(0, 60))
def test_settled_entries_are_those_of_a_dict(
    pieces: list[tuple[int, set[int], bool]], step: int, kept: int
) -> None:
    """However many windows the rows are cut into, and how few are kept in memory."""
    with (
        tempfile.TemporaryDirectory() as folder,
        closing(ChainDir.make(folder)) as directory,
        closing(PiecesFile(directory)) as file,
        mock.patch.multiple(pending, STEP=step, SAMPLE=max(1, step // 4), KEPT=kept),
    ):
        compare(PendingSpace(lambda: file), pieces)
        assert os.listdir(folder) == []


def compare(space: PendingSpace, pieces: list[tuple[int, set[int], bool]]) -> None:
    """Say all that of the pages, and of a dict, and settle."""
    expected: dict[int, tuple[int, int]] = {}
    for turn, (_, pages, hashed) in sorted(enumerate(pieces), key=lambda it: it[1][0]):
        expected |= dict.fromkeys(pages, (turn + 1, (turn + 100) * hashed))
    for turn, (round, pages, hashed) in enumerate(pieces):
        rows = len(pages)
        hashes = np.full((rows, 2), turn + 100, dtype=np.uint64) if hashed else None
        places = np.full(rows, place(PageKind.STORED, turn + 1))
        space.add(round, numbers(sorted(pages)), places, hashes)
    assert space.rows == sum(len(pages) for _, pages, _ in pieces)
    settled = space.settle(None)
    found = zip(settled.pages.tolist(), settled.places.tolist(), settled.hashes.tolist(),
                strict=True)  # fmt: skip
    assert list(found) == [
        (page, int(place(PageKind.STORED, chunk)), [half, half])
        for page, (chunk, half) in sorted(expected.items())
    ]
    assert not len(space.settle(None).pages), "and it is empty then"


def test_pieces_that_interleave_come_in_windows_all_the_same() -> None:
    """40 pieces of 512 rows, each across the whole space."""
    every = np.arange(40 * 512, dtype=np.uint64)
    pieces: list[Piece | PieceElsewhere] = [
        Piece((0, turn), every[turn::40], np.zeros(512, np.uint64), None) for turn in range(40)
    ]
    with mock.patch.object(pending, "STEP", 4096):
        rows = [sum(len(piece.pages) for piece in window) for window in pending._windows(pieces)]
    assert sum(rows) == len(every)
    assert max(rows) <= 4096 + 40 * pending.SAMPLE
    assert not pieces, "what is used up is freed"
