"""How commands speak."""

from __future__ import annotations

import sys

import pytest

from crtrace.cli.output import Bar


def test_a_bar_is_gone_after_an_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with pytest.raises(ValueError, match="damage"), Bar("reading") as bar:
        bar.update(1, 2)
        raise ValueError("damage")
    drawn, gone, after = capsys.readouterr().err.rpartition("\r\033[K")
    assert "reading" in drawn
    assert gone
    assert after == ""
