"""``crtrace export``."""

from __future__ import annotations

from pathlib import Path

import click

from crtrace.cli.options import chain_argument, epoch_option
from crtrace.cli.output import emit, json_option


@click.command()
@chain_argument
@epoch_option
@click.option(
    "--format", "kind", type=click.Choice(["core", "raw"]), default="core", show_default=True,
    help="core: an ELF core file for debuggers; raw: the memory, with a map beside it.",
)  # fmt: skip
@click.option(
    "-o", "--output", "path", type=click.Path(path_type=Path), metavar="PATH", required=True
)
@click.option("--pid", type=int, help="Which process of a tree; by default the first.")
@json_option
def export(chain: Path, epoch: int, kind: str, path: Path, pid: int | None, as_json: bool) -> None:
    """Write one process of one epoch in a form that other tools read."""
    from crtrace.export.core import export_core
    from crtrace.export.raw import export_raw
    from crtrace.image.reader import Chain

    with Chain.open(chain) as opened:
        view = opened.epoch(epoch)
        parts = (export_core if kind == "core" else export_raw)(view, path, pid=pid)
        number = view.header.epoch
    size = path.stat().st_size
    if as_json:
        emit({"epoch": number, "format": kind, "path": str(path), "bytes": size, "parts": parts})
    else:
        click.echo(f"epoch {number} as {kind} in {path}")
