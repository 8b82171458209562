"""Pages that become something else: an epoch has what they are, not what they were."""

from __future__ import annotations

from pathlib import Path

import pytest

from crtrace.units import PAGE_SIZE
from tests.live.conftest import Spawn
from tests.live.exactness import judged, reader

STORIES = (
    "look poke away poke back poke poke poke",
    "away look back look poke poke",
    "away poke return side side",
    "lay look look anon poke",
    "copy look discard look look poke",
    "copy poke away poke discard poke back look poke",
    "poke discard look poke lay poke discard look",
)


@pytest.mark.parametrize("story", STORIES)
def test_every_epoch_has_what_the_pages_are_then(spawn: Spawn, tmp_path: Path, story: str) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"F" * 8 * PAGE_SIZE)
    target = spawn("overlay", "--file", file)
    with judged(target.pid, tmp_path / "chain") as run:
        run.take()
        for command in story.split():
            now = target.ask(command)
            run.take()
            with run.epoch() as epoch:
                assert reader(epoch)(now["at"], 1) == bytes([now["byte"]]), command


def test_a_deleted_file_is_in_every_full_image(spawn: Spawn, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"F" * 8 * PAGE_SIZE)
    target = spawn("overlay", "--file", file)
    at = target.ask("lay")["at"]
    file.unlink()
    with judged(target.pid, tmp_path / "chain") as run:
        for full in (True, False, True, False):
            run.take(full=full)
            with run.epoch() as epoch:
                assert reader(epoch)(at, 64) == b"F" * 64
