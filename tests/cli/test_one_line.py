"""What no command foresees is a line on standard error, and no traceback."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ssam_scale.cli import main as cli
from ssam_scale.costs.profile import load_times
from ssam_scale.errors import UserError


def too_deep(n: int = 0) -> int:
    return too_deep(n + 1)


@pytest.mark.parametrize(
    ("fails", "said"),
    [
        (lambda: bytearray(2**62), "this machine's memory does not suffice for what was asked"),
        (too_deep, "something that was given is nested too deeply"),
        (lambda: b"\xff".decode(), "not text that can be read or written: 'utf-8' codec can't decode byte 0xff"),
        (lambda: "\ud800".encode(), "not text that can be read or written: 'utf-8' codec can't encode"),
    ],
    ids=["memory", "recursion", "decoding", "encoding"],
)
def test_it_is_a_line(
    fails: Callable[[], Any], said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cli, "app", lambda args: fails())
    with pytest.raises(SystemExit) as end:
        cli.main(["list", "masks"])
    assert end.value.code == 1
    error = capsys.readouterr().err
    assert error.startswith(f"ssam-scale: error: {said}")
    assert error.count("\n") == 1


def test_a_nested_file_of_times_is_a_line(tmp_path: Path) -> None:
    path = tmp_path / "times.json"
    path.write_text("[" * 100_000)
    with pytest.raises(UserError, match="not a file that --save-times wrote"):
        load_times(path)
