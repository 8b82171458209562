"""Fixtures for tests that follow live processes. All of these tests need root."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from crtrace.errors import FeatureMissing
from crtrace.linux.events import open_accounting
from crtrace.linux.libc import kernel_version
from crtrace.track.choose import VARIABLE
from crtrace.track.dirty import Coverage, WrittenPages
from crtrace.track.loader import Loading, Programs
from crtrace.track.softdirty import try_on_ourselves as try_soft_dirty
from crtrace.track.userfaultfd import try_on_ourselves as try_userfaultfd
from tests.live.harness import Target

HERE = Path(__file__).parent
ASKED_FOR = os.environ.get(VARIABLE)
"""The only armer that there shall be; tests may set it for themselves."""
Spawn = Callable[..., Target]
Places = Callable[[str], Path]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark every test of this directory; the hook sees those of all directories."""
    for item in items:
        if HERE in item.path.parents:
            item.add_marker("needs_root")


@pytest.fixture(scope="module")
def programs() -> Iterator[Programs]:
    """The BPF programs, loaded once: a controller that is forked inherits them."""
    if accounting := open_accounting():
        accounting.close()  # only for what it imports, which takes long
    with Loading().result() as loaded:
        yield loaded


@pytest.fixture
def spawn() -> Iterator[Spawn]:
    """Start targets that end with the test: ``spawn("writer", "--mib", 4)``."""
    with contextlib.ExitStack() as stack:
        yield lambda program, *options: stack.enter_context(Target(program, *options))


@pytest.fixture(scope="session")
def userfaultfd() -> None:
    """Skip what is only so where the kernel notes the first write to a page."""
    expected = kernel_version() >= (6, 7)
    _skip_unless(try_userfaultfd, "no write protection by userfaultfd (before Linux 6.7)", expected)
    _skip_unless_asked_for("userfaultfd")


@pytest.fixture(scope="session")
def soft_dirty() -> None:
    """Skip what needs soft-dirty bits."""
    # The kernel says of a new mapping that it is dirty, if it knows the word.
    flags = re.findall("^VmFlags:.* sd( |$)", Path("/proc/self/smaps").read_text(), re.M)
    expected = bool(flags) and kernel_version() >= (6, 1)
    _skip_unless(try_soft_dirty, "no soft-dirty bits (CONFIG_MEM_SOFT_DIRTY)", expected)
    _skip_unless_asked_for("soft-dirty")


def _skip_unless(try_on_ourselves: Callable[[], None], otherwise: str, expected: bool) -> None:
    """What is ``expected`` of the kernel by other signs must work."""
    try:
        try_on_ourselves()
    except (OSError, FeatureMissing):
        if expected:
            raise
        pytest.skip(f"cannot run here: {otherwise}")
    assert expected, "it works, but should not"


def skip_unless_visits_are_told(marks: WrittenPages) -> None:
    """Skip what needs to know who takes the lock of an address space."""
    if marks.coverage is Coverage.ALONE:
        assert kernel_version() < (5, 12)
        pytest.skip("cannot run here: nobody tells of visits by others (before Linux 5.12)")


def _skip_unless_asked_for(name: str) -> None:
    if ASKED_FOR not in (None, name):
        pytest.skip(f"cannot run here: {VARIABLE} asks for {ASKED_FOR}")


def asked_of(*names: str) -> list[str]:
    """Which of these armers a test can be run with; one at least, to be skipped aloud."""
    return [name for name in names if ASKED_FOR in (None, name)] or [names[0]]


def armed_by(name: str, request: pytest.FixtureRequest) -> Iterator[str]:
    """For fixtures: this armer is used meanwhile; skip where it does not work."""
    if name != "compare":
        request.getfixturevalue(name.replace("-", "_"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CRTRACE_ARMER", name)
        yield name


@contextlib.contextmanager
def reserved_hugetlb_pages(count: int) -> Iterator[int]:
    """So many huge pages more are there inside the block, if that can be had; how many."""
    setting = Path("/proc/sys/vm/nr_hugepages")
    before = int(setting.read_text()) if setting.exists() else 0
    try:
        if setting.exists():
            setting.write_text(str(before + count))
        yield int(setting.read_text()) - before if setting.exists() else 0
    finally:
        if setting.exists():
            setting.write_text(str(before))


@pytest.fixture
def places(tmp_path: Path) -> Iterator[Places]:
    """Where an object of a kind is made: ``places("shm")`` is in /dev/shm, others on a disk."""
    with tempfile.TemporaryDirectory(dir="/dev/shm", prefix="crtrace-test-") as shm:
        yield lambda kind: Path(shm) if kind == "shm" else tmp_path


@pytest.fixture
def hugetlb_pages() -> Iterator[int]:
    """Four huge pages are free during the test, so that ``layout`` has its "hugetlb" area."""
    with reserved_hugetlb_pages(4) as count:
        if count < 4:
            pytest.skip("cannot run here: hugetlb pages cannot be reserved")
        yield count


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Add up what tests recorded as ``pages_compared`` and the like."""
    names = ("ways_done", "epochs_judged", "pages_compared")
    totals = dict.fromkeys(names, 0)
    for report in terminalreporter.getreports("passed"):
        for name, value in report.user_properties:
            if name in totals:
                totals[name] += int(str(value))
    if totals["epochs_judged"]:
        terminalreporter.write_line(
            "ways of changing memory: {} times, {} epochs, {} pages compared".format(
                *totals.values()
            )
        )


PAUSE_FOR_EVER = """
void _start(void)
{
        for (;;) {
                int result;
                __asm__ volatile("int $0x80" : "=a"(result) : "0"(29) : "memory");
        }
}
"""


def program_of_32_bits(directory: Path) -> Path:
    """A program that waits for ever; skips where it cannot be made, or run."""
    source, program = directory / "pause.c", directory / "pause"
    source.write_text(PAUSE_FOR_EVER)
    alone = ["-static", "-nostdlib", "-fno-pic", "-no-pie", "-fno-stack-protector"]
    built = subprocess.run(
        ["gcc", "-m32", *alone, "-o", program, source], capture_output=True, check=False
    )
    if built.returncode:
        pytest.skip("cannot run here: gcc makes no 32-bit programs")
    try:
        subprocess.Popen([program]).kill()
    except OSError:
        pytest.skip("cannot run here: the kernel runs no 32-bit programs")
    return program
