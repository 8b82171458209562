"""What the records of one image say of each other: spaces, files, pages that could not be read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator

from crtrace.image.framing import RecordType
from crtrace.image.imagefile import AnyRecord, Image
from crtrace.image.losses import unreadable_pages
from crtrace.image.records import NT_PRFPREG, NT_PRSTATUS, Cpu, Mm
from crtrace.image.tables import Files, Vmas
from crtrace.units import U64, contains, count_pages, no_pages

REGISTER_SIZES = {NT_PRSTATUS: 27 * 8, NT_PRFPREG: 512}


def wrong_registers(record: Cpu) -> str:
    """Which register set has not the size of its type; none: an empty text."""
    for kind, data in record.sets:
        if len(data) != REGISTER_SIZES.get(kind, len(data)):
            return f"{len(data)} bytes of registers of type {kind:#x}"
    return ""


class References:
    """Takes the records of an image one by one and keeps what they name of each other."""

    def __init__(self, image: Image) -> None:
        self._image = image
        self._spaces = frozenset(image.spaces)
        self._files: set[int] = set()
        self._named_files: dict[int, set[int]] = {}
        self._no_space: list[int] = []
        self._table: dict[int, U64] | None = {}
        self._told: Counter[int] = Counter()
        self.table_id = next(iter(image.ids(RecordType.UNREADABLE)), 0)

    def load_table(self) -> None:
        """Read UNREADABLE, if there is one. Raises ``ImageDamaged``."""
        if self.table_id:
            self._table = None
            payload = self._image.payload(self.table_id)
            self._table = unreadable_pages(payload, self._image.where(self.table_id))

    def not_named(self, space: int, unread: U64) -> int:
        """How many of these pages, which could not be read, UNREADABLE does not name."""
        if self._table is None or not len(unread):
            return 0
        named = int(contains(self._table.get(space, no_pages()), unread).sum())
        self._told[space] += named
        return len(unread) - named

    def add(self, number: int, record: AnyRecord) -> list[int]:
        """A record; the spaces that it names and that do not exist."""
        spaces: set[int] = set()
        if isinstance(record, Mm):
            spaces = {record.space}
            self._named_files[number] = {record.exe_file} - {0}
            self._no_space += [number] if record.space == 0 else []
        elif isinstance(record, Vmas):
            spaces = {row.object_space for row in record.rows} - {0}
            self._named_files[number] = {row.file for row in record.rows} - {0}
        elif isinstance(record, Files):
            spaces = {row.object_space for row in record.rows} - {0}
            self._files |= {row.id for row in record.rows}
        return sorted(spaces - self._spaces)

    def contradictions(self, usable: Callable[[int], bool]) -> Iterator[tuple[int, str]]:
        """Records that name what is not there, and what that is.

        ``usable`` tells of a record whether what it holds could be read.
        """
        for number in self._no_space:
            yield number, "its space is 0, which stands for none"
        if all(map(usable, self._image.ids(RecordType.FILES))):
            for number, files in self._named_files.items():
                if missing := sorted(files - self._files):
                    yield number, f"names file {missing[0]}, which FILES does not have"
        for space, ranges in (self._table or {}).items():
            known = space not in self._spaces or usable(self._image.index_id(space))
            extra = count_pages(ranges) - self._told[space]
            if known and extra:
                yield self.table_id, f"{extra} pages of space {space} have no entry of kind 3"
