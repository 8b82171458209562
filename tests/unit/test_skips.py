"""Skips must give a reason, and in continuous integration a good one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

pytest_plugins = ["pytester"]

CONFTEST = Path(__file__).resolve().parents[1] / "conftest.py"
WAYS = (
    "def test_it(): pytest.skip({!r})",
    "pytest.skip({!r}, allow_module_level=True)",
    "@pytest.mark.skipif(True, reason={!r})\ndef test_it(): pass",
    "@pytest.fixture\ndef it(): pytest.skip({!r})\ndef test_it(it): pass",
)
Run = Callable[..., dict[str, int]]


@pytest.fixture
def run(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run test modules under the project's conftest with these variables, and count outcomes."""

    def run(*bodies: str, **variables: str) -> dict[str, int]:
        for name in ("CI", "CRTRACE_CI"):
            monkeypatch.delenv(name, raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        pytester.makeconftest(CONFTEST.read_text())
        modules = {f"test_{i}": f"import pytest\n{body}" for i, body in enumerate(bodies)}
        pytester.makepyfile(**modules)
        # A module that fails as a whole must not end the run before the others.
        return pytester.runpytest_inprocess("--continue-on-collection-errors").parseoutcomes()

    return run


def every_way(reason: str) -> list[str]:
    """Modules that skip with this reason in each way that pytest has."""
    return [body.format(reason) for body in WAYS]


def failed(outcomes: dict[str, int]) -> bool:
    """Every test failed; what fails before a test's own code, pytest calls an error."""
    return sum(outcomes.values()) == outcomes.get("failed", 0) + outcomes.get("errors", 0) > 0


def test_a_skip_with_a_reason_is_a_skip(run: Run) -> None:
    assert run(*every_way("no gdb")) == {"skipped": len(WAYS)}


def test_empty_and_false_variables_mean_no_ci(run: Run) -> None:
    assert run(*every_way("no gdb"), CI="false", CRTRACE_CI="") == {"skipped": len(WAYS)}


def test_a_skip_without_a_reason_fails(run: Run) -> None:
    assert failed(run(*every_way("")))


@pytest.mark.parametrize("variable", ["CI", "CRTRACE_CI"])
def test_a_skip_fails_in_ci(run: Run, variable: str) -> None:
    outcomes = run(*every_way("no gdb"), **{variable: "1"})
    assert failed(outcomes), outcomes
    assert sum(outcomes.values()) == len(WAYS)


def test_what_the_machine_lacks_may_be_skipped_in_ci(run: Run) -> None:
    assert run(*every_way("cannot run here: no hugetlb pages"), CI="true") == {"skipped": len(WAYS)}


def test_a_bare_skip_mark_has_no_reason(run: Run) -> None:
    assert failed(run("@pytest.mark.skip\ndef test_it(): pass"))


def test_expected_failures_are_no_skips(run: Run) -> None:
    body = "@pytest.mark.xfail(reason='known')\ndef test_it(): assert False"
    assert run(body, CI="1") == {"xfailed": 1}


def test_root_is_needed_where_marked(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    body = "@pytest.mark.needs_root\ndef test_it(): pass"
    monkeypatch.setattr("os.geteuid", lambda: 0)
    assert run(body) == {"passed": 1}
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    assert run(body) == {"skipped": 1}
    assert failed(run(body, CI="1"))
