"""Every epoch is what ``/proc/PID/mem`` gave during its pause, whatever the target does."""

from __future__ import annotations

import contextlib
import os
import random
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from crtrace.image.resolve import Source
from crtrace.units import PAGE_SIZE
from tests.live.conftest import Spawn
from tests.live.exactness import judged, reader
from tests.live.harness import (
    Untouched,
    compile_target,
    layout_mismatches,
    maps,
    read_mem,
    shadow_mismatches,
)


@pytest.mark.parametrize(("threads", "rate"), [(1, 50), (4, 200), (2, 0)])
def test_epochs_of_threads_that_write_without_pause_are_exact(
    spawn: Spawn, tmp_path: Path, threads: int, rate: int
) -> None:
    target = spawn("writer", "--mib", 24, "--threads", threads, "--rate", rate)
    with judged(target.pid, tmp_path / "chain") as run:
        for number in range(8):
            if number % 2:
                target.obey("churn 60")
            run.take(full=number == 5)
            with run.epoch() as epoch:
                assert shadow_mismatches(reader(epoch), target.info) == []
    target.terminate_and_check()


def test_earlier_epochs_stay_what_they_were(spawn: Spawn, tmp_path: Path) -> None:
    target = spawn("layout")
    seeds = (5, 6, 7)
    with judged(target.pid, tmp_path / "chain") as run:
        for seed in seeds:
            target.obey(f"write anon_written 0 8 {seed}")
            run.take()
        address = target.ask("areas")["anon_written"]["addr"]
        pages = []
        for number in range(len(seeds)):
            with run.epoch(number) as epoch:
                pages.append(reader(epoch)(address, 8 * PAGE_SIZE))
    assert len(set(pages)) == len(seeds)


CHANGES = (
    "write anon_written 1 9 {seed}", "write anon_unwritten 0 5 {seed}",
    "write anon_partial 3 3 {seed}", "zero anon_written 2 4", "dontneed anon_written 0 6",
    "dontneed file_private 0 4", "write file_private 2 6 {seed}", "write file_clean 1 2 {seed}",
    "dontneed file_clean 0 4", "write file_shared 0 6 {seed}", "write anon_shared 3 5 {seed}",
    "write memfd_shared 1 4 {seed}", "pwrite memfd_shared 2 3 {seed}", "punch memfd_shared 0 3",
    "write memfd_private 1 3 {seed}", "dontneed memfd_private 0 8", "write sysv 0 4 {seed}",
    "punch anon_shared 2 4", "pwrite file_shared 4 2 {seed}", "write deleted_shared 1 3 {seed}",
    "write deleted_private 2 3 {seed}", "dontneed deleted_private 0 4", "fixed anon_written 3 4",
    "mprotect anon_written none", "mprotect anon_written rw", "mremap anon_written",
    "mremap anon_partial", "brk +16", "write brk 2 5 {seed}", "brk -8", "write thp 0 300 {seed}",
    "dontneed thp 100 400", "write stack 0 4 {seed}", "read anon_unwritten 8 4",
    "write reserve_used 0 4 {seed}", "dontneed reserve_used 0 8", "dontneed zero_read 0 4",
)  # fmt: skip


@pytest.mark.parametrize("seed", range(6))
def test_epochs_are_exact_after_any_mixture_of_changes(
    spawn: Spawn, tmp_path: Path, seed: int
) -> None:
    rng = random.Random(seed)
    target = spawn("layout")
    with judged(target.pid, tmp_path / "chain") as run:
        for number in range(12):
            for _ in range(rng.randrange(8) if number else 0):
                # Some do not fit the state that others left; the target then says "bad".
                target.command(rng.choice(CHANGES).format(seed=rng.randrange(1, 1 << 20)))
            run.take()
        with run.epoch() as epoch:
            assert layout_mismatches(reader(epoch), target) == []
        assert run.stats[0]["pages_written"] > run.stats[-1]["pages_written"]
    target.terminate_and_check()


@pytest.mark.parametrize("change", CHANGES)
def test_each_kind_of_change_is_captured_alone(spawn: Spawn, tmp_path: Path, change: str) -> None:
    target = spawn("layout")
    with judged(target.pid, tmp_path / "chain") as run:
        run.take()
        assert target.command(change.format(seed=77)).startswith("ok")
        run.take()
        with run.epoch() as epoch:
            assert layout_mismatches(reader(epoch), target) == []
        run.take()
    target.terminate_and_check()


