"""Where writes cannot be noticed, contents are compared; and where there is no PAGEMAP_SCAN, the
words of pagemap say the same."""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from crtrace.errors import UsageError
from crtrace.image.reader import Chain
from crtrace.image.resolve import Source
from crtrace.linux import pagemap
from crtrace.linux.addrspace import AddressSpace
from crtrace.linux.pagemap import Filter, KernelScanner, PlainScanner, Scanner
from crtrace.linux.procfs import Process
from crtrace.track.choose import choose
from crtrace.units import PAGE_SHIFT, PAGE_SIZE, U64, Pid, count_pages, merge, no_pages, subtract
from tests.live.conftest import Spawn
from tests.live.exactness import judged, reader
from tests.live.harness import Target, compile_target, layout_mismatches, stopped
from tests.live.runner import run, verified

FILTERS = {
    "anything": Filter(),
    "own": pagemap.OWN,
    "nothing": pagemap.NOTHING_THERE,
    "of a file": Filter(need=pagemap.FILE),
}


@contextmanager
def scanners(target: Target) -> Iterator[tuple[Scanner, Scanner, AddressSpace]]:
    """Both ways to look at a target, which is stopped meanwhile."""
    with Process(Pid(target.pid)) as process, stopped(target.pid):
        space = AddressSpace(process)
        space.refresh()
        fd = process.open("pagemap")
        try:
            if not pagemap.supported(fd):
                pytest.skip("cannot run here: no PAGEMAP_SCAN to compare with")
            yield KernelScanner(fd), PlainScanner(fd, space), space
        finally:
            os.close(fd)


def pages_by_kind(found: tuple[U64, U64], but: U64) -> dict[int, list[list[int]]]:
    """The pages that a scan found, as ranges, for each combination of PRESENT and SWAPPED."""
    ranges, categories = found
    kinds = categories & np.uint64(pagemap.PRESENT | pagemap.SWAPPED)
    each = {int(kind): subtract(merge(ranges[kinds == kind]), but) for kind in np.unique(kinds)}
    return {kind: pages.tolist() for kind, pages in each.items() if len(pages)}


@pytest.mark.parametrize("name", FILTERS)
def test_pagemap_read_plainly_says_what_the_scan_says(spawn: Spawn, name: str) -> None:
    target = spawn("layout")
    with scanners(target) as (kernel, plain, space):
        # The kernel's scan passes over memory without page descriptors; nobody keeps its contents.
        raw = space.ranges(lambda vma: vma.name.startswith("[vvar"))
        whole = pages_by_kind(plain.scan(FILTERS[name]), raw)
        assert whole == pages_by_kind(kernel.scan(FILTERS[name]), raw)
        assert sum(count_pages(np.array(ranges)) for ranges in whole.values()) > 64
        for vma in space.vmas:
            ends = vma.pages - np.array([[0, vma.end - vma.start > PAGE_SIZE]], dtype=np.uint64)
            ours, theirs = (
                pages_by_kind(scanner.scan(FILTERS[name], ends), raw) for scanner in (plain, kernel)
            )
            assert ours == theirs, vma


def test_pagemap_is_asked_only_what_it_can_tell(spawn: Spawn) -> None:
    with scanners(spawn("layout")) as (_, plain, _), pytest.raises(ValueError, match="does not"):
        plain.scan(Filter(need=pagemap.WRITTEN))


def test_a_page_in_the_middle_of_a_huge_mapping_is_found(spawn: Spawn) -> None:
    """One mapping of half a TiB, of which two pages exist, or huge ones around them."""
    target = spawn("layout")
    at = target.info["areas"]["reserve"]["addr"] + (1 << 38)
    with open(f"/proc/{target.pid}/mem", "r+b", buffering=0) as memory:
        os.pwrite(memory.fileno(), bytes([7]) * 2 * PAGE_SIZE, at)
    with scanners(target) as (_, plain, space):
        around = next(vma for vma in space.vmas if vma.start <= at < vma.end)
        assert around.end - around.start >= 1 << 39
        found, _ = plain.scan(pagemap.OWN, around.pages)
    (pages,) = merge(found).tolist()
    assert pages[0] <= at >> PAGE_SHIFT < (at >> PAGE_SHIFT) + 2 <= pages[1] <= pages[0] + 1024


