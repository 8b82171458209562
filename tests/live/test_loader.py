"""How the BPF programs come to be loaded, where that is not as easy as usual."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from crtrace.errors import FeatureMissing
from crtrace.track import loader
from tests.live.runner import TIMEOUT, fake_bcc, run


def test_a_compiler_that_hangs_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hanging = fake_bcc(tmp_path, "import time; time.sleep(1000)")
    monkeypatch.setenv("PYTHONPATH", hanging["PYTHONPATH"])
    monkeypatch.setattr(loader, "PATIENCE", 0.5)
    with pytest.raises(FeatureMissing, match="not come to an end"):
        loader.compiled()


def test_nothing_is_imported_from_the_current_directory(tmp_path: Path) -> None:
    (tmp_path / "bcc.py").write_text(f"open({str(tmp_path / 'imported')!r}, 'w')")
    run("check", cwd=tmp_path).expect(0)
    assert not (tmp_path / "imported").exists()


def test_the_limit_of_locked_memory_is_raised_for_bpf() -> None:
    script = """if True:
        import resource
        from crtrace.track.loader import Loading
        with Loading(regions=64).result():
            soft, hard = resource.getrlimit(resource.RLIMIT_MEMLOCK)
            assert soft == hard, (soft, hard)
        """
    command = [sys.executable, "-P", "-c", script]
    subprocess.run(["prlimit", "--memlock=65536:", *command], check=True, timeout=TIMEOUT)
