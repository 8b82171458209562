"""Power may fail at any moment: what is read then is a committed prefix, and it goes on."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crtrace.errors import CrtraceError
from crtrace.image.store import ChainWriter
from tests.image.history import LENGTH, assert_goes_on, commit_next, committed, give_up
from tests.image.power import (
    DONE,
    LOST,
    MISSING,
    ZEROS,
    Data,
    Disk,
    Fate,
    State,
    Sync,
    put,
    sectors,
    torn,
)  # fmt: skip

pytestmark = pytest.mark.usefixtures("unsynced", "reserving")


class Life:
    """Writes a chain onto a disk that keeps account of it."""

    def __init__(self, path: Path, start: State = MISSING, epochs: int = 0) -> None:
        self.path = path
        self.disk = Disk(path, start)
        self.disk.may_hold(epochs, epochs)
        self._safe = epochs

    def run(self, epochs: int = 1, *, abort: bool = False) -> None:
        """Open the chain and write so many epochs, after one that is given up."""
        with self.disk.attached(), ChainWriter.open(self.path, create=True) as writer:
            if abort:
                give_up(writer)
            for _ in range(epochs):
                self._commit(writer)

    def _commit(self, writer: ChainWriter) -> None:
        """An epoch exists when commit() has returned, and does not when it has raised."""
        number = len(writer.entries)
        self.disk.may_hold(self._safe, number + 1)
        try:
            commit_next(writer)
        except CrtraceError:
            self.disk.may_hold(self._safe, number)
            raise
        self._safe = number + 1
        self.disk.may_hold(self._safe, self._safe)

    def fail(self, name: str) -> None:
        """A sync fails, so an epoch or the whole beginning does; then the writer is closed."""
        self.disk.fail_sync(name)
        with pytest.raises(CrtraceError, match="input/output error"):
            self.run()

    def fail_and_go_on(self, *names: str) -> None:
        """The same within an epoch, and the same writer begins it again."""
        with self.disk.attached(), ChainWriter.open(self.path) as writer:
            for name in names:
                self.disk.fail_sync(name)
                with pytest.raises(CrtraceError, match="input/output error"):
                    self._commit(writer)
            self._commit(writer)

    def kill(self, call: str, nth: int = 1) -> None:
        """The writer is killed when it is about to do that."""
        self.disk.kill_before(call, nth)
        self.run()


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Disk:
    """Ten epochs, and whatever may happen to their writer."""
    life = Life(tmp_path_factory.mktemp("power") / "chain")
    life.fail("..")
    life.fail(".")
    life.kill("rename")
    life.run(2)
    life.run(abort=True)
    life.fail_and_go_on("00000003.img.part", ".", "chain.idx")
    life.fail("chain.idx")
    life.run(2)
    # To open a chain syncs index and directory once; what follows is of the epoch.
    life.kill("fdatasync")
    life.kill("fdatasync", 2)
    life.kill("fsync", 2)
    life.kill("fdatasync", 3)  # the entry is written
    life.run()
    life.kill("pwrite", 2)
    life.run(2)
    assert life.disk.bounds(len(life.disk.log)) == (LENGTH, LENGTH)
    return life.disk


class Trial:
    """Judges what a disk may hold, each state once."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.found: dict[tuple[tuple[str, bytes], ...] | None, int] = {}

    def judge(self, disk: Disk, cut: int, fates: Mapping[int, Fate]) -> int:
        """The epochs that are there, as many as there must be; and one can go on with them."""
        state = disk.state(cut, fates)
        key = None if state is MISSING else tuple(sorted(state.items()))
        if key not in self.found:
            put(self.path, state)
            found = committed(self.path)
            assert_goes_on(self.path, found)
            self.found[key] = found
        least, most = disk.bounds(cut)
        assert least <= self.found[key] <= most
        return self.found[key]


@pytest.fixture(scope="module")
def trial(tmp_path_factory: pytest.TempPathFactory) -> Trial:
    """One for all tests: many cuts leave the same."""
    return Trial(tmp_path_factory.mktemp("trial") / "chain")


