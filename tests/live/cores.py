"""Cores as debuggers and their like see them."""

from __future__ import annotations

import re
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.live.runner import run

QUIET = ["gdb", "-nx", "-q", "-batch", "-iex", "set debuginfod enabled off"]


@dataclass
class Core:
    """A core file with the program that it is of, and what the program said of itself."""

    path: Path
    program: Path
    pid: int
    info: dict[str, Any]

    def gdb(self, *commands: str) -> str:
        """What gdb says to commands, in batch mode."""
        words = [word for command in commands for word in ("-ex", command)]
        done = subprocess.run(
            [*QUIET, self.program, self.path, *words],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 0, done.stdout
        return done.stdout

    def value(self, expression: str) -> str:
        """An expression as gdb prints it."""
        found = re.search(r"^\$1 = (.*)$", self.gdb(f"print {expression}"), re.M)
        assert found
        return found[1]

    def readelf(self, *options: str) -> tuple[str, str]:
        """stdout and stderr of readelf."""
        done = subprocess.run(
            ["readelf", "-W", *options, self.path], capture_output=True, text=True, check=True
        )
        return done.stdout, done.stderr


def export(chain: Path, out: Path, epoch: int = -1) -> Path:
    """An epoch as a core."""
    run("export", chain, "--epoch", epoch, "--format", "core", "-o", out).expect(0)
    return out
