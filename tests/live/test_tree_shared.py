"""Memory that the processes of a tree share: stored once, and exact for each of them."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from crtrace.image.epoch import Epoch, TaskView
from crtrace.units import PAGE_SIZE
from tests.live.conftest import Places, Spawn
from tests.live.exactness import Judged, judged
from tests.live.harness import compile_target, wait_until
from tests.live.sharing import KINDS, PAGES, Shared, reader_of
from tests.live.test_shared import WITH_DESCRIPTOR, assert_of_one_moment, changes

LARGE = 4096
"""Pages of an object that outweighs everything else the processes have."""


def take(run: Judged, shared: Shared, *, full: bool = False) -> dict[str, int]:
    """An epoch that has what was asked for in the target and in its child; its statistics."""
    stats = shared.take(run, full=full)
    with run.epoch() as epoch:
        assert shared.wrong(epoch, "child") == []
    return stats


def task_of(epoch: Epoch, pid: int) -> TaskView:
    """A process of an epoch."""
    return next(view for view in epoch.tasks if view.task.pid == pid)


def space_at(epoch: Epoch, pid: int, at: int) -> int:
    """The space of the object that a process maps at an address."""
    return next(vma.object_space for vma in task_of(epoch, pid).vmas if vma.start == at)


def listed(epoch: Epoch, space: int) -> int:
    """The pages of a space that the epoch's own image lists."""
    index = epoch.image.page_index(space)
    assert index is not None
    return len(index)


@pytest.mark.parametrize("kind", KINDS[1:])
def test_a_shared_object_is_stored_once_for_the_tree(
    spawn: Spawn, tmp_path: Path, places: Places, kind: str
) -> None:
    shared = Shared(spawn("shared"))
    shared.share(kind, places(kind), pages=LARGE)
    shared.do(f"target store it 0 {LARGE} 1")
    shared.do("target fork")
    shared.do(f"child load it 0 {LARGE}")
    at = shared.views["it"].at
    with judged(shared.pid, tmp_path / "chain", tree=True) as run:
        stats = take(run, shared)
        assert stats["pages_compared"] == LARGE
        assert stats["bytes_raw"] < 1.5 * LARGE * PAGE_SIZE
        with run.epoch() as epoch:
            spaces = {space_at(epoch, pid, at) for pid in (shared.pid, shared.child)}
            (space,) = spaces
            assert space
            assert listed(epoch, space) == LARGE
            rows = [file for file in epoch.files.values() if file.object_space == space]
            assert len(rows) == 1
        for who, count in (("target", 0), ("child", 7), ("outsider", 9)):
            if count:
                view = "out" if who == "outsider" else "it"
                shared.do(f"{who} store {view} 5 {count} {count}")
            stats = take(run, shared)
            assert stats["pages_compared"] == LARGE
            with run.epoch() as epoch:
                assert space_at(epoch, shared.child, at) == space
                assert listed(epoch, space) == count


@pytest.mark.parametrize("kind", KINDS)
def test_each_way_of_changing_shared_memory_is_captured_for_all(
    spawn: Spawn, tmp_path: Path, places: Places, kind: str
) -> None:
    shared = Shared(spawn("shared"))
    shared.share(kind, places(kind))
    shared.do("target fork")
    name = "anon" if kind == "anon" else "it"
    with judged(shared.pid, tmp_path / "chain", tree=True) as run:
        shared.do(f"child load {name} 0 {PAGES}")  # of a file, what nobody uses is left to the file
        take(run, shared)
        for seed, change in enumerate(changes(kind), 1):
            shared.do(change.format(seed))
            if len(shared.objects[name]) == PAGES:
                shared.do(f"child load {name} 0 {PAGES}")
            take(run, shared, full=seed == 5)


@pytest.mark.parametrize("who", ["target", "child"])
@pytest.mark.parametrize(
    ("kind", "how"),
    [(kind, "store") for kind in KINDS] + [(kind, "pwrite") for kind in WITH_DESCRIPTOR],
)
def test_all_of_the_tree_is_of_one_moment(
    spawn: Spawn, tmp_path: Path, places: Places, kind: str, how: str, who: str
) -> None:
    """Whichever process writes without pause, both see the same, and its own count fits."""
    shared = Shared(spawn("shared"))
    shared.share(kind, places(kind))
    name = "anon" if kind == "anon" else "it"
    shared.do("target fork")
    for each in ("target", "child"):
        shared.do(f"{each} load {name} 0 {PAGES}")
    turns = shared.do(f"{who} busy {how} {name}")
    at = shared.views[name].at
    writer, other = shared.pid, shared.child
    if who == "child":
        writer, other = other, writer
    with judged(shared.pid, tmp_path / "chain", tree=True) as run:
        for number in range(6):
            run.take(full=number == 3)
            with run.epoch() as epoch:
                read = reader_of(epoch, writer)
                assert_of_one_moment(read, at, turns)
                size = PAGES * PAGE_SIZE
                assert reader_of(epoch, other)(at, size) == read(at, size)
    shared.do(f"{who} rest")


