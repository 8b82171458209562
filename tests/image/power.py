"""A disk whose power may fail: what it was asked to do, and what may be on it afterwards.

``Disk`` sits below the store. It lets every call through and writes it down, with the syncs that
came back without an error. From these notes ``state`` builds what the disk may hold after a cut:
all that was synced before; of the rest, each step done, not done, or done in part, in any order.
"""

from __future__ import annotations

import errno
import os
import shutil
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

DIRECTORY, PARENT = -1, -2
"""What a sync is of, beside the numbers of files."""

State = Mapping[str, bytes]
"""The files of the chain's directory; ``MISSING`` when even that is not there."""
MISSING: State = {}


class Killed(BaseException):
    """The process ends here: no call comes through any more."""


@dataclass(frozen=True, slots=True)
class Data:
    """A write to a file."""

    file: int
    offset: int
    data: bytes


@dataclass(frozen=True, slots=True)
class Size:
    """A truncation."""

    file: int
    size: int


@dataclass(frozen=True, slots=True)
class Name:
    """A change of the directory: ``file`` gets the name ``add``, and ``drop`` is a name no more."""

    file: int = 0
    add: str = ""
    drop: str = ""


@dataclass(frozen=True, slots=True)
class Made:
    """The directory itself."""


@dataclass(frozen=True, slots=True)
class Sync:
    """A sync that worked, of a file or of ``DIRECTORY`` or ``PARENT``."""

    of: int


Event = Data | Size | Name | Made | Sync


@dataclass(frozen=True, slots=True)
class Fate:
    """What a cut leaves of a step.

    Of a write, these ranges of its bytes; if ``sized``, the file has grown to hold all of it, with
    zeros for what is not there. Of any other step all or, without ranges, nothing.
    """

    ranges: tuple[tuple[int, int], ...] = ()
    sized: bool = False


LOST = Fate()
DONE = Fate(((0, 1 << 62),), sized=True)
ZEROS = Fate(sized=True)


def torn(end: int, *, sized: bool = False) -> Fate:
    """Only the first bytes of a write; any other step is done."""
    return Fate(((0, end),), sized)


def sectors(write: Data, kept: Sequence[bool]) -> Fate:
    """Only some of the 512-byte sectors that a write goes to."""
    starts = [0, *range(-write.offset % 512 or 512, len(write.data), 512)]
    ends = [*starts[1:], len(write.data)]
    pairs = zip(starts, ends, strict=True)
    return Fate(tuple(pair for pair, keep in zip(pairs, kept, strict=False) if keep), sized=True)


def put(path: Path, state: State) -> None:
    """Make the directory ``path`` be what the disk held."""
    shutil.rmtree(path, ignore_errors=True)
    if state is not MISSING:
        path.mkdir(0o700)
        for name, data in state.items():
            (path / name).write_bytes(data)


