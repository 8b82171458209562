"""Every way of changing memory (``tests/targets/ways.c``): each alone, and all in any order."""

from __future__ import annotations

import contextlib
import os
import random
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from crtrace.image.epoch import Epoch
from crtrace.units import PAGE_SIZE
from tests.live.conftest import armed_by, asked_of, reserved_hugetlb_pages
from tests.live.exactness import Judged, judged, reader
from tests.live.harness import Target, Untouched, shadow_mismatches

ARMERS = asked_of("userfaultfd", "soft-dirty", "compare")

WAYS = {
    "stores by several threads": "threads",
    "stores of what is there already": "same_value",
    "read": "read",
    "recv": "recv",
    "read past the page cache": "direct",
    "io_uring": "uring",
    "io_uring's worker threads": "uring_worker",
    "io_uring past the page cache": "uring_direct",
    "io_uring into fixed buffers": "uring_fixed",
    "io_uring into fixed buffers past the page cache": "uring_fixed_direct",
    "AIO": "aio",
    "AIO past the page cache": "aio_direct",
    "AIO past the page cache without pause": "aio_direct_at_full_speed",
    "a signal's frame on another stack": "signal_frame",
    "process_vm_writev by another process": "vm_writev",
    "PTRACE_POKEDATA by another process": "poke",
    "/proc/PID/mem by another process": "proc_mem",
    "shared memory stored by another process": "shared_by_another",
    "a deleted file stored by another process": "deleted_by_another",
    "/proc/self/mem into pages for reading": "forced",
    "process_vm_writev to itself": "own_vm_writev",
    "a CLONE_VM child from before the watch": "sharing_child_from_before",
    "a CLONE_VM child that ends": "sharing_child_that_ends",
    "CLONE_VM children that stay": "sharing_child_that_stays",
    "a CLONE_VM child at full speed": "sharing_child_at_full_speed",
    "vfork": "vfork",
    "fork, with writes on both sides": "fork",
    "MADV_DONTNEED": "dontneed",
    "MADV_DONTNEED and a write": "dontneed_and_write",
    "MADV_FREE": "free",
    "MADV_FREE and a write": "free_and_write",
    "MADV_FREE and reclaim": "free_and_reclaim",
    "MADV_REMOVE": "remove",
    "a hole punched into a memfd": "punch",
    "MADV_COLD": "cold",
    "swapped out": "pageout",
    "swapped out and written": "pageout_and_write",
    "swapped out and discarded": "pageout_and_drop",
    "MADV_POPULATE": "populate",
    "munmap and mmap": "unmap_and_map",
    "MAP_FIXED": "map_over",
    "MAP_FIXED of a file": "map_file_over",
    "brk": "brk",
    "the stack grows": "stack",
    "mremap elsewhere": "move",
    "mremap to another size": "resize",
    "MREMAP_DONTUNMAP": "move_leaving",
    "two blocks exchanged": "exchange",
    "two halves exchanged": "exchange_within",
    "mappings joined and parted": "regrown",
    "PROT_NONE and back": "protect_none",
    "PROT_READ and back": "protect_read",
    "mappings named and locked in part": "cut",
    "clear_refs": "clear_refs",
    "huge pages": "thp",
    "huge pages discarded in part": "thp_drop",
    "huge pages protected in part": "thp_protect",
    "MADV_COLLAPSE of written pages": "collapse",
    "MADV_COLLAPSE of any pages": "collapse_as_is",
    "huge pages moved": "thp_move",
    "huge pages exchanged": "thp_exchange",
    "page tables exchanged": "table_exchange",
    "page tables with few pages exchanged": "end_of_table",
    "the huge zero page": "thp_zero",
    "huge pages swapped out": "thp_pageout",
    "hugetlb": "hugetlb",
    "hugetlb discarded": "hugetlb_drop",
    "hugetlb shared": "hugetlb_shared",
    "KSM": "ksm",
    "KSM of zeros": "ksm_zero",
    "a file's private pages written": "file_write",
    "a file's private pages discarded": "file_drop",
    "KSM of zeros in a file's private pages": "file_ksm_zero",
    "a file's private pages paged out": "file_pageout",
    "a file changed underneath": "file_changed",
    "a file truncated underneath": "file_truncated",
    "a deleted file changed underneath": "deleted_changed",
    "guard regions": "guard",
    "MAP_DROPPABLE": "droppable",
    "MADV_WIPEONFORK and fork": "wipe_on_fork",
    "memfd_secret": "secret",
    "the program's own userfaultfd": "own_uffd",
}

