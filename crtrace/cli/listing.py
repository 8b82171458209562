"""``crtrace list``."""

from __future__ import annotations

from pathlib import Path

import click

from crtrace.cli.options import chain_argument
from crtrace.cli.output import Bar, clock, emit, json_option, milliseconds, print_table
from crtrace.units import human_bytes


@click.command("list")
@chain_argument
@json_option
def list_(chain: Path, as_json: bool) -> None:
    """List the epochs of a chain."""
    from crtrace.analyze.summary import list_epochs
    from crtrace.image.reader import Chain

    with Bar("reading") as bar, Chain.open(chain) as opened:
        epochs = list_epochs(opened, bar.update)
    if as_json:
        emit({"chain": str(chain), "epochs": epochs})
        return
    columns = (
        ("epoch", ">"), ("time", "<"), ("kind", "<"), ("reason", "<"), ("pages", ">"),
        ("holes", ">"), ("stored", ">"), ("pause", ">"),
    )  # fmt: skip
    rows = (
        (
            e["epoch"],
            clock(e["wall_ns"], "milliseconds"),
            "full" if e["full"] else "+",
            e["reason"] or "",
            e["pages_written"],
            e["pages_hole"],
            human_bytes(e["bytes_stored"]),
            milliseconds(e["pause_us"]) if not e["damage"] else "damaged",
        )
        for e in epochs
    )
    print_table(columns, rows)
