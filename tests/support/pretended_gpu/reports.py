"""Run in a pretending process with ids of tests as arguments: runs them and prints their reports as JSON."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[3]
REPORTS: pytest.StashKey[dict[str, list[dict[str, Any]]]] = pytest.StashKey()
MARK = "a report: "


class _Print:
    def pytest_configure(self, config: pytest.Config) -> None:
        self._config = config

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """One line of JSON for each phase of a test."""
        data = self._config.hook.pytest_report_to_serializable(config=self._config, report=report)
        print(f"\n{MARK}{json.dumps(data)}", file=sys.__stdout__, flush=True)


if __name__ == "__main__":
    options = ["-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-m", ""]
    sys.exit(pytest.main([*options, *sys.argv[1:]], [_Print()]))
