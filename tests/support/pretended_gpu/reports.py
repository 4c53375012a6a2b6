"""Tests of a pretending process and their reports.

`python -m tests.support.pretended_gpu -m tests.support.pretended_gpu.reports ID...` runs tests and prints their reports
as JSON; `reports_of` reads those.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.support.processes import daemon

ROOT = Path(__file__).parents[3]
REPORTS: pytest.StashKey[dict[str, list[pytest.TestReport]]] = pytest.StashKey()
MARK = "a report: "


def reports_of(
    command: Sequence[str], items: Sequence[pytest.Item], *, silence: float
) -> dict[str, list[pytest.TestReport]]:
    """What a process reports of tests, by their ids; those that it ends without are reported as failed.

    Args:
        command: starts the process.
        items: the tests.
        silence: seconds without a word that are too long: the process is ended. How long all tests take depends on the
            machine and on what else it does.
    """
    reports: dict[str, list[pytest.TestReport]] = {item.nodeid: [] for item in items}
    config, said = items[0].config, []
    for line in _lines_of(["env", "-C", str(ROOT), "-u", "CUDA_VISIBLE_DEVICES", *command], silence):
        if line.startswith(MARK):
            data = json.loads(line.removeprefix(MARK))
            reports[data["nodeid"]].append(config.hook.pytest_report_from_serializable(config=config, data=data))
        else:
            said.append(line)
    text = "\n".join(said)[-5000:]
    for item in items:
        if not (of_it := reports[item.nodeid]) or of_it[-1].when != "teardown":
            why = f"the pretending process ended, or was silent for {silence:g} s, before or in this test:\n{text}"
            of_it.append(pytest.TestReport(item.nodeid, item.location, {}, "failed", why, "call"))
    return reports


def _lines_of(command: Sequence[str], silence: float) -> list[str]:
    """What a process has said when it ends, or has been silent for too long."""
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        with daemon(command, log) as process:
            size, since = 0, time.monotonic()
            while process.poll() is None and time.monotonic() - since < silence:
                time.sleep(0.2)
                if log.stat().st_size != size:
                    size, since = log.stat().st_size, time.monotonic()
        return log.read_text(errors="replace").splitlines()


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
