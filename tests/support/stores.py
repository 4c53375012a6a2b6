"""An MLflow store with nothing in it: making its tables takes seconds, so it is made once and copied."""

from __future__ import annotations

import shutil
import tempfile
from functools import cache
from pathlib import Path

from ssam_scale.tracking.store import open_store


def put_store(path: Path) -> Path:
    """A SQLite store at `path`, which is returned, unless something is there already."""
    if not path.exists():
        path.write_bytes(_empty())
    return path


@cache
def _empty() -> bytes:
    folder = Path(tempfile.mkdtemp())
    try:
        open_store(f"sqlite:///{folder}/empty.db", create=True)
        return (folder / "empty.db").read_bytes()
    finally:
        shutil.rmtree(folder)
