"""``crtrace diff``."""

from __future__ import annotations

from pathlib import Path

import click

from crtrace.cli.options import chain_argument
from crtrace.cli.output import Bar, json_option


# Negative numbers look like options.
@click.command(context_settings={"ignore_unknown_options": True})
@chain_argument
@click.argument("a", type=int)
@click.argument("b", type=int)
@click.option("--pid", type=int, help="Only this process of a tree.")
@click.option("--pages", is_flag=True, help="Show the changed bytes.")
@json_option
def diff(chain: Path, a: int, b: int, pid: int | None, pages: bool, as_json: bool) -> None:
    """Show what changed from epoch A to epoch B: processes, mappings, pages, files.

    Negative numbers count from the end: -2 -1 compares the newest two.
    """
    from crtrace.analyze.diff import Diff
    from crtrace.cli import diff_json, diff_text
    from crtrace.image.reader import Chain

    with (
        Bar("comparing", lambda done: f"{int(done)} processes done") as bar,
        Chain.open(chain) as opened,
    ):
        found = Diff(opened.epoch(a), opened.epoch(b), pid=pid, progress=bar.update)
        if pages:
            parts = (diff_json if as_json else diff_text).changed_bytes(found)
        else:
            parts = diff_json.summary(found, chain) if as_json else diff_text.summary(found)
        for part in parts:
            bar.clear()
            click.echo(part, nl=False)
