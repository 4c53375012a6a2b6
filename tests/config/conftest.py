"""Reading the small configuration, changed, and what is said about it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from ssam_scale.config.load import load
from ssam_scale.config.schema import Config
from ssam_scale.errors import UserError
from tests.support.configs import SMALL


@pytest.fixture
def small(tmp_path: Path) -> Path:
    path = tmp_path / "small.yaml"
    path.write_text(SMALL)
    return path


@pytest.fixture
def read(tmp_path: Path) -> Callable[..., Config]:
    """Load a text as if it were a file."""

    def read(text: str, overrides: Sequence[str] = ()) -> Config:
        path = tmp_path / "given.yaml"
        path.write_text(text)
        return load(path, overrides)

    return read


@pytest.fixture
def complaint(read: Callable[..., Config], tmp_path: Path) -> Callable[..., str]:
    """The message of the error that a text and overrides lead to, with file names shortened."""

    def complaint(text: str, overrides: Sequence[str] = ()) -> str:
        with pytest.raises(UserError) as caught:
            read(text, overrides)
        return str(caught.value).replace(f"{tmp_path}/", "")

    return complaint
