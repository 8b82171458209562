"""What the capture asks of whatever makes the next write to a page visible."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from typing import Protocol

from crtrace.linux.addrspace import AddressSpace
from crtrace.linux.stop import StoppedProcess
from crtrace.units import U64, no_pages

Stamp = Callable[[], object]
"""What it returns is equal as long as something has not happened."""


def unknown() -> object:
    """Of what nobody tells: it may have happened."""
    return object()


@dataclass(frozen=True, slots=True)
class Told:
    """What is known besides of an address space. By default, nobody tells."""

    others: Stamp = unknown
    """Of writes by who does not stand still with the target."""
    migrated: Stamp = unknown
    """Of pages that have set out for other memory."""
    unlike_bits: Callable[[], tuple[object, object, object]] = lambda: (object(),) * 3
    """Of what soft-dirty bits do not tell: pages that were put in the place of others, or moved;
    new mappings that were joined with old ones; old ones that were joined."""


@dataclass(frozen=True, slots=True)
class How:
    """What a scan is to go by."""

    stopped: bool
    """All that run in the address space stand still."""
    ahead: bool = False
    """What it finds is copied while the target runs on, and scanned again in this epoch."""
    within: U64 | None = None
    """Page ranges outside of which nothing has changed since everything was last looked at, but
    what bounded scans have found since."""
    beside: ThreadPoolExecutor | None = None
    """A thread that may do a part of it."""
    told: Told = Told()


@dataclass(frozen=True)
class Scan:
    """What a scan found of the private memory of a process, as disjoint page ranges."""

    written: U64
    """Pages with contents of their own that may differ from when the last scan returned: never too
    few. Some may turn out unchanged, or zeros."""
    find_gone: Callable[[], U64]
    """To be called before the next scan, if at all."""
    unarmed: U64
    """Those among ``written`` that cannot be armed, so they are read every time."""
    not_rearmed: U64 = field(default_factory=no_pages)
    """Those that have not been armed since the last scan found them, too."""
    bounded: bool = False
    """It looked only within the bounds that were given."""

    @cached_property
    def gone(self) -> U64:
        """Where no page had contents of its own: not mapped privately, never written, discarded, or
        of a mapped file. To be trusted only if the target was stopped. To work it out when it is
        first asked for can wait until the pause is over."""
        return self.find_gone()


@dataclass(frozen=True, slots=True)
class Look:
    """What a look finds that arms nothing, of memory whose scans may be bounded: page ranges."""

    written: U64
    absent: U64


class Armer(Protocol):
    """Notices which pages of one address space are written.

    A page that ``scan`` reports as written is armed again by the time it returns, or in every scan
    until it is, so a later write is in a later scan. The caller reads its contents after that, and
    may let the target run.
    """

    name: str
    ldt: bytes
    """The target's local descriptor table as found by ``arm``; empty if nobody looked."""
    stands_still: bool
    """Whether every ``scan`` needs all that run in the address space stopped."""

    @property
    def heals(self) -> bool:
        """Whether the target puts itself right should we die during ``arm``."""

    def arm(self, stopped: StoppedProcess) -> None:
        """Set up, with the target stopped. Everything counts as written until the first scan."""

    def scan(self, space: AddressSpace, how: How) -> Scan:
        """The sets as of now. Raises ``TargetGone``.

        ``space`` must have been refreshed if the target is stopped; while it runs, the scan
        refreshes it itself where it has to, and may stop the target for a moment.
        """

    def written_now(self) -> int | None:
        """About how many pages a scan would find written now; None: as many as BPF has counted.
        Else all was looked at, and the next scan may be bounded as if it had been one that was not.
        """

    def boundable(self) -> bool:
        """Whether bounds make its scans shorter."""

    def look(self, space: AddressSpace, beside: ThreadPoolExecutor) -> Look:
        """Look at everything and leave it as it is; later scans may be bounded as if this had been
        one."""

    def everything(self) -> U64:
        """All pages that have contents of their own, written or not: page ranges, for a full image.
        What appears while this runs is in the next scan, and so is what cannot be armed: to read
        such a page while the target runs could be a page fault for its own userfaultfd."""

    def let_go(self, address: int) -> None:
        """Arm nothing in the mapping at an address any more, as of the last scan: the target waits
        for that."""

    def close(self) -> None:
        """Leave the target as it was; it may be called twice."""
