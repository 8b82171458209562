"""BTF, made by hand and the running kernel's."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from crtrace.linux.btf import KERNEL, Btf

NAMES = b"\0point\0x\0y\0flag\0btf_trace_moved\0other\0"
STRUCT, POINTER, TYPEDEF, FUNCTION = 4, 2, 8, 13


def name(text: str) -> int:
    return NAMES.index(b"\0" + text.encode() + b"\0") + 1


def type_of(kind: int, named: int, refers: int, *parts: bytes, flag: bool = False) -> bytes:
    info = flag << 31 | kind << 24 | len(parts)
    return struct.pack("<III", named, info, refers) + b"".join(parts)


def member(text: str, bits: int, width: int = 0) -> bytes:
    return struct.pack("<III", name(text), 1, width << 24 | bits)


def blob(*types: bytes, magic: int = 0xEB9F, names: bytes = NAMES) -> bytes:
    data = b"".join(types)
    header = struct.pack("<HBBIIIII", magic, 1, 0, 24, 0, len(data), len(data), len(names))
    return header + data + names


INT = type_of(1, 0, 4) + struct.pack("<I", 32)
POINT = type_of(STRUCT, name("point"), 8, member("x", 0), member("y", 32))


def test_members_are_found_behind_types_of_every_kind() -> None:
    ahead = [
        INT, type_of(POINTER, 0, 1), type_of(3, 0, 0) + bytes(12), type_of(5, 0, 4, bytes(12)),
        type_of(6, 0, 4, bytes(8), bytes(8)), *(type_of(kind, 0, 0) for kind in (7, 8, 9, 10, 11)),
        type_of(12, 0, 0), type_of(FUNCTION, 0, 0, bytes(8)), type_of(14, 0, 0) + bytes(4),
        type_of(15, 0, 0, bytes(12)), type_of(16, 0, 0), type_of(17, 0, 0) + bytes(4),
        type_of(18, 0, 0), type_of(19, 0, 8, bytes(12)),
    ]  # fmt: skip
    btf = Btf(blob(*ahead, POINT))
    assert (btf.offset("point", "x"), btf.offset("point", "y")) == (0, 4)
    assert btf.offset("point", "flag") is None
    assert btf.offset("other", "x") is None
    assert btf.offset("never heard of", "x") is None


def test_a_bitfield_has_no_offset_and_its_neighbours_do() -> None:
    members = member("x", 64), member("flag", 128, width=3), member("y", 131)
    btf = Btf(blob(type_of(STRUCT, name("point"), 24, *members, flag=True)))
    found = [btf.offset("point", each) for each in ("x", "flag", "y")]
    assert found == [8, None, None]


def test_structs_of_one_name_that_differ_tell_nothing() -> None:
    other = type_of(STRUCT, name("point"), 8, member("y", 32), member("x", 32))
    btf = Btf(blob(POINT, other))
    assert btf.offset("point", "x") is None
    assert btf.offset("point", "y") == 4


def test_arguments_of_a_tracepoint_are_counted() -> None:
    function = type_of(FUNCTION, 0, 0, bytes(8), bytes(8), bytes(8))
    types = function, type_of(POINTER, 0, 1), type_of(TYPEDEF, name("btf_trace_moved"), 2)
    assert Btf(blob(*types)).tracepoint_arguments("moved") == 2
    assert Btf(blob(*types)).tracepoint_arguments("x") is None
    beyond = type_of(TYPEDEF, name("btf_trace_moved"), 9)
    assert Btf(blob(beyond)).tracepoint_arguments("moved") is None


@pytest.mark.parametrize(
    "data",
    [
        b"", blob(POINT, magic=0x9FEB), blob(POINT)[:30], blob(POINT[:-1]), blob(POINT)[:-1],
        blob(type_of(31, 0, 0)),
    ],
)  # fmt: skip
def test_what_is_no_btf_is_refused(data: bytes) -> None:
    with pytest.raises(ValueError, match=r"."):
        Btf(data)


@given(st.binary(max_size=12), st.integers(0, 200), st.integers(0, 255))
def test_damage_is_refused_or_tells_something_harmless(tail: bytes, at: int, byte: int) -> None:
    data = bytearray(blob(INT, POINT) + tail)
    data[at % len(data)] = byte
    try:
        offset = Btf(bytes(data)).offset("point", "y")
    except ValueError:
        return
    assert offset is None or 0 <= offset < 1 << 29


@pytest.mark.skipif(not KERNEL.exists(), reason="cannot run here: the kernel has no BTF")
def test_the_running_kernel_tells_its_types() -> None:
    btf = Btf.of_kernel()
    assert btf
    assert (btf.offset("list_head", "next"), btf.offset("list_head", "prev")) == (0, 8)
    assert btf.offset("pt_regs", "orig_ax") == 120  # as bpf/track.c has it
    assert (btf.offset("pt_regs", "ip"), btf.offset("pt_regs", "flags")) == (128, 144)
    assert btf.offset("vm_area_struct", "vm_mm")
    assert btf.tracepoint_arguments("page_fault_user") == 3
