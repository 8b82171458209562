"""Soft-dirty bits: what would make them lie, and what they leave to the pause."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from crtrace.errors import FeatureMissing
from crtrace.image.reader import Chain
from crtrace.linux.libc import kernel_version
from crtrace.track import softdirty
from crtrace.track.dirty import WrittenPages
from crtrace.track.softdirty import SoftDirtyArmer, try_on_ourselves
from crtrace.units import PAGE_SIZE
from tests.live.conftest import Spawn, armed_by
from tests.live.exactness import judged, reader
from tests.live.harness import flip_byte, layout_mismatches
from tests.live.runner import run
from tests.live.test_others import outside
from tests.live.test_ways import ksm, scene

SOFT_DIRTY = {"CRTRACE_ARMER": "soft-dirty"}


@pytest.fixture
def armer(request: pytest.FixtureRequest) -> Iterator[str]:
    """Sessions of the test use soft-dirty bits."""
    yield from armed_by("soft-dirty", request)


def test_a_kernel_without_them_is_told(spawn: Spawn, tmp_path: Path) -> None:
    try:
        try_on_ourselves()
    except (OSError, FeatureMissing):
        pass
    else:
        pytest.skip("cannot run here: this kernel has soft-dirty bits")
    done = run("dump", spawn("layout").pid, "-o", tmp_path / "chain", env=SOFT_DIRTY).expect(12)
    old = kernel_version() < softdirty.SINCE
    assert ("before Linux 6.1" if old else "CONFIG_MEM_SOFT_DIRTY") in done.stderr


def test_they_are_not_relied_on_before_linux_6_1(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(softdirty, "kernel_version", lambda: (6, 0))
    with pytest.raises(FeatureMissing, match=r"before Linux 6\.1"):
        try_on_ourselves.__wrapped__()


@pytest.mark.usefixtures("armer")
def test_bits_that_somebody_else_takes_off_hide_nothing(spawn: Spawn, tmp_path: Path) -> None:
    """What is written from outside has no mark of BPF's either."""
    target = spawn("layout")
    area = target.ask("areas")["anon_written"]["addr"]
    with judged(target.pid, tmp_path / "chain") as judge:
        judge.take()
        for page in range(3):
            flip_byte(target.pid, area + page * PAGE_SIZE)
            Path(f"/proc/{target.pid}/clear_refs").write_text("4")
            judge.take()
            assert judge.stats[-1]["pages_written"] >= 1
    with Chain.open(tmp_path / "chain") as chain:
        assert len(chain.entries) == 4


@pytest.mark.usefixtures("armer")
def test_only_what_was_written_is_read(spawn: Spawn, tmp_path: Path) -> None:
    target = spawn("layout")
    with judged(target.pid, tmp_path / "chain") as judge:
        judge.take()
        whole = judge.stats[-1]
        target.obey("write anon_written 0 8 5")
        judge.take()
    assert whole["precopy_stops"] >= 1
    assert judge.stats[-1]["precopy_stops"] == 0
    assert 8 <= judge.stats[-1]["pages_scanned"] < whole["pages_scanned"] / 3


@pytest.mark.usefixtures("armer")
def test_much_that_was_written_is_copied_before_the_pause(spawn: Spawn, tmp_path: Path) -> None:
    target = spawn("bench", "--mib", 64)
    with judged(target.pid, tmp_path / "chain") as judge:
        judge.take()
        target.obey("random 12000")
        judge.take()
    stats = judge.stats[-1]
    assert stats["precopy_stops"] >= 1
    assert stats["precopy_stopped_time"] > 0
    assert stats["pages_residual"] < 1000
    assert stats["pages_scanned"] > 8000


@pytest.mark.usefixtures("armer")
def test_huge_pages_without_bits_are_read_each_time(
    spawn: Spawn, tmp_path: Path, hugetlb_pages: int
) -> None:
    target = spawn("layout")
    pages = target.ask("areas")["hugetlb"]["pages"]
    with judged(target.pid, tmp_path / "chain") as judge:
        for seed in (1, 2, 3):
            target.obey(f"write hugetlb 0 {seed} {seed}")
            judge.take()
            assert judge.stats[-1]["pages_unarmed"] >= pages
        with judge.epoch() as epoch:
            assert layout_mismatches(reader(epoch), target) == []


@pytest.mark.usefixtures("armer")
def test_two_of_us_do_not_take_each_other_s_bits(spawn: Spawn, tmp_path: Path) -> None:
    target = spawn("layout")
    with judged(target.pid, tmp_path / "chain") as judge:
        judge.take()
        busy = run("dump", target.pid, "-o", tmp_path / "other", env=SOFT_DIRTY).expect(13)
        assert "another crtrace" in busy.stderr
        judge.take()
    run("dump", target.pid, "-o", tmp_path / "other", env=SOFT_DIRTY).expect(0)


@pytest.mark.usefixtures("armer")
@pytest.mark.parametrize("covering", [True, False], ids=["kprobes", "no kprobes"])
@pytest.mark.parametrize("area", ["anon_written", "anon_unwritten"])
def test_what_others_write_while_bits_are_taken_off_is_not_missed(
    spawn: Spawn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, area: str, covering: bool
) -> None:
    """Between reading the bits and taking them off nobody could see it in the bits."""
    if not covering:
        monkeypatch.setattr(WrittenPages, "_covers_others", lambda marks: False)
    target, done = spawn("layout"), []
    address = target.ask("areas")[area]["addr"]
    clear = SoftDirtyArmer._clear

    def written_before(armer: SoftDirtyArmer) -> None:
        if len(done) == 0:
            outside("writev", target, address + 2 * PAGE_SIZE, 2)
        done.append(armer)
        clear(armer)

    with judged(target.pid, tmp_path / "chain") as judge:
        judge.take()
        judge.take()
        monkeypatch.setattr(SoftDirtyArmer, "_clear", written_before)
        judge.take()
        assert len(done) > 0
        judge.take()


KSM_RUNS = Path("/sys/kernel/mm/ksm/run")


@pytest.mark.usefixtures("armer")
@pytest.mark.skipif(not KSM_RUNS.exists(), reason="cannot run here: no KSM")
def test_what_was_merged_since_it_was_written_is_not_missed(tmp_path: Path) -> None:
    """KSM forgets the bit. As long as it runs it shows as somebody else, so here it rests."""
    with ksm(), scene(tmp_path, 1) as it:
        for _ in range(2):
            KSM_RUNS.write_text("1")
            assert not it.do("ksm")
            KSM_RUNS.write_text("0")
            it.take()
            assert not it.do("ksm")  # written in part
            it.take()
