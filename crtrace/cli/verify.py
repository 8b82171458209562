"""``crtrace verify``."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

from crtrace.cli.options import chain_argument
from crtrace.cli.output import Bar, Failure, emit, json_option, paint, printable
from crtrace.errors import ChainIncomplete, ImageDamaged
from crtrace.units import human_bytes

if TYPE_CHECKING:
    from crtrace.analyze.lost import EpochLoss
    from crtrace.analyze.verify import Damage

LISTED = 4
"""Address ranges of a line; ``--json`` has more."""


@click.command()
@chain_argument
@click.option("--epoch", type=int, help="Only this epoch and those it builds on.")
@json_option
def verify(chain: Path, epoch: int | None, as_json: bool) -> None:
    """Read a chain again, byte by byte, and compare every checksum and every page."""
    from crtrace.analyze.verify import verify as check
    from crtrace.image.reader import Chain

    with Bar("verifying", human_bytes) as bar, Chain.open(chain, salvage=True) as opened:
        report = check(opened, epoch, bar.update)
    if as_json:
        emit(report.to_json())
    else:
        for damage in report.damage:
            click.echo(paint(_describe(damage), fg="red"))
        for epoch_loss in report.lost:
            for line in describe_loss(epoch_loss):
                click.echo(line)
        for notice in report.notices:
            click.echo(printable(notice))
        state = "whole" if report.ok else "damaged"
        click.echo(
            f"{len(report.epochs)} epochs, {report.records} records, {report.pages} pages, "
            f"{human_bytes(report.bytes)}: {state}"
        )
    if not report.ok:
        only_missing = all(damage.missing for damage in report.damage)
        raise Failure((ChainIncomplete if only_missing else ImageDamaged).exit_code)


def describe_loss(loss: EpochLoss) -> Iterator[str]:
    """What an epoch lacks, a line for each process and for each record of anything but memory."""
    if loss.whole:
        yield f"epoch {loss.epoch} cannot be read"
    for state in loss.state:
        yield f"epoch {loss.epoch} lacks {printable(state.text)}: {state.record} is damaged"
    for process in loss.processes:
        ranges = ", ".join(f"{start:x}-{end:x}" for start, end in process.ranges[:LISTED])
        more = ", …" if len(process.ranges) > LISTED else ""
        yield (
            f"epoch {loss.epoch} lacks {human_bytes(process.bytes)} of process {process.pid} "
            f"({printable(process.comm)}): {ranges}{more}"
        )


def _describe(damage: Damage) -> str:
    where = f"{damage.file}, {damage.record} at offset {damage.offset:#x}: {damage.message}"
    lost = f"; {damage.pages_lost} pages lost" if damage.pages_lost else ""
    epochs = f"; epochs {', '.join(map(str, damage.epochs))}" if damage.epochs else ""
    return printable(where + lost + epochs)
