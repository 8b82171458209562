"""Memory that others can write: epochs are exact whoever changes it, and by whatever way.

Whoever is not the target stands still during the pause: nobody but the target is stopped then.
"""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from crtrace.image.tables import FileFlag
from crtrace.units import PAGE_SIZE
from tests.live.conftest import Places, Spawn
from tests.live.exactness import Judged, judged, reader
from tests.live.harness import MemoryReader
from tests.live.sharing import KINDS, PAGES, Shared

WITH_DESCRIPTOR = ("memfd", "shm", "file")
SEAL_SHRINK, SEAL_GROW, SEAL_WRITE, SEAL_FUTURE_WRITE = 2, 4, 8, 16


def changes(kind: str) -> list[str]:
    """All that can be done to an object of a kind; ``{}`` is a new seed."""
    view, out = ("anon", "anon") if kind == "anon" else ("it", "out")
    ways = [
        f"target store {view} 1 6 {{}}", f"child store {view} 3 2 {{}}",
        f"outsider store {out} 2 9 {{}}", f"outsider store {out} 12 2 {{}}",
        f"target store {view} 4 2 0", f"outsider store {out} 5 2 0",
        f"target remove {view} 0 3", f"child remove {view} 6 2", f"outsider remove {out} 8 2",
        f"target load {view} 0 {PAGES}",
    ]  # fmt: skip
    if kind in WITH_DESCRIPTOR:
        ways += [
            "target pwrite it 2 4 {}", "child pwrite it 11 2 {}", "outsider pwrite it 5 8 {}",
            "target punch it 3 4", "child punch it 1 1", "outsider punch it 6 5",
            "target truncate it 5", "target truncate it 16", "target pwrite it 4 9 {}",
            "outsider truncate it 3", "outsider truncate it 16", "outsider allocate it 7 4",
        ]  # fmt: skip
    return ways


@pytest.mark.parametrize("kind", KINDS)
def test_each_way_of_changing_shared_memory_is_captured(
    spawn: Spawn, tmp_path: Path, places: Places, kind: str
) -> None:
    shared = Shared(spawn("shared"))
    shared.share(kind, places(kind))
    shared.do("target fork")
    with judged(shared.pid, tmp_path / "chain") as run:
        shared.take(run)
        for seed, change in enumerate(changes(kind), 1):
            shared.do(change.format(seed))
            shared.take(run)


def anything(rng: random.Random, kind: str, size: int) -> str:
    """Some change to an object of so many pages that does not touch what lies past its end."""
    view, out = ("anon", "anon") if kind == "anon" else ("it", "out")
    who, where = rng.choice([("target", view), ("child", view), ("outsider", out)])
    verbs = ["store", "store", "remove"]
    if kind in WITH_DESCRIPTOR:
        verbs += ["pwrite", "punch", "truncate"]
    verb = rng.choice(verbs)
    if verb == "truncate":
        return f"{who} truncate it {rng.randrange(1, PAGES + 1)}"
    page = rng.randrange(size)
    count = rng.randrange(1, size - page + 1)
    seed = f" {rng.choice([0, rng.randrange(1, 1 << 20)])}" if verb in ("store", "pwrite") else ""
    return f"{who} {verb} {where if verb in ('store', 'remove') else 'it'} {page} {count}{seed}"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(2))
def test_any_mixture_of_changes_is_captured(
    spawn: Spawn, tmp_path: Path, places: Places, kind: str, seed: int
) -> None:
    rng = random.Random(seed)
    shared = Shared(spawn("shared"))
    shared.share(kind, places(kind))
    shared.do("target fork")
    with judged(shared.pid, tmp_path / "chain") as run:
        for number in range(15):
            for _ in range(rng.randrange(6)):
                size = len(shared.objects["anon" if kind == "anon" else "it"])
                shared.do(anything(rng, kind, size))
            shared.take(run, full=number == 8)


@pytest.mark.parametrize("kind", KINDS)
def test_what_changes_during_the_pre_copy_is_captured(
    spawn: Spawn, tmp_path: Path, places: Places, kind: str
) -> None:
    shared = Shared(spawn("shared"))
    shared.share(kind, places(kind))
    shared.do("target fork")
    todo: list[str] = []

    def change(done: int, total: int) -> None:
        assert 0 < done <= total
        if todo:
            shared.do(todo.pop(0).format(done))

    with judged(shared.pid, tmp_path / "chain", progress=change) as run:
        shared.take(run)
        ways = changes(kind)
        for way in ways:
            todo.append(way)
            shared.take(run, full=True)
            assert not todo, "the progress was never told"