class Disk:
    """Writes down what the store asks for in ``path``, which holds ``start`` at first."""

    def __init__(self, path: Path, start: State = MISSING) -> None:
        put(path, start)
        self.log: list[Event] = []
        self._path = path
        self._new = start is MISSING
        self._start = list(start.values())
        self._files = len(start)
        self._names = {name: number for number, name in enumerate(start)}
        self._first_names = dict(self._names)
        self._fds: dict[int, int] = {}
        self._unsynced: dict[int, list[int]] = defaultdict(list)
        self._synced: dict[int, int] = {}
        self._bounds = [(0, 0, 0)]
        self._failing = ""
        self._deadly: list[str] = []
        self._dead = False

    # --- while it is written ---

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Have the calls of the block noted. ``Killed`` ends the block and its descriptors."""
        with pytest.MonkeyPatch.context() as patch:
            for name in CALLS:
                patch.setattr(os, name, self._wrapped(name, getattr(os, name)))
            with suppress(Killed):
                yield
        for fd in self._fds:
            os.close(fd)
        self._fds.clear()
        self._dead = False

    def fail_sync(self, name: str) -> None:
        """Let the next sync of that file, of "." or of ".." fail with EIO."""
        self._failing = name

    def kill_before(self, call: str, nth: int = 1) -> None:
        """Let the process be killed when it comes to the ``nth`` such call from now."""
        self._deadly = [call] * nth

    def may_hold(self, least: int, most: int) -> None:
        """From now on, what is on the disk must be at least and at most so many epochs."""
        self._bounds.append((len(self.log), least, most))

    def _wrapped(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **fields: Any) -> Any:
            if name in self._deadly:
                self._deadly.pop()
                self._dead = not self._deadly
            if self._dead:
                raise Killed
            return getattr(self, "_" + name)(real, *args, **fields)

        return call

    def _open(self, real: Callable[..., int], path: Any, flags: int, *args: Any, **at: Any) -> int:
        fd = real(path, flags, *args, **at)
        if flags & os.O_DIRECTORY:
            self._fds[fd] = DIRECTORY if Path(path) == self._path else PARENT
            return fd
        if path not in self._names:
            self._name(Name(self._files, add=path))
            self._files += 1
        self._fds[fd] = self._names[path]
        return fd

    def _close(self, real: Callable[[int], None], fd: int) -> None:
        self._fds.pop(fd, None)
        real(fd)

    def _mkdir(self, real: Callable[..., None], path: Path, mode: int) -> None:
        real(path, mode)
        self._note(PARENT, Made())

    def _rename(self, real: Callable[..., None], old: str, new: str, **at: int) -> None:
        real(old, new, **at)
        self._name(Name(self._names[old], add=new, drop=old))

    def _unlink(self, real: Callable[..., None], name: str, **at: int) -> None:
        real(name, **at)
        self._name(Name(drop=name))

    def _pwrite(self, real: Callable[..., int], fd: int, data: bytes, offset: int) -> int:
        done = real(fd, data, offset)
        self._note(self._fds[fd], Data(self._fds[fd], offset, bytes(data[:done])))
        return done

    def _pwritev(self, real: Callable[..., int], fd: int, parts: list[bytes], offset: int) -> int:
        done = real(fd, parts, offset)
        self._note(self._fds[fd], Data(self._fds[fd], offset, b"".join(parts)[:done]))
        return done

    def _ftruncate(self, real: Callable[..., None], fd: int, size: int) -> None:
        real(fd, size)
        self._note(self._fds[fd], Size(self._fds[fd], size))

    def _posix_fallocate(self, real: Callable[..., None], fd: int, start: int, length: int) -> None:
        real(fd, start, length)
        self._note(self._fds[fd], Size(self._fds[fd], os.fstat(fd).st_size))

    def _fsync(self, real: Callable[..., None], fd: int) -> None:
        """Nothing is really synced: the cuts are made here, and it would take long."""
        what = self._fds[fd]
        if self._failing and what == self._names.get(self._failing, self._special(self._failing)):
            self._failing = ""
            if what not in (DIRECTORY, PARENT):
                # The kernel drops what it could not write; no later sync will bring it to disk.
                self._unsynced.pop(what, None)
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        for step in self._unsynced.pop(what, []):
            self._synced[step] = len(self.log)
        self.log.append(Sync(what))

    _fdatasync = _fsync

    @staticmethod
    def _special(name: str) -> int | None:
        return {".": DIRECTORY, "..": PARENT}.get(name)

    def _name(self, change: Name) -> None:
        _rename(self._names, change)
        self._note(DIRECTORY, change)

    def _note(self, what: int, event: Event) -> None:
        self._unsynced[what].append(len(self.log))
        self.log.append(event)

    # --- after the cut ---

    def bounds(self, cut: int) -> tuple[int, int]:
        """How many epochs there must be at least and at most, after that many events."""
        _, least, most = self._bounds[bisect_right(self._bounds, cut, key=lambda b: b[0]) - 1]
        return least, most

    def unsynced(self, cut: int) -> list[int]:
        """The events that may not have reached the disk when power was cut after ``cut`` events."""
        return [
            at
            for at, event in enumerate(self.log[:cut])
            if not isinstance(event, Sync) and self._synced.get(at, cut) >= cut
        ]

    def state(self, cut: int, fates: Mapping[int, Fate]) -> State:
        """What is on the disk, given what became of each unsynced event; if not said, ``LOST``."""
        lost = {at: fates.get(at, LOST) for at in self.unsynced(cut)}
        names = dict(self._first_names)
        files = defaultdict(bytearray, {at: bytearray(data) for at, data in enumerate(self._start)})
        made = not self._new
        for at, event in enumerate(self.log[:cut]):
            fate = lost.get(at, DONE)
            match event:
                case Data():
                    _write(files[event.file], event, fate)
                case Size() if fate.ranges:
                    _resize(files[event.file], event.size)
                case Name() if fate.ranges:
                    _rename(names, event)
                case Made() if fate.ranges:
                    made = True
        return {name: bytes(files[number]) for name, number in names.items()} if made else MISSING


CALLS = (
    "open", "close", "mkdir", "rename", "unlink", "pwrite", "pwritev", "ftruncate", "fsync",
    "fdatasync", "posix_fallocate",
)  # fmt: skip


def _rename(names: dict[str, int], change: Name) -> None:
    names.pop(change.drop, None)
    if change.add:
        names[change.add] = change.file


def _resize(content: bytearray, size: int) -> None:
    del content[size:]
    content.extend(bytes(size - len(content)))


def _write(content: bytearray, write: Data, fate: Fate) -> None:
    for start, end in fate.ranges:
        piece, at = write.data[start:end], write.offset + start
        if piece:
            _resize(content, max(len(content), at))
            content[at : at + len(piece)] = piece
    if fate.sized:
        _resize(content, max(len(content), write.offset + len(write.data)))
