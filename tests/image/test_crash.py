"""Whatever goes wrong while writing, a chain holds exactly a committed prefix."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from crtrace.analyze.verify import verify
from crtrace.errors import CrtraceError
from crtrace.image.reader import Chain
from crtrace.image.store import ChainWriter
from tests.image.support import ZERO, epoch, noise, page, read_all

CALLS = (
    "pwrite", "pwritev", "fdatasync", "fsync", "rename", "open", "mkdir", "unlink", "ftruncate",
)  # fmt: skip
EPOCHS: list[dict[int, bytes]] = [
    {1: page(1), 2: noise(2), 3: ZERO},
    {1: page(4), 5: noise(5)},
    {2: ZERO, 6: page(6)},
]


def expected_epochs() -> list[dict[int, bytes]]:
    memory: dict[int, bytes] = {}
    return [memory := {**memory, **pages} for pages in EPOCHS]


EXPECTED = expected_epochs()


def write_chain(path: Path) -> None:
    with ChainWriter.open(path, create=True) as writer:
        for pages in EPOCHS[len(writer.entries) :]:
            epoch(writer, pages)


def trip_at(monkeypatch: pytest.MonkeyPatch, number: int, act: Callable[..., Any]) -> Iterator[int]:
    """Have the Nth file system call do ``act(call, *its arguments)``; the counter that tells."""
    calls = count(1)
    for name in CALLS:
        real = getattr(os, name)

        def call(*args: Any, real: Callable[..., Any] = real, **fields: Any) -> Any:
            if next(calls) == number:
                return act(real, *args, **fields)
            return real(*args, **fields)

        monkeypatch.setattr(os, name, call)
    return calls


def committed(path: Path) -> int:
    """How many epochs there are; they are the right ones and the rest is as if never begun."""
    if not (path / "chain.idx").exists():
        return 0
    found = read_all(path)
    assert found == EXPECTED[: len(found)]
    with Chain.open(path) as chain:
        assert verify(chain).ok
    return len(found)


def fails(error: int) -> Callable[..., Any]:
    def act(real: Callable[..., Any], *args: Any, **fields: Any) -> Any:
        raise OSError(error, os.strerror(error))

    return act


def outcome(act: Callable[..., object], *args: object) -> CrtraceError | None:
    """The error that the call ended with; any but ours is a failure of the test."""
    try:
        act(*args)
    except CrtraceError as error:
        return error
    return None


def all_calls(tmp_path: Path) -> int:
    with pytest.MonkeyPatch.context() as patch:
        calls = trip_at(patch, -1, fails(0))
        write_chain(tmp_path / "dry")
        return next(calls) - 1


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EIO])
def test_any_call_may_fail(tmp_path: Path, error: int) -> None:
    total = all_calls(tmp_path)
    assert total > 40
    seen = set()
    for number in range(1, total + 1):
        path = tmp_path / str(number)
        with pytest.MonkeyPatch.context() as patch:
            trip_at(patch, number, fails(error))
            failure = outcome(write_chain, path)
        if failure:
            assert os.strerror(error).lower() in str(failure)
            assert failure.hint
            seen.add(committed(path))
            assert len(list(path.glob("*.img"))) == committed(path), "an image was left behind"
        assert not list(path.glob("*.part"))
        write_chain(path)
        assert committed(path) == len(EXPECTED), f"after call {number} of {total} failed"
    assert seen == {0, 1, 2}


def test_an_epoch_that_fails_leaves_the_writer_usable(tmp_path: Path) -> None:
    path = tmp_path / "chain"
    with ChainWriter.open(path, create=True) as writer:
        epoch(writer, EPOCHS[0])
        for number in range(1, 30):
            with pytest.MonkeyPatch.context() as patch:
                calls = trip_at(patch, number, fails(errno.ENOSPC))
                failure = outcome(epoch, writer, EPOCHS[1])
                if not failure:
                    assert next(calls) <= number, "a failure went unnoticed"
                    break
                assert len(writer.entries) == 1
        epoch(writer, EPOCHS[2])
    assert committed(path) == 3


def killed(real: Callable[..., Any], *args: Any, **fields: Any) -> Any:
    """Die in the middle of a call: half of what was to be written is there."""
    if real.__name__ == "pwrite":
        os_pwrite(args[0], memoryview(args[1])[: len(args[1]) // 2], args[2])
    os._exit(9)


os_pwrite = os.pwrite


def test_the_writer_may_be_killed_at_any_call(tmp_path: Path) -> None:
    total = all_calls(tmp_path)
    seen = []
    for number in range(1, total + 1):
        path = tmp_path / str(number)
        child = os.fork()
        if not child:
            trip_at(pytest.MonkeyPatch(), number, killed)
            write_chain(path)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
        seen.append(committed(path))
        write_chain(path)
        assert committed(path) == len(EXPECTED), f"after being killed at call {number} of {total}"
        assert not list(path.glob("*.part"))
    assert seen == sorted(seen)
    assert set(seen) == {0, 1, 2, 3}


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    if os.geteuid() != 0:
        pytest.skip("cannot run here: mounting a small file system needs root")
    where = tmp_path / "disk"
    where.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", where]
    done = subprocess.run(mount, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"cannot run here: no mounting: {done.stderr.strip()}")
    yield where
    subprocess.run(["umount", where], check=True)


def test_a_full_disk_keeps_committed_epochs(tiny_disk: Path) -> None:
    path = tiny_disk / "chain"
    memory: dict[int, bytes] = {}
    with ChainWriter.open(path, create=True) as writer:
        for number in range(1000):
            pages = {number * 10 + at: noise(number * 10 + at) for at in range(4)}
            failure = outcome(epoch, writer, pages)
            if failure:
                break
            memory.update(pages)
        assert failure
        assert "no space left on device while writing" in str(failure)
        assert failure.hint
        assert not list(path.glob("*.part"))
        assert len(writer.entries) > 3
        shutil.copytree(path, path.parent.parent / "copy")
        (path / "00000000.img").stat()
    copy = path.parent.parent / "copy"
    assert read_all(copy)[-1] == memory
