"""The processes under watch: the target, and with ``--tree`` all that descend from it.

A process that shares the target's address space (a child made with ``CLONE_VM``) always belongs to
it, tree or not: what it writes is the target's memory, so it must stand still in the pause.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field

from crtrace.capture.spaces import Spaces
from crtrace.capture.target import Target
from crtrace.errors import (
    AlreadyTraced,
    CrtraceError,
    LeaderGone,
    NotPermitted,
    TargetGone,
    UsageError,
)
from crtrace.image.records import Task
from crtrace.linux.events import in_initial_pid_namespace
from crtrace.linux.libc import same_memory
from crtrace.linux.procfs import Process, Stat, parents, refuse_unsuitable
from crtrace.linux.stop import (
    PATIENCE,
    StoppedProcess,
    look_before,
    reaping,
    release_all,
    stop_all,
)
from crtrace.track.dirty import Counts, WrittenPages
from crtrace.units import Pid

log = logging.getLogger("crtrace")


class ProgramChanged(TargetGone):
    """The target called ``execve``: the address space under watch is no more."""


@dataclass(eq=False, slots=True)
class Member:
    """One process under watch. ``tgid`` is its number in BPF's maps; 0: not known yet."""

    process: Process
    tgid: int
    target: Target
    parent: Member | None = None
    counted: Counts = field(default_factory=lambda: Counts(0, 0, 0))
    """BPF's counts as of the last pause."""
    recorded: Task | None = None
    """What the last committed epoch says of it."""
    status: int | None = None
    """Its wait status, once it has ended and that is known."""
    stat: Stat | None = None
    """What it said of itself when it was last seen to be settled."""

    @property
    def sharing(self) -> bool:
        """Whether its address space is another member's too, and watched through that one."""
        return self.process is not self.target.process

    def settled(self) -> bool:
        """Whether it still runs in the address space of ``target``; then ``stat`` is of now."""
        self.stat = self.target.holds(self.process)
        return self.stat is not None and (not self.sharing or self.target.lives())


