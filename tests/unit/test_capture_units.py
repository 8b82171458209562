"""The pure parts of capturing: cutting ranges, decoding bitmaps, parsing /proc, registers."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from crtrace.capture.copy import chunks
from crtrace.capture.target import Advice
from crtrace.capture.work import Part, Work
from crtrace.errors import TargetGone
from crtrace.image.tables import VmaFlag
from crtrace.linux.addrspace import AddressSpace
from crtrace.linux.files import read_build_id
from crtrace.linux.inject import rewound, signal_frame, signal_xstate
from crtrace.linux.procfs import EXEC, READ, SHARED, WRITE, Process, parse_maps, parse_stat
from crtrace.linux.registers import REGS_SIZE, Registers
from crtrace.linux.waits import cut_short, started_again
from crtrace.track.armer import Scan
from crtrace.track.dirty import decode
from crtrace.track.windows import middle
from crtrace.units import CHUNK_PAGES, U64, Pid, expand, merge, no_pages, to_ranges

page_sets = st.sets(st.integers(0, 5000), max_size=1500)


def ranges_of(pages: set[int]) -> U64:
    return to_ranges(np.array(sorted(pages), dtype=np.uint64))


@given(page_sets)
def test_chunks_hold_every_page_once_and_are_full_but_the_last(pages: set[int]) -> None:
    parts = [expand(part) for part in chunks(ranges_of(pages))]
    assert [int(page) for part in parts for page in part] == sorted(pages)
    assert all(len(part) == CHUNK_PAGES for part in parts[:-1])
    assert all(0 < len(part) <= CHUNK_PAGES for part in parts)


@given(page_sets)
def test_the_middle_has_as_many_pages_on_either_side(pages: set[int]) -> None:
    cut = middle(ranges_of(pages))
    below = sum(page < cut for page in pages)
    assert 0 <= len(pages) - 2 * below <= 1


@given(st.dictionaries(st.integers(0, 1 << 36), st.sets(st.integers(0, 511)), max_size=20))
def test_bitmaps_decode_to_the_pages_whose_bits_are_set(regions: dict[int, set[int]]) -> None:
    keys = np.array(sorted(regions), dtype=np.uint64)
    words = np.zeros((len(keys), 8), dtype=np.uint64)
    for row, region in enumerate(sorted(regions)):
        for bit in regions[region]:
            words[row, bit // 64] |= np.uint64(1 << bit % 64)
    expected = [region * 512 + bit for region in sorted(regions) for bit in sorted(regions[region])]
    assert decode(keys, words).tolist() == expected


MAPS = rb"""00400000-00452000 r-xp 00001000 08:02 173521      /usr/bin/a b\040c
7f0000000000-7f0000002000 rw-s 00000000 00:01 5 /dev/zero (deleted)
7ffe00000000-7ffe00021000 rw-p 00000000 00:00 0                          [stack]
7ffe00030000-7ffe00031000 ---p 00000000 00:00 0
ffffffffff600000-ffffffffff601000 --xp 00000000 00:00 0                  [vsyscall]
"""


def test_maps_are_parsed_with_their_odd_names() -> None:
    text, shared, stack, none = parse_maps(MAPS)
    assert (text.flags, text.offset, text.name) == (READ | EXEC, 0x1000, "/usr/bin/a b c")
    assert (text.device, text.inode) == (os.makedev(8, 2), 173521)
    assert (shared.flags, shared.shared) == (READ | WRITE | SHARED, True)
    assert (stack.name, stack.file_backed, stack.end) == ("[stack]", False, 0x7FFE00021000)
    assert (none.flags, none.name) == (0, "")


def test_a_name_may_look_like_an_escape_that_is_none() -> None:
    (vma,) = parse_maps(rb"00400000-00401000 r--s 00000000 00:01 7   /memfd:\777\012 (deleted)")
    assert vma.name == "/memfd:\\777\n (deleted)"


def test_flags_are_read_whatever_mappings_are_called(monkeypatch: pytest.MonkeyPatch) -> None:
    head = b"00400000-00401000 r--p 0 00:01 7 /odd\r\v\x1c\xc2\x85name\n"
    lines = head + b"Rss: 0 kB\nVmFlags: rd dd\n"
    monkeypatch.setattr(Process, "read", lambda process, name: lines)
    advice = Advice()
    with Process(Pid(os.getppid())) as process:
        advice.read(process)
    assert advice.flags == {(0x400000, 0x401000): VmaFlag.DONT_DUMP}


def test_who_has_no_memory_left_has_nothing_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    with Process(Pid(os.getppid())) as process:
        space = AddressSpace(process)
        monkeypatch.setattr(Process, "read", lambda process, name: b"")
        monkeypatch.setattr(Process, "alive", lambda process: False)
        with pytest.raises(TargetGone):
            space.empty()


def test_a_file_may_lie_about_its_build_id(tmp_path: Path) -> None:
    (tmp_path / "elf").write_bytes(b"\x7fELF\x02".ljust(32, b"\0") + b"\xff" * 32)
    with open(tmp_path / "elf", "rb") as file:
        assert read_build_id(file.fileno()) == b""


def test_stat_is_parsed_though_the_name_has_parentheses() -> None:
    with open("/proc/self/stat") as file:
        numbers = file.read().rpartition(")")[2]
    stat = parse_stat(f"12 (a) b (c) {numbers}")
    assert stat.comm == "a) b (c"
    assert stat.ppid == os.getppid()
    assert stat.startcode < stat.endcode < stat.startstack
    assert stat.arg_start <= stat.arg_end <= stat.env_start <= stat.env_end


def registers(**values: int) -> Registers:
    return Registers(bytes(REGS_SIZE)).changed(**values)


def test_registers_survive_packing() -> None:
    raw = bytes(range(REGS_SIZE))
    assert Registers(raw).pack() == raw
    assert registers(rax=-4).signed("rax") == -4


@pytest.mark.parametrize("result", [-512, -513, -514, -516])
def test_an_interrupted_call_is_rewound(result: int) -> None:
    again = rewound(registers(rax=result, orig_rax=35, rip=0x1002))
    assert (again["rax"], again["rip"], again.signed("orig_rax")) == (35, 0x1000, -1)


def test_a_finished_call_is_not_rewound() -> None:
    same = rewound(registers(rax=-4, orig_rax=35, rip=0x1002))
    assert (same.signed("rax"), same["rip"]) == (-4, 0x1002)


@pytest.mark.parametrize(
    ("rax", "number", "code", "expected"),
    [(-4, 232, 0x33, True), (-4, 35, 0x33, False), (0, 232, 0x33, False), (-4, 232, 0x23, False)],
)
def test_only_waits_that_are_never_restarted_are_given_back(
    rax: int, number: int, code: int, expected: bool
) -> None:
    stopped = registers(rax=rax, orig_rax=number, rip=0x1002, cs=code)
    assert cut_short(stopped.pack()) is expected
    assert started_again(stopped)["rip"] == 0x1000


def test_a_signal_frame_has_the_kernel_s_layout() -> None:
    frame = signal_frame(0x1111, registers(rip=0x2222, rax=0x3333, rsp=0x4444), 0x5555, 0x6666)
    word = np.frombuffer(frame, dtype="<u8")
    assert word[0] == 0x1111  # what ret takes
    context = word[1:]
    assert (context[5 + 13], context[5 + 15], context[5 + 16]) == (0x3333, 0x4444, 0x2222)
    assert context[5 + 23] == 0x6666  # extended state
    assert context[5 + 32] == 0x5555  # signal mask


def test_extended_state_in_a_frame_describes_itself() -> None:
    raw = bytearray(2696)
    raw[464:472] = (7).to_bytes(8, "little")
    dressed = np.frombuffer(signal_xstate(bytes(raw)), dtype="<u4")
    assert dressed[464 // 4] == 0x46505853
    assert (dressed[117], dressed[120]) == (2700, 2696)
    assert dressed[-1] == 0x46505845


def test_pre_copy_goes_on_while_it_gains_and_stops_when_it_does_not() -> None:
    gaining, stuck = (Work() for _ in range(2))
    assert all(gaining.converging(left) for left in (90_000, 40_000, 20_000, 9_000))
    assert [stuck.converging(left) for left in (50_000, 45_000, 41_000)] == [True, True, False]
    hopeless = Work()
    assert [hopeless.converging(left) for left in (250_000, 249_000)] == [True, False]
    assert not stuck.converged


def scan_of(
    written: set[int], *, unarmed: Iterable[int] = (), not_rearmed: Iterable[int] = ()
) -> Scan:
    """What a scan found, as sets of pages."""
    return Scan(ranges_of(written), no_pages, ranges_of(set(unarmed)), ranges_of(set(not_rearmed)))


def test_what_an_earlier_epoch_found_is_no_find_of_this_one() -> None:
    """By any of its scans: the one that takes the bits off may be that of pre-copy."""
    part = Part(ranges_of(set()))
    part.found(scan_of({1, 2, 3}, not_rearmed={1, 2}))
    part.found(scan_of({4}))
    work = Work(parts={0: part})
    part.marked = np.array([4], dtype=np.uint64)
    assert work.statistics()["bpf_missed"] == 1


def test_what_was_scanned_is_kept_with_what_was_carried() -> None:
    carried = ranges_of({1, 2})
    part = Part(carried)
    again = part.found(scan_of({2, 3, 9}))
    assert expand(part.scanned).tolist() == [1, 2, 3, 9]
    assert again.tolist() == merge(carried).tolist()


def test_what_a_scan_found_while_others_were_in_that_memory_is_read_again() -> None:
    part = Part(ranges_of(set()))
    found = []
    for page in (1, 2, 3, 4):
        found.append(part.found(scan_of({page, 9}, unarmed={9})))
        if page >= 3:
            part.trust()
    assert expand(part.revisit_next).tolist() == [1, 2]  # whoever was there may be slow
    following = Part(ranges_of(set()), revisit=part.revisit_next)
    assert expand(following.found(scan_of({7}))).tolist() == [1, 2]
    # What is not armed is never read while the target runs: it may be filled on demand.
    assert [expand(again).tolist() for again in found] == [[], [1], [2], []]
