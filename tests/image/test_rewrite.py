"""Epochs dropped and merged: what is left reads as before, whatever happens on the way."""

from __future__ import annotations

import os
import resource
import shutil
import tempfile
import tracemalloc
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crtrace import faults
from crtrace.analyze.verify import verify
from crtrace.errors import CrtraceError, ImageDamaged, UsageError
from crtrace.image import summary
from crtrace.image.losses import UnreadableReason
from crtrace.image.reader import Chain
from crtrace.image.records import Arch, Mm, Task
from crtrace.image.store import ChainWriter, ImageWriter
from crtrace.rewrite import check as check_module
from crtrace.rewrite import copy as copy_module
from crtrace.rewrite import prune as prune_module
from crtrace.rewrite.merge import merge
from crtrace.rewrite.prune import prune
from crtrace.units import PAGE_SIZE, U64
from tests.image.second_opinion import assert_same
from tests.image.support import (
    SPACE,
    ZERO,
    add_task,
    anon,
    apply_step,
    contents,
    epoch,
    noise,
    numbers,
    page,
    small_chain,
    write,
)
from tests.image.test_crash import FAULTS, fails, outcome, trip_at

Memory = dict[int, dict[int, bytes]]


def state(path: Path) -> dict[int, tuple[Memory, list[tuple[int, int, int, int]]]]:
    """Every epoch: its spaces with their pages, and what could not be read."""
    with Chain.open(path) as chain:
        assert verify(chain).ok
        found = {}
        for entry in chain.entries:
            view = chain.epoch(entry.epoch)
            memory = {space: contents(view, space=space) for space in view.spaces}
            lost = [(loss.space, loss.first, loss.count, loss.errno) for loss in view.losses()]
            found[entry.epoch] = memory, lost
        return found


def files(path: Path) -> dict[str, bytes]:
    return {each.name: each.read_bytes() for each in path.iterdir() if each.name != "lock"}


def ten(path: Path) -> Path:
    """Ten epochs, the sixth full; holes, zeros, unreadable pages, a child that inherits."""
    with ChainWriter.open(path, create=True) as writer:
        for number in range(10):
            with writer.begin(full=number == 5, reason=f"r{number}") as image:
                child = 3 <= number <= 7
                add_task(image, [anon(1, 90)])
                if child:
                    add_task(image, [anon(1, 90)], pid=200, space=2)
                if number == 3:
                    image.inherit(2, SPACE)
                own = {number: noise(number), 20: page(number + 1), 30 + number: ZERO}
                if image.header.full:
                    own |= {at: page(at) for at in range(40, 60)}
                write(image, own)
                image.mark_holes(SPACE, numbers([number + 28]))
                image.mark_unreadable(SPACE, numbers([70, 71]), 5 + number)
                if child:
                    write(image, {1: noise(1), 2: noise(2), 60 + number: noise(99)}, space=2)
                image.commit({"frozen_time": number})
    return path


@pytest.mark.parametrize("keep", [1, 2, 3, 4, 5, 6, 9, 10, 99])
@pytest.mark.parametrize("every", [0, 1, 2, 4])
def test_what_is_kept_reads_as_before(tmp_path: Path, keep: int, every: int) -> None:
    path = ten(tmp_path / "chain")
    before = state(path)
    done = prune(path, keep=keep, every=every)
    kept = [at for at in range(10) if at >= 10 - keep or (every and at % every == 0)]
    assert list(done.kept) == kept
    assert set(done.dropped) == set(range(10)) - set(kept)
    assert state(path) == {at: before[at] for at in kept}
    images = {name for name in os.listdir(path) if name.endswith(".img")}
    with Chain.open(path) as chain:
        assert images == {entry.name for entry in chain.entries}
        assert [chain.epoch(at).header.reason for at in kept] == [f"r{at}" for at in kept]
        assert [chain.epoch(at).stats["frozen_time"] for at in kept] == kept
    assert done.bytes_after == sum((path / name).stat().st_size for name in images)


