"""Chains of real processes, read by code that was made from FORMAT.md alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.image.second_opinion import assert_same
from tests.live.harness import Target
from tests.live.runner import run

Spawn = Callable[..., Target]


@pytest.mark.parametrize("name", ["layout", "spawner"])
def test_both_readers_read_the_same_of_a_real_process(
    spawn: Spawn, tmp_path: Path, name: str
) -> None:
    target = spawn(name)
    chain = tmp_path / "chain"
    run("watch", target.pid, "-o", chain, "--tree", "--count", 10, "--interval", 0.05).expect(0)
    found = assert_same(chain)
    assert len(found) == 10
    assert sum(map(len, found[9].values())) > 50
    run("prune", chain, "--keep", 2, "--keep-every", 3).expect(0)
    assert assert_same(chain) == {number: found[number] for number in (0, 3, 6, 8, 9)}
