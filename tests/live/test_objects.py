"""Which object a mapping is of, and when its contents must be read again."""

from __future__ import annotations

from pathlib import Path

import pytest

from crtrace.units import PAGE_SIZE
from tests.live.conftest import Spawn
from tests.live.exactness import judged, reader
from tests.live.harness import compile_target, maps, pattern_page, wait_until
from tests.live.sharing import PAGES, Shared
from tests.live.test_shared import assert_of_one_moment

NEXT_ID = Path("/proc/sys/kernel/shm_next_id")
MODES = pytest.mark.parametrize("mode", ["ro", "private"])


def deleted_file(shared: Shared, directory: Path) -> int:
    """A file "gone", open in the target, deleted and full of seed 1; the target's descriptor."""
    path = directory / "gone"
    fd = shared.do(f"target file gone {path} {PAGES}")
    shared.do(f"target pwrite gone 0 {PAGES} 1")
    path.unlink()
    return fd


@MODES
def test_more_of_a_deleted_file_is_mapped(spawn: Spawn, tmp_path: Path, mode: str) -> None:
    shared = Shared(spawn("shared"))
    deleted_file(shared, tmp_path)
    shared.do(f"target map first gone 0 4 {mode}")
    with judged(shared.pid, tmp_path / "chain") as run:
        shared.take(run)
        shared.do(f"target map more gone 4 8 {mode}")
        shared.take(run)
        shared.do("target unmap first")
        shared.take(run)
        shared.do(f"target map again gone 0 16 {mode}")
        shared.take(run)


@MODES
@pytest.mark.parametrize("way", ["store out", "pwrite gone"])
def test_a_deleted_file_that_the_target_only_reads_is_written_by_others(
    spawn: Spawn, tmp_path: Path, mode: str, way: str
) -> None:
    """Stores to pages that are dirty already do not even change the file's time."""
    shared = Shared(spawn("shared"))
    fd = deleted_file(shared, tmp_path)
    shared.do(f"target map seen gone 0 {PAGES} {mode}")
    shared.do(f"outsider open gone /proc/{shared.pid}/fd/{fd}")
    shared.do(f"outsider map out gone 0 {PAGES} rw")
    with judged(shared.pid, tmp_path / "chain") as run:
        for seed in range(2, 8):
            shared.do(f"outsider {way} 3 9 {seed}")
            shared.take(run)
        shared.do("outsider unmap out")
        shared.do("outsider close gone")
        shared.do("target close gone")
        shared.take(run)


@MODES
def test_a_deleted_file_is_of_one_moment(spawn: Spawn, tmp_path: Path, mode: str) -> None:
    shared = Shared(spawn("shared"))
    deleted_file(shared, tmp_path)
    at = shared.do(f"target map seen gone 0 {PAGES} {mode}")
    turns = shared.do("target busy pwrite gone")
    with judged(shared.pid, tmp_path / "chain") as run:
        for _ in range(12):
            run.take()
            with run.epoch() as epoch:
                assert_of_one_moment(reader(epoch), at, turns)
    shared.do("target rest")


@MODES
def test_a_deleted_file_that_nobody_can_write_is_read_once(
    spawn: Spawn, tmp_path: Path, mode: str
) -> None:
    path = tmp_path / "library"
    path.write_bytes(b"".join(pattern_page(5, page) for page in range(PAGES)))
    shared = Shared(spawn("shared"))
    shared.do(f"target look library {path}")
    shared.objects["library"] = [5] * PAGES
    shared.do(f"target map seen library 0 {PAGES} {mode}")
    path.unlink()
    with judged(shared.pid, tmp_path / "chain") as run:
        assert shared.take(run)["pages_compared"] == PAGES
        wait_until(lambda: shared.take(run)["pages_compared"] == 0, "it is not read again")
        assert shared.take(run, full=True)["pages_compared"] == PAGES


def library(path: Path, seed: int) -> None:
    """A file that begins as a program, with a build id, and goes on with a pattern."""
    program = compile_target("shared").read_bytes()[: 8 * PAGE_SIZE].ljust(8 * PAGE_SIZE, b"\0")
    path.write_bytes(program + b"".join(pattern_page(seed, page) for page in range(8, PAGES)))


def map_library(shared: Shared, path: Path, seed: int, mode: str) -> None:
    """Have the target map the pattern of a ``library``."""
    shared.do(f"target look library {path}")
    shared.objects["library"] = [0] * 8 + [seed] * (PAGES - 8)
    shared.do(f"target map seen library 8 {PAGES - 8} {mode}")


