"""``crtrace watch``."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import Any

import click

from crtrace.cli.options import MAX_PID, PATH, FiniteRange, max_pause_option
from crtrace.cli.output import (
    LOSSES,
    Bar,
    Failure,
    emit,
    json_option,
    milliseconds,
    note,
    paint,
    printable,
)
from crtrace.units import PAGE_SIZE, Pid, human_bytes


@click.command()
@click.argument("pid", type=click.IntRange(1, MAX_PID))
@click.option(
    "-o", "--output", "path", type=PATH, metavar="DIR",
    help="The chain to write; by default crtrace-PID.",
)  # fmt: skip
@click.option(
    "--interval", type=FiniteRange(min=0), default=5.0, show_default=True,
    help="Seconds between epochs; 0: only on SIGUSR1.",
)  # fmt: skip
@click.option("--count", type=click.IntRange(min=1), help="Stop after so many epochs.")
@max_pause_option
@click.option(
    "--tree/--no-tree", default=False, show_default=True,
    help="Follow all that descend from it as well, in one pause for all.",
)  # fmt: skip
@json_option
def watch(
    pid: int, path: Path | None, interval: float, count: int | None, max_pause: float, tree: bool,
    as_json: bool,
) -> None:  # fmt: skip
    """Follow process PID and write an image of it every few seconds.

    The first epoch is taken at once and is full; each later one holds only what changed. SIGUSR1
    takes one now. The first Ctrl-C (or SIGTERM) finishes the epoch under way and ends with 0, the
    second stops at once. When the target (with --tree: the last process) exits, watch ends with 0.
    """
    from crtrace.capture.attach import attached
    from crtrace.capture.watch import StopNow, Watch, listening
    from crtrace.errors import TargetGone

    path = path or Path(f"crtrace-{pid}")
    say = emit if as_json else _print_event
    with listening() as requests:
        try:
            with (
                Bar("first image", lambda pages: human_bytes(pages * PAGE_SIZE)) as bar,
                attached(
                    Pid(pid), path, tree=tree, max_pause_ms=max_pause, progress=bar.update
                ) as session,
                closing(
                    Watch(session, requests, interval=interval, count=count, tree=tree)
                ) as watched,
            ):
                note(f"watching {pid} ({session.process.comm}) into {path}")
                if not session.heals:
                    note("its code or a shadow stack forbids the safest way to attach: had crtrace")
                    note("been killed in that moment, the target would have been lost")
                last, delayed = "", ""
                for event in watched.run():
                    bar.clear()
                    say(event)
                    last, delayed = event["event"], event.get("reason", delayed)
        except StopNow as stop:
            note("stopped at once; the committed epochs are whole")
            raise Failure(128 + stop.signum) from None
    if not watched.taken and last == "end":
        note(f"no epoch was written: {delayed}", fg="yellow")
    elif not watched.taken:
        raise TargetGone(f"process {pid} exited before its first epoch was complete")
    tell_losses(watched.losses, watched.limits, path)


def tell_losses(pages: int, limits: list[str], path: Path) -> None:
    """Say what is not in the images, and leave with the exit code for that."""
    for limit in limits:
        note(limit, fg="yellow")
    if pages:
        note(f"{pages} pages could not be read: crtrace show {path} lists them", fg="yellow")
    if pages or limits:
        raise Failure(LOSSES)


def _print_event(event: dict[str, Any]) -> None:
    kind = event["event"]
    if kind == "checkpoint":
        click.echo(describe(event))
    elif kind == "exec":
        click.echo(f"{event['pid']} runs a new program now: {printable(event['comm'])}")
    elif kind == "delayed":
        note(f"epoch delayed: {event['reason']}", fg="yellow")
        if event["hint"]:
            note(f"               {event['hint']}")
    elif kind == "fork":
        click.echo(f"{event['pid']} ({printable(event['comm'])}) is new")
    elif kind == "exit":
        status = "" if event["status"] is None else f" with status {event['status']}"
        click.echo(f"{event['pid']} exited{status} after {event['epochs']} epochs")
    else:
        click.echo(f"{event['epochs']} epochs written")


def describe(event: dict[str, Any]) -> str:
    """A checkpoint event as a line."""
    kind = f"full ({event['reason']})" if event["full"] else "+"
    text = (
        f"epoch {event['epoch']:4d}  {kind:<12} {event['pages_written']:8d} pages written  "
        f"{human_bytes(event['bytes_stored']):>10} stored  "
        f"pause {milliseconds(event['frozen_time']):>10}"
    )
    if stops := event["precopy_stops"]:
        before = milliseconds(event["precopy_stopped_time"])
        text += f"  after {stops} for scans, {before} in all"
    if event["processes"] > 1:
        text += f"  {event['processes']} processes"
    for sign, name in ((event["pages_hole"], "holes"), (event["pages_unreadable"], "unreadable")):
        text += f"  {sign} {name}" if sign else ""
    if not event["precopy_converged"] or event["pause_overflow"]:
        text += paint("  the target writes faster than it can be copied", fg="yellow")
    return text
