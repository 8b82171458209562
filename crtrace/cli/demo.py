"""``crtrace demo``."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from crtrace.cli.options import PATH
from crtrace.cli.output import (
    Bar,
    Failure,
    emit,
    json_option,
    milliseconds,
    note,
    paint,
    print_table,
)
from crtrace.units import PAGE_SIZE, Pid, human_bytes

EPOCHS = 10
INTERVAL = 0.5


@click.command()
@click.option(
    "-o", "--output", "path", type=PATH, metavar="DIR",
    help="Keep the chain there; by default it is thrown away.",
)  # fmt: skip
@json_option
def demo(path: Path | None, as_json: bool) -> None:
    """Watch a small program at work and prove every epoch against its own memory.

    The program has several threads, a heap that grows and shrinks, a file mapping and shared
    mappings. In each pause its memory is also copied through /proc/PID/mem, and compared with the
    image afterwards; that copy's time is not counted as pause.
    """
    with tempfile.TemporaryDirectory(prefix="crtrace-demo-") as folder:
        with _workload(Path(folder) / "mapped-file") as pid:
            note(f"process {pid}: threads, a heap, a file mapping, shared memory")
            rows = list(_watch(pid, path or Path(folder) / "chain"))
        _check_chain(path or Path(folder) / "chain")
    if as_json:
        emit({"epochs": rows, "exact": all(not row["wrong"] for row in rows)})
    else:
        _report(rows)
    if any(row["wrong"] for row in rows):
        raise Failure(1)


@contextmanager
def _workload(file: Path) -> Iterator[int]:
    file.touch()
    with subprocess.Popen(
        [sys.executable, "-P", "-m", "crtrace.demo.workload", str(file)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as process:
        try:
            if process.stdout and not process.stdout.readline():
                raise Failure(1)
            yield process.pid
        finally:
            process.kill()


def _watch(pid: int, path: Path) -> Iterator[dict[str, Any]]:
    from crtrace.capture.attach import attached
    from crtrace.demo.judge import Judge
    from crtrace.image.reader import Chain

    judge = Judge()
    with (
        Bar("first image", lambda pages: human_bytes(pages * PAGE_SIZE)) as bar,
        attached(Pid(pid), path, progress=bar.update, witness=judge) as session,
    ):
        bar.clear()
        for number in range(EPOCHS):
            time.sleep(INTERVAL if number else 0)
            entry, stats = session.checkpoint("start" if not number else "interval")
            with Chain.open(path) as chain:
                verdict = judge.judge(chain.epoch(entry.epoch))
            bar.update(number + 1, EPOCHS)
            yield {
                "epoch": entry.epoch,
                "pages_written": stats["pages_written"],
                "bytes_stored": stats["bytes_stored"],
                "frozen_time": stats["frozen_time"],
                "bpf_pages": stats["bpf_pages"],
                "bpf_missed": stats["bpf_missed"],
                "pages_compared": verdict.compared,
                "wrong": len(verdict.wrong),
            }


def _check_chain(path: Path) -> None:
    from crtrace.analyze.verify import verify
    from crtrace.errors import ImageDamaged
    from crtrace.image.reader import Chain

    with Chain.open(path) as chain:
        report = verify(chain)
    if not report.ok:
        raise ImageDamaged(report.damage[0].message)
    note(f"verified: {report.records} records, {report.pages} pages, {human_bytes(report.bytes)}")


def _report(rows: list[dict[str, Any]]) -> None:
    columns = (
        ("epoch", ">"), ("pages written", ">"), ("stored", ">"), ("pause", ">"),
        ("pages compared", ">"), ("", "<"),
    )  # fmt: skip
    print_table(
        columns,
        (
            (
                row["epoch"],
                row["pages_written"],
                human_bytes(row["bytes_stored"]),
                milliseconds(row["frozen_time"]),
                row["pages_compared"],
                f"{row['wrong']} pages differ" if row["wrong"] else "exact",
            )
            for row in rows
        ),
    )
    wrong = sum(1 for row in rows if row["wrong"])
    if wrong:
        click.echo(paint(f"{wrong} of {len(rows)} epochs differ", fg="red"))
    else:
        click.echo(paint(f"all {len(rows)} epochs exact", fg="green"))
