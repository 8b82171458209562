"""What a clone is set up with, and what a wheel carries."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.needs_root
@pytest.mark.parametrize("kind", ["run", "demo", "test"])
def test_setup_has_nothing_to_say_when_nothing_is_to_do(kind: str) -> None:
    done = subprocess.run([ROOT / "scripts/setup", kind], capture_output=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")


def test_setup_names_packages_and_does_nothing() -> None:
    def named(*kind: str) -> list[str]:
        return subprocess.check_output(
            [ROOT / "scripts/setup", "packages", *kind], text=True, cwd="/"
        ).split()

    assert "python3-bpfcc" in named() == named("run")
    assert set(named("run")) < set(named("demo")) < set(named("test")) < set(named("vm"))


def test_setup_refuses_a_kind_that_it_does_not_know() -> None:
    done = subprocess.run(
        [ROOT / "scripts/setup", "everything"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "usage" in done.stderr


PROGRAMS = sorted(path.name for path in (ROOT / "scripts").iterdir() if not path.suffix)


def test_scripts_are_programs() -> None:
    assert {"setup", "crtrace", "demo", "test", "fuzz", "vm", "bench"} < set(PROGRAMS)
    for name in set(PROGRAMS) - {"vm_guest", "__pycache__"}:
        assert os.access(ROOT / "scripts" / name, os.X_OK), name


@pytest.fixture
def everybodys() -> Iterator[Path]:
    """A directory that others than root can enter, unlike ``tmp_path``."""
    with tempfile.TemporaryDirectory(dir="/var/tmp") as path:
        Path(path).chmod(0o755)
        yield Path(path)


@pytest.mark.needs_root
def test_what_is_for_us_survives_sudo(everybodys: Path) -> None:
    """Which clears the environment."""
    sudo = everybodys / "sudo"
    sudo.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    sudo.chmod(0o755)
    text = (ROOT / "scripts/as_root.sh").read_text() + 'as_root program "an argument"'
    as_nobody = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"]
    for environment, expected in (
        ({}, ["--", "program", "an argument"]),
        (
            {"CRTRACE_ARMER": "compare", "HOME": "/", "https_proxy": "x"},
            ["--preserve-env=CRTRACE_ARMER,https_proxy", "--", "program", "an argument"],
        ),
    ):
        done = subprocess.run(
            [*as_nobody, "bash", "-euo", "pipefail", "-c", text],
            env={"PATH": f"{everybodys}:/usr/bin:/bin", **environment},
            cwd="/", capture_output=True, text=True, check=True,
        )  # fmt: skip
        assert done.stdout.splitlines() == expected


def test_help_needs_no_root() -> None:
    text = (ROOT / "scripts/as_root.sh").read_text() + 'asks_for_help "$@" && echo yes || echo no'
    for words, expected in (
        (["watch", "-h"], "yes"), (["--help"], "yes"),
        (["run", "--", "x", "--help"], "no"), ([], "no"),
    ):  # fmt: skip
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", text, "bash", *words],
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        assert done.stdout.strip() == expected


def test_a_wheel_carries_the_bpf_sources_and_the_format(tmp_path: Path) -> None:
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", tmp_path],
        cwd=ROOT,
        capture_output=True,
        check=True,
    )
    (wheel,) = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {"crtrace/bpf/track.c", "crtrace/bpf/track.h", "crtrace/image/FORMAT.md"} <= names
