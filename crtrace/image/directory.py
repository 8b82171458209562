"""The directory of an image: where its records are."""

from __future__ import annotations

from typing import NoReturn

import numpy as np

from crtrace.errors import FormatTooNew, ImageDamaged
from crtrace.image.framing import (
    DIRECTORY_ROW,
    HEADER,
    OPTIONAL,
    RecordType,
    max_payload,
    type_name,
)

Directory = np.ndarray[tuple[int], np.dtype[np.void]]

NONE = -1
PARENTS: dict[int, tuple[int, ...]] = {
    RecordType.TASK: (NONE, RecordType.TASK),
    RecordType.MM: (RecordType.TASK,),
    RecordType.VMAS: (RecordType.MM,),
    RecordType.THREAD: (RecordType.TASK,),
    RecordType.CPU: (RecordType.THREAD,),
}
"""What a record of a type belongs to; those of the other types belong to the image."""
ONE_EACH = (RecordType.MM, RecordType.VMAS, RecordType.CPU)
"""The types of which a parent has one at most."""
ONE_IN_ALL = (
    RecordType.IMAGE,
    RecordType.ARCH,
    RecordType.FILES,
    RecordType.UNREADABLE,
    RecordType.STATS,
)
"""The types of which an image has one at most."""
OTHERS = max(RecordType) + 1
"""Stands for all types that are not known."""
LIMITS = np.array([max_payload(kind) for kind in range(OTHERS + 1)], dtype=np.uint64)
"""The longest payload by type."""
FLAGS = np.full(OTHERS + 1, OPTIONAL, dtype=np.uint32)
"""The least flags by type. What is not known must be optional, and SUMMARY says so, too."""
FLAGS[RecordType.IMAGE : RecordType.STATS + 1] = 0
FLAGS[[RecordType.DIRECTORY, RecordType.TAIL]] = OPTIONAL + 1  # they are not in a directory
_SEVEN = np.uint64(7)


def unpack_directory(payload: bytes, end: int, where: str) -> Directory:
    """The rows of a directory that describes the records from offset 0 up to ``end``.

    Raises ``ImageDamaged`` unless ids count from 1, records lie back to back and payloads are no
    longer than they may be, ``FormatTooNew`` for a record that must not be passed over and is not
    known.
    """
    rows = np.frombuffer(payload, dtype=DIRECTORY_ROW)
    _check_places(rows, end, where)
    kinds = np.minimum(rows["type"], OTHERS)
    flags, length = rows["flags"], rows["length"]
    # In long chains hundreds of directories are read for one epoch, so what is wrong is told apart
    # only where something is.
    good = (flags <= OPTIONAL) & (flags >= FLAGS[kinds]) & (length <= LIMITS[kinds])
    if not good.all():
        _refuse(rows[np.flatnonzero(~good)[0]], where)
    return rows


def _check_places(rows: Directory, end: int, where: str) -> None:
    if not len(rows) or (rows["length"] > end).any():
        raise ImageDamaged(f"{where}: a record is longer than the file, or there is none")
    offset, ids = rows["offset"], rows["id"]
    ends = np.cumsum(HEADER.size + (rows["length"] + _SEVEN & ~_SEVEN))
    # Every offset is compared with the end, since the sum of many lengths may pass 2^64.
    inside = offset[0] == 0 and offset.max() < end and ends[-1] == end
    follow = (ends[:-1] == offset[1:]).all() and (ids == np.arange(1, len(rows) + 1)).all()
    if not inside or not follow:
        raise ImageDamaged(f"{where}: records do not lie back to back")


def _refuse(row: np.void, where: str) -> NoReturn:
    """Say what is wrong with a row."""
    kind = int(row["type"])
    if kind in (RecordType.DIRECTORY, RecordType.TAIL):
        raise ImageDamaged(f"{where}: record {row['id']} is a directory or tail amid the others")
    # Also of records that are passed over: ``verify`` reads them.
    if row["length"] > max_payload(kind):
        raise ImageDamaged(
            f"{where}: {_name(row)} has a payload of {row['length']} bytes, expected at most "
            f"{max_payload(kind)}"
        )
    raise FormatTooNew(
        f"{where}: record {row['id']} of type {row['type']} with flags {row['flags']:#x} is "
        "not known to this crtrace",
        hint="use the crtrace that wrote the chain, or a later one",
    )


def check_parents(rows: Directory, where: str) -> None:
    """Raise ``ImageDamaged`` unless each record comes after the one it belongs to, and that one is
    of the type it must be, so that following parents ends; or if there are two of what there may
    be one of.
    """
    parents = rows["parent"]
    if late := np.flatnonzero(parents >= rows["id"]).tolist():
        row = rows[late[0]]
        raise ImageDamaged(f"{where}: {_name(row)} belongs to record {row['parent']}, a later one")
    types = np.where(parents > 0, rows["type"][parents.astype(np.int64) - 1].astype(np.int64), NONE)
    for kind in (*range(RecordType.IMAGE, RecordType.DIRECTORY), RecordType.SUMMARY):
        own = np.flatnonzero(rows["type"] == kind)
        expected = PARENTS.get(kind, (NONE,))
        if strange := own[~np.isin(types[own], expected)].tolist():
            owner = "the image" if expected == (NONE,) else f"a {type_name(expected[-1])}"
            raise ImageDamaged(
                f"{where}: {_name(rows[strange[0]])} belongs to record {parents[strange[0]]}, "
                f"expected {owner}"
            )
        if kind in ONE_EACH and len(np.unique(parents[own])) < len(own):
            raise ImageDamaged(f"{where}: a {type_name(expected[-1])} has two {type_name(kind)}")
        if kind in ONE_IN_ALL and len(own) > 1:
            raise ImageDamaged(f"{where}: {_name(rows[own[1]])} is one too many")


def _name(row: np.void) -> str:
    return f"{type_name(int(row['type']))} {row['id']} at offset {row['offset']:#x}"
