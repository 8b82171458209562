"""How commands speak: data to stdout, everything else to stderr, JSON where it is asked for."""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Callable, Iterable, Sequence
from datetime import datetime
from typing import Any, Self

import click

from crtrace.errors import CrtraceError

SCHEMA_VERSION = 1
LOSSES = 3
"""The exit code of what is finished and lacks something, which was listed."""

json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON on stdout.")


class Failure(Exception):
    """The command has said what is wrong; only the exit code is left to set."""

    def __init__(self, code: int) -> None:
        super().__init__(code)
        self.code = code


def emit(value: dict[str, Any]) -> None:
    """One JSON object on one line of stdout, at once: others may be waiting for it."""
    click.echo(dumps({"schema_version": SCHEMA_VERSION, **value}))
    sys.stdout.flush()


def dumps(value: Any) -> str:
    """JSON without spaces."""
    return json.dumps(value, separators=(",", ":"))


def begun(fields: dict[str, Any], key: str) -> str:
    """The beginning of a JSON object whose last field, a list, is still to be written."""
    return f'{dumps(fields)[:-1]},"{key}":['


def note(text: str, **style: Any) -> None:
    """A line for people, on stderr; names in it may be a target's choice."""
    click.echo(paint(printable(text), sys.stderr, **style), err=True)


def paint(text: str, stream: Any = None, **style: Any) -> str:
    """Coloured text where the stream is a terminal and NO_COLOR is not set."""
    stream = stream or sys.stdout
    if style and stream.isatty() and not os.environ.get("NO_COLOR"):
        return click.style(text, **style)
    return text


def explain(error: Exception) -> int:
    """Say on stderr what went wrong and what to do about it; the exit code."""
    if isinstance(error, CrtraceError):
        note(f"crtrace: {error}", fg="red")
        if error.hint:
            note(f"         {error.hint}")
        return error.exit_code
    if isinstance(error, OSError):
        note(f"crtrace: {error}", fg="red")
        return 1
    if isinstance(error, MemoryError):
        note("crtrace: out of memory; committed epochs are whole", fg="red")
        return 1
    traceback.print_exception(error)
    note("crtrace: this is a defect of crtrace; what is above would help to mend it", fg="red")
    return 1


def printable(text: str) -> str:
    """Text from elsewhere without control characters, which a terminal might obey."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def table(columns: Sequence[tuple[str, str]], rows: Iterable[Sequence[Any]]) -> Iterable[str]:
    """Lines of a table. A column is its title and ``<`` or ``>`` for the side it leans to."""
    cells = [[title for title, _ in columns], *([printable(str(c)) for c in row] for row in rows)]
    widths = [max(len(row[at]) for row in cells) for at in range(len(columns))]
    for row in cells:
        parts = [
            f"{cell:{side}{width}}"
            for cell, (_, side), width in zip(row, columns, widths, strict=True)
        ]
        yield "  ".join(parts).rstrip()


def print_table(columns: Sequence[tuple[str, str]], rows: Iterable[Sequence[Any]]) -> None:
    """Print a table on stdout."""
    for line in table(columns, rows):
        click.echo(line)


def milliseconds(us: float | None) -> str:
    """Microseconds as milliseconds, for people."""
    return "–" if us is None else f"{us / 1000:.2f} ms"


def clock(ns: int, precision: str = "seconds") -> str:
    """A time since 1970 as local time, for people."""
    try:
        return datetime.fromtimestamp(ns / 1e9).isoformat(" ", precision)
    except (ValueError, OverflowError, OSError):
        return f"{ns} ns"  # no clock ever said that


class Bar:
    """A progress bar on stderr while it is a terminal, and nothing elsewhere; as a context manager:
    after that it is gone, whatever came.

    ``update(done, total)`` may be called as often as one likes.
    """

    def __init__(self, label: str, show: Callable[[float], str] = lambda n: f"{n:.0f}") -> None:
        self._label = label
        self._show = show
        self._on = sys.stderr.isatty()
        self._percent = -1
        self._drawn = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.clear()

    def update(self, done: float, total: float) -> None:
        """Draw the bar if it looks different from before."""
        percent = int(100 * done / total) if total else 100
        if not self._on or percent == self._percent:
            return
        self._percent, self._drawn = percent, True
        filled = "█" * (percent * 30 // 100)
        text = f"\r{self._label} {filled:·<30} {percent:3d} %  {self._show(done)}"
        click.echo(text + "\033[K", err=True, nl=False)

    def clear(self) -> None:
        """Take the bar away."""
        if self._drawn:
            click.echo("\r\033[K", err=True, nl=False)
            self._drawn, self._percent = False, -1
