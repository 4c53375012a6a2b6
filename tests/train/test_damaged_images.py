"""A run ends at a damaged image, or goes on without it and says so."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from ssam_scale.data import inspect
from ssam_scale.data.beton import Sidecar
from tests.support.runs import ssam_scale, write_config


def flip(path: Path, index: int) -> None:
    """A bit in the middle of an image."""
    beton = inspect(path)
    raw = bytearray(path.read_bytes())
    raw[int(beton.starts[index] + beton.sizes[index] // 2)] ^= 4
    path.write_bytes(raw)


def test_a_run_lists_what_it_has_left_out(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "train.beton"
    for source, target in ((data / "train.beton", path), (data / "train.beton.json", Sidecar.path(path))):
        shutil.copy2(source, target)
    for index in (2, 30):
        flip(path, index)
    config = write_config(tmp_path / "run.yaml", data, train={"epochs": 2})
    where = f"data.train={path}"
    assert ssam_scale("train", "--config", config, where) == 2
    assert "is damaged" in capsys.readouterr().err.replace("\n", " ")
    assert ssam_scale("train", "--config", config, where, "data.on_damaged=skip") == 0
    said = capsys.readouterr().out.replace("\n", " ")
    assert said.count("2 damaged images of") == 1
    assert "in the place of which the next ones were seen: 2, 30" in said
