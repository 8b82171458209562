"""The bpf(2) calls: load and attach programs; drain and steer maps, in whole batches over numpy
arrays."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import struct
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from crtrace.linux.libc import (
    SYS_BPF,
    SYS_PERF_EVENT_OPEN,
    address_of,
    ioctl,
    kernel_version,
    syscall,
    words,
)
from crtrace.units import PAGE_SIZE, U64

_MAP_CREATE, _LOOKUP, _UPDATE, _DELETE, _, _PROG_LOAD = range(6)
_OBJ_GET_INFO, _RAW_TRACEPOINT_OPEN, _LOOKUP_BATCH, _LOOKUP_AND_DELETE_BATCH = 15, 17, 24, 25
KPROBE, TRACEPOINT, RAW_TRACEPOINT = 2, 5, 17
"""Types of programs (``enum bpf_prog_type``)."""
RINGBUF = 27
"""A type of maps (``enum bpf_map_type``)."""
_PERF_TYPE_TRACEPOINT, _PERF_FD_CLOEXEC = 2, 8
_PERF_SET_BPF, _PERF_ENABLE = 0x40042408, 0x2400
_KPROBE_TYPE = Path("/sys/bus/event_source/devices/kprobe/type")
_MISSES = 208
"""Where ``struct bpf_prog_info`` has them."""
_TRACEFS = ("/sys/kernel/tracing", "/sys/kernel/debug/tracing")

Array = npt.NDArray[Any]


def update(fd: int, key: Array, value: Array) -> None:
    """Set an element. ``OSError`` E2BIG when the map is full."""
    if not _element(_UPDATE, fd, key, value):
        raise OSError(errno.ENOENT, "no such element")


def delete(fd: int, key: Array) -> bool:
    """Remove an element; False when there was none."""
    return _element(_DELETE, fd, key, None)


def _element(command: int, fd: int, key: Array, value: Array | None) -> bool:
    attr = words(fd, key.ctypes.data, 0 if value is None else value.ctypes.data)
    try:
        syscall(SYS_BPF, command, ctypes.addressof(attr), ctypes.sizeof(attr))
    except FileNotFoundError:
        return False
    return True


def create_map(name: str, kind: int, key_size: int, value_size: int, entries: int) -> int:
    """The descriptor of a new map."""
    sizes = (kind, key_size, value_size, entries, 0, 0, 0)
    return _call(_MAP_CREATE, struct.pack("<7I16s", *sizes, name.encode()[:15]))


def load_program(name: str, kind: int, code: bytes) -> int:
    """The descriptor of a program that the verifier has accepted.

    ``OSError`` when it does not, with the last that the verifier said.
    """
    license = b"GPL\0"
    where = len(code) // 8, address_of(code), address_of(license)
    log = ctypes.create_string_buffer(1 << 18)
    for level, size, at in ((0, 0, 0), (1, len(log), ctypes.addressof(log))):
        attr = struct.pack(
            "<IIQQIIQII16s", kind, *where, level, size, at, 0, 0, name.encode()[:15]
        )  # fmt: skip
        try:
            return _call(_PROG_LOAD, attr)
        except OSError as error:
            failure = error
    said = " | ".join(log.value.decode(errors="replace").splitlines()[-4:])
    raise OSError(failure.errno, f"{failure.strerror}, for program {name}: {said}") from failure


def attach_raw_tracepoint(program: int, name: str) -> int:
    """Run a program at a raw tracepoint for as long as the descriptor returned is open."""
    text = name.encode() + b"\0"
    return _call(_RAW_TRACEPOINT_OPEN, struct.pack("<QII", address_of(text), program, 0))


def attach_tracepoint(program: int, category: str, name: str) -> int:
    """The same at a tracepoint with the arguments that tracefs describes, on all processors."""
    number = _tracepoint_number(category, name)
    attr = struct.pack("<IIQQQQQIIQ", _PERF_TYPE_TRACEPOINT, 64, number, 1, 0, 0, 0, 1, 0, 0)
    return _attach_to_event(program, attr)


def attach_kprobe(program: int, function: str) -> int:
    """The same at the beginning of a function of the kernel. ``OSError`` where that is not allowed,
    or there is no such function; ENOENT also where the kernel was built without."""
    kind = int(_KPROBE_TYPE.read_text())
    name = function.encode() + b"\0"
    attr = struct.pack("<IIQQQQQIIQQ", kind, 72, 0, 1, 0, 0, 0, 1, 0, address_of(name), 0)
    return _attach_to_event(program, attr)


def _attach_to_event(program: int, attr: bytes) -> int:
    nobody = (1 << 64) - 1
    fd = syscall(SYS_PERF_EVENT_OPEN, address_of(attr), nobody, 0, nobody, _PERF_FD_CLOEXEC)
    try:
        ioctl("PERF_EVENT_IOC_SET_BPF", fd, _PERF_SET_BPF, program)
        ioctl("PERF_EVENT_IOC_ENABLE", fd, _PERF_ENABLE, 0)
    except BaseException:
        os.close(fd)
        raise
    return fd


def misses_are_counted() -> bool:
    """Whether :func:`missed` says anything of programs at kprobes: only a version tells."""
    return kernel_version() >= (6, 7)


def missed(program: int) -> int:
    """How often a program should have run and did not, since another one was running on that
    processor, where that is counted."""
    info = bytearray(_MISSES + 8)
    where = (ctypes.c_char * len(info)).from_buffer(info)
    _call(_OBJ_GET_INFO, struct.pack("<IIQ", program, len(info), ctypes.addressof(where)))
    count: int = struct.unpack_from("<Q", info, _MISSES)[0]
    return count


def _tracepoint_number(category: str, name: str) -> int:
    for folder in _TRACEFS:
        with suppress(FileNotFoundError):
            return int(Path(f"{folder}/events/{category}/{name}/id").read_text())
    raise FileNotFoundError(errno.ENOENT, f"no tracepoint {category}:{name}; is tracefs mounted?")


def _call(command: int, attr: bytes) -> int:
    return syscall(SYS_BPF, command, address_of(attr), len(attr))


class Element:
    """Reads one element of a map, through buffers that are made once: the pause does it often."""

    def __init__(self, fd: int, key: Array, value: npt.DTypeLike) -> None:
        self._key, self._value = key, np.zeros(1, dtype=value)
        self._attr = words(fd, key.ctypes.data, self._value.ctypes.data)
        self._at = ctypes.addressof(self._attr)

    def read(self) -> Any:
        """Its value as of now, an int or a tuple of them; None when there is no such element."""
        try:
            syscall(SYS_BPF, _LOOKUP, self._at, ctypes.sizeof(self._attr))
        except FileNotFoundError:
            return None
        return self._value.item()


class Elements:
    """Reads all elements of one hash map, through buffers that are made once."""

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
        return self._all(_LOOKUP_AND_DELETE_BATCH)

    def peek(self) -> tuple[Array, Array]:
        """All keys and values, left in the map."""
        return self._all(_LOOKUP_BATCH)

    def _all(self, command: int) -> tuple[Array, Array]:
        keys, values = [self._keys[:0]], [self._values[:0]]
        first, done = True, False
        while not done:
            count, done = self._one_batch(command, first)
            keys.append(self._keys[:count].copy())
            values.append(self._values[:count].copy())
            first = False
        return np.concatenate(keys), np.concatenate(values)

    def _one_batch(self, command: int, first: bool) -> tuple[int, bool]:
        cursor_in, cursor_out = self._cursor.ctypes.data, self._cursor[1].ctypes.data
        attr = words(
            0 if first else cursor_in, cursor_out, self._keys.ctypes.data,
            self._values.ctypes.data, len(self._keys) | self.fd << 32, 0, 0,
        )  # fmt: skip
        done = False
        try:
            syscall(SYS_BPF, command, ctypes.addressof(attr), ctypes.sizeof(attr))
        except FileNotFoundError:
            done = True  # the end of the map; what was found before it still counts
        self._cursor[0] = self._cursor[1]
        return int(attr[4] & 0xFFFFFFFF), done


class Ring:
    """Reads a ring buffer whose records all have as many 64-bit words, without a system call.

    ``size`` is that of its data in bytes, ``words`` how many a record has.
    """

    _BUSY = np.uint64(1 << 31)

    def __init__(self, fd: int, size: int, words: int) -> None:
        self._words = 1 + words  # the first one is the kernel's
        self._nothing: U64 = np.empty((0, words), dtype=np.uint64)
        self.unfinished = False
        """The last look ended at a record that was still being written."""
        self._size = size
        own = mmap.mmap(fd, PAGE_SIZE, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
        # The kernel maps the data twice, one behind the other, so that no record is ever split.
        theirs = mmap.mmap(
            fd, PAGE_SIZE + 2 * size, mmap.MAP_SHARED, mmap.PROT_READ, offset=PAGE_SIZE
        )
        self._mapped = [own, theirs]
        self._consumer = np.frombuffer(own, dtype=np.uint64, count=1)
        self._producer = np.frombuffer(theirs, dtype=np.uint64, count=1)
        self._data = np.frombuffer(theirs, dtype=np.uint64, offset=PAGE_SIZE)

    def close(self) -> None:
        """Let go of the ring, which nobody reads any more; it may be called twice."""
        self._consumer = self._producer = np.zeros(1, dtype=np.uint64)
        self._data = np.zeros(0, dtype=np.uint64)
        for each in self._mapped:
            each.close()
        self._mapped = []

    def take(self) -> U64:
        """The records, ``(n, words)``, that are complete, oldest first, up to one that is still
        being written."""
        at, end = int(self._consumer[0]), int(self._producer[0])
        self.unfinished = False
        if at == end:
            return self._nothing
        first = at % self._size // 8
        entries = self._data[first : first + (end - at) // 8].reshape(-1, self._words)
        busy = np.flatnonzero(entries[:, 0] & self._BUSY)
        self.unfinished = len(busy) > 0
        ready = entries[: busy[0]] if self.unfinished else entries
        records: U64 = ready[:, 1:].copy()
        self._consumer[0] = at + ready.nbytes
        return records
