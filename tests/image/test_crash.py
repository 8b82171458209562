"""Whatever goes wrong while writing, a chain holds exactly a committed prefix, and it goes on."""

from __future__ import annotations

import errno
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from crtrace import image, rewrite
from crtrace.errors import CrtraceError
from crtrace.image.store import ChainWriter
from tests.image import power
from tests.image.history import LENGTH, assert_goes_on, commit_next, committed
from tests.image.support import epoch, noise, read_all

CALLS = (
    "pwrite", "pwritev", "fdatasync", "fsync", "rename", "open", "mkdir", "unlink", "ftruncate",
    "posix_fallocate",
)  # fmt: skip
FAULTS = [errno.ENOSPC, errno.EIO]

pytestmark = pytest.mark.usefixtures("unsynced", "reserving")


HARMLESS = {
    "close", "fstat", "getpid", "listdir", "major", "minor", "posix_fadvise", "pread", "read",
    "strerror", "sync", "urandom", "cpu_count",
}  # fmt: skip
"""What is called that changes no file."""


def test_every_call_that_changes_files_is_tried() -> None:
    sources = [*Path(image.__path__[0]).glob("*.py"), *Path(rewrite.__path__[0]).glob("*.py")]
    called = {name for each in sources for name in re.findall(r"\bos\.(\w+)\(", each.read_text())}
    assert called - HARMLESS == {*CALLS}
    assert called - HARMLESS <= {*power.CALLS}


def write_chain(path: Path, length: int = LENGTH) -> None:
    with ChainWriter.open(path, create=True) as writer:
        while len(writer.entries) < length:
            commit_next(writer)


def trip_at(
    monkeypatch: pytest.MonkeyPatch, number: int, *acts: Callable[..., Any]
) -> Iterator[int]:
    """Have the Nth file system call, and those after it, do ``act(call, *its arguments)``.

    Returns the counter that tells the calls.
    """
    calls = count()
    for name in CALLS:
        real = getattr(os, name)

        def call(*args: Any, real: Callable[..., Any] = real, **fields: Any) -> Any:
            at = next(calls) - number
            if 0 <= at < len(acts):
                return acts[at](real, *args, **fields)
            return real(*args, **fields)

        monkeypatch.setattr(os, name, call)
    return calls


def fails(error: int) -> Callable[..., Any]:
    def act(real: Callable[..., Any], *args: Any, **fields: Any) -> Any:
        raise OSError(error, os.strerror(error))

    return act


def noting(names: list[str], act: Callable[..., Any]) -> Callable[..., Any]:
    """``act``, and the name of the call that it was done to."""

    def noted(real: Callable[..., Any], *args: Any, **fields: Any) -> Any:
        names.append(real.__name__)
        return act(real, *args, **fields)

    return noted


