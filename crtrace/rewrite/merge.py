"""One epoch as a full image in a chain of its own."""

from __future__ import annotations

import os
import secrets
import shutil
from dataclasses import replace
from pathlib import Path

from crtrace.errors import UsageError
from crtrace.image.chaindir import explained, sync_parent
from crtrace.image.chainindex import IndexEntry
from crtrace.image.epoch import Epoch
from crtrace.image.header import FULL, NO_EPOCH, NO_ID
from crtrace.image.reader import Chain
from crtrace.image.store import ChainWriter
from crtrace.rewrite.check import check_copy, pages_of
from crtrace.rewrite.copy import copy_pages, copy_records
from crtrace.rewrite.progress import Meter, Progress


def merge(
    epoch: Epoch, into: str | os.PathLike[str], progress: Progress | None = None
) -> IndexEntry:
    """Write an epoch as a chain of one full image, with the same number, to the directory ``into``.

    The directory appears when the image is complete, on disk, and was read back and compared.
    Raises ``UsageError`` when something is there already.
    """
    where = Path(into)
    if where.exists() or where.is_symlink():
        raise UsageError(f"{where} is there already", hint="name a directory that is not")
    pages = pages_of(epoch.lineage)
    meter = Meter(3 * pages, progress)
    made = part = where.with_name(f".{where.name}.{secrets.token_hex(4)}.part")
    try:
        with ChainWriter.open(part, create=True) as chain:
            entry = _write(epoch, chain, pages, meter)
        with Chain.open(part) as copy:
            check_copy(copy.epoch(), epoch, pages, meter)
        with explained("making", where):
            os.rename(part, where)
            made = where
            sync_parent(where)
    except BaseException:
        shutil.rmtree(made, ignore_errors=True)
        raise
    return entry


def _write(epoch: Epoch, chain: ChainWriter, pages: int, meter: Meter) -> IndexEntry:
    header = replace(
        epoch.header, chain_id=chain.chain_id, image_id=os.urandom(16), parent_id=NO_ID,
        parent_hash=NO_ID, replaced_hash=NO_ID, parent_epoch=NO_EPOCH, kind=FULL,
    )  # fmt: skip
    with chain.begin_as(header) as image, meter.step(pages) as step:
        copy_records(epoch, image)
        copy_pages(epoch, image, len(epoch.lineage), step.add)
        return image.commit(dict(epoch.stats))
