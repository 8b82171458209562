"""Arguments that several commands share."""

from __future__ import annotations

from pathlib import Path

import click

chain_argument = click.argument("chain", type=click.Path(path_type=Path), metavar="DIR")
epoch_option = click.option(
    "--epoch", type=int, default=-1, show_default="the newest",
    help="Which one; negative numbers count from the end.",
)  # fmt: skip

__all__ = ["Path", "chain_argument", "epoch_option"]