def _writes(disk: Disk, size: int = 0) -> list[int]:
    """The writes, or those of so many bytes."""
    sized = [(at, len(event.data)) for at, event in enumerate(disk.log) if isinstance(event, Data)]
    return [at for at, length in sized if size in (0, length)]


def _rest(disk: Disk, last: int) -> dict[int, Fate]:
    """Everything up to the event ``last`` done, but this."""
    return {at: DONE for at in disk.unsynced(last + 1) if at != last}


def test_nothing_or_all_of_what_is_not_synced_is_there(disk: Disk, trial: Trial) -> None:
    seen = set()
    for cut in range(len(disk.log) + 1):
        seen.add(trial.judge(disk, cut, {}))
        seen.add(trial.judge(disk, cut, dict.fromkeys(disk.unsynced(cut), DONE)))
    assert seen == set(range(LENGTH + 1))
    assert len(trial.found) > 150


def test_any_single_step_is_lost_or_overtakes_all_others(disk: Disk, trial: Trial) -> None:
    before = len(trial.found)
    for cut, event in enumerate(disk.log):
        if isinstance(event, Sync):
            unsynced = disk.unsynced(cut)
            for at in unsynced:
                trial.judge(disk, cut, {at: DONE})
                trial.judge(disk, cut, {other: DONE for other in unsynced if other != at})
    assert len(trial.found) - before > 100


def test_the_last_write_is_torn(disk: Disk, trial: Trial) -> None:
    before = len(trial.found)
    entries = _writes(disk, 128)
    assert len(entries) >= LENGTH
    for at in {*entries, *_writes(disk)[::9]}:
        event = disk.log[at]
        assert isinstance(event, Data)
        size = len(event.data)
        for fate in (ZEROS, torn(1), torn(size - 1), torn(size // 2), torn(size // 2, sized=True)):
            trial.judge(disk, at + 1, {**_rest(disk, at), at: fate})
    assert len(trial.found) - before > 100


def test_an_entry_is_torn_at_any_byte(disk: Disk, trial: Trial) -> None:
    """Where memory is the disk, the file may have grown and any 8 bytes be there or not."""
    before = len(trial.found)
    at = _writes(disk, 128)[2]
    whole = _rest(disk, at)
    for end in range(128):
        trial.judge(disk, at + 1, {**whole, at: torn(end)})
        if end % 8 == 0:
            trial.judge(disk, at + 1, {**whole, at: torn(end, sized=True)})
    for start in (64, 120):
        trial.judge(disk, at + 1, {**whole, at: Fate(((start, 128),), sized=True)})
    assert len(trial.found) - before > 120


SECTORS = st.lists(st.booleans(), min_size=20, max_size=20)


def _fates(data: st.DataObject, disk: Disk, cut: int) -> dict[int, Fate]:
    """Any fate for each step that is not synced."""
    fates = {}
    for at in disk.unsynced(cut):
        event = disk.log[at]
        fates[at] = data.draw(st.sampled_from([DONE, LOST, ZEROS]))
        if isinstance(event, Data) and data.draw(st.booleans()):
            # By shares: the lengths of writes are not the same in each run.
            part = data.draw(st.integers(0, 1000))
            fates[at] = torn(len(event.data) * part // 1000)
        elif isinstance(event, Data) and len(event.data) > 512 and data.draw(st.booleans()):
            fates[at] = sectors(event, data.draw(SECTORS))
    return fates


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_any_part_of_it_is_there(disk: Disk, trial: Trial, data: st.DataObject) -> None:
    cut = data.draw(st.integers(0, len(disk.log)))
    trial.judge(disk, cut, _fates(data, disk, cut))


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_power_fails_again(disk: Disk, trial: Trial, data: st.DataObject) -> None:
    """While the chain that a first cut left is written on."""
    cut = data.draw(st.integers(0, len(disk.log)))
    fates = _fates(data, disk, cut)
    life = Life(trial.path, disk.state(cut, fates), trial.judge(disk, cut, fates))
    life.run()
    again = data.draw(st.integers(0, len(life.disk.log)))
    trial.judge(life.disk, again, _fates(data, life.disk, again))
