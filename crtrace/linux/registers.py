"""The general registers of an x86-64 thread."""

from __future__ import annotations

import struct

_REGS = struct.Struct("<27Q")
_NAMES = (
    "r15", "r14", "r13", "r12", "rbp", "rbx", "r11", "r10", "r9", "r8", "rax", "rcx", "rdx",
    "rsi", "rdi", "orig_rax", "rip", "cs", "eflags", "rsp", "ss", "fs_base", "gs_base",
    "ds", "es", "fs", "gs",
)  # fmt: skip
REGS_SIZE = _REGS.size
CODE_64 = 0x33, 0xE033
"""What ``cs`` can be in 64-bit code; the latter on Xen. There may be 32-bit code, too."""


class Registers:
    """The general registers of one thread, by name, as 64-bit unsigned numbers."""

    __slots__ = ("values",)

    def __init__(self, raw: bytes) -> None:
        self.values = dict(zip(_NAMES, _REGS.unpack(raw), strict=True))

    def __getitem__(self, name: str) -> int:
        return int(self.values[name])

    def signed(self, name: str) -> int:
        """A register as the signed number that system call results are."""
        value = self[name]
        return value - (1 << 64) if value >> 63 else value

    def changed(self, **values: int) -> Registers:
        """A copy with some registers set; negative numbers wrap as in the processor."""
        copy = Registers(self.pack())
        copy.values.update({name: value & (1 << 64) - 1 for name, value in values.items()})
        return copy

    def pack(self) -> bytes:
        """The kernel's ``user_regs_struct``."""
        return _REGS.pack(*(self.values[name] for name in _NAMES))
