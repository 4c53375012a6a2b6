"""A run that the tests of a file share."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support.runs import ssam_scale
from tests.support.short_run import ShortRun, short_run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> ShortRun:
    return short_run(tmp_path_factory.mktemp("run"))


@pytest.fixture
def evaluated(capsys: pytest.CaptureFixture[str]) -> Callable[..., dict[str, Any]]:
    """What `ssam-scale evaluate … --json` prints."""

    def evaluated(*arguments: str | Path) -> dict[str, Any]:
        capsys.readouterr()
        assert ssam_scale("evaluate", *arguments, "--json") == 0
        found: dict[str, Any] = json.loads(capsys.readouterr().out)
        return found

    return evaluated
