"""``crtrace dump``."""

from __future__ import annotations

from pathlib import Path

import click

from crtrace.cli.options import MAX_PID, PATH, max_pause_option
from crtrace.cli.output import Bar, emit, json_option
from crtrace.cli.watch import describe, tell_losses
from crtrace.units import PAGE_SIZE, Pid, human_bytes


@click.command()
@click.argument("pid", type=click.IntRange(1, MAX_PID))
@click.option(
    "-o", "--output", "path", type=PATH, metavar="DIR", required=True,
    help="The chain to write, new or of the same process.",
)  # fmt: skip
@max_pause_option
@json_option
def dump(pid: int, path: Path, max_pause: float, as_json: bool) -> None:
    """Write one image of process PID.

    Onto a chain of the same process it is incremental: every page is read, and stored if its
    contents differ from those that the chain has.
    """
    from crtrace.capture.attach import attached
    from crtrace.capture.watch import checkpoint_event

    with (
        Bar("image", lambda pages: human_bytes(pages * PAGE_SIZE)) as bar,
        attached(Pid(pid), path, max_pause_ms=max_pause, progress=bar.update) as session,
    ):
        entry, stats = session.checkpoint("dump")
    event = checkpoint_event(entry, "dump", stats)
    if as_json:
        emit(event)
    else:
        click.echo(describe(event))
    tell_losses(stats["pages_unreadable"], stats["limits"], path)
