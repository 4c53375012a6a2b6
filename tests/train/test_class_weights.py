"""`loss.class_weights: balanced`: what it comes to on the training images, and that a run is that of these numbers."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from ssam_scale.config.load import load
from ssam_scale.data import open_images
from ssam_scale.data.loaders import draws
from ssam_scale.train.checkpoint.files import read_state
from ssam_scale.train.class_weights import balanced
from tests.support.runs import CLASSES, VIT, differing, ssam_scale, train_on_ranks, write_config
from tests.support.tracked import client

SUBSET = 30  # of 48 images, so that the classes have not as many


@pytest.fixture
def config(data: Path, home: Path) -> Path:
    loss = {"class_weights": "balanced", "mixup": 0.2}
    path = write_config(home / "run.yaml", data, model=VIT, loss=loss, train={"epochs": 1})
    values = yaml.safe_load(path.read_text())
    values["data"]["subset"] = SUBSET
    path.write_text(yaml.safe_dump(values))
    return path


def counts_of(data: Path) -> list[int]:
    labels = open_images(data / "train.beton").labels
    return [int((labels[draws(len(labels), SUBSET)[0]] == label).sum()) for label in range(CLASSES)]


def test_a_class_weighs_as_much_as_any_other(config: Path, data: Path) -> None:
    loaded = load(config)
    found = balanced(loaded, open_images(loaded.data.train))
    assert found is not None
    assert list(found.images) == counts_of(data)
    assert len(set(found.images)) > 1
    # n / (classes · count): each class's images together weigh n / classes.
    assert np.multiply(found.weights, found.images) == pytest.approx([SUBSET / CLASSES] * CLASSES)
    assert balanced(load(config, ["loss.class_weights=[1, 2, 3, 4]"]), open_images(loaded.data.train)) is None


def test_it_is_recorded_as_given_and_as_the_numbers(
    config: Path, data: Path, home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ssam_scale("train", "--config", config) == 0
    counts = counts_of(data)
    weights = [SUBSET / (CLASSES * count) for count in counts]
    assert f"loss.class_weights balanced: from {min(weights):.4g} (" in capsys.readouterr().out
    run_id = json.loads((home / "checkpoints/result.json").read_text())["run_id"]
    run = client(home).get_run(run_id)
    assert run.data.params["loss.class_weights"] == "balanced"
    table = home / "mlartifacts/ssam_scale" / run_id / "artifacts/class_weights.csv"
    rows: list[dict[str, Any]] = list(csv.DictReader(table.read_text().splitlines()))
    assert [float(row["weight"]) for row in rows] == weights
    assert [int(row["images"]) for row in rows] == counts
    # Whoever takes up a checkpoint without the images knows the loss.
    assert read_state(home / "checkpoints/epoch_0001")["config"]["loss"]["class_weights"] == weights


@pytest.mark.slow
def test_a_run_is_that_of_the_numbers_for_any_number_of_processes(config: Path, data: Path, home: Path) -> None:
    numbers = f"loss.class_weights={[SUBSET / (CLASSES * count) for count in counts_of(data)]}"
    assert ssam_scale("train", "--config", config, f"checkpoint.directory={home}/balanced") == 0
    assert ssam_scale("train", "--config", config, f"checkpoint.directory={home}/numbers", numbers) == 0
    assert differing(home / "balanced/epoch_0001", home / "numbers/epoch_0001") == []
    train_on_ranks(2, config, f"checkpoint.directory={home}/two")
    # The same images in each step, whose gradients are summed in another order.
    assert differing(home / "balanced/epoch_0001", home / "two/epoch_0001", 2e-6) == []
    resume = (f"checkpoint.resume={home}/balanced/epoch_0001", f"checkpoint.directory={home}/on", "train.epochs=2")
    assert ssam_scale("train", "--config", config, *resume) == 0


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["model.num_classes=6"], "train.beton has no image of class 4, 5, of model.num_classes 6, whose weight would"),
        (["data.subset=12", "model.num_classes=12"], "data.subset 12 has no image of class "),
        (["model.num_classes=3"], "label 3 is outside the model's 3 classes; set model.num_classes to 4 or more"),
        (
            ["loss.class_weights=balance"],
            "loss.class_weights: must be a list of numbers from 0 to 1e+06, one for ",
        ),
        (["loss.class_weights=[1, x]"], "loss.class_weights: must be a list of numbers from 0 to 1e+06, one for "),
        (["loss.class_weights=[1, 2]"], "loss.class_weights has 2 numbers, and model.num_classes is 4"),
    ],
)
@pytest.mark.parametrize("dry", [[], ["--dry-run"]], ids=["run", "dry run"])
def test_what_cannot_be_meant_is_a_line_before_any_work(
    overrides: list[str], said: str, dry: list[str], config: Path, home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = [] if "data.subset=12" in overrides else ["data.subset=null"]
    assert ssam_scale("train", "--config", config, *own, *overrides, *dry) == 2
    error = capsys.readouterr().err
    assert said in error
    assert len(error.strip().splitlines()) == 1
    assert not (home / "checkpoints").exists()


def test_what_it_costs_needs_no_images(config: Path, home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["--config", config, f"data.train={home}/none.beton", "--gpus", "2", "data.batch_size=4"]
    assert ssam_scale("cost", *given, "train.epochs=null", "train.max_steps=100") == 0
    assert "base" in capsys.readouterr().out