def cut(real: Callable[..., Any], *args: Any, **fields: Any) -> Any:
    """Write only the first half, or do the call if it is another."""
    if real.__name__ == "pwritev":
        whole = b"".join(args[1])
        return os_pwrite(args[0], whole[: len(whole) // 2], args[2])
    if real.__name__ == "pwrite":
        return os_pwrite(args[0], args[1][: len(args[1]) // 2], args[2])
    return real(*args, **fields)


def killed(real: Callable[..., Any], *args: Any, **fields: Any) -> Any:
    """Die in the middle of a write, or before any other call."""
    if real.__name__ in ("pwrite", "pwritev"):
        cut(real, *args)
    os._exit(9)


os_pwrite = os.pwrite


def outcome(act: Callable[..., object], *args: object) -> CrtraceError | None:
    """The error that the call ended with; any but ours is a failure of the test."""
    try:
        act(*args)
    except CrtraceError as error:
        return error
    return None


@pytest.fixture(scope="module")
def calls(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The names of the calls that the whole chain takes."""
    names: list[str] = []
    path = tmp_path_factory.mktemp("dry") / "chain"

    def noted(real: Callable[..., Any], *args: Any, **fields: Any) -> Any:
        names.append(real.__name__)
        return real(*args, **fields)

    with pytest.MonkeyPatch.context() as patch:
        trip_at(patch, 0, *[noted] * 1000)
        write_chain(path)
    assert 14 * LENGTH < len(names) < 1000
    return names


def trip(path: Path, number: int, *acts: Callable[..., Any]) -> CrtraceError | None:
    """Write the chain, with faults from that call on; the error that it ended with."""
    shutil.rmtree(path, ignore_errors=True)
    with pytest.MonkeyPatch.context() as patch:
        trip_at(patch, number, *acts)
        failure = outcome(write_chain, path)
    assert failure or committed(path) == LENGTH, f"a fault at call {number} went unnoticed"
    return failure


def as_it_was(path: Path) -> int:
    """How many epochs there are; nothing is left of the one that failed."""
    found = committed(path)
    names = set(os.listdir(path)) if path.exists() else set()
    assert names - {"chain.idx", "lock"} == {f"{number:08d}.img" for number in range(found)}
    return found


@pytest.mark.parametrize("error", FAULTS)
def test_any_call_may_fail(tmp_path: Path, calls: list[str], error: int) -> None:
    path = tmp_path / "chain"
    seen = set()
    for number in range(len(calls)):
        failure = trip(path, number, fails(error))
        if failure:
            assert os.strerror(error).lower() in str(failure)
            assert failure.hint
            seen.add(as_it_was(path))
        assert_goes_on(path, committed(path))
    assert seen == set(range(LENGTH))


def writes(calls: list[str]) -> list[int]:
    """The numbers of the calls that write data."""
    return [number for number, name in enumerate(calls) if name in ("pwrite", "pwritev")]


def test_any_write_may_be_cut_short_and_fail(tmp_path: Path, calls: list[str]) -> None:
    path = tmp_path / "chain"
    seen = set()
    for number in writes(calls):
        assert trip(path, number, cut, fails(errno.ENOSPC))
        seen.add(committed(path))
        assert_goes_on(path, committed(path))
    assert seen == set(range(LENGTH))


def test_any_write_may_be_cut_short_and_go_on(tmp_path: Path, calls: list[str]) -> None:
    """Of an image, the rest is written; what is of one piece is an error."""
    path = tmp_path / "chain"
    whole = 0
    for number in writes(calls):
        if failure := trip(path, number, cut):
            assert "no space left on device" in str(failure)
            assert_goes_on(path, as_it_was(path))
        else:
            whole += 1
    assert whole >= calls.count("pwritev")


@pytest.mark.parametrize("faults", [2, 3, 1000])
def test_what_is_to_clean_up_may_fail_too(tmp_path: Path, calls: list[str], faults: int) -> None:
    """Then something may be left, but no damage."""
    path = tmp_path / "chain"
    for number in range(calls.index("pwritev"), len(calls) * 3 // LENGTH):
        assert trip(path, number, *[fails(errno.EIO)] * faults)
        assert_goes_on(path, committed(path))


def test_an_epoch_that_fails_leaves_the_writer_usable(tmp_path: Path) -> None:
    """Each call of an epoch fails once; only without reserved space does the epoch do as well."""
    path = tmp_path / "chain"
    number = failures = 0
    with ChainWriter.open(path, create=True) as writer:
        while (length := len(writer.entries)) < LENGTH:
            failed: list[str] = []
            with pytest.MonkeyPatch.context() as patch:
                trip_at(patch, number, noting(failed, fails(errno.ENOSPC)))
                failure = outcome(commit_next, writer)
            if failure:
                failures += 1
                assert len(writer.entries) == length
                assert as_it_was(path) == length
            else:
                assert failed in ([], ["posix_fallocate"]), "a failure went unnoticed"
            number = number + 1 if failed else 0
    assert failures > 2 * LENGTH
    assert committed(path) == LENGTH


def test_the_writer_may_be_killed_at_any_call(tmp_path: Path, calls: list[str]) -> None:
    path = tmp_path / "chain"
    seen = []
    for number in range(len(calls)):
        shutil.rmtree(path, ignore_errors=True)
        child = os.fork()
        if not child:
            trip_at(pytest.MonkeyPatch(), number, killed)
            write_chain(path)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
        seen.append(committed(path))
        assert_goes_on(path, seen[-1])
    assert seen == sorted(seen)
    assert set(seen) == set(range(LENGTH + 1))


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
