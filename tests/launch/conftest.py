"""Copies of the working tree to launch from: in another folder, with a space in its path, with the same .venv."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.checkout import ROOT, copy_tree


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A copy of the working tree that uses this checkout's environment."""
    target = copy_tree(tmp_path / "a copy")
    (target / ".venv").symlink_to(ROOT / ".venv")
    return target