class Tree:
    """The ``members``, parents before their children, and those ``departed`` of late."""

    def __init__(self, process: Process, marks: WrittenPages, spaces: Spaces, follow: bool) -> None:
        self._marks = marks
        self._spaces = spaces
        self._follow = follow
        self._nested = not in_initial_pid_namespace()
        self._lost = marks.lost_children()
        self._all_met: int | None = None
        """How many children had been followed when all of them were members."""
        self.departed: list[Member] = []
        self.refused: dict[Pid, str] = {}
        """Processes of the tree that cannot be captured, and why."""
        tgid = marks.add(process, follow=follow)
        self.members: list[Member] = []
        try:
            self.root = Member(process, tgid, Target(process, spaces.of_program(process)))
            self.members.append(self.root)
            self.root.target.arm(marks, [tgid])
            self._add_relatives()
        except BaseException:
            marks.remove(tgid)
            self.close()
            raise

    def close(self) -> None:
        """Disarm and let go of all; the processes go on. It may be called twice."""
        for member in self.members:
            member.target.close()
            self._forget(member)
        self.members.clear()

    def _forget(self, member: Member, *, ended: bool = False) -> None:
        self._marks.remove(member.tgid, ended=ended)
        if member is not self.root:
            member.process.close()

    @property
    def over(self) -> bool:
        """Whether there is nothing left to watch."""
        return not self.members or not (self._follow or self.root in self.members)

    def targets(self) -> list[Target]:
        """The address spaces, each once."""
        return list({id(member.target): member.target for member in self.members}.values())

    def of(self, target: Target) -> list[Member]:
        """The members in an address space."""
        return [member for member in self.members if member.target is target]

    def tgids(self, target: Target) -> list[int]:
        """BPF's numbers of the members in an address space; 0 if somebody may run in it besides."""
        return [*(member.tgid for member in self.of(target)), *([0] if self.refused else [])]

    def counts(self, member: Member) -> Counts:
        """What BPF counted for a member until now."""
        return self._marks.counts(member.tgid)

    def faults(self) -> int:
        """Write faults in the members' memory since the last pause."""
        own = sum(self.counts(each).faults - each.counted.faults for each in self.members)
        return own + sum(target.written_by_others() for target in self.targets())

    def limits(self) -> list[str]:
        """What of the tree is not in the images, and why."""
        found = [f"process {pid} is left out: {why}" for pid, why in self.refused.items()]
        for target in self.targets():
            found += target.limits
        if lost := self._marks.lost_children() - self._lost:
            found.append(f"{lost} forks were not followed in time: too many processes at once")
        return found

    # ---- while they run ------------------------------------------------------------------------

    def update(self) -> None:
        """Bring the members up to date: those that ended, began, or run another program."""
        refused = list(self.refused)
        for member in list(self.members):
            if not member.process.alive():
                self.look_after(member)
        for pid, tgid in self.strangers():
            self.take_in(pid, tgid)
        for pid in refused:
            self.refused.pop(pid, None)
            self._mark_and_arm(self.take_in(pid, 0))
        self.settle()
        for member in self.members:
            if not member.tgid:
                member.tgid = self._marks.resolve(member.process)
        for target in self.targets():
            self._arm(target)
            with suppress(TargetGone):
                target.look_for_pins()

    def look_after(self, member: Member) -> None:
        """It seems to be gone. Raises if it is the target, and only seems so."""
        why = member.process.gone()
        if isinstance(why, TargetGone):
            self.depart(member, ended=True)
        elif member is self.root:
            raise why
        else:
            self.depart(member)
            self.refused[member.process.pid] = str(why)

    def _arm(self, target: Target) -> None:
        """Arm it if it is not. Where that fails it is read whole in the pause; only the target
        itself must not be like that without its user's knowing."""
        try:
            if not target.armed:
                target.arm(self._marks, self.tgids(target))
        except (CrtraceError, OSError) as error:
            if target is self.root.target and target.lives():
                raise
            log.debug("process %d could not be armed: %s", target.process.pid, error)

    def _add_relatives(self) -> None:
        """Add who is there already. A child made before its parent was marked is in the list that
        is read after that."""
        tried: set[Pid] = set()
        while fresh := set(found := self._relatives()) - tried:
            tried |= fresh
            for pid in found:
                self._mark_and_arm(self.take_in(pid, 0))

    def _mark_and_arm(self, member: Member | None) -> None:
        """Begin with one that BPF does not follow by itself."""
        with suppress(TargetGone):
            if member:
                member.tgid = self._marks.add(member.process, follow=self._follow)
                self._arm(member.target)

    def _relatives(self) -> list[Pid]:
        """Who belongs to the tree by ``/proc`` and is no member: descendants, parents first, and
        those in a member's address space."""
        above = parents()
        known = {member.process.pid for member in self.members}
        found: list[Pid] = []
        reached = known if self._follow else set()
        while reached := {pid for pid, parent in above.items() if parent in reached} - known:
            found += sorted(reached)
            known |= reached
        return found + [pid for pid in above if pid not in known and self._sharing(pid)]

    # ---- also while they are stopped -----------------------------------------------------------

    def strangers(self) -> Iterator[tuple[Pid, int]]:
        """Processes that are to be taken in, with their ``tgid``, until there are no more."""
        tried: set[Pid] = set()
        while fresh := [each for each in self._newcomers() if each[0] not in tried]:
            for each in fresh:
                tried.add(each[0])
                yield each

    def _newcomers(self) -> list[tuple[Pid, int]]:
        """Processes that BPF has followed and that are no members yet, with their ``tgid``."""
        followed, lost = self._marks.children(), self._marks.lost_children() > self._lost
        if followed == self._all_met and not lost:
            return []  # to look through the targets takes a pause 0.1 ms
        known = {member.tgid for member in self.members}
        if not self._nested:
            known.update(self.refused)  # they are asked again between the pauses
        fresh = [tgid for tgid in self._marks.targets() if tgid not in known]
        self._all_met = None if fresh else followed
        if lost or (self._nested and fresh):
            # The numbers that BPF knows are of another namespace, or it has not got them all.
            there = [pid for pid in self._relatives() if pid not in self.refused]
            return [(pid, 0 if self._nested else int(pid)) for pid in there]
        return [(Pid(tgid), tgid) for tgid in fresh]

    def take_in(
        self, pid: Pid, tgid: int, stop: Callable[[Process], None] = lambda process: None
    ) -> Member | None:
        """Make a process a member; its pages count as written until it is armed.

        None if it is gone, or cannot be captured. ``stop`` is called first: what is at the edge of
        an ``execve`` is looked at behind it then.
        """
        if any(each.process.pid == pid for each in self.members):
            return None
        try:
            process = Process(pid)
        except TargetGone:
            return None
        try:
            stop(process)
            refuse_unsuitable(process)
            return self._join(process, tgid)
        except TargetGone:
            process.close()
        except (AlreadyTraced, LeaderGone, NotPermitted, UsageError) as error:
            process.close()
            self.refused[pid] = str(error)
        except BaseException:
            process.close()
            raise
        return None

    def _join(self, process: Process, tgid: int) -> Member:
        above = process.stat().ppid
        target = self._sharing(process.pid)
        if not target and not self._follow:
            raise TargetGone(f"process {process.pid} runs a program of its own by now")
        target = target or Target(process, self._spaces.of_program(process))
        parent = next((each for each in self.members if each.process.pid == above), None)
        member = Member(process, tgid, target, parent)
        self.members.append(member)
        return member

    def _sharing(self, pid: Pid) -> Target | None:
        """The address space that a process shares with members."""
        for target in self.targets():
            with suppress(OSError):
                if target.process.pid != pid and same_memory(target.process.pid, pid):
                    return target
        return None

    def depart(self, member: Member, *, ended: bool = False) -> None:
        """It has ended, or cannot be captured any more."""
        self.members.remove(member)
        with suppress(TargetGone):
            stat = member.process.stat()
            member.status = stat.exit_code if stat.state in "ZX" else None
        self.departed.append(member)
        if not self.of(member.target):
            member.target.close()
        self._forget(member, ended=ended)

    def settle(self) -> None:
        """Give every member the address space that it runs in now."""
        while moved := self.moved():
            for member in moved:
                self._resettle(member)

    def moved(self) -> list[Member]:
        """Members that do not run in the address space of their ``target`` any more."""
        return [member for member in self.members if not member.settled()]

    def _resettle(self, member: Member) -> None:
        """A member runs a new program, or the one that it shared its address space with is gone."""
        before = member.target
        remains = before.holds(member.process)
        if not before.lives():
            before.close()  # nobody can be watched through it any more
        if not (remains or self._follow or member is self.root):
            self.members.remove(member)  # it was here only for what it shared
            self._forget(member)
            return
        try:
            refuse_unsuitable(member.process)
            shared = self._sharing(member.process.pid)
            space = before.space if remains else self._spaces.of_program(member.process)
            member.target = shared or Target(member.process, space)
        except TargetGone:
            self.look_after(member)
        except (LeaderGone, UsageError) as error:
            if member is self.root:
                raise
            self.depart(member)
            self.refused[member.process.pid] = str(error)


