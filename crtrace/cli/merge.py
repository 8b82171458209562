"""``crtrace merge``."""

from __future__ import annotations

from pathlib import Path

import click

from crtrace.cli.options import PATH, chain_argument, epoch_option
from crtrace.cli.output import Bar, emit, json_option
from crtrace.units import human_bytes


@click.command()
@chain_argument
@click.option(
    "--into", type=PATH, required=True, metavar="OUT",
    help="The directory of the new chain; it must not be there yet.",
)  # fmt: skip
@epoch_option
@json_option
def merge(chain: Path, into: Path, epoch: int, as_json: bool) -> None:
    """Write one epoch as a full image, in a chain of its own that needs no other.

    OUT appears when the image is complete and was read back and compared. The process can be
    watched on into it.
    """
    from crtrace.image.reader import Chain
    from crtrace.rewrite.merge import merge as write

    with Bar("merging", lambda _: "") as bar, Chain.open(chain) as opened:
        view = opened.epoch(epoch)
        entry = write(view, into, bar.update)
        images = len(view.lineage)
    if as_json:
        emit(
            {
                "chain": str(into), "epoch": entry.epoch, "images_merged": images,
                "pages_written": entry.pages_written, "bytes": entry.length,
            }
        )  # fmt: skip
    else:
        click.echo(
            f"epoch {entry.epoch} of {images} images as one in {into}: "
            f"{entry.pages_written} pages, {human_bytes(entry.length)}"
        )