def test_discarded_pages_become_holes_and_not_stored_zeros(spawn: Spawn, tmp_path: Path) -> None:
    target = spawn("layout")
    with judged(target.pid, tmp_path / "chain") as run:
        run.take()
        target.obey("dontneed anon_written 0 6")
        run.take()
        assert run.stats[1]["pages_hole"] >= 6
        address = target.ask("areas")["anon_written"]["addr"]
        with run.epoch() as epoch:
            task = epoch.tasks[0]
            vma = next(v for v in task.vmas if v.start <= address < v.end)
            runs = list(epoch.memory_runs(task, vma))
        first = next(r for r in runs if r.addr <= address < r.addr + r.npages * PAGE_SIZE)
        assert first.source is Source.ZERO


def test_a_page_written_with_the_same_contents_is_not_stored_again(
    spawn: Spawn, tmp_path: Path
) -> None:
    target = spawn("layout")
    with judged(target.pid, tmp_path / "chain") as run:
        target.obey("write anon_written 0 8 9")
        run.take()
        target.obey("write anon_written 0 8 9")
        run.take()
    assert run.stats[1]["pages_skipped_parent"] >= 8
    assert run.stats[1]["bytes_raw"] < 8 * PAGE_SIZE


def test_unreadable_pages_are_listed_and_cost_nothing_else(spawn: Spawn, tmp_path: Path) -> None:
    target = spawn("layout")
    areas = target.ask("areas")
    if "secret" not in areas:
        pytest.skip("cannot run here: no secretmem (boot with secretmem.enable=1)")
    with judged(target.pid, tmp_path / "chain") as run:
        run.take()
        with run.epoch() as epoch:
            assert layout_mismatches(reader(epoch), target) == []


def test_watching_leaves_no_trace_in_the_target(spawn: Spawn, tmp_path: Path) -> None:
    target = spawn("layout")
    before = Untouched(target.pid)
    with judged(target.pid, tmp_path / "chain") as run:
        for _ in range(3):
            run.take()
        before.assert_same(ignore=["vma_flags"])  # the userfaultfd shows there while we watch
    before.assert_same()


def test_an_epoch_that_failed_is_carried_into_the_next(
    spawn: Spawn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = spawn("layout")
    with judged(target.pid, tmp_path / "chain") as run:
        run.take()
        target.obey("write anon_written 0 8 11")
        with monkeypatch.context() as patch:
            patch.setattr(
                "crtrace.image.imagewriter.ImageWriter.commit", lambda *_: (_ for _ in ()).throw(
                    OSError(5, "made to fail")
                )
            )  # fmt: skip
            with pytest.raises(OSError, match="made to fail"):
                run.session.checkpoint()
        target.obey("write anon_partial 0 2 12")
        run.take()
        with run.epoch() as epoch:
            assert layout_mismatches(reader(epoch), target) == []


UPROBES = Path("/sys/kernel/tracing/uprobe_events")


@contextlib.contextmanager
def probed(program: Path, offset: int) -> Iterator[None]:
    """Somebody else traces where a program passes a place, also of those that run already."""
    name = f"crtrace_test/at_{offset:x}"
    enable = UPROBES.parent / "events" / name / "enable"
    shell(f"echo p:{name} {program}:{offset:#x} >> {UPROBES} && echo 1 > {enable}")
    try:
        yield
    finally:
        shell(f"echo 0 > {enable}; echo -:{name} >> {UPROBES}")


def shell(command: str) -> None:
    subprocess.run(["sh", "-c", command], check=True)


@pytest.mark.skipif(not os.access(UPROBES, os.W_OK), reason="cannot run here: no uprobes")
def test_breakpoints_that_the_kernel_puts_into_code_are_captured(
    spawn: Spawn, tmp_path: Path
) -> None:
    target, program = spawn("layout"), compile_target("layout")
    text = next(vma for vma in maps(target.pid) if vma.name == str(program) and "x" in vma.perms)
    symbols = subprocess.run(["nm", program], capture_output=True, text=True, check=True).stdout
    places = {
        line.split()[-1]: int(line[:16], 16) for line in symbols.splitlines() if line[0] != " "
    }

    def breakpoints() -> list[bool]:
        code = read_mem(target.pid, text.start, text.end - text.start)
        return [code[places[name] - text.offset] == 0xCC for name in ("die", "target_on_term")]

    with judged(target.pid, tmp_path / "chain") as judge, contextlib.ExitStack() as probes:
        judge.take()
        for count, name in enumerate(("die", "target_on_term"), 1):
            probes.enter_context(probed(program, places[name]))
            assert sum(breakpoints()) == count
            judge.take()
        probes.close()
        assert sum(breakpoints()) == 0
        judge.take()
