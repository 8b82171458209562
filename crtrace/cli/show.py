"""``crtrace show``."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from crtrace.cli.options import chain_argument, epoch_option
from crtrace.cli.output import (
    Bar,
    clock,
    emit,
    json_option,
    milliseconds,
    paint,
    print_table,
    printable,
)
from crtrace.units import human_bytes


@click.command()
@chain_argument
@epoch_option
@json_option
def show(chain: Path, epoch: int, as_json: bool) -> None:
    """Show one epoch: tasks, threads, memory map, files, statistics, losses."""
    from crtrace.analyze.summary import show as summarise
    from crtrace.image.reader import Chain

    with Bar("reading") as bar, Chain.open(chain) as opened:
        facts = summarise(opened.epoch(epoch), bar.update)
    if as_json:
        emit(facts)
        return
    kind = "full" if facts["full"] else f"builds on epoch {facts['parent_epoch']}"
    click.echo(
        f"epoch {facts['epoch']} ({printable(facts['reason'])}), {kind}; "
        f"Linux {printable(facts['kernel'])} "
        f"on {printable(facts['hostname'])}; tracked by {printable(facts['armer'])}"
    )
    for task in facts["tasks"]:
        _print_task(task)
    _print_files(facts["files"])
    limits = facts["stats"].pop("limits", [])
    _print_stats(facts["stats"])
    if limits:
        _heading("limits")
        for limit in limits:
            click.echo(printable(limit))
    _print_losses(facts["losses"])


def _heading(text: str) -> None:
    click.echo()
    click.echo(paint(text, bold=True))


def _print_task(task: dict[str, Any]) -> None:
    _heading(f"process {task['pid']} {printable(task['comm'])}, child of {task['ppid']}")
    if task["space"] is None:
        status = task["exit_status"]
        click.echo("without memory" if status < 0 else f"ended, wait status {status}")
        return
    click.echo(printable(" ".join(task["cmdline"])))
    print_table(
        (("thread", ">"), ("name", "<"), ("system call", ">"), ("blocked signals", ">")),
        ((t["tid"], t["comm"], t["syscall"], f"{t['sigmask']:#x}") for t in task["threads"]),
    )
    _print_map(task["vmas"])


def _print_map(vmas: list[dict[str, Any]]) -> None:
    """The mappings, with a column for each source that any of them has bytes from."""
    _heading("memory map: bytes, and where they come from")
    total: Counter[str] = Counter()
    for vma in vmas:
        total.update({"size": vma["end"] - vma["start"], **vma["bytes"]})
    names = [name for name, size in total.items() if size]
    rows = [
        (
            f"{v['start']:x}-{v['end']:x}", v["perms"],
            *_sizes({"size": v["end"] - v["start"], **v["bytes"]}, names), v["name"],
        )
        for v in vmas
    ]  # fmt: skip
    rows.append(("all", "", *_sizes(total, names), ""))
    columns = (("range", "<"), ("prot", "<"), *((name, ">") for name in names), ("mapping", "<"))
    print_table(columns, rows)


def _sizes(sizes: Mapping[str, int], names: list[str]) -> list[str]:
    return [human_bytes(sizes[name]) if sizes[name] else "" for name in names]


def _print_files(files: list[dict[str, Any]]) -> None:
    if files:
        _heading("files")
        print_table(
            (("size", ">"), ("written", "<"), ("kept", "<"), ("what", "<"), ("path", "<")),
            (
                (
                    human_bytes(file["size"]),
                    clock(file["mtime_ns"]),
                    "yes" if file["kept"] else "no",
                    ", ".join(file["flags"]),
                    file["path"],
                )
                for file in files
            ),
        )


def _print_stats(stats: dict[str, Any]) -> None:
    _heading("statistics")
    paid = stats.pop("paid", {})
    rows = [
        (name, milliseconds(value) if name.endswith("_time") else value)
        for name, value in sorted(stats.items())
    ]
    rows += [(f"target's {name}", value) for name, value in sorted(paid.items())]
    print_table((("what", "<"), ("value", ">")), rows)


def _print_losses(losses: list[dict[str, Any]]) -> None:
    if losses:
        _heading("not readable")
        print_table(
            (("address", "<"), ("end", "<"), ("errno", ">"), ("reason", "<")),
            ((f"{x['start']:#x}", f"{x['end']:#x}", x["errno"], x["reason"]) for x in losses),
        )
