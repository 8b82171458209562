"""What tests of the store share."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest


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