@pytest.mark.parametrize("kind", WITH_DESCRIPTOR)
def test_every_kind_of_view_of_one_object_is_exact(
    spawn: Spawn, tmp_path: Path, places: Places, kind: str
) -> None:
    shared = Shared(spawn("shared"))
    shared.share(kind, places(kind), pages=40)
    for view in ("low it 0 12 rw", "high it 4 12 rw", "part it 20 4 ro", "alone it 0 16 private"):
        shared.do(f"target map {view}")
    shared.do("target unmap it")
    with judged(shared.pid, tmp_path / "chain") as run:
        for seed, change in enumerate((
            "target store low 2 5 {}", "target store high 6 9 {}", "outsider store out 0 40 {}",
            "target load part 20 4", "outsider pwrite it 18 8 {}", "target store alone 1 3 {}",
            "outsider pwrite it 0 16 {}", "target load alone 0 16", "outsider store out 21 2 {}",
            "outsider punch it 2 3", "target pwrite it 39 1 {}", "outsider truncate it 22",
            "outsider truncate it 2", "outsider truncate it 40", "target store alone 0 6 {}",
            "target unmap high", "outsider pwrite it 0 40 {}", "target map high it 12 28 rw",
            "target unmap low", "outsider store out 0 20 {}", "target unmap high",
            "outsider pwrite it 10 20 {}", "target unmap alone", "outsider store out 20 4 {}",
        ), 1):  # fmt: skip
            shared.do(change.format(seed))
            shared.take(run)


@pytest.mark.parametrize(
    ("kind", "mode"),
    [("memfd", "ro"), ("memfd", "private"), ("shm", "ro"), ("shm", "private"), ("sysv", "ro")],
)
def test_what_the_target_only_reads_is_captured_as_others_write_it(
    spawn: Spawn, tmp_path: Path, places: Places, kind: str, mode: str
) -> None:
    shared = Shared(spawn("shared"))
    shared.share(kind, places(kind))
    shared.do(f"target map seen it 0 {PAGES} {mode}")
    shared.do("target unmap it")
    with judged(shared.pid, tmp_path / "chain") as run:
        shared.take(run)
        for seed in range(1, 6):
            shared.do(f"outsider store out {seed} 7 {seed}")
            shared.take(run)  # pages that the target never touched, too
        shared.do("target load seen 0 9")
        shared.take(run)


@pytest.mark.parametrize("kind", ["shm", "file"])
def test_an_object_that_is_unlinked_while_it_is_mapped(
    spawn: Spawn, tmp_path: Path, places: Places, kind: str
) -> None:
    shared = Shared(spawn("shared"))
    shared.share(kind, places(kind))
    with judged(shared.pid, tmp_path / "chain") as run:
        shared.do("target store it 2 8 1")
        shared.do("outsider pwrite it 12 2 2")  # not in the target's page table
        shared.take(run)
        shared.path.unlink()
        shared.take(run)
        with run.epoch() as epoch:
            (row,) = (file for file in epoch.files.values() if file.path == str(shared.path))
            assert row.flags & FileFlag.DELETED
            at = shared.views["it"].at
            epoch.read_memory(epoch.tasks[0], at, PAGES * PAGE_SIZE)  # needs no file
        for seed, change in enumerate(changes(kind), 3):
            if not change.startswith("child"):
                shared.do(change.format(seed))
                shared.take(run)


def test_sealed_memory(spawn: Spawn, tmp_path: Path) -> None:
    shared = Shared(spawn("shared"))
    shared.share("memfd", tmp_path)
    with judged(shared.pid, tmp_path / "chain") as run:
        shared.do("target store it 0 9 1")
        shared.do(f"target seal it {SEAL_SHRINK | SEAL_GROW | SEAL_FUTURE_WRITE}")
        shared.take(run)
        shared.do("target store it 3 9 2")  # mappings from before can still be written
        shared.take(run)
        shared.do("outsider store out 5 9 3")
        shared.take(run)
    shared.do(f"target memfd sealed {PAGES}")
    shared.do("target pwrite sealed 1 12 4")
    shared.do(f"target seal sealed {SEAL_WRITE}")
    assert shared.target.command("target pwrite sealed 0 1 5").startswith("bad")
    shared.do(f"target map ro sealed 0 {PAGES} ro")
    shared.do(f"target map own sealed 0 {PAGES} private")
    with judged(shared.pid, tmp_path / "chain") as run:
        shared.take(run)
        shared.do("target store own 4 3 6")
        shared.take(run)


