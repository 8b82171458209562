"""An image being written: records appended by several threads, then directory, tail and name."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import suppress

from xxhash import xxh3_128_digest

from crtrace.errors import CrtraceError
from crtrace.faults import point
from crtrace.image.chaindir import PART, ChainDir, explained, no_space
from crtrace.image.framing import (
    HEADER,
    MAX_RECORDS,
    ROW,
    TAIL_SIZE,
    Part,
    RecordHeader,
    RecordType,
    Tail,
    max_payload,
    padding,
    type_name,
)
from crtrace.image.spool import Spool

SLICE = 1 << 20
RESERVE = 64 << 20
"""Space is asked for so many bytes at a time: to find it block by block, as they are written, takes
more processor time."""
SMALL = 8 << 20
"""Files up to this size do without."""


class RecordFile:
    """``name.part``, until ``publish`` gives it its name.

    ``append`` may be called by several threads: offsets and ids are given out under a lock, the
    bytes are hashed and written outside of it. After a failed write nothing more is accepted.
    """

    def __init__(self, directory: ChainDir, name: str) -> None:
        self._directory = directory
        self._name = name
        self._path = directory.path / name
        self._fd = directory.create(name + PART)
        self._lock = threading.Condition()
        self._active = 0
        self._end = 0
        self._reserved = SMALL
        self._rows = bytearray()
        """Those of the directory: as Python objects they would take six times as much."""
        self._failure: CrtraceError | None = None

    @property
    def _count(self) -> int:
        """Records."""
        return len(self._rows) // ROW.size

    def append(
        self, kind: int, parts: Sequence[Part] | Spool, *, parent: int = 0, flags: int = 0
    ) -> tuple[int, int]:
        """Write a record; its id, and the bytes it takes in the file."""
        length = parts.nbytes if isinstance(parts, Spool) else sum(map(_size, parts))
        size = HEADER.size + length + padding(length)
        with self._lock:
            if length > max_payload(kind) or self._count >= MAX_RECORDS:
                self._failure = self._failure or CrtraceError(
                    f"{self._name} would have more records, or longer ones, than may be read"
                )
            if self._failure:
                raise self._failure
            if self._end + size > self._reserved:
                self._reserve(self._end + size + RESERVE)
            offset, number = self._end, self._count + 1
            self._rows += bytes(ROW.size)
            self._end += size
            self._active += 1
        try:
            self._place(RecordHeader(kind, flags, length, number, parent), parts, offset)
        except BaseException as error:
            # Whatever it was, there is a gap in the file now.
            self._failure = (
                error
                if isinstance(error, CrtraceError)
                else CrtraceError(f"{self._name} lacks record {number}: {error}")
            )
            raise
        finally:
            with self._lock:
                self._active -= 1
                self._lock.notify_all()
        return number, size

    def _reserve(self, end: int) -> None:
        """Ask for space up to there; where there is none, writing what needs it will fail.

        Nobody may have an offset in there yet: where the file system cannot reserve, libc writes.
        """
        start, self._reserved = self._reserved, end
        with suppress(OSError, MemoryError):
            point("posix_fallocate")
            os.posix_fallocate(self._fd, start, end - start)

    def _place(self, header: RecordHeader, parts: Sequence[Part] | Spool, offset: int) -> None:
        header = header.sealed(parts)
        ROW.pack_into(
            self._rows, ROW.size * (header.id - 1), header.type, header.id, header.parent,
            header.flags, offset, header.length, header.checksum,
        )  # fmt: skip
        if isinstance(parts, Spool):
            self._write([header.pack()], offset)
            offset += HEADER.size
            for part in parts:
                self._write([part], offset)
                offset += len(part)
            self._write([bytes(padding(header.length))], offset)
        else:
            self._write([header.pack(), *parts, bytes(padding(header.length))], offset)

    def _write(self, parts: Sequence[Part], offset: int) -> None:
        left = [view for part in parts if (view := memoryview(part).cast("B")).nbytes]
        with explained("writing", self._path):
            while left:
                point("pwritev")
                done = os.pwritev(self._fd, left, offset)
                # Begin to write to disk now: less is left for the end, and the page cache is
                # spared, which others may need more than an image that nobody reads.
                os.posix_fadvise(self._fd, offset, done, os.POSIX_FADV_DONTNEED)
                offset += done
                left = _after(left, done)

    def where(self, number: int) -> str:
        """A record that was written, for messages."""
        kind, *_ = self._row(number)
        return f"{self._path}: {type_name(kind)} {number}"

    def length(self, number: int) -> int:
        """The length of the payload of a record that was written."""
        *_, length, _ = self._row(number)
        return length

    def span(self, number: int, at: int, length: int) -> bytes:
        """Part of the payload of a record that was written."""
        *_, start, _, _ = self._row(number)
        with explained("reading", self._path):
            point("pread of the image")
            data = os.pread(self._fd, length, start + HEADER.size + at)
            if len(data) != length:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
        return data

    def slices(self, number: int) -> Iterator[bytes]:
        """The payload of a record that was written, in pieces of up to 1 MiB."""
        length = self.length(number)
        for at in range(0, length, SLICE):
            yield self.span(number, at, min(SLICE, length - at))

    def _row(self, number: int) -> tuple[int, ...]:
        return ROW.unpack_from(self._rows, ROW.size * (number - 1))

    def finish(self) -> tuple[bytes, int]:
        """Write directory and tail; no thread may still append. Image hash and file length."""
        rows = bytes(self._rows)
        image_hash = xxh3_128_digest(rows)
        offset = self._end
        self.append(RecordType.DIRECTORY, [rows])
        length = self._end + TAIL_SIZE
        tail = Tail(offset, len(rows), length, image_hash)
        self.append(RecordType.TAIL, [tail.pack()])
        if self._reserved > SMALL:
            with explained("writing", self._path):
                point("ftruncate")
                os.ftruncate(self._fd, length)
        return image_hash, length

    def publish(self) -> None:
        """Bring the file to disk under its name."""
        self._directory.publish(self._fd, self._name)

    def close(self) -> None:
        """Wait for threads that are writing, then close; harmless when repeated."""
        with self._lock:
            self._failure = self._failure or CrtraceError(f"{self._name} is already finished")
            self._lock.wait_for(lambda: not self._active)
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def discard(self) -> None:
        """Close and remove the file, published or not."""
        self.close()
        for name in (self._name + PART, self._name):
            try:
                self._directory.remove(name)
            except (CrtraceError, MemoryError):
                self._directory.remove(name)  # left there, it would be in the next attempt's way


def _size(part: Part) -> int:
    return memoryview(part).nbytes


def _after(parts: list[memoryview], done: int) -> list[memoryview]:
    """What is left to write after the first ``done`` bytes."""
    if not done:
        raise no_space()
    for at, part in enumerate(parts):
        if done < part.nbytes:
            return [part[done:], *parts[at + 1 :]]
        done -= part.nbytes
    return []
