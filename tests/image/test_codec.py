"""Blocks and hashes."""

from __future__ import annotations

import contextlib

import numpy as np
import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from crtrace.errors import ImageDamaged
from crtrace.image.codec import (
    LZ4,
    RAW,
    ZERO_PAGE_HASH,
    compress,
    decompress,
    hash_pages,
)
from crtrace.units import CHUNK_BYTES
from tests.image.support import array, noise, page


@pytest.mark.parametrize(
    ("pages", "codec"), [([page(1), page(2)], LZ4), ([noise(1), noise(2)], RAW)]
)
def test_a_block_comes_back(pages: list[bytes], codec: int) -> None:
    used, block = compress(array(pages))
    assert used == codec
    assert decompress(used, bytes(block), 8192) == b"".join(pages)
    assert len(block) <= 8192


def test_a_block_of_another_length_is_refused() -> None:
    _, block = compress(array([page(1), page(2)]))
    for length in (4096, 12288):
        with pytest.raises(ImageDamaged):
            decompress(LZ4, bytes(block), length)
    with pytest.raises(ImageDamaged, match="4095 bytes"):
        decompress(RAW, bytes(4095), 4096)


def test_no_block_is_larger_than_a_chunk() -> None:
    with pytest.raises(ImageDamaged, match="at most"):
        decompress(LZ4, b"", CHUNK_BYTES + 1)


def test_an_unknown_codec_is_refused() -> None:
    with pytest.raises(ImageDamaged, match="codec is 7"):
        decompress(7, bytes(4096), 4096)


@given(st.binary(max_size=300))
def test_any_block_is_read_or_refused(block: bytes) -> None:
    with contextlib.suppress(ImageDamaged):
        assert len(decompress(LZ4, block, 4096)) == 4096


def test_hashes_are_canonical_digests() -> None:
    pages = [page(1), noise(2), bytes(4096)]
    hashes = hash_pages(array(pages))
    assert hashes.shape == (3, 2)
    assert hashes.tobytes() == b"".join(xxhash.xxh3_128(data).digest() for data in pages)
    assert (hashes[2] == ZERO_PAGE_HASH).all()


def test_rows_may_be_apart_in_memory() -> None:
    wide = np.zeros((4, 8192), dtype=np.uint8)
    wide[:, :4096] = array([page(n) for n in range(4)])
    assert (hash_pages(wide[:, :4096]) == hash_pages(array([page(n) for n in range(4)]))).all()
