"""``crtrace show``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from crtrace.cli.options import chain_argument, epoch_option
from crtrace.cli.output import emit, json_option, milliseconds, paint, print_table, printable
from crtrace.units import human_bytes


@click.command()
@chain_argument
@epoch_option
@json_option
def show(chain: Path, epoch: int, as_json: bool) -> None:
    """Show one epoch: tasks, threads, memory map, files, statistics, losses."""
    from crtrace.analyze.summary import show as summarise
    from crtrace.image.reader import Chain

    with Chain.open(chain) as opened:
        facts = summarise(opened.epoch(epoch))
    if as_json:
        emit(facts)
        return
    kind = "full" if facts["full"] else f"builds on epoch {facts['parent_epoch']}"
    click.echo(
        f"epoch {facts['epoch']} ({facts['reason']}), {kind}; Linux {printable(facts['kernel'])} "
        f"on {printable(facts['hostname'])}; tracked by {printable(facts['armer'])}"
    )
    for task in facts["tasks"]:
        _print_task(task)
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
    _heading(f"process {task['pid']} {printable(task['comm'])}")
    click.echo(printable(" ".join(task["cmdline"])))
    print_table(
        (("thread", ">"), ("name", "<"), ("system call", ">"), ("blocked signals", ">")),
        ((t["tid"], t["comm"], t["syscall"], f"{t['sigmask']:#x}") for t in task["threads"]),
    )
    _heading("memory map: bytes, and where they come from")
    sources = list(next(iter(task["vmas"]), {"bytes": {}})["bytes"])
    columns = (
        ("range", "<"), ("prot", "<"), *((name, ">") for name in sources), ("mapping", "<"),
    )  # fmt: skip
    print_table(
        columns,
        (
            (
                f"{v['start']:x}-{v['end']:x}",
                v["perms"],
                *(human_bytes(v["bytes"][name]) if v["bytes"][name] else "" for name in sources),
                v["name"],
            )
            for v in task["vmas"]
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