@pytest.mark.parametrize("kind", ["memfd", "shm", "sysv", "file"])
def test_objects_that_come_and_go(spawn: Spawn, tmp_path: Path, places: Places, kind: str) -> None:
    """The next one is mapped at the same place; a disk also gives it the same inode number."""
    shared = Shared(spawn("shared"))
    with judged(shared.pid, tmp_path / "chain") as run:
        for seed in range(1, 9):
            shared.share(kind, places(kind))
            shared.do(f"target store it {seed % 5} {seed} {seed}")
            if seed % 2:
                shared.do(f"outsider store out {seed} 3 {20 + seed}")
            if kind in ("shm", "file") and seed % 3:
                shared.path.unlink()
            shared.take(run)
            shared.do(f"outsider store out {seed % 3} 2 {40 + seed}")
            if seed % 4:
                shared.take(run)
            shared.forget(kind)
            if seed % 3 == 2:
                shared.take(run)  # an epoch without any


def test_a_chain_goes_on_with_the_same_object_and_with_another(
    spawn: Spawn, tmp_path: Path
) -> None:
    shared = Shared(spawn("shared"))
    for seed in range(1, 5):
        if seed != 3:
            shared.share("memfd", tmp_path)
        shared.do(f"outsider store out {seed} 9 {seed}")
        with judged(shared.pid, tmp_path / "chain") as run:
            shared.take(run)
            shared.take(run)
        shared.do(f"outsider store out {seed} 2 {seed + 9}")  # nobody watches
        if seed != 2:
            shared.forget("memfd")


def assert_of_one_moment(read: MemoryReader, at: int, turns: int) -> None:
    """A thread counts up in each page at ``at`` in turn, and then the word at ``turns``.

    So in one moment some first pages are a turn ahead of that word, and the others are not.
    """
    done = int.from_bytes(read(turns, 8), "little")
    words = (read(at + page * PAGE_SIZE, 8) for page in range(PAGES))
    ahead = [int.from_bytes(word, "little") - done for word in words]
    assert set(ahead) <= {0, 1}, ahead
    assert ahead == sorted(ahead, reverse=True), ahead


@pytest.mark.parametrize(
    ("kind", "how"),
    [(kind, "store") for kind in KINDS] + [(kind, "pwrite") for kind in WITH_DESCRIPTOR],
)
def test_an_object_is_of_one_moment_while_the_target_writes_it(
    spawn: Spawn, tmp_path: Path, places: Places, kind: str, how: str
) -> None:
    shared = Shared(spawn("shared"))
    shared.share(kind, places(kind))
    name = "anon" if kind == "anon" else "it"
    shared.do(f"target load {name} 0 {PAGES}")  # of a file, what nobody uses is left to the file
    turns = shared.do(f"target busy {how} {name}")
    with judged(shared.pid, tmp_path / "chain") as run:
        for number in range(6):
            run.take(full=number == 3)
            with run.epoch() as epoch:
                assert_of_one_moment(reader(epoch), shared.views[name].at, turns)
    shared.do("target rest")


@pytest.mark.parametrize("kind", WITH_DESCRIPTOR)
def test_epochs_are_exact_while_the_target_shrinks_and_regrows_an_object(
    spawn: Spawn, tmp_path: Path, places: Places, kind: str
) -> None:
    shared = Shared(spawn("shared"))
    shared.share(kind, places(kind))
    shared.do("target busy churn it it")
    with judged(shared.pid, tmp_path / "chain") as run:
        for _ in range(20):
            run.take()
    shared.do("target rest")


@pytest.mark.parametrize("kind", ["anon", "memfd", "shm", "sysv"])
def test_statistics_tell_what_was_compared_and_what_that_cost(
    spawn: Spawn, tmp_path: Path, places: Places, kind: str
) -> None:
    shared = Shared(spawn("shared"))
    shared.share(kind, places(kind))
    view, out = ("anon", "anon") if kind == "anon" else ("it", "out")
    shared.do(f"target store {view} 2 7 1")
    shared.do(f"outsider store {out} 10 4 2")

    def stored(run: Judged) -> int:
        """Pages of the object that the newest image lists."""
        with run.epoch() as epoch:
            task = epoch.tasks[0]
            at = shared.views[view].at
            space = next(vma.object_space for vma in task.vmas if vma.start == at)
            index = epoch.image.page_index(space)
            assert index is not None
            return len(index)

    with judged(shared.pid, tmp_path / "chain") as run:
        assert shared.take(run)["pages_compared"] == 11
        assert stored(run) == 11
        stats = shared.take(run)
        assert (stats["pages_compared"], stored(run)) == (11, 0)
        assert stats["pages_skipped_parent"] >= 11
        shared.do(f"outsider store {out} 12 4 3")
        assert shared.take(run)["pages_compared"] == 13
        assert stored(run) == 4
        shared.do(f"outsider store {out} 12 4 3")  # the same again
        assert shared.take(run)["pages_compared"] == 13
        assert stored(run) == 0
        shared.do(f"target remove {view} 3 5")
        stats = shared.take(run)
        assert stored(run) == 5  # holes
        assert stats["pages_hole"] >= 5
