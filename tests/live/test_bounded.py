"""Scans that only look where BPF has marked: exact whatever happens beside them, or told."""

from __future__ import annotations

import itertools
import os
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import crtrace.capture.target
from crtrace.linux.addrspace import EVERYTHING
from crtrace.linux.pagemap import SWAPPED, Filter
from crtrace.linux.procfs import Process
from crtrace.track import loader, softdirty, userfaultfd, windows
from crtrace.track.bytecode import BpfMap
from crtrace.track.dirty import MARKED_AGAIN, Evidence, WrittenPages, pages_under
from crtrace.track.guide import Guide
from crtrace.track.loader import Loading, kernel_types
from crtrace.units import PAGE_SIZE, U64, Pid, no_pages
from tests.live.conftest import Spawn, armed_by, asked_of, skip_unless_visits_are_told
from tests.live.exactness import Judged, acting, judged, take_with
from tests.live.harness import Target, flip_byte, maps
from tests.live.test_ways import RACING, WAYS, Stage, ksm, machine

__all__ = ["machine"]
MOMENTS = ("_pause", "_look_back")
"""Steps of a session: what comes before is after the last scan before the pause, or after that."""
BOUNDABLE = ("--ring", 0, "--uffd", 0)
"""Options of the target, which has neither then: with one, nothing would be bounded."""
WITHOUT_THESE = [
    way for way in WAYS.values() if way not in (RACING, "own_uffd") and not way.startswith("uring")
]
NOBODY = Pid(1 << 22)
"""No process has such a number."""
bounded: list[int] = []
"""For each epoch with a way around its pause, whether its scan was."""
COMPACT = Path("/proc/sys/vm/compact_memory")


@pytest.fixture(autouse=True, scope="module")
def small_targets_too() -> Iterator[None]:
    """A scan is bounded whenever that is exact, though it may not be shorter."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(windows, "LARGE", 1)
        patch.setattr(windows, "A_CALL", 0)
        patch.setattr(windows, "HELP", 1)
        patch.setattr(softdirty, "A_READ", 0)
        yield


@pytest.fixture(params=asked_of("userfaultfd", "soft-dirty"), scope="module")
def armer(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each armer whose scans can be bounded, where the kernel has what it needs."""
    yield from armed_by(request.param, request)


