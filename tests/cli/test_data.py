"""The commands: what they print, and Fashion-MNIST from its package's files."""

from __future__ import annotations

import gzip
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from ssam_scale.cli.data import app
from ssam_scale.data import prepare_fashion_mnist, verify
from ssam_scale.data.fashion_mnist import CLASSES, FOLDER
from ssam_scale.errors import UserError
from tests.support.images import make_image_folder


def run(*arguments: Any) -> str:
    result = CliRunner(env={"COLUMNS": "200"}).invoke(
        app, [str(argument) for argument in arguments], catch_exceptions=False
    )
    assert result.exit_code == 0, result.output
    return result.stdout


def run_in_vain(*arguments: Any) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert isinstance(result.exception, UserError)
    return str(result.exception)


def test_write_and_check(tmp_path: Path) -> None:
    make_image_folder(tmp_path / "[images]", classes=3, per_class=4, size_range=(30, 40))
    out = tmp_path / "[x].beton"
    assert f"Wrote {out}: 12 images, 3 classes" in run("write", tmp_path / "[images]", out, "--workers", 1)
    report = run("check", out)
    assert "12 images" in report
    assert "3 classes" in report
    assert "every byte as it was written" in report
    fewer = make_image_folder(tmp_path / "val" / "other", classes=1, per_class=2, size_range=(30, 40))[0].parent
    fewer.rename(tmp_path / "val" / "n00000001")
    (tmp_path / "val" / "other").rmdir()
    assert "2 images, 3 classes" in run("write", tmp_path / "val", tmp_path / "v.beton", "--classes-of", out)
    out.write_bytes(out.read_bytes()[:-100])
    assert "cut short" in run_in_vain("check", out)


def test_bad_images_are_listed(tmp_path: Path) -> None:
    victim = make_image_folder(tmp_path / "images", classes=1, per_class=3, size_range=(30, 40))[1]
    victim.write_bytes(victim.read_bytes()[:300])
    assert str(victim) in run_in_vain("write", tmp_path / "images", tmp_path / "x.beton")
    report = run("write", tmp_path / "images", tmp_path / "x.beton", "--skip-bad")
    assert f"skipped {victim}: " in report
    assert "2 images, 1 classes" in report
    assert "1 damaged images left out" in report


def write_idx(path: Path, array: np.ndarray) -> None:
    header = bytes((0, 0, 8, array.ndim)) + np.array(array.shape, ">u4").tobytes()
    path.write_bytes(gzip.compress(header + array.astype(np.uint8).tobytes()))


@pytest.fixture
def idx_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "idx"
    folder.mkdir()
    generator = np.random.default_rng(0)
    for prefix, count in (("train", 30), ("t10k", 10)):
        write_idx(folder / f"{prefix}-images-idx3-ubyte.gz", generator.integers(0, 256, (count, 28, 28)))
        write_idx(folder / f"{prefix}-labels-idx1-ubyte.gz", np.arange(count) % 10)
    return folder


def test_fashion_mnist_is_written_once(idx_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "data" / "fashion"
    assert "Wrote" in run("fashion-mnist", out, "--idx-folder", idx_folder)
    beton = verify(out / "train.beton")
    assert beton.images == beton.jpegs == 30
    assert beton.labels.tolist() == [*range(10)] * 3
    assert set(beton.pixels.tolist()) == {28 * 28}
    assert beton.sidecar is not None
    assert beton.sidecar.classes == CLASSES
    assert verify(out / "val.beton").images == 10
    times = [path.stat().st_mtime_ns for path in sorted(out.iterdir())]
    assert "Up to date" in run("fashion-mnist", out, "--idx-folder", idx_folder)
    assert [path.stat().st_mtime_ns for path in sorted(out.iterdir())] == times
    assert "Wrote" in run("fashion-mnist", out, "--idx-folder", idx_folder, "--size", 28, "--limit", 5)
    assert verify(out / "train.beton").images == 5


def test_a_half_copied_file_is_written_again(idx_folder: Path, tmp_path: Path) -> None:
    first = prepare_fashion_mnist(tmp_path, idx_folder=idx_folder, progress=False)
    whole = first.val.read_bytes()
    first.val.write_bytes(whole[:-1])
    assert prepare_fashion_mnist(tmp_path, idx_folder=idx_folder, progress=False).written
    assert first.val.read_bytes() == whole


def test_fashion_mnist_without_its_package(idx_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="apt-get install dataset-fashion-mnist"):
        prepare_fashion_mnist(tmp_path / "out", idx_folder=tmp_path / "nowhere", progress=False)
    (idx_folder / "train-labels-idx1-ubyte.gz").write_bytes(b"nonsense")
    with pytest.raises(UserError, match="reinstall dataset-fashion-mnist"):
        prepare_fashion_mnist(tmp_path / "out", idx_folder=idx_folder, progress=False)
    write_idx(idx_folder / "train-labels-idx1-ubyte.gz", np.arange(29))
    with pytest.raises(UserError, match="30 images but 29 labels"):
        prepare_fashion_mnist(tmp_path / "out", idx_folder=idx_folder, progress=False)


@pytest.mark.slow
@pytest.mark.skipif(not FOLDER.is_dir(), reason="needs Debian's dataset-fashion-mnist")
def test_the_real_fashion_mnist(tmp_path: Path) -> None:
    prepared = prepare_fashion_mnist(tmp_path, progress=False)
    train, val = verify(prepared.train), verify(prepared.val)
    assert np.bincount(train.labels).tolist() == [6000] * 10
    assert np.bincount(val.labels).tolist() == [1000] * 10


def test_importing_the_package_brings_in_neither_ffcv_nor_numba() -> None:
    code = (
        "import sys, torch; before = torch.get_num_threads(); import ssam_scale.data, ssam_scale.cli.data\n"
        "print(before == torch.get_num_threads(), {'ffcv', 'numba'} & set(sys.modules))"
    )
    root = str(Path(__file__).parents[2])
    environment = {**os.environ, "PYTHONPATH": root}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.strip() == "True set()"
