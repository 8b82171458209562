"""The compiled BPF programs as data: what the compiler made, kept so that it need not run again.

Nothing in here is trusted with more than what the kernel's verifier lets any program do; and the
file is read only where nobody but us and root can have written it.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import stat
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Self

import numpy as np

INSTRUCTION = np.dtype([("op", "u1"), ("registers", "u1"), ("offset", "<i2"), ("imm", "<i4")])
_LOAD_IMM64, _MAP_FD = 0x18, 1
"""``BPF_LD | BPF_IMM | BPF_DW`` with the source register ``BPF_PSEUDO_MAP_FD``: the map's
descriptor is the immediate (include/uapi/linux/bpf.h)."""
SHARED_CACHE = Path("/var/cache/crtrace")
"""Of root; ``scripts/setup`` makes it."""


@dataclass(frozen=True, slots=True)
class BpfMap:
    """A map to be made; sizes in bytes."""

    name: str
    kind: int
    key_size: int
    value_size: int
    entries: int


@dataclass(frozen=True, slots=True)
class BpfProgram:
    """A program; where its code names a map, it does so by that map's place in the list."""

    name: str
    kind: int
    code: bytes

    @classmethod
    def of(cls, name: str, kind: int, code: bytes, fds: Sequence[int]) -> Self:
        """From loaded code, which names maps by descriptor."""
        numbers = {fd: number for number, fd in enumerate(fds)}
        return cls(name, kind, _renamed(code, numbers))

    def bound(self, fds: Sequence[int]) -> bytes:
        """The code for maps with these descriptors."""
        return _renamed(self.code, dict(enumerate(fds)))


def _renamed(code: bytes, names: Mapping[int, int]) -> bytes:
    instructions = np.frombuffer(code, dtype=INSTRUCTION).copy()
    loads = (instructions["op"] == _LOAD_IMM64) & (instructions["registers"] >> 4 == _MAP_FD)
    instructions["imm"][loads] = [names[int(each)] for each in instructions["imm"][loads]]
    return instructions.tobytes()


@dataclass(frozen=True, slots=True)
class Bytecode:
    """All maps and programs; ``headers`` says which the compiler had."""

    headers: str
    maps: tuple[BpfMap, ...]
    programs: tuple[BpfProgram, ...]

    def pack(self) -> bytes:
        """As JSON."""
        programs = [
            {**asdict(each), "code": base64.b64encode(each.code).decode()} for each in self.programs
        ]
        maps = [asdict(each) for each in self.maps]
        return json.dumps({"headers": self.headers, "maps": maps, "programs": programs}).encode()

    @classmethod
    def unpack(cls, data: bytes) -> Self:
        """Raises ``ValueError``, ``KeyError`` or ``TypeError`` for anything else."""
        found = json.loads(data)
        programs = [
            BpfProgram(each["name"], each["kind"], base64.b64decode(each["code"]))
            for each in found["programs"]
        ]
        maps = [BpfMap(**each) for each in found["maps"]]
        return cls(found["headers"], tuple(maps), tuple(programs))


def cache_key(sources: Path) -> str:
    """What the code depends on: the sources, the kernel, and headers that were asked for."""
    kernel = os.uname()
    parts = [path.read_bytes() for path in sorted(sources.glob("*.[ch]"))]
    told = os.environ.get("BCC_KERNEL_SOURCE", "")
    parts += [each.encode() for each in (kernel.release, kernel.version, kernel.machine, told)]
    return hashlib.sha256(b"\0".join(parts)).hexdigest()


def _cache_file() -> Path:
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = SHARED_CACHE if os.geteuid() == 0 else Path(home) / "crtrace"
    return folder / f"bpf-{os.uname().release}"


def recall(key: str) -> Bytecode | None:
    """What was kept under ``key``, if there is such a thing, whole, and nobody else's."""
    with suppress(OSError, ValueError, KeyError, TypeError):
        if not _ours_alone(os.stat(_cache_file().parent)):
            return None
        fd = os.open(_cache_file(), os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
        with open(fd, "rb") as file:
            about = os.fstat(fd)
            if _ours_alone(about) and stat.S_ISREG(about.st_mode):
                head, _, data = file.read(1 << 20).partition(b"\n")
                if head == _head(key, data):
                    return Bytecode.unpack(data)
    return None


def keep(key: str, code: Bytecode) -> None:
    """Keep it for the next start, in place of what was there; where that fails, do without."""
    data = code.pack()
    file = _cache_file()
    part = file.with_name(f".{file.name}.{os.getpid()}")
    with suppress(OSError):
        file.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
        fd = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        with open(fd, "wb") as out:
            out.write(_head(key, data) + b"\n" + data)
        part.rename(file)


def _head(key: str, data: bytes) -> bytes:
    return f"{key} {hashlib.sha256(data).hexdigest()}".encode()


def _ours_alone(about: os.stat_result) -> bool:
    return about.st_uid in (0, os.geteuid()) and not about.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