@pytest.fixture(scope="module")
def stage(machine: None, armer: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    """Scenes that tests of one way after another share, of a target that can be bounded."""
    stage = Stage((tmp_path_factory.mktemp("stage") for _ in iter(int, 1)), *BOUNDABLE)
    yield stage
    stage.close()
    assert len(bounded) < 20 or any(bounded), "nothing was tried"


@pytest.mark.usefixtures("armer")
def test_a_quiet_target_is_scanned_within_bounds(spawn: Spawn, tmp_path: Path) -> None:
    target = spawn("layout")
    with judged(target.pid, tmp_path / "chain") as judge:
        for page in range(5):
            target.obey(f"write anon_unwritten {page} 1 5")
            judge.take()
    assert [stats["scans_bounded"] for stats in judge.stats] == [1] * 5
    assert [stats["pages_late"] for stats in judge.stats] == [0] * 5


@pytest.mark.usefixtures("armer")
def test_nothing_is_bounded_where_reading_brings_memory_that_can_be_written(
    spawn: Spawn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(crtrace.capture.target, "filled_by_reads", lambda: True)
    with judged(spawn("layout").pid, tmp_path / "chain") as judge:
        for _ in range(2):
            judge.take()
    assert [stats["scans_bounded"] for stats in judge.stats] == [0, 0]


@pytest.mark.usefixtures("armer")
def test_nothing_is_bounded_while_somebody_is_left_out(spawn: Spawn, tmp_path: Path) -> None:
    """Who may run in the same memory."""
    with judged(spawn("layout").pid, tmp_path / "chain") as judge:
        tree = judge.session._tree
        take_with(judge, lambda: tree.refused.update({NOBODY: "for a test"}), "_pause")
        judge.take()
        judge.take()
    assert (judge.stats[0]["scans_bounded"], judge.stats[-1]["scans_bounded"]) == (0, 1)


@pytest.mark.parametrize("way", WITHOUT_THESE)
def test_each_way_around_the_pause(stage: Stage, way: str) -> None:
    lacking = ""

    def act() -> None:
        nonlocal lacking
        lacking = it.do(way)

    # While KSM runs it is in that memory nearly all the time, and little would be bounded.
    with ksm("1" if "ksm" in way else "0"), stage.lend() as it:
        for step in MOMENTS:
            with acting(it.run.session, step, act):
                it.take_meanwhile()
            assert it.run.stats[-1]["pages_late"] == 0
            bounded.append(it.run.stats[-1]["scans_bounded"])
            if lacking:
                pytest.skip(f"cannot run here: {lacking}")
        it.take()


@pytest.fixture
def others_unmarked(monkeypatch: pytest.MonkeyPatch) -> None:
    """What we write is not marked where kprobes are allowed, either."""
    monkeypatch.setattr(Loading, "_cover", lambda loading, code, fds: ())


@pytest.mark.usefixtures("others_unmarked")
@pytest.mark.parametrize("splitting", [False, True])
def test_what_nobody_could_notice_is_told_afterwards(
    spawn: Spawn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, armer: str, splitting: bool
) -> None:
    target = spawn("layout")
    address = target.ask("areas")["anon_written"]["addr"]
    with judged(target.pid, tmp_path / "chain") as judge:
        judge.take()
        assert judge.take()
        assert judge.stats[-1]["scans_bounded"]
        evidence = WrittenPages.evidence
        counter = itertools.count()

        def as_if_no_count_had_changed(
            marks: WrittenPages, space: int, tgids: list[int]
        ) -> Evidence:
            splits = next(counter) if splitting else 0
            return replace(evidence(marks, space, tgids), counts=(), splits=splits)

        monkeypatch.setattr(WrittenPages, "evidence", as_if_no_count_had_changed)
        monkeypatch.setattr(WrittenPages, "migrations", lambda marks: 0)
        pause = judge.session._pause
        judge.session.checkpoint("the counts are the same from here")

        def write_unnoticed(*args: Any) -> Any:
            flip_byte(target.pid, address)
            return pause(*args)

        monkeypatch.setattr(judge.session, "_pause", write_unnoticed)
        _, stats = judge.session.checkpoint("late")
        if splitting and armer == "soft-dirty":  # that could explain it
            assert stats["pages_late"] == 0
            return
        assert stats["pages_late"] == 1
        assert any("1 pages changed unnoticed" in limit for limit in stats["limits"])
        for _ in range(2):  # that way of scanning is not trusted any more
            judge.take()
            assert not judge.stats[-1]["scans_bounded"]


@pytest.mark.usefixtures("userfaultfd", "others_unmarked")
def test_the_second_of_two_faults_on_a_page_is_awaited(spawn: Spawn, tmp_path: Path) -> None:
    """The first one has made the page written, so the scan that found it has armed it."""
    target = spawn("layout")
    page = target.ask("areas")["anon_written"]["addr"]
    with judged(target.pid, tmp_path / "chain") as judge:
        judge.take()
        target.obey("write anon_written 0 1 5")
        target.obey("dontneed anon_written 0 1")
        target.obey("write anon_written 0 1 6")
        # Nobody notices what we do: as one that was marked before the first scan.
        take_with(judge, partial(flip_byte, target.pid, page), "_pause")
    assert judge.stats[-1]["scans_bounded"]


@pytest.mark.usefixtures("userfaultfd")
def test_a_page_that_was_armed_while_the_kernel_moved_it_is_looked_at_again(
    spawn: Spawn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = spawn("bench", "--mib", 64)
    data = max(maps(target.pid), key=lambda vma: vma.end - vma.start)
    moving: list[int] = []
    asked: list[U64] = []
    with judged(target.pid, tmp_path / "chain") as judge:
        judge.take()
        armer = judge.session._tree.root.target.armer
        assert isinstance(armer, userfaultfd.UserfaultfdArmer)
        scan, pause = armer._scanner.scan, judge.session._pause

        def as_if_it_moved(
            want: Filter, within: U64 | None = None, *, arm: bool = False, **report: int
        ) -> tuple[U64, U64]:
            ranges, categories = scan(want, within, arm=arm, **report)
            if want == userfaultfd.NOT_IN_PLACE:
                assert within is not None
                asked.append(within)
                return within, np.full(len(within), SWAPPED, dtype=np.uint64)
            addresses = ranges[:, 0] * np.uint64(PAGE_SIZE)
            inside = arm & (data.start <= addresses) & (addresses < data.end)
            moving.extend(addresses[inside].tolist())
            return ranges, categories | np.uint64(SWAPPED) * inside

        def arrive_and_write(*args: Any) -> Any:
            flip_byte(target.pid, moving[0])  # nobody notices, as if its protection were lost
            return pause(*args)

        monkeypatch.setattr(judge.session, "_little", 5)  # so that there are two scans before
        monkeypatch.setattr(armer._scanner, "scan", as_if_it_moved)
        monkeypatch.setattr(judge.session, "_pause", arrive_and_write)
        target.obey("random 8")
        judge.take()
        assert judge.stats[-1]["precopy_rounds"] == len(asked) == 2
        assert judge.stats[-1]["scans_bounded"]
        assert judge.stats[-1]["pages_late"] == 0


@pytest.mark.usefixtures("armer")
@pytest.mark.skipif(not os.access(COMPACT, os.W_OK), reason="cannot run here: no compaction")
def test_a_target_is_exact_while_the_kernel_compacts_memory(spawn: Spawn, tmp_path: Path) -> None:
    ended = threading.Event()

    def compact() -> None:
        while not ended.is_set():
            with suppress(OSError):
                COMPACT.write_text("1")

    target = spawn("bench", "--mib", 64)
    target.obey("write 2")
    thread = threading.Thread(target=compact)
    thread.start()
    try:
        with judged(target.pid, tmp_path / "chain") as judge:
            for _ in range(8):
                judge.take()
        assert any(stats["scans_bounded"] for stats in judge.stats)
        assert not any(stats["pages_late"] for stats in judge.stats)
    finally:
        ended.set()
        thread.join()


@pytest.fixture
def split(tmp_path: Path) -> Iterator[Path]:
    """Who writes "1" to this file splits all huge pages."""
    mounted = tmp_path / "debugfs"
    mounted.mkdir()
    file = mounted / "split_huge_pages"
    if subprocess.run(["mount", "-t", "debugfs", "debugfs", mounted], check=False).returncode:
        pytest.skip("cannot run here: no debugfs")
    try:
        file.write_text("1")
        yield file
    except OSError as error:
        pytest.skip(f"cannot run here: debugfs splits no huge pages: {error.strerror}")
    finally:
        subprocess.run(["umount", mounted], check=False, capture_output=True)


@pytest.mark.usefixtures("armer")
def test_huge_pages_that_are_split_are_not_late(spawn: Spawn, tmp_path: Path, split: Path) -> None:
    """Where dirty memory is split or moved, the kernel may set soft-dirty bits that nobody set."""
    target = spawn("bench", "--mib", 64)
    target.obey("write 2")
    with judged(target.pid, tmp_path / "chain") as judge:
        judge.take()
        for step in MOMENTS:
            take_with(judge, partial(split.write_text, "1"), step)
            judge.take()
    assert any(stats["scans_bounded"] for stats in judge.stats)
    assert not any(stats["pages_late"] for stats in judge.stats)


@pytest.mark.usefixtures("armer")
def test_a_ring_that_is_full_makes_scans_look_everywhere(
    spawn: Spawn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = Loading._made

    def with_a_small_ring(loading: Loading, each: BpfMap) -> int:
        one_page = BpfMap(each.name, each.kind, 0, 0, PAGE_SIZE)
        return made(loading, one_page if each.name == "fresh" else each)

    monkeypatch.setattr(Loading, "_made", with_a_small_ring)
    monkeypatch.setattr(loader, "RING_PAGES", 1)
    target = spawn("bench", "--mib", 400)  # 200 regions; the ring holds 170
    with judged(target.pid, tmp_path / "chain") as judge:
        judge.take()
        assert judge.stats[-1]["scans_bounded"]
        step = judge.session._pause

        def write_much(*args: Any) -> Any:
            target.obey("random 2000")
            return step(*args)

        def untold() -> int:
            return judge.session._marks.evidence(0, []).counts[0]

        assert untold() == 0
        monkeypatch.setattr(judge.session, "_pause", write_much)
        judge.take()
        assert not judge.stats[-1]["scans_bounded"]
        assert untold() > 0


def test_bpf_tells_address_spaces_apart(spawn: Spawn) -> None:
    with Loading(covering=False).result() as programs:  # else smaps would be read in peace
        marks = WrittenPages(programs)
        skip_unless_visits_are_told(marks)
        first, second = (Process(Pid(spawn("layout").pid)) for _ in range(2))
        with first, second:
            spaces = [marks.mm_behind(partial(_look, each))[0] for each in (first, second)]
            assert len({0, *spaces}) == 3
            before = [marks.evidence(space, []) for space in spaces]
            _look(first)  # ours do not count
            assert [marks.evidence(space, []) for space in spaces] == before
            os.system(f"cat /proc/{second.pid}/smaps > /dev/null")
            after = [marks.evidence(space, []) for space in spaces]
            assert [a == b for a, b in zip(before, after, strict=True)] == [True, False]


@pytest.fixture
def guide(spawn: Spawn) -> Iterator[Guide]:
    """The guide of a target that nothing happens to."""
    with Loading().result() as programs, Process(Pid(spawn("layout").pid)) as process:
        marks = WrittenPages(programs)
        yield Guide(marks, *marks.mm_behind(partial(_look, process)))


def numbers(*pages: int) -> U64:
    return np.array(pages, dtype=np.uint64)


@pytest.mark.parametrize(
    ("found", "marked", "again", "awaited"),
    [
        ([1000, 1002], [1000, 1001], [], []),
        ([1000, 1002], [1000, 1001, 5000], [], [[4608, 5120]]),
        ([1000, 1002], [1000, 1001], [1001], [[512, 1024]]),
        # A huge page that one of several faults has made, or the only one.
        ([512, 1024], [512, 700], [], [[512, 1024]]),
        ([512, 1024], [512], [], []),
        ([512, 1536], [600, 1100], [], []),
    ],
)
def test_what_may_be_under_way_over_the_first_scan_is_awaited(
    guide: Guide, found: list[int], marked: list[int], again: list[int], awaited: list[list[int]]
) -> None:
    guide.scanned(numbers(*found).reshape(-1, 2), turned=True, stopped=False)
    guide.await_faults(numbers(*marked), numbers(*again), [])
    assert guide.bounds([1], turned=False).tolist() == awaited
    # Another attempt at the same epoch waits for it as well.
    guide.scanned(no_pages(), turned=True, stopped=False)
    guide.await_faults(numbers(), numbers(), [])
    assert guide.bounds([1], turned=False).tolist() == awaited
    guide.scanned(no_pages(), turned=False, stopped=True)
    assert not len(guide.bounds([1], turned=False))


def test_nobody_is_awaited_where_all_stood_still(guide: Guide) -> None:
    guide.scanned(no_pages(), turned=True, stopped=True)
    guide.await_faults(numbers(1000), numbers(1000), [])
    assert not len(guide.bounds([1], turned=False))


def test_where_marks_found_no_room_everybody_is_awaited(
    guide: Guide, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(WrittenPages, "lost", lambda marks, counts: 1)
    guide.scanned(no_pages(), turned=True, stopped=False)
    guide.await_faults(numbers(), numbers(), [])
    assert guide.bounds([1], turned=False).tolist() == EVERYTHING.tolist()
    guide.scanned(no_pages(), turned=False, stopped=True)
    guide.paused([])
    guide.scanned(no_pages(), turned=True, stopped=False)
    guide.await_faults(numbers(), numbers(), [])
    assert not len(guide.bounds([1], turned=False))


def test_what_two_have_marked_is_marked_twice() -> None:
    marked = {7: numbers(3, 4), 8: numbers(4, 5), 7 | MARKED_AGAIN: numbers(3), 9: numbers(6)}
    pages, again = pages_under([7, 8], marked)
    assert (pages.tolist(), again.tolist()) == ([3, 4, 5], [3, 4])
    assert [len(each) for each in pages_under([1], marked)] == [0, 0]


def test_somebody_else_in_the_memory_is_told_from_the_target_itself(spawn: Spawn) -> None:
    target = spawn("layout")
    with Loading().result() as programs, Process(Pid(target.pid)) as process:
        marks = WrittenPages(programs)
        skip_unless_visits_are_told(marks)
        tgid = marks.add(process)
        space, _ = marks.mm_behind(partial(_look, process))
        marks.live_in(space, tgid)
        before = marks.evidence(space, [tgid])
        target.obey("brk +4")
        assert marks.evidence(space, [tgid]) != before
        assert marks.foreign_visits(space) == 0
        os.system(f"cat /proc/{process.pid}/smaps > /dev/null")
        assert marks.foreign_visits(space) > 0


@contextmanager
def followed() -> Iterator[tuple[Target, Process, WrittenPages, int]]:
    """A target that knows all ways, marked, and BPF's name of its address space."""
    with (
        Loading().result() as programs,
        Target("ways", "--seed", 1, "--ring", 0) as target,
        Process(Pid(target.pid)) as process,
    ):
        marks = WrittenPages(programs)
        tgid = marks.add(process)
        space, _ = marks.mm_behind(partial(_look, process))
        marks.live_in(space, tgid)
        yield target, process, marks, space


def test_what_a_target_writes_as_others_do_counts_as_theirs() -> None:
    """The kernel asks for the pages first, and the data come later."""
    if not kernel_types():
        pytest.skip("cannot run here: the kernel has no BTF")
    with followed() as (target, _, marks, space):

        def visits(way: str) -> int:
            before = marks.foreign_visits(space)
            assert target.command(way) == "ok"
            return marks.foreign_visits(space) - before

        for way in ("threads", "read", "brk", "file_changed"):
            # More than once: somebody may look at all processes just then.
            assert min(visits(way) for _ in range(5)) == 0, way
        for way in ("own_vm_writev", "forced"):
            assert min(visits(way) for _ in range(5)) > 0, way


def test_what_may_lose_soft_dirty_bits_is_counted_and_little_else() -> None:
    if not kernel_types():
        pytest.skip("cannot run here: the kernel has no BTF")
    # KSM would come by all the time.
    with ksm("0"), followed() as (target, process, marks, space):

        def counted(action: Callable[[], object]) -> list[bool]:
            before = marks.unlike_bits(space)
            action()
            return [b != n for b, n in zip(before, marks.unlike_bits(space), strict=True)]

        for way, expected in {
            "vm_writev": [False, False, False],
            "brk": [False, True, True],
            "cut": [False, False, True],
            "table_exchange": [True, True, True],
            "end_of_table": [True, True, True],
        }.items():
            assert counted(partial(target.obey, way)) == expected, way
        smaps = f"cat /proc/{process.pid}/smaps > /dev/null"
        assert counted(partial(os.system, smaps)) == [False, False, False]


def take_in_one_round(judge: Judged, target: Target) -> dict[str, Any]:
    """The statistics of an epoch of 32 written pages that were copied once before the pause."""
    target.obey(f"write anon_written 0 32 {len(judge.stats)}")
    judge.take()
    assert judge.stats[-1]["precopy_rounds"] == 1
    return judge.stats[-1]


@pytest.mark.usefixtures("userfaultfd")
def test_what_was_found_while_somebody_else_was_there_is_read_again(
    spawn: Spawn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = spawn("layout")
    with judged(target.pid, tmp_path / "chain") as judge:
        judge.take()
        collect = judge.session._collect
        residual = []
        for visit in ("true", f"cat /proc/{target.pid}/smaps"):

            def visited(*args: Any, visit: str = visit) -> Any:
                os.system(f"{visit} > /dev/null")
                return collect(*args)

            monkeypatch.setattr(judge.session, "_collect", visited)
            stats = take_in_one_round(judge, target)
            # What is in hugetlbfs cannot be armed, so it is read every time.
            residual.append(stats["pages_residual"] - stats["pages_unarmed"])
        assert residual[0] < 16
        assert residual[1] >= 32


@pytest.mark.usefixtures("userfaultfd")
def test_a_page_that_is_filled_between_two_walks_is_no_hole(
    spawn: Spawn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By who does not stand still in the pause."""
    target = spawn("layout")
    address = target.ask("areas")["anon_unwritten"]["addr"]
    filled: list[int] = []

    def one_after_the_other(beside: object, here: Any, there: Any) -> tuple[Any, Any]:
        nothing = there()
        flip_byte(target.pid, address + len(filled) * PAGE_SIZE)
        filled.append(address)
        return here(), nothing

    with judged(target.pid, tmp_path / "chain") as judge:
        judge.take()
        monkeypatch.setattr(userfaultfd, "_at_once", one_after_the_other)
        for _ in range(2):
            judge.take()
        assert len(filled) >= 2


@pytest.mark.usefixtures("userfaultfd")
def test_all_is_read_again_where_nobody_tells_of_visits(
    spawn: Spawn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when more address spaces are watched than can be counted."""
    monkeypatch.setattr(WrittenPages, "mm_behind", lambda marks, look: (0, 0))
    target = spawn("layout")
    with judged(target.pid, tmp_path / "chain") as judge:
        judge.take()
        assert take_in_one_round(judge, target)["pages_residual"] >= 32


def _look(process: Process) -> None:
    """Take the lock of its address space for a moment."""
    fd = process.open("pagemap")
    os.pread(fd, 8, 0)
    os.close(fd)


def test_regions_are_told_once_in_a_generation(spawn: Spawn) -> None:
    with Loading().result() as programs:
        marks = WrittenPages(programs)
        target = spawn("layout")
        with Process(Pid(target.pid)) as process:
            tgid = marks.add(process)
            area = target.ask("areas")["anon_unwritten"]
            page = np.uint64(area["addr"] // PAGE_SIZE)

            def told(**options: bool) -> bool:
                ranges = marks.regions([tgid], **options)
                return bool(((ranges[:, 0] <= page) & (page < ranges[:, 1])).any())

            assert not told()
            target.obey("write anon_unwritten 0 1 5")
            assert told()
            assert told()
            marks.switch()
            assert not told()
            assert told(before=True)
            assert page in marks.drain()[tgid]
            marks.switch()
            assert not told(before=True)
