"""Data that the tests of this folder share."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.runs import write_data


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_data(folder)
    return folder
