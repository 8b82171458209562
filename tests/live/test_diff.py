"""What ``diff`` tells of a live process: just what it did between two epochs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from crtrace.units import PAGE_SIZE
from tests.live.conftest import Spawn
from tests.live.exactness import judged
from tests.live.harness import Target, compile_target, pattern_page, read_mem
from tests.live.runner import run

Area = dict[str, Any]
QUIET = {"stack"}
"""Areas inside mappings that the target uses for other things as well."""


def known(target: Target) -> dict[str, tuple[Area, list[int | None]]]:
    """Every area with what its pages hold, as the target knows it."""
    areas = {n: a for n, a in target.ask("areas").items() if n not in QUIET and a["pages"] <= 4096}
    return {name: (area, target.ask(f"seeds {name}")) for name, area in areas.items()}


def addresses(area: Area, pages: list[int]) -> set[int]:
    return {area["addr"] + page * PAGE_SIZE for page in pages}


@pytest.fixture
def changed(spawn: Spawn, tmp_path: Path) -> tuple[Path, Target, set[int], set[int]]:
    """A chain of two epochs; the addresses of pages in areas, and of those that changed."""
    target = spawn("layout")
    with judged(target.pid, tmp_path / "chain") as judge:
        target.obey("mmap goes 8")
        target.obey("write goes 1 2 5")
        target.obey("mmap small 8")
        judge.take()
        before = known(target)
        for command in (
            "write anon_written 3 2 50", "half anon_written 9 1", "zero anon_written 11 1",
            "write anon_unwritten 60 4 51", "zero anon_unwritten 2 2", "dontneed dontneed 20 3",
            "write anon_written 20 1 1", "write thp 700 3 52", "write file_private 9 2 53",
            "dontneed file_private 1 1", "write memfd_shared 2 1 54", "punch memfd_shared 5 2",
            "write sysv 7 1 55", "write anon_shared 40 2 56", "write memfd_private 3 1 57",
            "mprotect read_only rw", "munmap goes", "mmap comes 16", "write comes 4 2 58",
            "mprotect small none",
        ):  # fmt: skip
            target.obey(command)
        judge.take()
        after = known(target)
    inside: set[int] = set()
    different: set[int] = set()
    for name in before.keys() & after.keys():
        (area, was), (_, now) = before[name], after[name]
        inside |= addresses(area, [at for at, seed in enumerate(was) if seed is not None])
        pairs = enumerate(zip(was, now, strict=True))
        different |= addresses(area, [at for at, (x, y) in pairs if x != y])
    return tmp_path / "chain", target, inside, different


def mappings(path: Path) -> list[dict[str, Any]]:
    (shown,) = run("diff", path, "0", "-1", "--json").expect(0).events
    (process,) = shown["processes"]
    assert process["change"] == "kept"
    found: list[dict[str, Any]] = process["mappings"]
    return found


def test_just_what_was_changed_is_told(
    changed: tuple[Path, Target, set[int], set[int]],
) -> None:
    path, target, inside, different = changed
    told = {
        page
        for mapping in mappings(path)
        for start, end in mapping["ranges"]
        for page in range(start, end, PAGE_SIZE)
    }
    assert len(different) > 15
    assert told & inside == different
    assert len(told) < len(different) + 64, "its own data and stack besides"
    target.terminate_and_check()


def test_mappings_that_came_went_and_were_protected_are_told(
    changed: tuple[Path, Target, set[int], set[int]],
) -> None:
    path, target, _, _ = changed
    areas = target.ask("areas")

    def covering(name: str) -> dict[str, Any]:
        at = areas[name]["addr"]
        return next(m for m in mappings(path) if m["start"] <= at < m["end"])

    for name, was, now in (("read_only", "r--p", "rw-p"), ("small", "rw-p", "---p")):
        mapping, at = covering(name), areas[name]["addr"]
        before = [v["perms"] for v in mapping["before"] if v["start"] <= at < v["end"]]
        assert (before, mapping["perms"]) == ([was], now)
    comes = covering("comes")
    start = areas["comes"]["addr"]
    size = areas["comes"]["pages"] * PAGE_SIZE
    came = sum(
        max(0, min(end, start + size) - max(first, start)) for first, end in comes["alone"]["parts"]
    )
    # What "goes" had may have been given to "comes" again, and is then compared page by page.
    again = sum(
        max(0, min(v["end"], start + size) - max(v["start"], start)) for v in comes["before"]
    )
    assert came + again == size
    target.terminate_and_check()


def test_the_changed_bytes_are_shown(
    changed: tuple[Path, Target, set[int], set[int]],
) -> None:
    """Those of one page, which had pattern 1 and has pattern 50."""
    path, target, _, different = changed
    addr = target.ask("areas")["anon_written"]["addr"] + 3 * PAGE_SIZE
    old, new = pattern_page(1, 3), pattern_page(50, 3)
    assert read_mem(target.pid, addr, PAGE_SIZE) == new
    rows = run("diff", path, -2, -1, "--pages", "--json").expect(0).events
    parts = {row["start"]: row for row in rows}
    part = parts[addr]
    assert bytes.fromhex(part["old"])[:PAGE_SIZE] == old
    assert bytes.fromhex(part["new"])[:PAGE_SIZE] == new
    covered = {at & -PAGE_SIZE for row in rows for at in range(row["start"], row["end"], 16)}
    assert different <= covered
    text = run("diff", path, 0, 1, "--pages", "--pid", target.pid).expect(0).stdout.splitlines()
    for sign, data in (("-", old), ("+", new)):
        lines = [line for line in text if line.startswith(f"{sign}{addr + 32:012x}: ")]
        assert [line.split("  ")[0].split(": ")[1] for line in lines] == [data[32:48].hex(" ", 2)]
    assert "\033" not in "".join(text)
    target.terminate_and_check()


def test_another_program_is_said_to_be_one(spawn: Spawn, tmp_path: Path) -> None:
    path = tmp_path / "chain"
    target = spawn("layout")
    assert run("dump", target.pid, "-o", path).code in (0, 3)
    target.obey(f"exec {compile_target('threads')}")
    target.await_ready()
    run("dump", target.pid, "-o", path).expect(0)
    (shown,) = run("diff", path, -2, -1, "--json").expect(0).events
    assert [(p["change"], p["mappings"]) for p in shown["processes"]] == [("exec", [])]
    text = run("diff", path, -2, -1).expect(0).stdout
    assert "runs another program; its whole map was replaced" in text


def test_what_cannot_be_compared_is_an_error(
    changed: tuple[Path, Target, set[int], set[int]],
) -> None:
    path = changed[0]
    run("diff", path, 0, 7).expect(2, "has no epoch 7")
    run("diff", path, 0, 1, "--pid", 1).expect(2, "neither epoch has pid 1")
    run("diff", path, 0, "x").expect(2)
    image = path / "00000000.img"
    image.write_bytes(image.read_bytes()[:-1])
    run("diff", path, 0, 1).expect(20, "00000000.img")