def test_the_newest_images_stay_byte_for_byte(tmp_path: Path) -> None:
    path = ten(tmp_path / "chain")
    before = files(path)
    done = prune(path, keep=3)
    assert done.rewritten == (7,)
    after = files(path)
    for name in ("00000008.img", "00000009.img"):
        assert after[name] == before[name]
    assert set(after) == {"chain.idx", "00000007.1.img", "00000008.img", "00000009.img"}


def test_nothing_to_drop_changes_nothing(tmp_path: Path) -> None:
    path = ten(tmp_path / "chain")
    before = files(path)
    assert prune(path, keep=10).dropped == ()
    assert files(path) == before


def test_a_chain_goes_on_after_it_was_thinned_out_again_and_again(tmp_path: Path) -> None:
    path, memory, expected = tmp_path / "chain", {}, {}
    number = 0
    for turn in range(6):
        with ChainWriter.open(path, create=True) as writer:
            for _ in range(9):
                changes = {number % 7: noise(number), 100 + number: page(number + 1)}
                epoch(writer, changes)
                memory |= changes
                expected[number] = {SPACE: dict(memory)}
                number += 1
        done = prune(path, keep=2 + turn, every=4 if turn % 2 else 0)
        found = state(path)
        assert sorted(found) == sorted(done.kept)
        assert {at: held for at, (held, _) in found.items()} == {
            at: expected[at] for at in done.kept
        }


STEP = st.tuples(
    st.sampled_from(["write", "write", "write", "hole", "space", "drop", "full"]),
    st.sets(st.integers(0, 12), max_size=5),
    st.integers(0, 4),
)


@settings(max_examples=80, deadline=None)
@given(
    steps=st.lists(STEP, min_size=4, max_size=18),
    cuts=st.lists(st.tuples(st.integers(1, 6), st.integers(0, 3)), min_size=1, max_size=3),
)
def test_any_chain_thinned_out_in_any_way(
    steps: list[tuple[str, set[int], int]], cuts: list[tuple[int, int]]
) -> None:
    """With summaries of few images, so that many of them stop being of use."""
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as scratch:
        patch.setattr(summary, "FAN_OUT", 2)
        path, memory, expected = Path(scratch), {SPACE: {}}, {}
        parts = [steps[at :: len(cuts)] for at in range(len(cuts))]
        for part, (keep, every) in zip(parts, cuts, strict=True):
            with ChainWriter.open(path, create=True) as writer:
                for kind, pages, seed in part:
                    apply_step(writer, memory, kind, pages, seed)
                    last = writer.entries[-1].epoch
                    expected[last] = {space: dict(held) for space, held in memory.items()}
            if part:
                done = prune(path, keep=keep, every=every)
                found = {at: held for at, (held, _) in state(path).items()}
                assert found == {at: expected[at] for at in done.kept}


LARGE = 2_000_000


