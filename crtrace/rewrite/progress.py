"""How much is done of work in several steps, each of about so many pages."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

Progress = Callable[[int, int], None]
"""Called with the pages done and the pages there are; a page counts in each step."""


class Meter:
    """Tells a ``Progress`` of it. What is done never goes back, and ends at the total.

    ``total`` is the sum of the pages of all steps.
    """

    def __init__(self, total: int, tell: Progress | None) -> None:
        self._total = total
        self._tell = tell or (lambda done, total: None)
        self._done = 0

    @contextmanager
    def step(self, pages: int, units: int = 0) -> Iterator[Step]:
        """A step of about so many pages; or counted in ``units``, which are as much as these."""
        start = self._done
        yield Step(lambda share: self._reach(start + int(share * pages)), units or pages)
        self._reach(start + pages)

    def _reach(self, done: int) -> None:
        self._done = done
        self._tell(done, self._total)


class Step:
    """How far a step is."""

    def __init__(self, tell: Callable[[float], None], units: int) -> None:
        self._tell = tell
        self._units = units
        self._done = 0

    def reach(self, units: int) -> None:
        """So many are done. There may turn out to be more than was thought."""
        self._done = max(units, self._done)
        self._tell(min(self._done / self._units, 1.0) if self._units else 1.0)

    def add(self, units: int) -> None:
        """So many more are done."""
        self.reach(self._done + units)
