"""What holds for every test."""

import os
from collections.abc import Iterable

# The networks here are too small to gain from a second thread, and waiting threads take the cores from other processes.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from hypothesis import settings

# No test depends on a wall-clock time: an example may be the one that compiles.
settings.register_profile("ssam_scale", deadline=None)
settings.load_profile("ssam_scale")


def pytest_collection_modifyitems(items: Iterable[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