def large_chain(path: Path, halves: tuple[int, int], gone: int = -1) -> None:
    """Nine epochs; two of them have every other of many pages each, and one lacks the space."""
    zeros = np.zeros((512, PAGE_SIZE), dtype=np.uint8)
    with ChainWriter.open(path, create=True) as writer:
        for number in range(9):
            with writer.begin() as image:
                add_task(image, space=SPACE if number != gone else 2)
                if number in halves:
                    pages = np.arange(halves.index(number), LARGE, 2, dtype=np.uint64)
                    for part in np.array_split(pages, len(pages) // 512 + 1):
                        image.write_pages(SPACE, part, zeros[: len(part)])
                elif number != gone:
                    write(image, {number: page(number + 1)})
                image.commit({})


def peak_of(act: Callable[[], object]) -> int:
    """The most memory that something takes."""
    tracemalloc.start()
    try:
        act()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("every", [None, 0, 4])
def test_the_memory_it_takes_does_not_grow_with_the_image(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, every: int | None
) -> None:
    """Page indexes of copies go to files; 32 bytes for each page is what they would take."""
    monkeypatch.setattr(summary, "FAN_OUT", 2)
    path = tmp_path / "chain"
    large_chain(path, (5, 6))
    if every is None:
        peak = peak_of(lambda: merge_newest(path, tmp_path / "out"))
        path = tmp_path / "out"
    else:
        peak = peak_of(lambda: prune(path, keep=2, every=every))
    assert peak < 48 << 20
    with Chain.open(path) as chain:
        assert sum(len(part.pages) for part in chain.epoch().index_parts(SPACE)) == LARGE
        assert verify(chain).ok
        if every:
            summed_up = chain.image(chain.entry(7)).summary(SPACE)
            assert sum(map(len, summed_up)) == LARGE, "from the file, too"


def test_many_holes_for_an_older_space_take_no_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(summary, "FAN_OUT", 2)
    path = tmp_path / "chain"
    large_chain(path, (3, 4), gone=5)
    assert peak_of(lambda: prune(path, keep=2, every=4)) < 48 << 20
    with Chain.open(path) as chain:
        assert chain.entry(7).pages_hole == LARGE - 2
        assert sum(map(len, chain.image(chain.entry(7)).summary(SPACE))) == LARGE
        assert contents(chain.epoch(7)) == {6: page(7), 7: page(8)}
        assert verify(chain).ok


def test_many_spaces_take_no_more_descriptors_than_one(tmp_path: Path) -> None:
    path, spaces = tmp_path / "chain", 120
    with ChainWriter.open(path, create=True) as writer:
        for number in range(4):
            with writer.begin() as image:
                for space in range(1, spaces + 1):
                    add_task(image, pid=space, space=space)
                    write(image, {space + number: page(7), 1: page(space)}, space=space)
                image.commit({})
    before = state(path)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = max(map(int, os.listdir("/proc/self/fd"))) + 20
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, limits[1]))
    try:
        merge_newest(path, tmp_path / "out")
        prune(path, keep=1, every=3)
        prune(path, keep=1)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert state(path) == state(tmp_path / "out") == {3: before[3]}
    assert_same(path)


def test_what_is_written_again_has_no_more_than_was_dropped(tmp_path: Path) -> None:
    """Also where a summary of older images lies in between."""
    path = tmp_path / "chain"
    with ChainWriter.open(path, create=True) as writer:
        for number in range(19):
            epoch(writer, {number: noise(number)})
    prune(path, keep=2, every=5)
    with Chain.open(path) as chain:
        found = {entry.epoch: entry.pages_written for entry in chain.entries}
    assert found == {0: 1, 5: 5, 10: 5, 15: 5, 17: 2, 18: 1}


def test_a_number_that_stood_for_something_else_leaves_nothing_behind(tmp_path: Path) -> None:
    """Space 2 is gone in the epoch that is dropped, and another one afterwards."""
    path = tmp_path / "chain"
    with ChainWriter.open(path, create=True) as writer:
        for held in ({1: noise(1), 2: noise(2)}, None, {2: noise(3)}, {}):
            with writer.begin() as image:
                add_task(image)
                if held is not None:
                    add_task(image, pid=200, space=2)
                    write(image, held, space=2)
                image.commit({})
    prune(path, keep=2, every=4)
    found = state(path)
    assert {at: held[2] for at, (held, _) in found.items()} == {
        0: {1: noise(1), 2: noise(2)}, 2: {2: noise(3)}, 3: {2: noise(3)},
    }  # fmt: skip


@pytest.mark.parametrize("lasting", [0, 2, 4])
def test_a_summary_says_all_whatever_becomes_of_older_images(tmp_path: Path, lasting: int) -> None:
    """Space 2 is not in the image that is dropped. The next one, written again, has holes for what
    an older space of that number had; the last one sums up the new space alone."""
    path = tmp_path / "chain"
    with ChainWriter.open(path, create=True) as writer:
        for number in range(9):
            with writer.begin() as image:
                add_task(image)
                if number != 1:
                    add_task(image, pid=200, space=2)
                    pages = {20: noise(number)}
                    if number in (0, lasting):
                        pages[21 + number] = page(7)
                    write(image, pages, space=2)
                image.commit({})
    before = state(path)
    assert prune(path, keep=7, every=2).rewritten == (2,)
    assert state(path) == {at: before[at] for at in before if at != 1}
    with Chain.open(path) as chain:
        view = chain.epoch(8)
        assert len(view.lineage) == 8
        # With a row of what was written again, it is of no use.
        assert len(view.layers(2)) == (8 if lasting == 2 else 1)
    assert_same(path)


