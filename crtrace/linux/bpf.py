"""The bpf(2) calls that drain and steer maps, in whole batches over numpy arrays."""

from __future__ import annotations

import ctypes
import errno
from typing import Any

import numpy as np
import numpy.typing as npt

from crtrace.linux.libc import SYS_BPF, syscall

_LOOKUP, _UPDATE, _DELETE, _NEXT_KEY = 1, 2, 3, 4
_LOOKUP_AND_DELETE_BATCH = 25

Array = npt.NDArray[Any]


def lookup(fd: int, key: Array, value: Array) -> bool:
    """Fill ``value`` with the element at ``key``; False when there is none."""
    return _element(_LOOKUP, fd, key, value)


def update(fd: int, key: Array, value: Array) -> None:
    """Set an element. ``OSError`` E2BIG when the map is full."""
    if not _element(_UPDATE, fd, key, value):
        raise OSError(errno.ENOENT, "no such element")


def delete(fd: int, key: Array) -> bool:
    """Remove an element; False when there was none."""
    return _element(_DELETE, fd, key, None)


def next_key(fd: int, key: Array | None, following: Array) -> bool:
    """Fill ``following`` with the key after ``key``, or the first one; False at the end."""
    attr = (ctypes.c_uint64 * 4)(fd, 0 if key is None else key.ctypes.data, following.ctypes.data)
    try:
        syscall(SYS_BPF, _NEXT_KEY, ctypes.addressof(attr), ctypes.sizeof(attr))
    except FileNotFoundError:
        return False
    return True


def _element(command: int, fd: int, key: Array, value: Array | None) -> bool:
    attr = (ctypes.c_uint64 * 4)(fd, key.ctypes.data, 0 if value is None else value.ctypes.data)
    try:
        syscall(SYS_BPF, command, ctypes.addressof(attr), ctypes.sizeof(attr))
    except FileNotFoundError:
        return False
    return True


class Drain:
    """Takes all elements out of one hash map, through buffers that are made once."""

    def __init__(
        self, fd: int, key: npt.DTypeLike, value: npt.DTypeLike, batch: int = 8192
    ) -> None:
        self.fd = fd
        self._keys = np.zeros(batch, dtype=key)
        self._values = np.zeros(batch, dtype=value)
        # The cursor between calls is opaque; for hash maps the kernel uses its first 4 bytes.
        self._cursor = np.zeros((2, 8), dtype=np.uint64)

    def take(self) -> tuple[Array, Array]:
        """All keys and values, removed from the map."""
        keys, values = [self._keys[:0]], [self._values[:0]]
        first, done = True, False
        while not done:
            count, done = self._one_batch(first)
            keys.append(self._keys[:count].copy())
            values.append(self._values[:count].copy())
            first = False
        return np.concatenate(keys), np.concatenate(values)

    def _one_batch(self, first: bool) -> tuple[int, bool]:
        cursor_in, cursor_out = self._cursor.ctypes.data, self._cursor[1].ctypes.data
        attr = (ctypes.c_uint64 * 7)(
            0 if first else cursor_in, cursor_out, self._keys.ctypes.data,
            self._values.ctypes.data, len(self._keys) | self.fd << 32, 0, 0,
        )  # fmt: skip
        done = False
        try:
            syscall(SYS_BPF, _LOOKUP_AND_DELETE_BATCH, ctypes.addressof(attr), ctypes.sizeof(attr))
        except FileNotFoundError:
            done = True  # the end of the map; what was found before it still counts
        self._cursor[0] = self._cursor[1]
        return int(attr[4] & 0xFFFFFFFF), done
