"""Every record survives packing, and no payload can do worse than be refused."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from crtrace.errors import CrtraceError, FormatTooNew, ImageDamaged
from crtrace.image import heap, tables
from crtrace.image.framing import Record, RecordHeader, Tail
from crtrace.image.header import ImageHeader, Stats
from crtrace.image.losses import Unreadable, UnreadableRange
from crtrace.image.records import Arch, Cpu, Mm, Task, Thread
from crtrace.image.tables import (
    FileInfo,
    Files,
    Vma,
    VmaFlag,
    Vmas,
)

u32 = st.integers(0, 2**32 - 1)
u64 = st.integers(0, 2**64 - 1)
i64 = st.integers(-(2**63), 2**63 - 1)
i32 = st.integers(-(2**31), 2**31 - 1)
ids = st.binary(min_size=16, max_size=16)
pids = st.integers(0, 2**31 - 1)
# What a name on Linux can be: any bytes but zero.
names = st.binary(max_size=12).map(
    lambda raw: raw.replace(b"\0", b"\1").decode("utf-8", "surrogateescape")
)
letters = st.sampled_from("RSDTtZXI")
four = st.tuples(u32, u32, u32, u32)
namespaces = st.lists(st.tuples(names, u64), max_size=3).map(tuple)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=5,
)


def built(record: type, /, **fields: Any) -> st.SearchStrategy[Any]:
    return st.builds(record, **fields)


@st.composite
def mappings(draw: st.DrawFn) -> Vmas:
    rows, at = [], 0
    for _ in range(draw(st.integers(0, 5))):
        start = at + draw(st.integers(0, 9))
        at = start + draw(st.integers(1, 9))
        vma = built(
            Vma, start=st.just(start << 12), end=st.just(at << 12),
            pgoff=st.integers(0, 2**40).map(lambda page: page << 12), flags=u32, kind=u32,
            file=u32, object_space=u32, name=names,
        )  # fmt: skip
        rows.append(draw(vma))
    return Vmas(tuple(rows))


file_rows = st.lists(
    built(
        FileInfo, id=st.integers(1, 2**32 - 1), flags=u32, dev=u64, inode=u64, size=u64,
        mtime_ns=i64, object_space=u32, path=names, build_id=st.binary(max_size=64),
    ),
    max_size=4, unique_by=lambda row: row.id,
)  # fmt: skip


@st.composite
def losses(draw: st.DrawFn) -> Unreadable:
    rows, space, at = [], 0, 0
    for _ in range(draw(st.integers(0, 4))):
        if step := draw(st.integers(0, 2)):
            space, at = space + step, 0
        first = at + draw(st.integers(0, 2**49))
        row = built(
            UnreadableRange, space=st.just(space), first=st.just(first),
            count=st.integers(1, 2**49), errno=i32, reason=u32,
        )  # fmt: skip
        rows.append(draw(row))
        at = first + rows[-1].count
    return Unreadable(tuple(rows))


MM_FIELDS = (
    "start_code", "end_code", "start_data", "end_data", "start_brk", "brk", "start_stack",
    "arg_start", "arg_end", "env_start", "env_end", "map_count", "flags",
)  # fmt: skip

RECORDS = {
    "ImageHeader": built(
        ImageHeader, chain_id=ids, image_id=ids, parent_id=ids, parent_hash=ids,
        replaced_hash=ids, epoch=u64, parent_epoch=u64, kind=st.integers(0, 1), wall_ns=u64,
        boottime_ns=u64, boot_id=ids, reason=names, kernel=names, hostname=names,
        tool_version=names, armer=names,
    ),
    "Arch": built(Arch, machine=names, xstate_size=u32, xfeatures=u64, clock_ticks=u32),
    "Task": built(
        Task, pid=pids, ppid=pids, pgid=pids, sid=pids, tty=u32, state=letters, start_ticks=u64,
        uid=four, gid=four, exit_status=i32, seccomp=u32,
        ns_pids=st.lists(pids, max_size=4).map(tuple), comm=names, cwd=names, root=names,
        cgroup=names, cmdline=st.binary(max_size=20),
        namespaces=namespaces,
    ),
    "Mm": built(
        Mm, space=u32, exe_file=u32, auxv=st.binary(max_size=40), ldt=st.binary(max_size=20),
        **dict.fromkeys(MM_FIELDS, u64),
    ),
    "Thread": built(
        Thread, tid=pids, ns_tid=pids, state=letters, sigmask=u64, pending=u64, syscall=i64,
        comm=names,
    ),
    "Cpu": built(Cpu, sets=st.lists(st.tuples(u32, st.binary(max_size=30)), max_size=3).map(tuple)),
    # Too short for the names of the fields that have a type.
    "Stats": built(Stats, fields=st.dictionaries(st.text(max_size=3), json_values, max_size=4)),
    "Vmas": mappings(),
    "Files": built(Files, rows=st.just(()) | file_rows.map(tuple)),
    "Unreadable": losses(),
}  # fmt: skip
each_record = pytest.mark.parametrize("name", RECORDS)


@each_record
@given(data=st.data())
def test_a_record_comes_back_as_it_was(name: str, data: st.DataObject) -> None:
    record: Record = data.draw(RECORDS[name])
    assert type(record).unpack(record.pack(), "here") == record


@each_record
@given(data=st.data())
def test_a_payload_cut_short_is_refused(name: str, data: st.DataObject) -> None:
    record: Record = data.draw(RECORDS[name])
    payload = record.pack()
    cut = data.draw(st.integers(0, len(payload) - 1))
    with pytest.raises(ImageDamaged, match="here"):
        type(record).unpack(payload[:cut], "here")


@each_record
@given(data=st.data())
def test_any_bytes_are_read_or_refused(name: str, data: st.DataObject) -> None:
    record: Record = data.draw(RECORDS[name])
    payload = bytearray(record.pack())
    for _ in range(data.draw(st.integers(1, 8))):
        at = data.draw(st.integers(0, len(payload) - 1))
        payload[at] = data.draw(st.integers(0, 255))
    with contextlib.suppress(CrtraceError):
        type(record).unpack(bytes(payload), "here")


@pytest.mark.parametrize("name", sorted(RECORDS.keys() - {"Stats"}))
@given(data=st.data())
def test_fields_added_by_a_later_minor_version_are_passed_over(
    name: str, data: st.DataObject
) -> None:
    record: Record = data.draw(RECORDS[name])
    extra = data.draw(st.binary(max_size=24))
    assert type(record).unpack(record.pack() + extra, "here") == record


def test_longer_rows_are_passed_over() -> None:
    table = Unreadable((UnreadableRange(space=1, first=2, count=3, errno=14, reason=1),))
    payload = table.pack()
    longer = payload[:4] + (40).to_bytes(4, "little") + payload[8:] + bytes(8)
    assert Unreadable.unpack(longer, "here") == table


def test_a_hostile_count_is_refused_before_memory_is_taken() -> None:
    with pytest.raises(ImageDamaged, match="at most 1024"):
        Cpu.unpack(b"\xff\xff\xff\xff" + bytes(12), "here")
    with pytest.raises(ImageDamaged, match="does not fit"):
        Vmas.unpack((2**32 - 1).to_bytes(4, "little") + b"\x30" + bytes(19), "here")


WRONG_ROWS = {
    "empty": [(4096, 4096)],
    "backwards": [(8192, 4096)],
    "unaligned": [(0, 4097)],
    "overlapping": [(0, 8192), (4096, 12288)],
    "descending": [(8192, 12288), (0, 4096)],
}


@pytest.mark.parametrize("rows", WRONG_ROWS.values(), ids=WRONG_ROWS)
def test_mappings_out_of_order_are_neither_written_nor_read(rows: list[tuple[int, int]]) -> None:
    with pytest.raises(ValueError, match="unaligned, empty or begins before"):
        Vmas(tuple(Vma(start=start, end=end) for start, end in rows)).pack()
    packed = b"".join(tables.VMA_ROW.pack(*row, 0, 0, 0, 0, 0, 0, 0) for row in rows)
    payload = heap.TABLE.pack(len(rows), tables.VMA_ROW.size, 0) + packed
    with pytest.raises(ImageDamaged, match="here: mapping"):
        Vmas.unpack(payload, "here")


def test_a_name_outside_of_the_heap_is_refused() -> None:
    for offset, length in ((3, 2), (4, 1), (0, 5), (2**32 - 1, 2**32 - 1)):
        row = tables.VMA_ROW.pack(0, 4096, 0, 0, 0, 0, 0, offset, length)
        payload = heap.TABLE.pack(1, tables.VMA_ROW.size, 4) + row + b"heap"
        with pytest.raises(ImageDamaged, match="outside of a heap of 4"):
            Vmas.unpack(payload, "here")


@pytest.mark.parametrize("ids", [(0,), (5, 5)])
def test_files_without_a_name_of_their_own_are_neither_written_nor_read(
    ids: tuple[int, ...],
) -> None:
    with pytest.raises(ValueError, match="twice"):
        Files(tuple(FileInfo(id=number) for number in ids)).pack()
    packed = b"".join(tables.FILE_ROW.pack(number, *[0] * 11) for number in ids)
    with pytest.raises(ImageDamaged, match="twice"):
        Files.unpack(heap.TABLE.pack(len(ids), tables.FILE_ROW.size, 0) + packed, "here")


def test_another_major_version_is_too_new_and_not_damaged() -> None:
    header = ImageHeader(chain_id=bytes(16), image_id=bytes(16), epoch=0)
    payload = bytearray(header.pack())
    payload[8] = 2
    with pytest.raises(FormatTooNew, match=r"2\.0"):
        ImageHeader.unpack(bytes(payload), "here")


def test_permissions_read_like_proc_maps() -> None:
    flags = VmaFlag.READ | VmaFlag.EXEC
    assert Vma(start=0, end=4096, flags=flags).perms == "r-xp"
    assert Vma(start=0, end=4096, flags=VmaFlag.SHARED).perms == "---s"


@given(st.tuples(u32, u32, u64, u32, u32, u64))
def test_record_header_round_trip(fields: tuple[int, ...]) -> None:
    header = RecordHeader(*fields)
    assert len(header.pack()) == 32
    assert RecordHeader.unpack(header.pack()) == header


def test_checksum_covers_header_and_payload() -> None:
    header = RecordHeader(9, 0, 8, 1, 0)
    sealed = header.sealed([b"12345678"])
    assert sealed.checksum == header.sealed([b"1234", b"5678"]).checksum
    assert sealed.checksum != header.sealed([b"12345679"]).checksum
    assert sealed.checksum != RecordHeader(9, 0, 8, 2, 0).sealed([b"12345678"]).checksum


def test_tail_is_48_bytes() -> None:
    assert len(Tail(0, 0, 0, bytes(16)).pack()) == 48
