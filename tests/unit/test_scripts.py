"""What a clone is set up with, and what a wheel carries."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
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


@pytest.mark.parametrize(
    "name",
    ["setup", "crtrace", "demo", "test", "fuzz", "vm",
     "bench", "bench-pause", "bench-tree", "bench-chain"],
)  # fmt: skip
def test_scripts_are_programs(name: str) -> None:
    assert os.access(ROOT / "scripts" / name, os.X_OK)


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