@pytest.mark.parametrize("error", FAULTS)
def test_the_chain_is_the_old_one_or_the_new_one_whatever_call_fails(
    tmp_path: Path, error: int
) -> None:
    source = ten(tmp_path / "source")
    before = state(source)
    after = {at: before[at] for at in (0, 4, 8, 9)}
    outcomes = set()
    for number in range(1, 1000):
        path = tmp_path / "chain"
        shutil.copytree(source, path)
        with pytest.MonkeyPatch.context() as patch:
            calls = trip_at(patch, number, fails(error))
            failure = outcome(lambda: prune(path, keep=2, every=4))  # noqa: B023
            if not failure and next(calls) <= number:
                break
        found = state(path)
        assert found in (before, after), f"call {number}"
        if found == before:
            assert files(path).keys() == files(source).keys(), f"left behind at call {number}"
        outcomes.add(found == after)
        prune(path, keep=2, every=4)
        assert state(path) == after
        with Chain.open(path) as chain:
            named = {entry.name for entry in chain.entries}
        assert {name for name in os.listdir(path) if name.endswith((".img", ".part"))} == named
        shutil.rmtree(path)
    assert outcomes == {False, True}
    assert number > 60


@pytest.mark.parametrize(("fault", "done"), [
    ("pwrite of the index#1:enospc", False),
    ("fdatasync#3:enospc", False),
    ("rename#3:enospc", False),
    ("fsync of the directory#4:enospc", True),
])  # fmt: skip
def test_what_is_new_goes_when_the_index_stays_and_not_otherwise(
    tmp_path: Path, fault: str, done: bool
) -> None:
    path = ten(tmp_path / "chain")
    before = files(path)
    kept = {at: each for at, each in state(path).items() if at in (0, 4, 8, 9)}
    faults.plan(fault)
    try:
        with pytest.raises(CrtraceError, match=r"no space left .*chain\.idx"):
            prune(path, keep=2, every=4)
    finally:
        faults.plan("")
    if done:
        assert state(path) == kept
        assert before.keys() < files(path).keys(), "the old ones stay until that is on disk"
    else:
        assert files(path) == before


def test_killed_at_any_call_it_is_the_old_one_or_the_new_one(tmp_path: Path) -> None:
    source = ten(tmp_path / "source")
    before = state(source)
    after = {at: before[at] for at in (8, 9)}
    seen = []
    for number in range(1, 1000):
        path = tmp_path / str(number)
        shutil.copytree(source, path)
        child = os.fork()
        if not child:
            trip_at(pytest.MonkeyPatch(), number, lambda *_, **__: os._exit(9))
            prune(path, keep=2)
            os._exit(0)
        if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0:
            break
        found = state(path)
        assert found in (before, after)
        seen.append(found == after)
        with ChainWriter.open(path) as writer:
            epoch(writer, {500: page(1)})
        assert 500 in state(path)[10][0][SPACE]
        assert not [name for name in os.listdir(path) if name.endswith(".part")]
    assert seen == sorted(seen), "before the one step, then after it"
    assert {True, False} == set(seen)


def test_a_copy_that_went_wrong_is_not_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = ten(tmp_path / "chain")
    before = files(path)

    def forgetful(view: Any, image: Any, above: int, progress: Any) -> None:
        real(view, image, above - 1, progress)

    real = prune_module.copy_pages
    monkeypatch.setattr(prune_module, "copy_pages", forgetful)
    with pytest.raises(ImageDamaged, match="are not the same"):
        prune(path, keep=2, every=4)
    assert files(path) == before


