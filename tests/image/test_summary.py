"""What list and show are given."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from crtrace.analyze.summary import list_epochs, show
from crtrace.image.reader import Chain
from crtrace.image.store import ChainWriter
from crtrace.image.tables import FileInfo, Files, Vma, VmaKind
from crtrace.units import PAGE_SIZE
from tests.image.support import RW, SPACE, ZERO, add_task, anon, numbers, page, write

LIB = Vma(
    start=40 * PAGE_SIZE, end=44 * PAGE_SIZE, flags=RW, kind=VmaKind.FILE, file=1, name="/lib/x"
)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "chain"
    with ChainWriter.open(path, create=True) as writer:
        for reason in ("start", "dump"):
            with writer.begin(reason=reason, wall_ns=5, kernel="6.18") as image:
                files = Files((FileInfo(id=1, flags=1, path="/lib/x", build_id=b"\xab"),))
                add_task(image, [anon(10, 10), LIB], files=files, threads=2)
                write(image, {11: page(len(reason)), 12: ZERO, 41: page(7)})
                image.mark_unreadable(SPACE, numbers([15]), 14)
                if reason == "dump":
                    image.mark_holes(SPACE, numbers([12]))
                image.commit({"frozen_time": 1234})
    return path


def test_list_has_a_row_for_each_epoch(path: Path) -> None:
    with Chain.open(path) as chain:
        rows = list_epochs(chain)
    json.dumps(rows)
    assert [(row["epoch"], row["full"], row["parent_epoch"]) for row in rows] == [
        (0, True, None), (1, False, 0),
    ]  # fmt: skip
    assert [row["reason"] for row in rows] == ["start", "dump"]
    assert [row["pages_written"] for row in rows] == [3, 1]
    assert [row["pages_hole"] for row in rows] == [0, 1]
    assert {row["pause_us"] for row in rows} == {1234}
    assert {row["wall_ns"] for row in rows} == {5}
    assert {row["damage"] for row in rows} == {None}
    sizes = [(path / f"0000000{at}.img").stat().st_size for at in range(2)]
    assert [row["length"] for row in rows] == sizes


def test_list_goes_on_after_damage(path: Path) -> None:
    (path / "00000000.img").write_bytes(b"")
    with Chain.open(path) as chain:
        rows = list_epochs(chain)
    assert "file length is 0" in rows[0]["damage"]
    assert [row["reason"] for row in rows] == [None, "dump"]


def test_show_has_everything_but_contents(path: Path) -> None:
    with Chain.open(path) as chain:
        shown = show(chain.epoch())
    json.dumps(shown)
    assert (shown["epoch"], shown["reason"], shown["kernel"]) == (1, "dump", "6.18")
    assert shown["images_needed"] == 2
    (task,) = shown["tasks"]
    assert task["cmdline"] == ["./target", "-x"]
    assert [thread["tid"] for thread in task["threads"]] == [100, 101]
    assert task["threads"][0]["registers"] == [1, 2]
    heap, lib = task["vmas"]
    page_bytes = PAGE_SIZE
    assert heap["bytes"] == {
        "stored": page_bytes, "zero": 8 * page_bytes, "object": 0, "file": 0,
        "unreadable": page_bytes,
    }  # fmt: skip
    assert lib["bytes"]["stored"] == page_bytes
    assert lib["bytes"]["file"] == 3 * page_bytes
    assert (lib["perms"], lib["kind"], lib["name"]) == ("rw-p", "file", "/lib/x")
    assert shown["files"] == [
        {
            "id": 1, "path": "/lib/x", "flags": ["deleted"], "dev": 0, "inode": 0, "size": 0,
            "mtime_ns": 0, "build_id": "ab", "kept": False,
        }
    ]  # fmt: skip
    assert shown["losses"] == [
        {
            "space": 1, "start": 15 * page_bytes, "end": 16 * page_bytes, "errno": 14,
            "reason": "read_failed",
        }
    ]  # fmt: skip
    assert shown["stats"]["pages_hole"] == 1


def test_names_that_are_no_text_are_still_json(tmp_path: Path) -> None:
    path = tmp_path / "chain"
    with ChainWriter.open(path, create=True) as writer, writer.begin() as image:
        add_task(image, [anon(1, 1)], files=Files((FileInfo(id=1, path="/x\udcff"),)))
        image.commit({})
    with Chain.open(path) as chain:
        assert json.dumps(show(chain.epoch()))
