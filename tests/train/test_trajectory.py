"""Whole runs with a loss term by outputs of earlier weights: resumed, on several processes, and refused in a line."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import mlflow
import pytest

from tests.support.runs import RESNET, VIT, differing, ssam_scale, train_on_ranks, write_config

TERMS: dict[str, dict[str, Any]] = {
    "saf": {"kind": "saf", "weight": 2.0, "lag_epochs": 2, "start_epoch": 2},
    "mesa": {"kind": "mesa", "weight": 2.0, "decay": 0.7, "start_epoch": 1},
}
SAM = {"rho": 0.05, "direction": {"fraction": 0.5}, "mask": {"pattern": "depth"}}
PAIRS = [(kind, perturbation) for kind in TERMS for perturbation in (None, SAM)]
NAMES = [f"{kind}{' with SAM' if perturbation else ''}" for kind, perturbation in PAIRS]


def train(*arguments: str) -> None:
    assert ssam_scale("train", *arguments) == 0


@pytest.mark.parametrize(
    ("kind", "perturbation"),
    [pytest.param(*pair, id=name, marks=pytest.mark.slow) for pair, name in zip(PAIRS, NAMES, strict=True)],
)
def test_resuming_equals_never_having_stopped(
    kind: str, perturbation: Any, data: Path, home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mixed = {"mixup": 0.2, "cutmix": 1.0} if kind == "mesa" else {}
    config = write_config(
        home / "run.yaml",
        data,
        model={**RESNET, "drop_rate": 0.1},
        loss={"label_smoothing": 0.1, **mixed},
        perturbation=perturbation,
        trajectory=TERMS[kind],
        train={"epochs": 5, "accumulation": 2, "ema_decay": 0.9},
        tracking={"probe_every": 7},
    )
    checkpoints = home / "checkpoints"
    train("--config", str(config), "checkpoint.keep=4")
    shutil.move(checkpoints / "epoch_0005", home / "uninterrupted")
    shutil.rmtree(checkpoints / "epoch_0004")
    train("--config", str(config), "checkpoint.keep=4", "--resume", "auto")
    assert "resumed from" in capsys.readouterr().out
    assert differing(home / "uninterrupted", checkpoints / "epoch_0005") == []
    # In another folder of checkpoints, from where the outputs are not: beside the checkpoint that is gone on with.
    shutil.rmtree(checkpoints / "epoch_0005")
    moved = home / "moved"
    shutil.move(checkpoints, moved)
    train("--config", str(config), f"checkpoint.resume={moved / 'epoch_0003'}", f"checkpoint.directory={home / 'new'}")
    assert differing(home / "uninterrupted", home / "new/epoch_0005") == []
    client = mlflow.MlflowClient(f"sqlite:///{home}/mlflow.db")
    runs = client.search_runs([client.get_experiment_by_name("ssam_scale").experiment_id])
    assert {run.data.tags["method"] for run in runs} == {kind if perturbation is None else f"ssam-depth+{kind}"}
    assert all(run.data.tags["mask"] == ("depth rotate 0–1" if perturbation else "") for run in runs)
    assert all("overhead/vs_base_percent" in run.data.metrics for run in runs)
    assert all(run.data.metrics["probe/reference"] > 0.0 for run in runs if "probe/reference" in run.data.metrics)


@pytest.mark.slow
@pytest.mark.parametrize("kind", TERMS)
def test_several_processes_train_as_one_and_go_on_as_another_number(kind: str, data: Path, home: Path) -> None:
    """1e-5: steps in float32, apart by their rounding; and of the outputs some may be rounded otherwise to float16."""
    sam = {**SAM, "direction": {"fraction": 1.0}}  # a part of the batch would be a part of each process's
    config = write_config(
        home / "run.yaml", data, model=VIT, perturbation=sam, trajectory=TERMS[kind], train={"epochs": 4}
    )
    train("--config", str(config), f"checkpoint.directory={home / 'one'}")
    two = home / "two"
    train_on_ranks(2, config, "sharding.backend=fsdp2", f"checkpoint.directory={two}")
    assert differing(home / "one/epoch_0004", two / "epoch_0004", 1e-5) == []
    # What two processes have written is read by one.
    shutil.rmtree(two / "epoch_0004")
    train("--config", str(config), f"checkpoint.directory={two}", "--resume", "auto")
    assert differing(home / "one/epoch_0004", two / "epoch_0004", 1e-5) == []


@pytest.mark.slow
def test_averaged_statistics_of_batchnorm_are_one_for_all_processes(data: Path, home: Path) -> None:
    """So that a resumed run, to which the first process's are given, goes on as if it had not stopped."""
    config = write_config(home / "run.yaml", data, model=RESNET, trajectory=TERMS["mesa"], train={"epochs": 3})
    train_on_ranks(2, config, "checkpoint.keep=3")
    shutil.move(home / "checkpoints/epoch_0003", home / "uninterrupted")
    train_on_ranks(2, config, "--resume", "auto")
    assert differing(home / "uninterrupted", home / "checkpoints/epoch_0003") == []


@pytest.mark.parametrize("kind", TERMS)
def test_a_dry_run_writes_nothing(kind: str, data: Path, home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = write_config(home / "run.yaml", data, model=VIT, trajectory={**TERMS[kind]})
    before = sorted(home.rglob("*"))
    train("--config", str(config), "--dry-run", "train.epochs=3")
    assert f"dry run: {kind} vit_tiny" in capsys.readouterr().out
    assert sorted(home.rglob("*")) == before


def test_a_disk_that_is_too_small_is_told_in_the_first_second(
    data: Path, home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_config(home / "run.yaml", data, trajectory={"kind": "saf", "lag_epochs": 900, "start_epoch": 900})
    options = ("model.num_classes=10000000", "train.epochs=2000", "checkpoint.keep=900")
    assert ssam_scale("train", "--config", str(config), *options) == 2
    said = capsys.readouterr().err
    assert "trajectory.kind saf: " in said
    assert "(48 images × 10,000,000 classes × 2 bytes × 1801 epochs)" in said
    assert said.count("\n") == 1


def test_outputs_that_are_gone_are_told_before_anything_is_loaded(
    data: Path, home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    term = {"kind": "saf", "lag_epochs": 1, "start_epoch": 1}
    config = write_config(home / "run.yaml", data, model=VIT, trajectory=term, train={"epochs": 2})
    train("--config", str(config))
    shutil.rmtree(home / "checkpoints/epoch_0002")
    shutil.rmtree(home / "checkpoints/outputs")
    capsys.readouterr()
    assert ssam_scale("train", "--config", str(config), "--resume", "auto") == 2
    said = capsys.readouterr().err
    assert f"checkpoint {home}/checkpoints/epoch_0001: outputs of epoch 0 that process 0 wrote are not in " in said
    assert ssam_scale("train", "--config", str(config), "--resume", "auto", "trajectory=null") == 2
    assert "is of a saf run, this is a base run" in capsys.readouterr().err
