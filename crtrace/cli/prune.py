"""``crtrace prune``."""

from __future__ import annotations

from pathlib import Path

import click

from crtrace.cli.options import chain_argument
from crtrace.cli.output import Bar, emit, json_option
from crtrace.units import human_bytes


@click.command()
@chain_argument
@click.option(
    "--keep",
    type=click.IntRange(min=1),
    required=True,
    metavar="N",
    help="Keep the newest N epochs.",
)
@click.option(
    "--keep-every", "every", type=click.IntRange(min=1), metavar="N",
    help="Keep every Nth of the older ones as well: those whose number N divides.",
)  # fmt: skip
@json_option
def prune(chain: Path, keep: int, every: int | None, as_json: bool) -> None:
    """Drop old epochs of a chain; those that are kept stay what they were.

    The old files go only when the new ones were read back and compared.
    """
    from crtrace.rewrite.prune import prune as thin_out

    with Bar("writing anew", lambda _: "") as bar:
        done = thin_out(chain, keep=keep, every=every or 0, progress=bar.update)
    if as_json:
        emit(
            {
                "chain": str(chain), "kept": done.kept, "dropped": done.dropped,
                "rewritten": done.rewritten, "bytes_before": done.bytes_before,
                "bytes_after": done.bytes_after,
            }
        )  # fmt: skip
    else:
        click.echo(
            f"{len(done.kept)} epochs kept, {len(done.dropped)} dropped, "
            f"{len(done.rewritten)} written anew: "
            f"{human_bytes(done.bytes_before)} before, {human_bytes(done.bytes_after)} now"
        )
