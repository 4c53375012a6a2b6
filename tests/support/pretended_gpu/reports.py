"""Tests of a pretending process and their reports.

`python -m tests.support.pretended_gpu -m tests.support.pretended_gpu.reports ID...` runs tests and prints their reports
as JSON; `reports_of` reads those.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

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
        silence: seconds from one report to the next that are too long: the process is killed. How long all of them
            take depends on the machine and on what else it does.
    """
    reports: dict[str, list[pytest.TestReport]] = {item.nodeid: [] for item in items}
    config = items[0].config
    said = []
    with _started(command, silence) as (lines, errors):
        for line in lines:
            if line.startswith(MARK):
                data = json.loads(line.removeprefix(MARK))
                reports[data["nodeid"]].append(config.hook.pytest_report_from_serializable(config=config, data=data))
            else:
                said.append(line)
        errors.seek(0)
        text = ("".join(said) + errors.read())[-5000:]
    for item in items:
        if not (of_it := reports[item.nodeid]) or of_it[-1].when != "teardown":
            why = f"the pretending process ended, or was silent for {silence:g} s, before or in this test:\n{text}"
            of_it.append(pytest.TestReport(item.nodeid, item.location, {}, "failed", why, "call"))
    return reports


@contextmanager
def _started(command: Sequence[str], silence: float) -> Iterator[tuple[Iterator[str], Any]]:
    """A process's lines, until it ends or was silent for too long, and the file of its errors; with all it started."""
    environment = {key: value for key, value in os.environ.items() if key != "CUDA_VISIBLE_DEVICES"}
    with (
        tempfile.TemporaryFile("w+", errors="replace") as errors,
        subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            errors="replace",
            start_new_session=True,
        ) as process,
    ):

        def end() -> None:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)

        def lines() -> Iterator[str]:
            assert process.stdout is not None
            while True:
                timer = threading.Timer(silence, end)
                timer.start()
                try:
                    line = process.stdout.readline()
                finally:
                    timer.cancel()
                if not line:
                    return
                yield line

        try:
            yield lines(), errors
        finally:
            end()


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
