"""Everything in this folder runs in a process of its own that pretends to have GPUs (`tests.support.pretended_gpu`).

The process is started for the first test of a file and runs all of the file's tests that were asked for; here their
reports are handed on. `DEVICES` of a test module says how many GPUs there are; one unless it says so.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest

from tests.support.pretended_gpu.reports import MARK, REPORTS, ROOT

_PRETENDING = "SSAM_SCALE_PRETENDED_GPUS" in os.environ


def pytest_runtest_protocol(item: pytest.Item, nextitem: pytest.Item | None) -> bool | None:
    """Hand on what the pretending process reported of this test."""
    if _PRETENDING:
        return None
    reports = item.session.stash.setdefault(REPORTS, {})
    if item.nodeid not in reports:
        reports.update(_run([other for other in item.session.items if other.path == item.path]))
    item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
    for data in reports[item.nodeid]:
        report = item.config.hook.pytest_report_from_serializable(config=item.config, data=data)
        item.ihook.pytest_runtest_logreport(report=report)
    item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
    return True


def _run(items: list[pytest.Item]) -> dict[str, list[dict[str, Any]]]:
    """The reports of a file's tests by their ids."""
    devices = getattr(items[0].getparent(pytest.Module).obj, "DEVICES", 1)  # type: ignore[union-attr]
    command = [sys.executable, "-m", "tests.support.pretended_gpu", "--devices", str(devices), "-m"]
    command += ["tests.support.pretended_gpu.reports", *(item.nodeid for item in items)]
    environment = {key: value for key, value in os.environ.items() if key != "CUDA_VISIBLE_DEVICES"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=800)
    reports: dict[str, list[dict[str, Any]]] = {}
    for line in done.stdout.splitlines():
        if line.startswith(MARK):
            data = json.loads(line.removeprefix(MARK))
            reports.setdefault(data["nodeid"], []).append(data)
    missing = [item.nodeid for item in items if item.nodeid not in reports]
    if missing:
        pytest.fail(f"the pretending process ended before {missing[0]}:\n{(done.stdout + done.stderr)[-5000:]}")
    return reports
