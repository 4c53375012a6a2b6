"""What holds for every test: threads, which GPUs are seen, which tiers run, how tests are shared among workers."""

from __future__ import annotations

import gc
import os
import random
from collections.abc import Iterator
from typing import Any

# The networks here are too small to gain from a second thread, and waiting threads take the cores from other processes.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pytest
import torch
from hypothesis import settings

from tests.support import gpus, patches, ranks, senders, workers

# No test depends on a wall-clock time (an example may be the one that compiles), and every run is the same run. Other
# examples are looked for with --hypothesis-profile=explore.
settings.register_profile("ssam_scale", deadline=None, derandomize=True)
settings.register_profile("explore", deadline=None)
settings.load_profile("ssam_scale")


def pytest_configure(config: pytest.Config) -> None:
    """Hide the GPUs before any test module could look for them."""
    if not gpus.selects_gpu_tests_only(config.option.markexpr):
        gpus.hide_gpus()


@pytest.fixture(autouse=True)
def _same_random_numbers() -> None:
    """Every test draws what it draws alone."""
    random.seed(0)
    np.random.seed(0)  # what libraries draw from
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _functions_of_torch_put_back() -> Iterator[None]:
    with patches.functional_put_back():
        yield


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip what needs a GPU where none is seen; leave out the tests that only `-m exhaustive` asks for."""
    missing = "needs a CUDA device"
    if gpus.are_hidden():
        missing = "GPUs are hidden from a run with other tests in it; run these by themselves: pytest -m gpu"
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason=missing))
    if "exhaustive" not in config.option.markexpr:
        left_out = [item for item in items if item.get_closest_marker("exhaustive")]
        items[:] = [item for item in items if not item.get_closest_marker("exhaustive")]
        config.hook.pytest_deselected(items=left_out)
    if any(item.get_closest_marker("slow") for item in items):
        ranks.preload_for_whole_runs()
    if hasattr(config, "workerinput"):
        workers.longest_first(items)


def pytest_collection_finish() -> None:
    """What was imported is looked through by no collection any more, each of which takes a third of a second for it."""
    gc.collect()
    gc.freeze()


def pytest_sessionfinish(session: pytest.Session) -> None:
    """End the ranks that served all tests, and what runs have left to send to stores that are gone."""
    ranks.end_pools()
    factory: pytest.TempPathFactory | None = getattr(session.config, "_tmp_path_factory", None)
    if factory is not None:
        senders.end_senders(factory.getbasetemp())


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """How many workers `-n auto` means; none where tests share one GPU."""
    return 0 if gpus.selects_gpu_tests_only(config.option.markexpr) else workers.AUTO


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Which worker gets what."""
    return workers.scheduling(config, log)
