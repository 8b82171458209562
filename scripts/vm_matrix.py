"""What ``scripts/vm matrix`` runs on each kernel, once for each armer, and the table of it."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

TESTS = (
    # What is found out about the machine; BPF is compiled, loaded and attached, and sees writes.
    "tests/live/test_check.py::test_check_tries_everything_the_most_important_first",
    "tests/live/test_check.py::test_code_that_was_kept_needs_no_headers",
    "tests/live/test_loader.py",
    "tests/live/test_marks.py::test_several_processes_are_told_apart",
    "tests/live/test_marks.py::test_the_first_faults_of_children_are_seen",
    "tests/live/test_marks.py::test_changes_of_the_address_space_are_counted",
    "tests/live/test_marks.py::test_bpf_and_scan_agree_on_scattered_writes",
    "tests/live/test_marks.py::test_watch_works_from_inside_a_pid_namespace",
    # Images are what the target had, in whatever way that came to be.
    "tests/live/test_compare.py",
    "tests/live/test_softdirty.py",
    "tests/live/test_exact.py::test_epochs_of_threads_that_write_without_pause_are_exact[1-50]",
    "tests/live/test_exact.py::test_epochs_are_exact_after_any_mixture_of_changes[0]",
    "tests/live/test_exact.py::test_breakpoints_that_the_kernel_puts_into_code_are_captured",
    "tests/live/test_pins.py",
    "tests/live/test_shared.py::test_each_way_of_changing_shared_memory_is_captured",
    "tests/live/test_tree.py::test_a_family_that_is_there_already_is_captured_whole",
    "tests/live/test_tree.py::test_children_that_come_between_epochs_are_captured",
    "tests/live/test_ways.py::test_all_ways_in_any_order",
    # Also where a scan looks only in places.
    "tests/live/test_bounded.py::test_a_quiet_target_is_scanned_within_bounds",
    "tests/live/test_bounded.py::test_what_nobody_could_notice_is_told_afterwards",
    "tests/live/test_bounded.py::test_a_target_is_exact_while_the_kernel_compacts_memory",
    "tests/live/test_bounded.py::test_huge_pages_that_are_split_are_not_late",
    "tests/live/test_bounded_bits.py",
    "tests/live/test_bounded.py::test_bpf_tells_address_spaces_apart",
    "tests/live/test_bounded.py::test_somebody_else_in_the_memory_is_told_from_the_target_itself",
    "tests/live/test_bounded.py::test_regions_are_told_once_in_a_generation",
    # The target goes on as before, even when crtrace is killed.
    "tests/live/test_untouched.py",
    "tests/live/test_tree.py::test_a_whole_tree_goes_on_when_crtrace_is_killed",
)
"""What can come out differently on another kernel or with another armer, and so little of it that
one can wait for a row where the processor is emulated: each way alone (``test_ways.py`` whole)
takes half an hour there. Images and commands that read them are the same everywhere."""

ARMERS = ("userfaultfd", "soft-dirty", "compare")
"""With ``compare`` nothing is armed, so that row is that of a kernel where nothing can be."""

SCRIPT = f"""\
scripts/setup test >&2
export PATH=$PWD/.venv/bin:$PATH CRTRACE_CI=1 CRTRACE_SEEDS=${{CRTRACE_SEEDS:-1}}
for armer in ${{CRTRACE_ARMER:-{" ".join(ARMERS)}}}; do
    export CRTRACE_ARMER=$armer
    results=$CRTRACE_RESULTS/$armer
    mkdir "$results"
    scripts/crtrace check --json >"$results/check.json" || continue
    echo "=== $armer" >&2
    python -m pytest -o junit_family=xunit1 --junitxml="$results/junit.xml" "$@" || true
done
"""


@dataclass
class Outcome:
    """What came out of the tests in one place, with one armer."""

    kernel: str
    armer: str = "none"
    coverage: str = ""
    passed: int = 0
    skipped: Counter[str] = field(default_factory=Counter)
    """How many, by reason."""
    failed: list[str] = field(default_factory=list)


def outcomes_in(directory: Path, where: str, code: int) -> list[Outcome]:
    """The rows of one place, of which there is always one: that nothing works is a failure."""
    rows, missing = [], ""
    for armer in ARMERS:
        report = directory / armer / "check.json"
        text = report.read_text() if report.exists() else ""
        found = json.loads(text) if text else {"works": False, "probes": []}
        if found["works"]:
            rows.append(_outcome(directory / armer / "junit.xml", where, found))
        else:
            missing = _missing(found)
    if code or not rows:
        rows = rows or [Outcome(where)]
        rows[-1].failed.append(f"the run as a whole, exit code {code}" if code else missing)
    return rows


def _missing(found: dict[str, Any]) -> str:
    names = [each["name"] for each in found["probes"]
             if each["importance"] == "required" and not each["ok"]]  # fmt: skip
    return f"crtrace check: {', '.join(names) or 'no report'}"


def _outcome(junit: Path, where: str, found: dict[str, Any]) -> Outcome:
    probes = {probe["name"]: probe for probe in found["probes"]}
    release = probes["machine"]["found"].rpartition(", ")[2]
    release = ".".join(release.split(".")[:2])  # what follows is the distribution's
    coverage = probes.get("BPF coverage", {"found": "page faults"})["found"]
    outcome = Outcome(f"{release}, {where}", found["armer"], coverage)
    if junit.exists():
        _count(outcome, junit.read_text())
    else:
        outcome.failed.append("pytest as a whole: it left no report")
    return outcome


def _count(outcome: Outcome, report: str) -> None:
    """Take in a JUnit report of pytest."""
    for case in ET.fromstring(report).iter("testcase"):
        skipped = case.find("skipped")
        if case.find("failure") is not None or case.find("error") is not None:
            outcome.failed.append(f"{case.get('classname')}::{case.get('name')}")
        elif skipped is not None:
            outcome.skipped[skipped.get("message", "").removeprefix("cannot run here: ")] += 1
        else:
            outcome.passed += 1


def table(outcomes: Sequence[Outcome]) -> str:
    """The results as Markdown."""
    lines = [
        "| kernel | armer | BPF coverage | passed | skipped | failed |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    lines += [
        f"| {each.kernel} | {each.armer} | {each.coverage} | {each.passed} "
        f"| {each.skipped.total()} | {len(each.failed)} |"
        for each in outcomes
    ]
    notes = []
    for each in outcomes:
        reasons = "; ".join(f"{count} × {why}" for why, count in each.skipped.most_common())
        if reasons:
            notes.append(f"- {each.kernel}, {each.armer}, skipped: {reasons}")
        notes += [f"- {each.kernel}, {each.armer}, failed: {name}" for name in each.failed]
    return "\n".join([*lines, "", *notes, ""] if notes else [*lines, ""])
