"""`ssam-scale predict`: a folder of images, however they lie in it, to a table."""

from __future__ import annotations

import csv
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pyarrow import parquet

from ssam_scale.data.tree import images_of_tree
from ssam_scale.errors import UserError
from tests.support.images import make_image_folder
from tests.support.runs import ssam_scale
from tests.support.short_run import ShortRun

Evaluated = Callable[..., dict[str, Any]]


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.slow
def test_it_is_as_often_right_as_evaluate_says(run: ShortRun, evaluated: Evaluated, tmp_path: Path) -> None:
    table = tmp_path / "predicted.csv"
    assert ssam_scale("predict", run.checkpoint, run.data / "val", "-o", table, "--top", "4") == 0
    rows = rows_of(table)
    assert len(rows) == 20
    assert list(rows[0]) == ["file", *(f"{kind}_{n}" for n in range(1, 5) for kind in ("class", "probability"))]
    right = sum(row["file"].partition("/")[0] == row["class_1"] for row in rows)
    found = evaluated(run.checkpoint)
    assert 100.0 * right / len(rows) == found["top1"]
    confidence = 100.0 * sum(float(row["probability_1"]) for row in rows) / len(rows)
    assert confidence == pytest.approx(found["confidence"])
    for row in rows:
        probabilities = [float(row[f"probability_{n}"]) for n in range(1, 5)]
        assert probabilities == sorted(probabilities, reverse=True)
        assert sum(probabilities) == pytest.approx(1.0)
        assert {row[f"class_{n}"] for n in range(1, 5)} == {f"n{label:08d}" for label in range(4)}
    same = tmp_path / "predicted.parquet"
    assert ssam_scale("predict", run.checkpoint, run.data / "val", "-o", same) == 0
    found_there = parquet.read_table(same).to_pylist()
    assert [row["file"] for row in found_there] == [row["file"] for row in rows]
    assert [row["class_1"] for row in found_there] == [row["class_1"] for row in rows]
    assert [row["probability_1"] for row in found_there] == [float(row["probability_1"]) for row in rows]
    # Of a file, images are known by their numbers.
    assert ssam_scale("predict", run.checkpoint, run.data / "val.beton", "-o", table) == 0
    assert [row["class_1"] for row in rows_of(table)] == [row["class_1"] for row in rows]


@pytest.mark.slow
def test_what_cannot_be_read_is_listed(run: ShortRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "images"
    shutil.copytree(run.data / "val/n00000000", folder / "a b/deep")
    shutil.copy(run.data / "val/n00000001/n00000001_0.JPEG", folder / "loose.jpg")
    (folder / "notes.txt").write_text("no image")
    (folder / "a b/empty.png").touch()
    (folder / "cut.jpg").write_bytes((folder / "loose.jpg").read_bytes()[:300])
    (folder / "text.jpeg").write_text("no image")
    (folder / "nothing.png").symlink_to(folder / "gone.png")
    os.mkfifo(folder / "pipe.png")
    table = tmp_path / "out.csv"
    assert ssam_scale("predict", run.checkpoint, folder, "-o", table) == 0
    names = [row["file"] for row in rows_of(table)]
    assert names == [*(f"a b/deep/n00000000_{n}.JPEG" for n in range(5)), "loose.jpg"]
    error = capsys.readouterr().err
    assert "5 could not be read, and are left out:" in error
    for line in (
        "nothing.png: a link to nothing",
        "pipe.png: is no file",
        "a b/empty.png: empty file",
        "text.jpeg: text, and not an image",
        "cut.jpg: ",
    ):
        assert line in error
    # Those that can be are taken for what they are taken for beside nothing else.
    alone = tmp_path / "alone.csv"
    assert ssam_scale("predict", run.checkpoint, folder / "a b/deep", "-o", alone) == 0
    assert [row["class_1"] for row in rows_of(alone)] == [row["class_1"] for row in rows_of(table)][:5]
    assert ssam_scale("predict", run.checkpoint, folder / "loose.jpg", "-o", alone) == 0
    assert [row["file"] for row in rows_of(alone)] == ["loose.jpg"]


MISUSES: dict[str, tuple[list[str], str]] = {
    "another table": (
        ["{val}", "-o", "{out}/t.xlsx"],
        "t.xlsx: what kind of table is meant? Name it t.csv or .parquet",
    ),
    "no folder for it": (["{val}", "-o", "{out}/none/t.csv"], "there is no folder {out}/none"),
    "a folder in its place": (["{val}", "-o", "{out}/is.csv"], "is.csv: is a folder"),
    "a link in its place": (["{val}", "-o", "{out}/link.csv"], "link.csv: is a link"),
    "no images": (["{out}", "-o", "{out}/t.csv"], "no images in there"),
    "no such folder": (["{out}/none", "-o", "{out}/t.csv"], "none: no such file"),
    "nothing but damaged ones": (["{out}/bad", "-o", "{out}/t.csv"], "all of its 1 images are damaged"),
    "more classes than there are": (["{val}", "-o", "{out}/t.csv", "--top", "5"], "--top 5: "),
}


@pytest.mark.slow
@pytest.mark.parametrize("misuse", MISUSES)
def test_misuse_is_a_line_and_nothing_is_written(
    misuse: str, run: ShortRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "is.csv").mkdir()
    (tmp_path / "link.csv").symlink_to("/dev/null")
    if misuse == "nothing but damaged ones":
        (tmp_path / "bad").mkdir()
        (tmp_path / "bad/1.jpg").write_text("no image")
    before = sorted(tmp_path.rglob("*"))
    arguments, said = MISUSES[misuse]
    names = {"out": tmp_path, "val": run.data / "val"}
    assert ssam_scale("predict", run.checkpoint, *(argument.format(**names) for argument in arguments)) == 2
    error = capsys.readouterr().err
    assert said.format(**names) in error
    assert error.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before


def test_a_tree_has_each_image_once(tmp_path: Path) -> None:
    make_image_folder(tmp_path / "tree", 2, 2, (20, 24))
    (tmp_path / "tree/.hidden").mkdir()
    shutil.copy(tmp_path / "tree/n00000000/n00000000_0.JPEG", tmp_path / "tree/.hidden/x.jpg")
    (tmp_path / "tree/n00000001/circle").symlink_to(tmp_path / "tree")
    (tmp_path / "other").mkdir()
    shutil.copy(tmp_path / "tree/n00000000/n00000000_0.JPEG", tmp_path / "other/y.JPG")
    (tmp_path / "tree/linked").symlink_to(tmp_path / "other")
    images, closed = images_of_tree(tmp_path / "tree")
    assert closed == {}
    assert [images.named(image) for image in range(images.images)] == [
        "linked/y.JPG",
        *(f"n{label:08d}/n{label:08d}_{n}.JPEG" for label in range(2) for n in range(2)),
    ]
    assert images.labels.tolist() == [0] * 5
    with pytest.raises(UserError, match="no such folder of images"):
        images_of_tree(tmp_path / "none")


@pytest.mark.slow
def test_names_are_in_the_checkpoint(run: ShortRun, tmp_path: Path) -> None:
    state = json.loads((run.checkpoint / "state.json").read_text())
    assert state["classes"] == [f"n{label:08d}" for label in range(4)]
