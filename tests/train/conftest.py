"""Data that the tests of this folder share."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.runs import write_data
from tests.support.stores import put_store


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_data(folder)
    return folder


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A folder for a run, with the tables of its tracking store."""
    return put_store(tmp_path / "mlflow.db").parent
