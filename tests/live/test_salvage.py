"""What a damaged chain of a real process still gives, and what it says is missing."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from elftools.elf.elffile import ELFFile

from crtrace.image.places import PageKind, chunks, kinds
from crtrace.image.reader import Chain
from tests.live.harness import Target
from tests.live.runner import run

Spawn = Callable[..., Target]


@pytest.fixture
def damaged(spawn: Spawn, tmp_path: Path) -> tuple[Path, Path, int]:
    """A chain with a flipped bit in the middle of a chunk, a whole copy of it, and the pid."""
    target = spawn("writer", "--mib", 16, "--threads", 1)
    whole, chain = tmp_path / "whole", tmp_path / "chain"
    run("watch", target.pid, "-o", whole, "--count", 3, "--interval", 0.2).expect(0)
    target.terminate_and_check()
    chain.mkdir(0o700)
    for file in whole.iterdir():
        (chain / file.name).write_bytes(file.read_bytes())
    with Chain.open(chain) as opened:
        view = opened.epoch(0)
        assert view.tasks[0].mm
        places = view.index(view.tasks[0].mm.space).places
        named = chunks(places[kinds(places) == PageKind.STORED]).astype(np.int64)
        row = view.image.directory[int(np.bincount(named).argmax()) - 1]
    data = bytearray((chain / "00000000.img").read_bytes())
    data[int(row["offset"]) + int(row["length"]) // 2] ^= 0x10
    (chain / "00000000.img").write_bytes(data)
    return chain, whole, target.pid


def test_verify_tells_epoch_process_and_addresses(damaged: tuple[Path, Path, int]) -> None:
    chain, _, pid = damaged
    report = json.loads(run("verify", chain, "--json").expect(20).stdout)
    (damage,) = report["damage"]
    assert (damage["file"], damage["record"].split()[0]) == ("00000000.img", "CHUNK")
    assert damage["pages_lost"] > 0
    first = report["lost"][0]
    assert (first["epoch"], first["whole"]) == (0, False)
    (process,) = first["processes"]
    assert process["pid"] == pid
    assert process["bytes"] == damage["pages_lost"] * 4096
    listed = sum(end - start for start, end in process["ranges"])
    assert listed == process["bytes"] if not process["more"] else listed < process["bytes"]
    assert len(process["ranges"]) == 64 or not process["more"]
    assert "lacks" in run("verify", chain).expect(20).stdout


def test_an_export_of_it_is_refused_and_salvaged_says_what_is_missing(
    damaged: tuple[Path, Path, int], tmp_path: Path
) -> None:
    chain, whole, _ = damaged
    out = tmp_path / "memory"
    assert "checksum" in run("export", chain, "--epoch", 0, "--format", "raw", "-o", out).expect(
        20
    ).stderr  # fmt: skip
    assert not out.exists()
    done = run("export", chain, "--epoch", 0, "--format", "raw", "-o", out, "--salvage", "--json")
    said = json.loads(done.expect(3).stdout)
    (process,) = said["lost"][0]["processes"]
    assert "lacks" in done.stderr
    run("export", whole, "--epoch", 0, "--format", "raw", "-o", tmp_path / "right").expect(0)
    compared, lost = compare(out, tmp_path / "right")
    assert compared > 1000
    assert lost * 4096 == process["bytes"] > 0


def rows(path: Path) -> dict[int, dict[str, Any]]:
    """The map of a raw file, by the start of each mapping."""
    return {row["start"]: row for row in map(json.loads, path.read_text().splitlines())}


def missing(row: dict[str, Any]) -> set[int]:
    """The addresses of the pages that a raw file has not."""
    return {addr for start, end in row["missing"] for addr in range(start, end, 4096)}


def compare(out: Path, right: Path) -> tuple[int, int]:
    """Hold each page of a salvaged raw file against the whole one's; how many pages it has, and
    how many it says are missing that the whole one has."""
    ours, theirs = out.read_bytes(), right.read_bytes()
    salvaged = rows(out.with_suffix(".map"))
    compared = lost = 0
    for start, row in rows(right.with_suffix(".map")).items():
        gone = missing(salvaged[start])
        lost += len(gone - missing(row))
        for addr in set(range(start, row["end"], 4096)) - gone:
            at, mine = (each["offset"] + addr - start for each in (row, salvaged[start]))
            assert ours[mine : mine + 4096] == theirs[at : at + 4096], f"{addr:#x}"
            compared += 1
    return compared, lost


def test_a_salvaged_core_has_no_segment_where_something_is_lost(
    damaged: tuple[Path, Path, int], tmp_path: Path
) -> None:
    chain, _, _ = damaged
    done = run("export", chain, "--epoch", 0, "-o", tmp_path / "core", "--salvage", "--json")
    lost = json.loads(done.expect(3).stdout)["lost"][0]["processes"][0]["ranges"]
    with (tmp_path / "core").open("rb") as file:
        spans = [
            (segment["p_vaddr"], segment["p_vaddr"] + segment["p_memsz"])
            for segment in ELFFile(file).iter_segments("PT_LOAD")
        ]
    assert len(spans) > 10
    assert not [1 for start, end in spans for first, last in lost if first < end and start < last]


def test_epochs_that_do_not_need_what_is_damaged_still_export(
    damaged: tuple[Path, Path, int], tmp_path: Path
) -> None:
    chain, whole, _ = damaged
    (chain / "00000002.img").write_bytes(b"gone")
    report = json.loads(run("verify", chain, "--json").expect(20).stdout)
    lost = {each["epoch"]: each["whole"] for each in report["lost"]}
    assert (lost[0], lost[2]) == (False, True)
    for epoch in range(3):
        out = tmp_path / f"core{epoch}"
        run("export", chain, "--epoch", epoch, "-o", out).expect(20 if epoch in lost else 0)
        code = 20 if lost.get(epoch) else 3 if epoch in lost else 0
        run("export", chain, "--epoch", epoch, "-o", out, "--salvage").expect(code)
        if code == 0:
            run("export", whole, "--epoch", epoch, "-o", tmp_path / "right").expect(0)
            assert out.read_bytes() == (tmp_path / "right").read_bytes()