@pytest.mark.parametrize(("resident", "asked"), [(64 << 20, 0), (0, 1)], ids=["dense", "sparse"])
def test_the_kernel_is_asked_what_is_empty_only_where_little_is_there(
    monkeypatch: pytest.MonkeyPatch, resident: int, asked: int
) -> None:
    """That takes it time in proportion to what is there, in the pause."""
    questions = []

    def empty(space: AddressSpace) -> U64:
        questions.append(space)
        return no_pages()

    monkeypatch.setattr(AddressSpace, "empty", empty)
    monkeypatch.setattr(AddressSpace, "resident", lambda _: resident // PAGE_SIZE)
    memory = mmap.mmap(-1, 3 << 29, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with Process(Pid(os.getpid())) as process, open("/proc/self/pagemap", "rb") as file:
        space = AddressSpace(process)
        space.refresh()
        PlainScanner(file.fileno(), space).scan(pagemap.OWN)
    assert len(questions) == asked
    memory.close()


def test_words_are_read_again_where_the_kernel_left_some_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As before Linux 6.5 where a huge page goes meanwhile: the rest moves up."""
    memory = mmap.mmap(-1, 64 * PAGE_SIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory[60 * PAGE_SIZE] = 1
    first = np.frombuffer(memory, dtype=np.uint8).ctypes.data // PAGE_SIZE
    within = np.array([[first, first + 64]], dtype=np.uint64)
    pread, whole = os.pread, []

    def left_out(fd: int, size: int, at: int) -> bytes:
        raw = pread(fd, size, at)
        whole.append(len(raw))
        return raw[80:] if len(whole) == 1 else raw

    with Process(Pid(os.getpid())) as process, open("/proc/self/pagemap", "rb") as file:
        space = AddressSpace(process)
        space.refresh()
        scanner = PlainScanner(file.fileno(), space)
        monkeypatch.setattr(os, "pread", left_out)
        ranges, _ = scanner.scan(Filter(exclude=pagemap.FILE), within)
    assert (ranges - np.uint64(first)).tolist() == [[60, 61]]
    assert whole == [512, 512]


@pytest.mark.parametrize("lacking", ["userfaultfd", "pagemap_scan"])
def test_watch_does_without_what_the_kernel_lacks(
    spawn: Spawn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lacking: str
) -> None:
    monkeypatch.delenv("CRTRACE_ARMER", raising=False)
    target = spawn("layout")
    chain = tmp_path / "chain"
    without = [str(compile_target("without")), lacking]
    for seed in (3, 4):
        target.obey(f"write anon_written 0 8 {seed}")
        run("dump", target.pid, "-o", chain, before=without).expect(0)
    (shown,) = run("show", chain, "--json").expect(0).events
    assert shown["armer"] in ("soft-dirty", "compare")
    assert verified(chain) == [0, 1]
    with Chain.open(chain) as written:
        assert layout_mismatches(reader(written.epoch(-1)), target) == []
    target.terminate_and_check()


def test_what_is_copied_before_the_pause_and_again_in_it_is_stored_once(
    spawn: Spawn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CRTRACE_ARMER", "compare")
    target = spawn("writer", "--mib", 16, "--fill", 1, "--running", 0)
    with judged(target.pid, tmp_path / "chain") as run:
        run.take()
        run.take()
    first, second = run.stats
    assert first["precopy_rounds"] == 1
    assert first["pages_residual"] * PAGE_SIZE > 32 << 20
    assert first["bytes_raw"] < 40 << 20
    assert second["pages_residual"] * PAGE_SIZE > 32 << 20
    assert second["bytes_raw"] < 1 << 20


def test_the_vdso_is_in_every_image_and_nothing_counts_as_missed(
    spawn: Spawn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CRTRACE_ARMER", "compare")
    with judged(spawn("layout").pid, tmp_path / "chain") as it:
        for _ in range(2):
            it.take()
            with it.epoch() as epoch:
                task = epoch.tasks[0]
                (vdso,) = (vma for vma in task.vmas if vma.name == "[vdso]")
                sources = [run.source for run in epoch.memory_runs(task, vdso)]
                assert sources == [Source.STORED]
    assert it.stats[1]["bpf_missed"] == 0


@pytest.mark.parametrize("name", ["userfaultfd", "soft-dirty", "compare"])
def test_the_environment_names_the_armer(
    spawn: Spawn, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest, name: str
) -> None:
    if name != "compare":
        request.getfixturevalue(name.replace("-", "_"))
    monkeypatch.setenv("CRTRACE_ARMER", name)
    with Process(Pid(spawn("layout").pid)) as process:
        armer = choose(process, AddressSpace(process))
        assert armer.name == name
        armer.close()
        armer.close()


def test_an_unknown_armer_is_a_usage_error(spawn: Spawn, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CRTRACE_ARMER", "magic")
    with (
        Process(Pid(spawn("layout").pid)) as process,
        pytest.raises(UsageError, match="magic"),
    ):
        choose(process, AddressSpace(process))