@pytest.mark.parametrize("every", [None, 0, 4])
def test_progress_goes_on_while_copies_are_read_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, every: int | None
) -> None:
    path = ten(tmp_path / "chain")
    told: list[tuple[int, int]] = []
    begun: dict[str, int] = {}

    def note(name: str) -> None:
        real = getattr(check_module, name)

        def call(*args: Any) -> Any:
            begun.setdefault(name, len(told))
            return real(*args)

        monkeypatch.setattr(check_module, name, call)

    note("check_image")
    note("_check_space")
    tell = lambda done, total: told.append((done, total))  # noqa: E731
    if every is None:
        with Chain.open(path) as chain:
            merge(chain.epoch(), tmp_path / "out", tell)
    else:
        prune(path, keep=2, every=every, progress=tell)
    assert len({total for _, total in told}) == 1
    done = [done / total for done, total in told]
    assert done == sorted(done)
    assert done[-1] == 1
    # To read back and to compare is each about as much as to write, or more.
    assert 0 < done[begun["check_image"] - 1] < 0.4
    assert len({*done[begun["check_image"] : begun["_check_space"]]}) > 3
    assert done[begun["_check_space"]] < 1


def test_a_copy_that_lacks_what_is_no_page_is_not_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "chain"
    with ChainWriter.open(path, create=True) as writer, writer.begin() as image:
        image.add(Arch(machine="x86_64"))
        add_task(image)
        image.mark_unreadable(SPACE, numbers([3, 4]), 14, reason=UnreadableReason.GUARD)
        image.mark_unreadable(SPACE, numbers([5]), 14, reason=UnreadableReason.SECRET)
        image.commit({})
    merge_newest(path, tmp_path / "right")
    with monkeypatch.context() as patch:
        patch.setattr(copy_module, "COPIED", copy_module.COPIED - {Arch.TYPE})
        with pytest.raises(ImageDamaged, match="of another machine"):
            merge_newest(path, tmp_path / "out")
    real = ImageWriter.mark_unreadable

    def otherwise(self: ImageWriter, space: int, pages: U64, errno: int, *, reason: int) -> None:
        real(self, space, pages, errno, reason=min(reason, UnreadableReason.GUARD))

    monkeypatch.setattr(ImageWriter, "mark_unreadable", otherwise)
    with pytest.raises(ImageDamaged, match="pages of space 1 are lost for other reasons"):
        merge_newest(path, tmp_path / "out")
    assert sorted(os.listdir(tmp_path)) == ["chain", "right"]


def test_a_damaged_chain_is_left_alone(tmp_path: Path) -> None:
    path = ten(tmp_path / "chain")
    data = bytearray((path / "00000006.img").read_bytes())
    data[data.index(noise(6)[:32])] ^= 1
    (path / "00000006.img").write_bytes(data)
    before = files(path)
    with pytest.raises(ImageDamaged):
        prune(path, keep=2)
    assert files(path) == before


def test_a_chain_that_is_being_written_is_left_alone(tmp_path: Path) -> None:
    path = ten(tmp_path / "chain")
    with ChainWriter.open(path), pytest.raises(CrtraceError, match=f"written by pid {os.getpid()}"):
        prune(path, keep=2)


@pytest.mark.parametrize("number", range(10))
def test_any_epoch_merged_is_the_same_in_one_image(tmp_path: Path, number: int) -> None:
    path = ten(tmp_path / "chain")
    before = state(path)
    with Chain.open(path) as chain:
        entry = merge(chain.epoch(number), tmp_path / "out")
        header = chain.epoch(number).header
    assert entry.full
    assert state(tmp_path / "out") == {number: before[number]}
    with Chain.open(tmp_path / "out") as chain:
        assert chain.epoch().header.wall_ns == header.wall_ns
        assert chain.epoch().header.reason == f"r{number}"
    with ChainWriter.open(tmp_path / "out") as writer:
        assert epoch(writer, {900: page(3)}).epoch == number + 1
    assert sorted(os.listdir(tmp_path)) == ["chain", "out"]


def test_merging_onto_something_is_refused(tmp_path: Path) -> None:
    path = small_chain(tmp_path / "chain")
    with Chain.open(path) as chain:
        with pytest.raises(UsageError, match="is there already"):
            merge(chain.epoch(), path)
        (tmp_path / "link").symlink_to("nowhere")
        with pytest.raises(UsageError, match="is there already"):
            merge(chain.epoch(), tmp_path / "link")


