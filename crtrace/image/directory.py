"""The directory of an image: where its records are."""

from __future__ import annotations

import numpy as np

from crtrace.errors import FormatTooNew, ImageDamaged
from crtrace.image.framing import DIRECTORY_ROW, HEADER, OPTIONAL, RecordType

Directory = np.ndarray[tuple[int], np.dtype[np.void]]

PARENTS = {
    RecordType.MM: RecordType.TASK,
    RecordType.VMAS: RecordType.MM,
    RecordType.THREAD: RecordType.TASK,
    RecordType.CPU: RecordType.THREAD,
}
"""What a record of a type belongs to."""
ONE_EACH = (RecordType.MM, RecordType.VMAS, RecordType.CPU)
"""The types of which a parent has one at most."""


def unpack_directory(payload: bytes, end: int, where: str) -> Directory:
    """The rows of a directory that describes the records from offset 0 up to ``end``.

    Raises ``ImageDamaged`` unless ids count from 1 and records lie back to back, ``FormatTooNew``
    for a record that must not be passed over and is not known.
    """
    rows = np.frombuffer(payload, dtype=DIRECTORY_ROW)
    _check_places(rows, end, where)
    _check_types(rows, where)
    return rows


def _check_places(rows: Directory, end: int, where: str) -> None:
    if not len(rows) or (rows["length"] > end).any():
        raise ImageDamaged(f"{where}: a record is longer than the file, or there is none")
    padding = (-rows["length"].astype(np.int64) % 8).astype(np.uint64)
    ends = np.cumsum(HEADER.size + rows["length"] + padding)
    starts = np.concatenate(([np.uint64(0)], ends[:-1]))
    ids = np.arange(1, len(rows) + 1)
    # Every offset is compared with the end, since the sum of many lengths may pass 2^64.
    inside = (rows["offset"] < end).all() and ends[-1] == end
    if not inside or (starts != rows["offset"]).any() or (ids != rows["id"]).any():
        raise ImageDamaged(f"{where}: records do not lie back to back")


def _check_types(rows: Directory, where: str) -> None:
    # SUMMARY is not among them: it is optional, and must say so.
    known = (rows["type"] >= RecordType.IMAGE) & (rows["type"] <= RecordType.STATS)
    bad = (rows["flags"] & ~np.uint32(OPTIONAL) != 0) | ~(known | (rows["flags"] == OPTIONAL))
    if bad.any():
        row = rows[np.flatnonzero(bad)[0]]
        raise FormatTooNew(
            f"{where}: record {row['id']} of type {row['type']} with flags {row['flags']:#x} is "
            "not known to this crtrace",
            hint="use the crtrace that wrote the chain, or a later one",
        )


def check_parents(rows: Directory, where: str) -> None:
    """Raise ``ImageDamaged`` unless each record comes after the one it belongs to, and that one is
    of the type it must be: so that following parents ends."""
    parents = rows["parent"]
    if late := np.flatnonzero(parents >= rows["id"]).tolist():
        raise ImageDamaged(f"{where}: record {late[0] + 1} belongs to the later {parents[late[0]]}")
    for kind in (*PARENTS, RecordType.TASK):
        own = np.flatnonzero(rows["type"] == kind)
        # TASK alone may have no parent, which is 0.
        own = own[parents[own] > 0] if kind == RecordType.TASK else own
        types = np.where(parents[own] > 0, rows["type"][parents[own].astype(np.int64) - 1], 0)
        expected = PARENTS.get(kind, RecordType.TASK)
        if strange := own[types != expected].tolist():
            number = strange[0] + 1
            raise ImageDamaged(f"{where}: {kind.name} {number} belongs to no {expected.name}")
        if kind in ONE_EACH and len(np.unique(parents[own])) < len(own):
            raise ImageDamaged(f"{where}: a {expected.name} has two {kind.name}")
