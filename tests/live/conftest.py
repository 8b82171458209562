"""Fixtures for tests that follow live processes. All of these tests need root."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.live.harness import Target

HERE = Path(__file__).parent
Spawn = Callable[..., Target]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark every test of this directory; the hook sees those of all directories."""
    for item in items:
        if HERE in item.path.parents:
            item.add_marker("needs_root")


@pytest.fixture
def spawn() -> Iterator[Spawn]:
    """Start targets that end with the test: ``spawn("writer", "--mib", 4)``."""
    with contextlib.ExitStack() as stack:
        yield lambda program, *options: stack.enter_context(Target(program, *options))


@pytest.fixture
def hugetlb_pages() -> Iterator[int]:
    """Four huge pages are free during the test, so that ``layout`` has its "hugetlb" area."""
    setting = Path("/proc/sys/vm/nr_hugepages")
    if not setting.exists():
        pytest.skip("cannot run here: the kernel has no hugetlb pages")
    before = int(setting.read_text())
    try:
        setting.write_text(str(before + 4))
        if int(setting.read_text()) < before + 4:
            pytest.skip("cannot run here: hugetlb pages cannot be reserved")
        yield 4
    finally:
        setting.write_text(str(before))
