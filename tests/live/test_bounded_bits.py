"""Bounded scans by soft-dirty bits, which are not taken off each time."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from crtrace.track import softdirty
from crtrace.track.dirty import WrittenPages
from crtrace.track.softdirty import Bits, SoftDirtyArmer
from crtrace.units import U64, count_pages
from tests.live.conftest import Spawn, armed_by
from tests.live.exactness import judged, take_with
from tests.live.harness import flip_byte
from tests.live.test_bounded import small_targets_too

__all__ = ["small_targets_too"]


@pytest.fixture(autouse=True)
def armer(request: pytest.FixtureRequest) -> Iterator[str]:
    """Sessions use soft-dirty bits."""
    yield from armed_by("soft-dirty", request)


def test_bits_are_taken_off_when_reading_again_has_cost_more(
    spawn: Spawn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = spawn("layout")
    with judged(target.pid, tmp_path / "chain") as judge:

        def write_and_take(turn: int) -> None:
            target.obey(f"write anon_written {8 * turn} 8 {turn + 1}")
            judge.take()

        judge.take()
        armer = judge.session._tree.root.target.armer
        assert isinstance(armer, SoftDirtyArmer)
        write_and_take(0)
        once_more = armer._read_again + count_pages(armer._not_rearmed) + 1
        monkeypatch.setattr(softdirty, "A_READ", armer._effort // once_more)
        for turn in (1, 2, 3):
            write_and_take(turn)
    stats = judge.stats[1:]
    assert [each["scans_bounded"] for each in stats] == [1, 1, 0, 1]
    assert stats[2]["pages_scanned"] >= stats[1]["pages_scanned"] >= stats[0]["pages_scanned"]
    assert stats[2]["pages_scanned"] >= 24
    assert stats[2]["bpf_missed"] <= softdirty.CANARIES
    assert stats[3]["pages_scanned"] < stats[2]["pages_scanned"]


def test_pages_that_keep_their_bits_are_found_within_bounds(
    spawn: Spawn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As those that a device has pinned: the target writes them without a fault."""
    target = spawn("layout")
    address = target.ask("areas")["anon_written"]["addr"]
    clear = SoftDirtyArmer._clear

    def kept(armer: SoftDirtyArmer) -> None:
        clear(armer)
        flip_byte(target.pid, address)  # nobody counts what we do

    with judged(target.pid, tmp_path / "chain") as judge:
        judge.take()
        monkeypatch.setattr(SoftDirtyArmer, "_clear", kept)
        monkeypatch.setattr(softdirty, "A_READ", 1 << 40)  # once everywhere
        target.obey("write anon_written 0 1 9")
        judge.take()
        monkeypatch.setattr(softdirty, "A_READ", 0)
        take_with(judge, partial(flip_byte, target.pid, address), "_pause")
        judge.take()
    assert [stats["scans_bounded"] for stats in judge.stats[1:]] == [0, 1, 1]


def test_what_loses_bits_while_they_are_read_within_bounds_makes_it_all_read(
    spawn: Spawn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, read = spawn("layout"), []
    bits = SoftDirtyArmer._bits

    def merged_meanwhile(armer: SoftDirtyArmer, windows: U64 | None = None) -> Bits:
        read.extend([] if windows is None else [windows])
        return bits(armer, windows)

    with judged(target.pid, tmp_path / "chain") as judge:
        monkeypatch.setattr(WrittenPages, "unlike_bits", lambda marks, space: (len(read), 0, 0))
        judge.take()
        monkeypatch.setattr(SoftDirtyArmer, "_bits", merged_meanwhile)
        judge.take()
        monkeypatch.setattr(SoftDirtyArmer, "_bits", bits)
        judge.take()
    assert [stats["scans_bounded"] for stats in judge.stats] == [1, 0, 1]
    assert len(read) == 1