class StoppedTree:
    """All members in a ptrace stop, newcomers included, until ``release``."""

    def __init__(self, tree: Tree) -> None:
        self._tree = tree
        self._held: dict[Member, StoppedProcess] = {}
        self._strangers: dict[Pid, StoppedProcess] = {}
        self._deadline = 0.0
        self.stopping_at = self.stopped_at = self.resumed_at = 0.0
        self._reaper = ExitStack()
        for member in tree.members:
            with suppress(TargetGone):
                self._held[member] = StoppedProcess(member.process)
        self._every = list(self._held.values())
        self._stopping = list(self._every)
        """Whose threads are to be reaped. No longer once all have stopped: to end the one that does
        it would cost the pause a change of threads."""

    def get_ready(self) -> None:
        """What can be done while they run. Raises ``TargetBusy``."""
        look_before(self._every, time.monotonic() + PATIENCE)
        self._reaper.enter_context(reaping(self._stopping))

    def stop(self) -> None:
        """Stop them. Raises what :class:`StoppedProcess` does; then all that was stopped is let go.

        Processes that share an address space are stopped last: the parent of a ``vfork`` only stops
        when its child has gone on.
        """
        self.stopping_at = time.monotonic()
        self._deadline = self.stopping_at + PATIENCE
        for sharing in (False, True):
            group = [held for member, held in self._held.items() if member.sharing == sharing]
            stop_all(group, self._deadline)
        for pid, tgid in self._tree.strangers():
            if member := self._tree.take_in(pid, tgid, self._stop_stranger):
                self._held[member] = self._strangers.pop(pid)
        self.stopped_at = time.monotonic()
        self._stopping.clear()
        for member in list(self._tree.members):
            if member not in self._held or not self._held[member].tracees:
                self._tree.look_after(member)
        if self._tree.over:
            raise TargetGone(f"process {self._tree.root.process.pid} has exited")
        if moved := self._tree.moved():
            if self._tree.root in moved:
                raise ProgramChanged(f"process {self._tree.root.process.pid} called execve")
            self._tree.settle()

    def _stop_stranger(self, process: Process) -> None:
        held = StoppedProcess(process)
        self._strangers[process.pid] = held
        self._every.append(held)
        self._stopping.append(held)
        look_before([held], self._deadline)
        stop_all([held], self._deadline)
        if not held.tracees:
            raise TargetGone(f"process {process.pid} has exited")

    def threads(self, member: Member) -> StoppedProcess:
        """The threads of a member."""
        return self._held[member]

    def release(self) -> int:
        """Let them all go; how many waits were given back."""
        try:
            release_all(self._every)
            self.resumed_at = time.monotonic()
        finally:
            self._reaper.close()
        return sum(held.waits_given_back for held in self._every)
