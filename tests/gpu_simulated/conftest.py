"""Everything in this folder runs in processes that pretend to have GPUs (`tests.support.pretended_gpu`).

A process is started for the first test of a module and runs all that were asked for of it, and of the other modules of
its number of GPUs (`DEVICES`, 1 unless the module says another) and its `WORLD`; here their reports are handed on.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from ssam_scale.sharding import World, join_world
from tests.support.pretended_gpu.reports import REPORTS, reports_of
from tests.support.processes import free_port

_HERE = Path(__file__).parent
_SILENCE = 600.0
"""Seconds without a word that are too long: the longest test takes 20 where nothing else runs."""

_PRETENDING = "SSAM_SCALE_PRETENDED_GPUS" in os.environ
if _PRETENDING:
    from ssam_scale.masks.kernels import gpu

    gpu.BLOCK = 1 << 16  # the interpreter takes a millisecond for a program, however large


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The first test of a process waits for all of them: each has its time limit in the process and none here."""
    for item in items:
        if not _PRETENDING and _process_of(item) is not None:
            item.add_marker(pytest.mark.timeout(0))


def pytest_runtest_protocol(item: pytest.Item, nextitem: pytest.Item | None) -> bool | None:
    """Hand on what the pretending process reported of this test."""
    if _PRETENDING or _process_of(item) is None:
        return None
    reports = item.session.stash.setdefault(REPORTS, {})
    if item.nodeid not in reports:
        reports.update(_run([other for other in item.session.items if _process_of(other) == _process_of(item)]))
    item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
    for report in reports[item.nodeid]:
        item.ihook.pytest_runtest_logreport(report=report)
    item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
    return True


def _process_of(item: pytest.Item) -> tuple[int, str] | None:
    """What a test's process is like; None outside of this folder."""
    module = item.getparent(pytest.Module)
    if module is None or item.path.parent != _HERE:
        return None
    return getattr(module.obj, "DEVICES", 1), getattr(module.obj, "WORLD", "one process")


def _run(items: list[pytest.Item]) -> dict[str, list[pytest.TestReport]]:
    """The reports of a process's tests by their ids."""
    process = _process_of(items[0])
    assert process is not None
    command = [sys.executable, "-m", "tests.support.pretended_gpu", "--devices", str(process[0]), "-m"]
    command += ["tests.support.pretended_gpu.reports", *(item.nodeid for item in items)]
    return reports_of(command, items, silence=_SILENCE)


@pytest.fixture(scope="session")
def world() -> Iterator[World]:
    """One process in a process group; one for all tests, because DeepSpeed keeps the groups that it has made."""
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {**alone, "MASTER_PORT": str(free_port())}.items():
            patch.setenv(name, value)
        with join_world() as world:
            yield world
