"""`ssam-scale bench loader`, run as its users run it, on few photographs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ssam_scale.cli.main import main
from tests.support.images import make_image


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, draw = tmp_path_factory.mktemp("photographs"), np.random.default_rng(0)
    for number in range(40):
        path = folder / "ab"[number % 2] / f"{number}.jpg"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(make_image(draw, 60, 80)).save(path, quality=90)
    return folder


@pytest.mark.exhaustive  # the peers' readers compile and start for minutes
@pytest.mark.parametrize("cold", [False, True])
def test_every_reader_reads_all_of_it_in_each_round(photographs: Path, tmp_path: Path, cold: bool) -> None:
    command = [sys.executable, "-m", "ssam_scale", "bench", "loader", str(photographs), "--rounds", "2", "--json"]
    command += ["--resolution", "32", "--batch-size", "8", "--processes", "2", "--workers", "2", *["--cold"] * cold]
    done = subprocess.run([*command, "--record", str(tmp_path)], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)
    stored = {(row["reader"], row["stored"]) for row in rows}
    assert {("ssam_scale", "JPEG"), ("FFCV", "JPEG"), ("ssam_scale", "50% raw"), ("FFCV", "50% raw")} < stored
    assert {("ImageFolder", "files"), ("WebDataset", "tar archives")} < stored
    for row in rows:
        assert (row["photographs"], row["processes"], row["workers"], row["cold"]) == (40, 2, 2, cold)
        # 20 of each process; WebDataset's workers have 10 each, of which 8 are a full batch.
        assert row["batches"] == 2.0
        assert 0 < row["first_batch_seconds"] < row["start_seconds"]
        assert row["processor_seconds"] > 0
        assert row["memory"] > 0
        assert (row["over_ffcv"] is None) == (row["reader"] not in ("ssam_scale",))
        assert (row["over_image_folder"] is None) == (row["reader"] == "ImageFolder")
    (table,) = tmp_path.glob("loader_*.md")
    assert "ssam_scale, JPEG" in table.read_text()


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--batch-size", "41"], "40 photographs are fewer than a batch for each process, 41"),
        (["--processes", "3", "--batch-size", "16"], "40 photographs are fewer than a batch for each process, 48"),
        (["--jpeg-proportion", "1.5"], "--jpeg-proportion 1.5: a share is from 0 to 1"),
        (["--workers", "0"], "--workers"),
        (["--max-resolution", "2"], "--max-resolution"),
    ],
)
def test_what_cannot_be_measured_is_said_in_a_line(
    photographs: Path, capsys: pytest.CaptureFixture[str], options: list[str], complaint: str
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["bench", "loader", str(photographs), *options])
    assert ended.value.code == 2
    assert complaint in capsys.readouterr().err