RACING = "aio_direct_at_full_speed"
"""A device writes during the pause itself, so no copy of that moment can be exact."""
BY_DESCRIPTOR = ("direct", "aio_direct", "own_uffd")
"""Ways that take a descriptor for which more is read, io_uring's besides."""
FROM_OUTSIDE = (
    "vm_writev", "poke", "proc_mem", "shared_by_another", "deleted_by_another",
    "sharing_child_from_before", "sharing_child_that_ends", "sharing_child_that_stays",
)  # fmt: skip
"""Writers who do not stop with the target, so they are not asked to write during the pause."""

SEEDS = range(int(os.environ.get("CRTRACE_SEEDS", "10")))
"""Of the random sequences; more of them make a hunt."""
EPOCHS = 7
ALONE_TOGETHER = 20
"""Ways that are tried, one after another, on one target: to attach takes longer than to try."""


@contextlib.contextmanager
def swap(directory: Path) -> Iterator[None]:
    """A small swap file is in use inside the block, where that is allowed."""
    file = directory / "swap"
    file.touch(mode=0o600)
    with open(file, "wb") as out:
        out.write(bytes(32 << 20))  # a file with holes is refused
    made = subprocess.run(["mkswap", file], capture_output=True, check=False)
    on = subprocess.run(["swapon", file], capture_output=True, check=False)
    try:
        yield
    finally:
        if made.returncode == 0 and on.returncode == 0:
            subprocess.run(["swapoff", file], check=True)
        file.unlink()


@contextlib.contextmanager
def ksm(run: str = "1") -> Iterator[None]:
    """Equal pages are looked for, fast, and zeros too, where the kernel can."""
    wanted = {"pages_to_scan": "1000", "sleep_millisecs": "1", "use_zero_pages": "1", "run": run}
    settings = {Path("/sys/kernel/mm/ksm", name): value for name, value in wanted.items()}
    before = {path: path.read_text() for path in settings if path.exists()}
    try:
        for path in before:
            path.write_text(settings[path])
        yield
    finally:
        for path, value in before.items():
            path.write_text(value)


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Swap, KSM and huge pages are there, as far as the machine lets us."""
    with swap(tmp_path_factory.mktemp("swap")), ksm(), reserved_hugetlb_pages(4):
        yield


@dataclass
class Scene:
    """A ``ways`` target under watch, and how much was compared."""

    target: Target
    run: Judged
    compared: int = 0
    epochs: int = 0
    done: list[str] = field(default_factory=list)

    def do(self, way: str) -> str:
        """One way; "" or why this machine cannot."""
        return self.heed(way, self.target.command(way))

    def heed(self, way: str, answer: str) -> str:
        """What the target answered to a way; it must not have failed."""
        assert not answer.startswith("bad"), f"{way}: {answer}"
        self.done.append(way)
        return "" if answer == "ok" else answer.removeprefix("cannot: ")

    def take(self, *, full: bool = False) -> dict[str, Any]:
        """An epoch that is exact, and that has what the target promises; its statistics."""
        self.take_meanwhile(full=full)
        with self.run.epoch() as epoch:
            info = {"areas": self.target.ask("areas")}
            wrong = shadow_mismatches(across(epoch), info)
        owners = {
            each["way"]
            for each in info["areas"]
            for addr in wrong
            if each["data"] <= addr < each["data"] + each["bytes"]
        }
        assert not wrong, f"after {self.done[-12:]}: not what the target has: {owners}"
        return self.run.stats[-1]

    def take_meanwhile(self, *, full: bool = False) -> None:
        """An exact epoch of a target that may be at work."""
        try:
            self.compared += self.run.take(full=full).compared
        except AssertionError as error:
            raise AssertionError(f"{error} {self.target.pid} after {self.done[-12:]}") from error
        self.epochs += 1

    def take_during(self, way: str) -> None:
        """An exact epoch that is taken while the target is busy with a way."""
        self.target.send(way)
        self.take_meanwhile()
        self.heed(way, self.target.answer())

    def record(self, record_property: Callable[..., None]) -> None:
        """Keep for the summary how much was compared, and how often."""
        record_property("ways_done", len(self.done))
        record_property("epochs_judged", self.epochs)
        record_property("pages_compared", self.compared)


def across(epoch: Epoch) -> Callable[[int, int], bytes]:
    """``read(address, length)`` of an epoch, over as many mappings as it takes."""
    within = reader(epoch)
    vmas = epoch.tasks[0].vmas

    def read(address: int, length: int) -> bytes:
        end = address + length
        parts = [(max(address, v.start), min(end, v.end)) for v in vmas]
        data = b"".join(within(start, stop - start) for start, stop in parts if start < stop)
        assert len(data) == length, f"{address:#x} is not mapped from end to end"
        return data

    return read


@contextlib.contextmanager
def scene(directory: Path, seed: int, *options: object) -> Iterator[Scene]:
    """A target of that seed under watch. In the end it checks itself, and is as it was."""
    with Target("ways", "--seed", seed, *options) as target:
        with judged(target.pid, directory / "chain") as run:
            scene = Scene(target, run)
            scene.take()
            yield scene
            before = Untouched(target.pid)
            scene.take_meanwhile()
            # Protection shows in the flags, and keeps neighbours apart.
            before.assert_same()
        before.assert_same(ignore=["mappings", "vma_flags"])
        target.terminate_and_check()


@pytest.fixture(params=ARMERS, scope="module")
def armer(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each test runs with every armer that the kernel has what it needs for."""
    yield from armed_by(request.param, request)


