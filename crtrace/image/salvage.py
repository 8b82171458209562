"""What damage has made useless, and is passed over where the rest of a chain is read."""

from __future__ import annotations

from dataclasses import dataclass, field

from crtrace.units import U64


@dataclass(slots=True)
class Salvage:
    """What is known to be damaged; whatever depends on it cannot be known."""

    records: dict[int, set[int]] = field(default_factory=dict)
    """Epoch -> records of its image of which the contents cannot be used."""
    entries: dict[tuple[int, int], U64] = field(default_factory=dict)
    """Epoch and space -> a range array of the pages of which its page index, sound otherwise, says
    what is not so."""

    def lacks(self, epoch: int, number: int) -> bool:
        """Whether a record of the image of an epoch cannot be used."""
        return number in self.records.get(epoch, ())
