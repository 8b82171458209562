"""``crtrace export``."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from crtrace.cli.options import PATH, chain_argument, epoch_option
from crtrace.cli.output import LOSSES, Bar, Failure, emit, json_option, note
from crtrace.cli.verify import describe_loss
from crtrace.units import human_bytes

if TYPE_CHECKING:
    from crtrace.analyze.lost import EpochLoss, Suspects
    from crtrace.image.reader import Chain


@click.command()
@chain_argument
@epoch_option
@click.option(
    "--format", "kind", type=click.Choice(["core", "raw"]), default="core", show_default=True,
    help="core: an ELF core file for debuggers; raw: the memory, with a map beside it.",
)  # fmt: skip
@click.option("-o", "--output", "path", type=PATH, metavar="PATH", required=True)
@click.option("--pid", type=int, help="Which process of a tree; by default the first.")
@click.option(
    "--salvage", is_flag=True,
    help="Of a damaged chain: leave out what is lost, say what that is, and exit with 3.",
)  # fmt: skip
@json_option
def export(
    chain: Path, epoch: int, kind: str, path: Path, pid: int | None, salvage: bool, as_json: bool
) -> None:
    """Write one process of one epoch in a form that other tools read."""
    from crtrace.export.core import export_core
    from crtrace.export.raw import export_raw
    from crtrace.image.reader import Chain

    lost: list[EpochLoss] = []
    with Bar("exporting", human_bytes) as bar, Chain.open(chain, salvage=salvage) as opened:
        number = opened.entry(epoch).epoch
        damage = None
        if salvage:
            damage, lost = _find_damage(opened, number)
        view = opened.epoch(number, damage)
        parts = (export_core if kind == "core" else export_raw)(
            view, path, pid=pid, progress=bar.update
        )
    size = path.stat().st_size
    if as_json:
        emit(
            {
                "epoch": number, "format": kind, "path": str(path), "bytes": size, "parts": parts,
                "lost": [asdict(each) for each in lost],
            }
        )  # fmt: skip
    else:
        click.echo(f"epoch {number} as {kind} in {path}")
    if lost:
        for line in describe_loss(lost[0]):
            note(line, fg="yellow")
        raise Failure(LOSSES)


def _find_damage(chain: Chain, number: int) -> tuple[Suspects, list[EpochLoss]]:
    """What is damaged, and what the epoch lacks because of that."""
    from crtrace.analyze.verify import verify

    with Bar("looking for damage", human_bytes) as bar:
        report = verify(chain, number, bar.update)
    return report.suspects, [loss for loss in report.lost if loss.epoch == number]