@pytest.mark.parametrize("kind", WITH_DESCRIPTOR)
def test_epochs_are_exact_for_all_while_the_child_shrinks_and_regrows_an_object(
    spawn: Spawn, tmp_path: Path, places: Places, kind: str
) -> None:
    shared = Shared(spawn("shared"))
    shared.share(kind, places(kind))
    shared.do("target fork")
    shared.do("child busy churn it it")
    with judged(shared.pid, tmp_path / "chain", tree=True) as run:
        for _ in range(20):
            run.take()
    shared.do("child rest")


def test_objects_that_only_the_child_has(spawn: Spawn, tmp_path: Path) -> None:
    shared = Shared(spawn("shared"))
    shared.do("target fork")
    with judged(shared.pid, tmp_path / "chain", tree=True) as run:
        take(run, shared)
        for seed in range(1, 6):
            shared.do(f"child memfd own {PAGES}")
            shared.do(f"child map seen own 0 {PAGES} rw")
            shared.do(f"child store seen {seed} {seed} {seed}")
            take(run, shared)
            shared.do(f"child pwrite own 0 {seed} 9")
            take(run, shared)
            shared.do("child unmap seen")
            shared.do("child close own")
            if seed % 2:
                take(run, shared)


def test_private_mappings_of_one_object_are_told_apart(spawn: Spawn, tmp_path: Path) -> None:
    shared = Shared(spawn("shared"))
    shared.share("memfd", tmp_path)
    shared.do("outsider store out 0 16 1")
    shared.do(f"target map alone it 0 {PAGES} private")
    shared.do("target store alone 2 4 2")
    shared.do("target fork")
    with judged(shared.pid, tmp_path / "chain", tree=True) as run:
        take(run, shared)
        for seed, change in enumerate((
            "child store alone 4 4 {}", "target store alone 1 2 {}", "outsider store out 0 16 {}",
            "child store it 3 9 {}", "target punch it 6 8", "child truncate it 5",
            "child truncate it 16", "child store alone 3 9 {}", "outsider pwrite it 2 12 {}",
        ), 3):  # fmt: skip
            shared.do(change.format(seed))
            take(run, shared)


def test_segments_of_two_ipc_namespaces_with_the_same_id(spawn: Spawn, tmp_path: Path) -> None:
    """Nothing that ``maps`` shows tells them apart: not device, inode number or name."""
    shared = Shared(spawn(["unshare", "--ipc", compile_target("shared")]))
    shared.do("target fork")
    shared.do("child isolate")
    for who in ("target", "child"):
        assert shared.do(f"{who} sysv of_{who} {PAGES}") == 0
        shared.do(f"{who} map of_{who} of_{who} 0 {PAGES} rw")
    with judged(shared.pid, tmp_path / "chain", tree=True) as run:
        for seed in range(1, 5):
            shared.do(f"target store of_target {seed} 5 {seed}")
            shared.do(f"child store of_child {seed} 7 {seed + 10}")
            take(run, shared)
        with run.epoch() as epoch:
            at = [shared.view("target", "of_target").at, shared.view("child", "of_child").at]
            spaces = {space_at(epoch, shared.pid, at[0]), space_at(epoch, shared.child, at[1])}
            assert len(spaces - {0}) == 2


def test_an_object_outlives_a_process_that_shared_it(spawn: Spawn, tmp_path: Path) -> None:
    shared = Shared(spawn("shared"))
    shared.share("memfd", tmp_path)
    shared.do("target fork")
    with judged(shared.pid, tmp_path / "chain", tree=True) as run:
        shared.do("child store it 2 9 1")
        take(run, shared)
        shared.do("child store it 3 9 2")
        os.kill(shared.child, signal.SIGKILL)
        state = Path(f"/proc/{shared.child}/stat")
        wait_until(lambda: state.read_text().rpartition(")")[2].split()[0] == "Z", "it is dead")
        shared.take(run)
        shared.do("outsider store out 5 5 3")
        shared.take(run)
