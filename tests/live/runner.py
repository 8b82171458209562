"""Run the command line as its users do: in a process of its own, in another directory.

Nothing here knows crtrace from inside. What it prints on stdout with ``--json`` must be JSON, line
by line, and on stderr there must never be a traceback: both are checked on every run.
"""

from __future__ import annotations

import functools
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

from tests.live.harness import status, wait_until

CRTRACE = [sys.executable, "-P", "-m", "crtrace"]
NOBODY = 65534
SLOWNESS = float(os.environ.get("CRTRACE_SLOWNESS", "1"))
"""How much longer than usual everything takes: where the processor is emulated."""
TIMEOUT = 20.0 * SLOWNESS
"""Seconds; ``scripts/vm`` says how many times slower a machine is that it emulates."""

Event = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Result:
    """How a run ended. ``events`` are the JSON objects of stdout, where ``--json`` was given."""

    code: int
    stdout: str
    stderr: str
    events: list[Event]

    def expect(self, code: int, *said: str) -> Self:
        """The exit code is this one, and stderr has each of these texts."""
        assert self.code == code, f"exit code {self.code}, expected {code}: {self.stderr}"
        for text in said:
            assert text in self.stderr, f"nothing of {text!r} in: {self.stderr}"
        return self

    def of(self, kind: str) -> list[Event]:
        """The events of one kind."""
        return [event for event in self.events if event["event"] == kind]


def _text(args: Sequence[object]) -> list[str]:
    return [str(arg) for arg in args]


def _events(args: Sequence[str], stdout: str) -> list[Event]:
    return [_event(line) for line in stdout.splitlines()] if "--json" in args else []


def _event(line: str) -> Event:
    event: Event = json.loads(line)
    assert event["schema_version"] == 1, line
    return event


def judged(args: Sequence[str], code: int, stdout: str, stderr: str) -> Result:
    """A ``Result``, unless the run broke what holds for every run."""
    for word in ("Traceback", "Exception ignored", "defect of crtrace"):
        assert word not in stderr, f"crtrace {' '.join(args)}: {stderr}"
    return Result(code, stdout, stderr, _events(args, stdout))


def run(
    *args: object,
    before: Sequence[str] = (),
    cwd: Path | str = "/",
    env: dict[str, str] | None = None,
    umask: int = -1,
    timeout: float = TIMEOUT,
) -> Result:
    """Run a command to its end. ``before`` is a command line that starts others, like setpriv."""
    words = _text(args)
    done = subprocess.run(
        [*before, *CRTRACE, *words],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        cwd=cwd,
        env=os.environ | (env or {}),
        umask=umask,
        timeout=timeout,
        check=False,
    )
    return judged(words, done.returncode, done.stdout, done.stderr)


def verified(path: Path) -> list[int]:
    """The epochs of a chain, which ``verify`` must find whole."""
    (report,) = run("verify", path, "--json").expect(0).events
    assert report["ok"], report["damage"]
    assert not report["notices"], report["notices"]
    epochs: list[int] = report["epochs"]
    return epochs


def with_capabilities(*names: str) -> tuple[str, ...]:
    """What to put before a command so that it runs as a user with these alone."""
    given = ",".join(f"+{name}" for name in names) or "-all"
    user = "setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups"
    return (*user, f"--inh-caps={given}", f"--ambient-caps={given}")


@functools.cache
def as_nobody() -> tuple[str, ...]:
    """What to put before a command so that it runs as a user without any privilege.

    Where that user cannot reach this tree or its virtual environment, it may read all files.
    """
    plain = with_capabilities()
    reaches = subprocess.run(
        [*plain, sys.executable, "-P", "-c", "import crtrace.cli"],
        cwd="/",
        capture_output=True,
        check=False,
    )
    return plain if reaches.returncode == 0 else with_capabilities("dac_read_search")


def fake_bcc(folder: Path, body: str) -> dict[str, str]:
    """An environment in which another ``bcc`` is found."""
    (folder / "bcc.py").write_text(body)
    return {"PYTHONPATH": os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")])}


class Watching:
    """``crtrace watch PID --json`` in the background; killed at the end of the block if need be."""

    def __init__(self, pid: int, path: Path, *options: object, cwd: Path | str = "/") -> None:
        self._args = ["watch", str(pid), "-o", str(path), "--json", *_text(options)]
        self._cwd = cwd
        self._lines: queue.Queue[str | None] = queue.Queue()
        self._read: list[str] = []

    def __enter__(self) -> Self:
        self._stderr: IO[str] = tempfile.TemporaryFile("w+")
        self._process = subprocess.Popen(
            [*CRTRACE, *self._args],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            text=True,
            cwd=self._cwd,
            start_new_session=True,  # a Ctrl-C is for the tests
        )
        self._reader = threading.Thread(target=self._pump, daemon=True)
        self._reader.start()
        return self

    def _pump(self) -> None:
        assert self._process.stdout
        for line in self._process.stdout:
            self._lines.put(line)
        self._lines.put(None)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._process.kill()
        self._process.wait()
        self._reader.join()
        if self._process.stdout:
            self._process.stdout.close()
        self._stderr.close()

    @property
    def pid(self) -> int:
        """Its process number."""
        return self._process.pid

    @property
    def stderr(self) -> str:
        """What it wrote to stderr so far."""
        self._stderr.seek(0)
        return self._stderr.read()

    def event(self, kind: str = "", timeout: float = TIMEOUT) -> Event:
        """The next event; it must be of this kind, if one is given."""
        try:
            line = self._lines.get(timeout=timeout)
        except queue.Empty:
            raise AssertionError(f"no event for {timeout} s: {self.stderr}") from None
        assert line is not None, f"watch ended with {self._process.wait()}: {self.stderr}"
        self._read.append(line)
        event = _event(line)
        assert not kind or event["event"] == kind, f"expected {kind}: {event}"
        return event

    def signal(self, *numbers: int) -> None:
        """Send signals: all have arrived before it runs on."""
        os.kill(self.pid, signal.SIGSTOP)
        wait_until(lambda: status(self.pid)["State"][0] in "TZ", "crtrace stands still")
        for number in numbers:
            os.kill(self.pid, number)
        os.kill(self.pid, signal.SIGCONT)

    def wait(self, timeout: float = TIMEOUT) -> Result:
        """Its end, with all events since the beginning."""
        try:
            code = self._process.wait(timeout)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still runs after {timeout} s: {self.stderr}") from None
        self._reader.join()
        while (line := self._lines.get()) is not None:
            self._read.append(line)
        return judged(self._args, code, "".join(self._read), self.stderr)


def await_part(path: Path, epoch: int, size: int = 1) -> None:
    """Return while an epoch is being written: its unfinished image has grown to ``size`` bytes."""
    part = path / f"{epoch:08d}.img.part"

    def grown() -> bool:
        try:
            return part.stat().st_size >= size
        except FileNotFoundError:
            return False

    wait_until(grown, f"{part} of {size} bytes")
