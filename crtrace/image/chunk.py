"""A chunk: up to 512 pages of one space, compressed together."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from crtrace.errors import ImageDamaged
from crtrace.image.codec import decompress
from crtrace.image.fields import must_be_zero
from crtrace.image.framing import CHUNK_HEAD
from crtrace.image.places import PAGE_LIMIT
from crtrace.units import CHUNK_PAGES, PAGE_SIZE, U64, Bytes


class Chunk(NamedTuple):
    """A chunk unpacked: its pages ``(n,)`` and their contents ``(n, 4096)``, read-only."""

    space: int
    pages: U64
    data: Bytes


def unpack_chunk(payload: bytes, where: str) -> Chunk:
    """A chunk from its payload. Raises ``ImageDamaged``; takes at most 2 MiB."""
    if len(payload) < CHUNK_HEAD.size:
        raise ImageDamaged(f"{where}: {len(payload)} bytes are too few for a chunk")
    space, count, codec, reserved = CHUNK_HEAD.unpack_from(payload)
    must_be_zero(reserved, where)
    head = CHUNK_HEAD.size + 8 * count
    if not 1 <= count <= CHUNK_PAGES or head > len(payload):
        raise ImageDamaged(f"{where}: page count is {count}, expected 1 to {CHUNK_PAGES}")
    pages = np.frombuffer(payload, dtype="<u8", count=count, offset=CHUNK_HEAD.size)
    if (pages[1:] <= pages[:-1]).any():
        raise ImageDamaged(f"{where}: page numbers do not ascend")
    if pages[-1] >= PAGE_LIMIT:
        raise ImageDamaged(f"{where}: page number {pages[-1]:#x} is not below 2^52")
    try:
        data = decompress(codec, memoryview(payload)[head:], count * PAGE_SIZE)
    except ImageDamaged as error:
        raise ImageDamaged(f"{where}: {error}") from error
    return Chunk(space, pages, np.frombuffer(data, dtype=np.uint8).reshape(count, PAGE_SIZE))
