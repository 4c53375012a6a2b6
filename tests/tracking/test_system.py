"""What a machine does, recorded beside what a run measures."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping

import pytest

from ssam_scale.config.schema import Config
from ssam_scale.tracking import system
from ssam_scale.tracking.run import open_run
from ssam_scale.tracking.store import open_store
from ssam_scale.tracking.system import SystemMonitor, watched_for


@pytest.fixture(autouse=True)
def _often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(system, "EVERY_S", 0.02)


def test_processor_memory_disk_and_network_at_steps_since_the_beginning() -> None:
    seen, enough = [], threading.Event()

    def log(metrics: Mapping[str, float], step: int) -> None:
        seen.append((metrics, step))
        if len(seen) > 1:
            enough.set()

    with SystemMonitor(log, time.time() - 1000.0, "node07"):
        assert enough.wait(60)
    metrics, step = seen[0]
    assert {
        f"system/node07/{name}" for name in ("cpu_utilization_percentage", "disk_usage_percentage")
    } < metrics.keys()
    assert step >= 1000.0 / 0.02  # a run that is resumed goes on, instead of writing over what it has


def test_what_cannot_be_read_is_a_warning(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def refused() -> list[object]:
        raise PermissionError("/proc/diskstats")

    monkeypatch.setattr(system, "_monitors", refused)
    with caplog.at_level(logging.WARNING), SystemMonitor(lambda metrics, step: None, 0.0) as monitor:
        monitor._thread.join(60)
    assert "no longer recorded: PermissionError: /proc/diskstats" in caplog.text


def test_another_machine_records_into_the_one_run(config: Callable[..., Config], uri: str) -> None:
    with open_run(config("sam"), enabled=True) as run:
        assert run.id is not None
        with run.watch_machine("node00"), watched_for(uri, run.id, "node01"):
            until = time.monotonic() + 60
            names: set[str] = set()
            while not {"node00", "node01"} <= names and time.monotonic() < until:
                time.sleep(0.05)
                found = open_store(uri, create=False).get_run(run.id).data.metrics
                names = {name.split("/")[1] for name in found if name.startswith("system/")}
    assert names == {"node00", "node01"}


def test_a_store_that_does_not_answer_there_is_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    with watched_for("http://127.0.0.1:9", "0" * 32, "node01"):
        pass
    assert "node01 is not recorded" in caplog.text