class Stage:
    """Lends one scene to several tests; a new one after a failure, or when it was used enough."""

    def __init__(self, directories: Iterator[Path], *options: object) -> None:
        self._directories, self._options = directories, options
        self._open = contextlib.ExitStack()
        self._scene: Scene | None = None
        self._uses = 0

    @contextlib.contextmanager
    def lend(self) -> Iterator[Scene]:
        """A scene that begins with a full epoch."""
        if self._uses % ALONE_TOGETHER == 0:
            self.close()
        self._uses += 1
        if self._scene is None:
            self._scene = self._open.enter_context(
                scene(next(self._directories), 1, *self._options)
            )
        self._scene.compared = self._scene.epochs = 0
        self._scene.done = []
        try:
            self._scene.take_meanwhile(full=True)
            yield self._scene
        except BaseException as error:
            scenes, self._scene = self._open.pop_all(), None
            scenes.__exit__(type(error), error, error.__traceback__)
            raise

    def close(self) -> None:
        """End the scene; what it checks in the end may fail."""
        self._scene = None
        self._open.close()


@pytest.fixture(scope="module")
def stage(machine: None, armer: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    """Scenes that tests of one way after another share."""
    stage = Stage(tmp_path_factory.mktemp("stage") for _ in iter(int, 1))
    yield stage
    stage.close()


@pytest.fixture(scope="module")
def plain_stage(
    machine: None, armer: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Stage]:
    """The same with targets that have none of the descriptors for which more is read than scans
    have found: what a scan misses is missed."""
    options = ("--ring", 0, "--uffd", 0, "--direct", 0)
    stage = Stage((tmp_path_factory.mktemp("plain") for _ in iter(int, 1)), *options)
    yield stage
    stage.close()


def test_the_table_has_every_way_of_the_target() -> None:
    with Target("ways") as target:
        assert sorted(WAYS.values()) == sorted(target.info["ways"])


@pytest.mark.usefixtures("armer")
@pytest.mark.parametrize("way", [way for way in WAYS.values() if way != RACING])
def test_each_way_alone(
    request: pytest.FixtureRequest, way: str, record_property: Callable[..., None]
) -> None:
    special = way in BY_DESCRIPTOR or way.startswith("uring")
    stage: Stage = request.getfixturevalue("stage" if special else "plain_stage")
    # While KSM runs it is in that memory nearly all the time, so more is read then, too.
    with ksm("1" if "ksm" in way else "0"), stage.lend() as it:
        for _ in range(3):
            if lacking := it.do(way):
                pytest.skip(f"cannot run here: {lacking}")
            it.take()
        it.record(record_property)


@pytest.mark.usefixtures("machine", "armer")
@pytest.mark.parametrize("seed", SEEDS)
def test_all_ways_in_any_order(
    tmp_path: Path, seed: int, record_property: Callable[..., None]
) -> None:
    rng = random.Random(seed)
    ways = [way for way in WAYS.values() if way != RACING]
    inside = [way for way in ways if way not in FROM_OUTSIDE]
    with scene(tmp_path, seed) as it:
        for _ in range(EPOCHS):
            for way in rng.choices(ways, k=rng.randrange(16)):
                it.do(way)
            if rng.random() < 0.5:
                it.take(full=rng.random() < 0.1)
            else:
                it.take_during(rng.choice(inside))
        it.record(record_property)


def test_stores_of_what_is_there_already_cost_no_stored_page(stage: Stage) -> None:
    with stage.lend() as it:
        it.take()
        quiet = it.run.stats[-1]
        it.do("same_value")
        stats = it.take()
        assert stats["pages_skipped_parent"] >= 8
        assert stats["pages_written"] <= quiet["pages_written"] + 8  # what asking takes
        assert stats["bytes_raw"] <= quiet["bytes_raw"] + 8 * PAGE_SIZE


def test_direct_reads_without_pause_are_said_to_be_a_limit(stage: Stage, armer: str) -> None:
    with stage.lend() as it:
        if lacking := it.do(RACING):
            pytest.skip(f"cannot run here: {lacking}")
        _, stats = it.run.session.checkpoint("while a device writes")
        said = [limit for limit in stats["limits"] if "direct reads" in limit]
        assert len(said) == (armer != "compare")
        assert it.do(RACING) == ""  # it ends
        it.take()
