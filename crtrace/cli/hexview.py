"""Bytes before and after, in the manner of ``xxd`` and ``diff``: only lines that differ."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator

import click
import numpy as np

from crtrace.units import Bytes

LINE = 16
SHOWN = bytes(c if 0x20 <= c < 0x7F else ord(".") for c in range(256))


def colours() -> bool:
    """Whether stdout is for colours."""
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR")


def hex_lines(addr: int, old: Bytes, new: Bytes, *, colour: bool) -> Iterator[str]:
    """Two lines for each 16 bytes that differ; ``old`` and ``new``: the bytes from ``addr`` on."""
    before, after = old.reshape(-1, LINE), new.reshape(-1, LINE)
    differ = before != after
    for row in np.flatnonzero(differ.any(axis=1)).tolist():
        marks = differ[row].tolist() if colour else None
        at = addr + row * LINE
        yield _line("-", at, before[row].tobytes(), marks, "red")
        yield _line("+", at, after[row].tobytes(), marks, "green")


def _line(sign: str, addr: int, data: bytes, marks: list[bool] | None, colour: str) -> str:
    pairs, text = data.hex(" ", 2), data.translate(SHOWN).decode("ascii")
    if marks:
        cells = [_mark(f"{byte:02x}", mark, colour) for byte, mark in zip(data, marks, strict=True)]
        pairs = " ".join(a + b for a, b in zip(cells[::2], cells[1::2], strict=True))
        text = "".join(_mark(c, mark, colour) for c, mark in zip(text, marks, strict=True))
    return f"{sign}{addr:012x}: {pairs}  {text}"


def _mark(text: str, mark: bool, colour: str) -> str:
    return click.style(text, fg=colour, bold=True) if mark else text


def changed_lines(
    addr: int, old: Bytes | None, new: Bytes | None
) -> Iterator[tuple[int, bytes | None, bytes | None]]:
    """Neighbouring lines that differ as one: address, bytes before, bytes after.

    Where either side is not known, all of the other one.
    """
    if old is None or new is None:
        yield addr, _bytes(old), _bytes(new)
        return
    before, after = old.reshape(-1, LINE), new.reshape(-1, LINE)
    rows = np.flatnonzero((before != after).any(axis=1))
    for part in np.split(rows, np.flatnonzero(np.diff(rows) > 1) + 1):
        if len(part):
            whole = slice(int(part[0]), int(part[-1]) + 1)
            yield addr + whole.start * LINE, before[whole].tobytes(), after[whole].tobytes()


def _bytes(data: Bytes | None) -> bytes | None:
    return None if data is None else data.tobytes()
