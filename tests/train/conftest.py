"""Data that the tests of this folder share."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from ssam_scale.tracking.store import open_store
from tests.support.runs import write_data


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_data(folder)
    return folder


@pytest.fixture(scope="session")
def _empty_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("store") / "empty.db"
    open_store(f"sqlite:///{path}", create=True)
    return path


@pytest.fixture
def home(_empty_database: Path, tmp_path: Path) -> Path:
    """A folder for a run, with the tables of its tracking store: making them takes seconds."""
    shutil.copy(_empty_database, tmp_path / "mlflow.db")
    return tmp_path
