"""Arguments that several commands share."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import click

PATH = click.Path(path_type=Path, readable=False)
"""Whether it can be read turns out: access(2), which click asks, knows nothing of capabilities."""
chain_argument = click.argument("chain", type=PATH, metavar="DIR")
epoch_option = click.option(
    "--epoch", type=int, default=-1, show_default="the newest",
    help="Which one; negative numbers count from the end.",
)  # fmt: skip

MAX_PID = 2**22
"""The kernel's own limit of process numbers (PID_MAX_LIMIT)."""


class FiniteRange(click.FloatRange):
    """A number within bounds, and not "nan" or "inf"."""

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        number = float(super().convert(value, param, ctx))
        if not math.isfinite(number):
            self.fail(f"{value} is no finite number", param, ctx)
        return number


max_pause_option = click.option(
    "--max-pause", type=FiniteRange(min=3), default=10.0, show_default=True, metavar="MS",
    help="Pre-copy until the pause is expected to be shorter than this.",
)  # fmt: skip
