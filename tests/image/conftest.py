"""What tests of the store share."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from crtrace.image import recordfile


@pytest.fixture(scope="module")
def unsynced() -> Iterator[None]:
    """Nothing is really synced: a test may not cut the power of this machine, and it takes long."""

    def fsync(fd: int) -> None:
        os.fstat(fd)

    def fdatasync(fd: int) -> None:
        os.fstat(fd)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        patch.setattr(os, "fdatasync", fdatasync)
        yield


@pytest.fixture(scope="module")
def reserving() -> Iterator[None]:
    """Space is reserved for images of all sizes, over and over."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recordfile, "SMALL", 600)
        patch.setattr(recordfile, "RESERVE", 1000)
        yield