def merge_newest(path: Path, into: Path) -> None:
    with Chain.open(path) as chain:
        merge(chain.epoch(), into)


@pytest.mark.parametrize("error", FAULTS)
def test_a_merge_that_fails_leaves_nothing(tmp_path: Path, error: int) -> None:
    path = ten(tmp_path / "chain")
    for number in range(1, 200):
        with pytest.MonkeyPatch.context() as patch:
            calls = trip_at(patch, number, fails(error))
            failure = outcome(merge_newest, path, tmp_path / "out")
            if not failure and next(calls) <= number:
                break
        assert not failure or os.strerror(error).lower() in str(failure)
        assert sorted(os.listdir(tmp_path)) == (["chain", "out"] if not failure else ["chain"])
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
    assert number > 10


def trip_spool(patch: pytest.MonkeyPatch, number: int, error: int) -> Iterator[int]:
    """Have the Nth call fail that is for a spool, or reads an image that is being written.

    Returns the counter that tells the calls.
    """
    calls, pread = count(), os.pread
    for name in ("open", "unlink", "pwrite", "pread"):
        original = getattr(os, name)

        def call(what: Any, *args: Any, real: Any = original, **fields: Any) -> Any:
            where = os.readlink(f"/proc/self/fd/{what}") if isinstance(what, int) else str(what)
            asked = "spool-" in where or (real is pread and where.endswith(".img.part"))
            if asked and next(calls) == number:
                raise OSError(error, os.strerror(error))
            return real(what, *args, **fields)

        patch.setattr(os, name, call)
    return calls


@pytest.mark.parametrize("error", FAULTS)
@pytest.mark.parametrize(("every", "least"), [(None, 15), (0, 15), (2, 90)])
def test_any_call_of_a_spool_may_fail(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, every: int | None, least: int, error: int
) -> None:
    """In a merge, and in a prune that writes full images and others, with summaries. Each column
    is made, nameless, written, and read twice."""
    monkeypatch.setattr(summary, "FAN_OUT", 2)
    path = ten(tmp_path / "chain")
    before, beside = files(path), os.listdir(tmp_path)
    for number in count():
        with pytest.MonkeyPatch.context() as patch:
            calls = trip_spool(patch, number, error)
            if every is None:
                failure = outcome(merge_newest, path, tmp_path / "out")
            else:
                failure = outcome(lambda: prune(path, keep=2, every=every))
            if not failure:
                break
        assert f"{os.strerror(error).lower()} while " in str(failure)
        assert (files(path), os.listdir(tmp_path)) == (before, beside)
    assert next(calls) == number, "a failure went unnoticed"
    assert number >= least


def test_a_spool_passes_points_at_which_it_may_be_made_to_fail(tmp_path: Path) -> None:
    path = ten(tmp_path / "chain")
    faults.plan(f"count:{tmp_path / 'log'}")
    try:
        merge_newest(path, tmp_path / "out")
    finally:
        faults.plan("")
    names = [line.split(maxsplit=2)[2] for line in (tmp_path / "log").read_text().splitlines()]
    assert names.count("pwrite of a spool") >= 3
    assert names.count("pread of a spool") >= 3


def test_tasks_and_their_places_are_copied(tmp_path: Path) -> None:
    path = tmp_path / "chain"
    with ChainWriter.open(path, create=True) as writer, writer.begin() as image:
        first = image.add(Task(pid=1, comm="one"))
        image.add(Mm(space=SPACE), parent=first)
        image.add(Task(pid=2, comm="two", state="Z", exit_status=256), parent=first)
        add_task(image, [anon(4, 2)], pid=3, threads=3)
        image.commit({})
    with Chain.open(path) as chain:
        merge(chain.epoch(), tmp_path / "out")
        with Chain.open(tmp_path / "out") as copy:
            assert copy.epoch().tasks == chain.epoch().tasks
