"""The records about the image itself: what it is, and the statistics of its checkpoint."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from crtrace.errors import FormatTooNew, ImageDamaged
from crtrace.image.fields import Cursor, must_be_zero, text
from crtrace.image.framing import IMAGE_MAGIC, MAJOR, MINOR, RecordType

NO_ID = bytes(16)
NO_EPOCH = 2**64 - 1
FULL, INCREMENTAL = 0, 1
MAX_DEPTH = 32
"""How deep the values of the statistics may be nested: as deep as that, all can be printed."""
MAX_NUMBER = 2**64
VERSION = struct.Struct("<8sII")


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageHeader:
    """What an image is: the first record."""

    TYPE: ClassVar = RecordType.IMAGE
    FIXED: ClassVar = struct.Struct("<8sII16s16s16s16s16sQQIIQQ16s")

    chain_id: bytes
    image_id: bytes
    parent_id: bytes = NO_ID
    parent_hash: bytes = NO_ID
    replaced_hash: bytes = NO_ID
    epoch: int
    parent_epoch: int = NO_EPOCH
    kind: int = FULL
    wall_ns: int = 0
    boottime_ns: int = 0
    boot_id: bytes = NO_ID
    reason: str = ""
    kernel: str = ""
    hostname: str = ""
    tool_version: str = ""
    armer: str = ""

    @property
    def full(self) -> bool:
        """Whether the image needs no parent."""
        return self.kind == FULL

    def pack(self) -> bytes:
        """The payload."""
        fixed = self.FIXED.pack(
            IMAGE_MAGIC, MAJOR, MINOR, self.chain_id, self.image_id, self.parent_id,
            self.parent_hash, self.replaced_hash, self.epoch, self.parent_epoch, self.kind, 0,
            self.wall_ns, self.boottime_ns, self.boot_id,
        )  # fmt: skip
        texts = (self.reason, self.kernel, self.hostname, self.tool_version, self.armer)
        return fixed + b"".join(map(text, texts))

    @classmethod
    def unpack(cls, data: bytes, where: str) -> Self:
        """Raises ``FormatTooNew`` for another major version, before anything else is believed."""
        check_version(data, where)
        cursor = Cursor(data, where)
        (_, _, _, chain_id, image_id, parent_id, parent_hash, replaced, epoch, parent_epoch,
         kind, reserved, wall_ns, boottime_ns, boot_id) = cursor.take(cls.FIXED)  # fmt: skip
        must_be_zero(reserved, where)
        if kind not in (FULL, INCREMENTAL):
            raise ImageDamaged(f"{where}: kind is {kind}, expected 0 (full) or 1 (incremental)")
        return cls(
            chain_id=chain_id, image_id=image_id, parent_id=parent_id, parent_hash=parent_hash,
            replaced_hash=replaced, epoch=epoch, parent_epoch=parent_epoch, kind=kind,
            wall_ns=wall_ns, boottime_ns=boottime_ns, boot_id=boot_id,
            reason=cursor.text(), kernel=cursor.text(), hostname=cursor.text(),
            tool_version=cursor.text(), armer=cursor.text(),
        )  # fmt: skip


def check_version(data: bytes, where: str) -> None:
    """Refuse what is no image (``ImageDamaged``) or one of another major version."""
    magic, major, minor = Cursor(data, where).take(VERSION)
    if magic != IMAGE_MAGIC:
        raise ImageDamaged(f"{where}: magic is {magic.hex()}, expected {IMAGE_MAGIC.hex()}")
    if major != MAJOR:
        raise FormatTooNew(
            f"{where}: format version is {major}.{minor}; this crtrace reads version {MAJOR}",
            hint="use the crtrace that wrote the chain, or a later one",
        )


@dataclass(frozen=True, slots=True)
class Stats:
    """The statistics of a checkpoint, as JSON: fields may be added."""

    TYPE: ClassVar = RecordType.STATS

    fields: dict[str, Any]

    def pack(self) -> bytes:
        """The payload."""
        return json.dumps(self.fields, sort_keys=True).encode()

    @classmethod
    def unpack(cls, data: bytes, where: str) -> Self:
        """Raises ``ImageDamaged`` when it is no JSON object."""
        try:
            fields = json.loads(str(data, "utf-8"))
        except (ValueError, RecursionError) as error:
            raise ImageDamaged(f"{where}: statistics are no JSON: {error}") from error
        if not isinstance(fields, dict):
            raise ImageDamaged(f"{where}: statistics are no JSON object")
        if wrong := _wrong_values(fields) or _wrong_fields(fields):
            raise ImageDamaged(f"{where}: statistics: {wrong}")
        return cls(fields)


def _wrong_values(fields: dict[str, Any]) -> str:
    """What cannot be printed as JSON again; nothing: an empty text."""
    layer: list[Any] = [fields]
    for _ in range(MAX_DEPTH):
        numbers = (value for value in layer if isinstance(value, int | float))
        # Not a number is not smaller than anything either.
        if not all(abs(number) < MAX_NUMBER for number in numbers):
            return "a number is too large or none"
        layer = [inner for value in layer for inner in _inside(value)]
        if not layer:
            return ""
    return f"nested more than {MAX_DEPTH} deep"


def _inside(value: Any) -> Iterable[Any]:
    if isinstance(value, dict):
        return value.values()
    return value if isinstance(value, list) else ()


def _wrong_fields(fields: dict[str, Any]) -> str:
    """What is not as those who print the statistics expect; nothing: an empty text."""
    limits = fields.get("limits", [])
    if not isinstance(limits, list) or not all(isinstance(limit, str) for limit in limits):
        return "limits is no list of texts"
    if not isinstance(fields.get("paid", {}), dict):
        return "paid is no object"
    times = {name: value for name, value in fields.items() if name.endswith("_time")}
    for name, value in times.items():
        if value is not None and not isinstance(value, int | float):
            return f"{name} is no number"
    return ""
