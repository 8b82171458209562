"""A chain of which each epoch is known by its number, however often it has to be begun."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from crtrace.analyze.verify import verify
from crtrace.image.reader import Chain
from crtrace.image.records import Mm, Task
from crtrace.image.store import ChainWriter
from tests.image.support import SPACE, ZERO, contents, noise, numbers, page, write

LENGTH = 10
FULL = 5


@dataclass(frozen=True, slots=True)
class Changes:
    """What an epoch has that the one before has not."""

    pages: Mapping[int, bytes]
    holes: tuple[int, ...] = ()


def changes(number: int) -> Changes:
    """The changes of the epoch: zeros come and go, and from time to time a page does."""
    pages = {1: page(number + 1), 2: noise(number) if number % 3 else ZERO, 10 + number: page(9)}
    return Changes(pages, (8 + number,) if number % 4 == 3 else ())


@cache
def memory(number: int) -> Mapping[int, bytes]:
    """All that the epoch holds."""
    before = memory(number - 1) if number else {}
    now = {**before, **changes(number).pages}
    return {at: data for at, data in now.items() if at not in changes(number).holes}


def commit_next(writer: ChainWriter) -> None:
    """Write the epoch whose turn it is, with as few records as can be."""
    number = len(writer.entries)
    full, change = number == FULL, changes(number)
    with writer.begin(full=full) as image:
        task = image.add(Task(pid=100, comm="target"))
        image.add(Mm(space=SPACE), parent=task)
        write(image, memory(number) if full else change.pages)
        image.mark_holes(SPACE, numbers(change.holes))
        image.commit({})


def give_up(writer: ChainWriter) -> None:
    """An epoch that is not committed."""
    with writer.begin() as image:
        write(image, {1: page(99), 77: noise(77)})


def committed(path: Path) -> int:
    """How many epochs there are: each the right one, and nothing is damaged."""
    if not (path / "chain.idx").exists():
        return 0
    with Chain.open(path) as chain:
        for number, entry in enumerate(chain.entries):
            assert entry.epoch == number
            assert contents(chain.epoch(number)) == memory(number)
        report = verify(chain)
        assert not report.damage
        return len(chain.entries)


def assert_goes_on(path: Path, number: int) -> None:
    """A new writer writes two more epochs, and nothing is left of what was cut."""
    with ChainWriter.open(path, create=True) as writer:
        assert len(writer.entries) == number
        commit_next(writer)
        commit_next(writer)
    with Chain.open(path) as chain:
        for new in (number, number + 1):
            assert contents(chain.epoch(new)) == memory(new)
        assert not chain.index.faults
        images = {f"{entry.epoch:08d}.img" for entry in chain.entries}
        assert set(chain.names()) == images | {"chain.idx", "lock"}
