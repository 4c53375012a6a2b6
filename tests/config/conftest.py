"""A small valid configuration, as text with one key a line, for tests that change one thing in it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from ssam_scale.config import Config, load
from ssam_scale.errors import UserError

SMALL = """\
model:
  name: resnet18
  num_classes: 10
data:
  train: data/train.beton
  val: data/val.beton
  batch_size: 128
  crop_scale: [0.25, 1.0]
optimizer:
  lr: 0.1
perturbation:
  rho: 0.2
  mask:
    pattern: depth
    cut: [0.25, 0.75]
train:
  epochs: 3
"""


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