@MODES
def test_a_library_is_deleted_while_it_is_mapped(spawn: Spawn, tmp_path: Path, mode: str) -> None:
    path = tmp_path / "library"
    library(path, 3)
    shared = Shared(spawn("shared"))
    map_library(shared, path, 3, mode)
    with judged(shared.pid, tmp_path / "chain") as run:
        shared.take(run)
        with run.epoch() as epoch:
            (row,) = (file for file in epoch.files.values() if file.path == str(path))
            assert row.build_id
            assert not row.object_space
        path.unlink()
        shared.take(run)
        with run.epoch() as epoch:
            assert reader(epoch)(shared.views["seen"].at, 16)


@pytest.mark.parametrize("deleted", [True, False])
def test_a_library_gives_way_to_another_with_the_same_inode_number(
    spawn: Spawn, tmp_path: Path, deleted: bool
) -> None:
    path = tmp_path / "library"
    library(path, 3)
    number = path.stat().st_ino
    shared = Shared(spawn("shared"))
    map_library(shared, path, 3, "private")
    path.unlink()
    with judged(shared.pid, tmp_path / "chain") as run:
        shared.take(run)
        shared.do("target unmap seen")
        shared.do("target close library")
        others = [tmp_path / f"other{n}" for n in range(100)]
        for other in others:
            library(other, 4)
            if other.stat().st_ino == number:
                break
        else:
            pytest.skip("cannot run here: this file system does not give inode numbers again")
        map_library(shared, other, 4, "private")
        if deleted:
            other.unlink()
        shared.take(run)
        with run.epoch() as epoch:
            at = shared.views["seen"].at
            vma = next(vma for vma in epoch.tasks[0].vmas if vma.start == at)
            row = epoch.files[vma.file]
            assert row.path == str(other)
            if not deleted:
                about = other.stat()
                assert (row.size, row.mtime_ns) == (about.st_size, about.st_mtime_ns)


def test_the_first_segment_of_an_ipc_namespace_has_inode_number_0(
    spawn: Spawn, tmp_path: Path
) -> None:
    shared = Shared(spawn(["unshare", "--ipc", compile_target("shared")]))
    shared.share("sysv", tmp_path)
    (vma,) = (vma for vma in maps(shared.pid) if vma.name.startswith("/SYSV"))
    assert vma.inode == 0
    with judged(shared.pid, tmp_path / "chain") as run:
        for seed in range(1, 5):
            shared.do(f"target store it {seed} 5 {seed}")
            shared.take(run)
            shared.do(f"outsider store out {seed + 3} 5 {seed + 10}")
            shared.take(run)


def test_a_segment_and_a_memfd_with_the_same_inode_number(spawn: Spawn, tmp_path: Path) -> None:
    if not NEXT_ID.exists():
        pytest.skip("cannot run here: the kernel lets nobody choose the id of a segment")
    shared = Shared(spawn(["unshare", "--ipc", compile_target("shared")]))
    shared.do(f"target memfd other {PAGES}")
    shared.do(f"target map other other 0 {PAGES} rw")
    number = shared.do("target inode other")
    assert shared.do(f"target sysv it {PAGES} {number}") == number
    shared.do(f"target map it it 0 {PAGES} rw")
    with judged(shared.pid, tmp_path / "chain") as run:
        for seed in range(1, 4):
            shared.do(f"target store it 0 {5 + seed} {seed}")
            shared.do(f"target store other 2 {9 + seed} {seed + 10}")
            shared.take(run)
    with judged(shared.pid, tmp_path / "chain") as run:  # a chain that goes on
        shared.do("target store it 3 2 7")
        shared.take(run)
        shared.do("target store other 3 2 8")
        shared.take(run)


def test_two_objects_are_mapped_in_turn_at_one_address(spawn: Spawn, tmp_path: Path) -> None:
    """The map may read the same twice, and have been another when the object was opened."""
    shared = Shared(spawn("shared"))
    for name, seed in (("a", 1), ("b", 2)):
        shared.do(f"target memfd {name} {PAGES}")
        shared.do(f"target pwrite {name} 0 {PAGES} {seed}")
    shared.do("target busy flip a b")
    with judged(shared.pid, tmp_path / "chain") as run:
        for _ in range(40):
            run.take()
    shared.do("target rest")


@pytest.mark.parametrize("kind", ["memfd", "file"])
def test_an_object_that_others_cut_off_during_the_pause_fails_no_epoch(
    spawn: Spawn, tmp_path: Path, kind: str
) -> None:
    shared = Shared(spawn("shared"))
    shared.share(kind, tmp_path)
    if kind == "file":
        shared.path.unlink()
    shared.do("outsider busy churn it out")
    with judged(shared.pid, tmp_path / "chain") as run:
        for _ in range(100):
            run.session.checkpoint()  # which contents it gets is a matter of chance
        shared.do("outsider rest")
        shared.do("outsider truncate it 0")
        shared.do(f"outsider truncate it {PAGES}")
        shared.do("outsider store out 3 5 1")
        shared.take(run)
