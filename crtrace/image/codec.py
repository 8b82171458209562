"""Compression and hashing of pages; the only module that knows LZ4.

Both libraries release the GIL, so threads that call these functions run side by side.
"""

from __future__ import annotations

import lz4.block
import numpy as np
from xxhash import xxh3_128_digest

from crtrace.errors import ImageDamaged
from crtrace.units import CHUNK_BYTES, PAGE_SIZE, U64, Bools, Bytes

RAW, LZ4 = 0, 1


def compress(data: Bytes) -> tuple[int, memoryview]:
    """The pages as one block: codec and bytes.

    ``data`` must be contiguous. What LZ4 does not make smaller is returned as it is, uncopied.
    """
    flat = data.data.cast("B")
    block: bytes = lz4.block.compress(flat, mode="fast", acceleration=1, store_size=False)
    return (LZ4, memoryview(block)) if len(block) < len(flat) else (RAW, flat)


def decompress(codec: int, block: bytes | memoryview, raw_length: int) -> bytes | memoryview:
    """A block back: exactly ``raw_length`` bytes (at most ``CHUNK_BYTES``), or ``ImageDamaged``."""
    if raw_length > CHUNK_BYTES:
        raise ImageDamaged(f"a block of {raw_length} bytes; at most {CHUNK_BYTES} are allowed")
    if codec == LZ4:
        try:
            data: bytes | memoryview = lz4.block.decompress(block, uncompressed_size=raw_length)
        except lz4.block.LZ4BlockError as error:
            raise ImageDamaged(f"the block does not decompress: {error}") from error
    elif codec == RAW:
        data = block
    else:
        raise ImageDamaged(f"codec is {codec}, expected 0 (raw) or 1 (lz4)")
    if len(data) != raw_length:
        raise ImageDamaged(f"the block has {len(data)} bytes, expected {raw_length}")
    return data


def as_bytes(column: U64) -> memoryview:
    """The bytes of an array, uncopied where it is contiguous; an empty one has none to cast."""
    return np.ascontiguousarray(column).reshape(-1).view(np.uint8).data


def hash_pages(pages: Bytes) -> U64:
    """The xxh3-128 of each row of an ``(n, 4096)`` array, as ``(n, 2)`` uint64.

    The 16 bytes of a row are the digest in canonical order; as numbers they mean nothing and are
    only compared.
    """
    joined = b"".join(map(xxh3_128_digest, pages))
    return np.frombuffer(joined, dtype=np.uint64).reshape(-1, 2)


def equal_hashes(one: U64, other: U64) -> Bools:
    """Which rows of two ``(n, 2)`` arrays are equal; much faster than ``all`` along an axis."""
    same: Bools = (one[:, 0] == other[:, 0]) & (one[:, 1] == other[:, 1])
    return same


ZERO_PAGE_HASH = hash_pages(np.zeros((1, PAGE_SIZE), dtype=np.uint8))[0]
