"""No test disappears unnoticed: every skip gives its reason, and continuous integration, which
sets CI or CRTRACE_CI, accepts only that the machine truly lacks something.
"""

from __future__ import annotations

import os
from collections.abc import Generator

import pytest

ACCEPTED = "cannot run here:"
NO_REASON = ("", "unconditional skip", "Skipped")


def _in_ci() -> bool:
    return any(os.environ.get(name, "0") not in ("", "0", "false") for name in ("CI", "CRTRACE_CI"))


def _judge(report: pytest.TestReport | pytest.CollectReport) -> None:
    """Turn a skip into a failure unless its reason is good enough."""
    if not report.skipped or hasattr(report, "wasxfail") or not isinstance(report.longrepr, tuple):
        return
    reason = report.longrepr[2].removeprefix("Skipped: ").strip()
    if reason in NO_REASON:
        report.outcome, report.longrepr = "failed", "skipped without a reason"
    elif _in_ci() and not reason.startswith(ACCEPTED):
        report.outcome, report.longrepr = "failed", f"skipped in CI: {reason}"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Judge skips of tests and fixtures."""
    report = yield
    _judge(report)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    """Judge skips of whole modules."""
    report = yield
    _judge(report)
    return report


def pytest_configure(config: pytest.Config) -> None:
    """Make the marker known: root-only tests carry ``@pytest.mark.needs_root``."""
    config.addinivalue_line("markers", "needs_root: follows other processes, which only root may")


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip what needs root for everybody else."""
    if item.get_closest_marker("needs_root") and os.geteuid() != 0:
        pytest.skip("needs root")
