"""What a short run of `tests.support.runs` has tracked and saved."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import mlflow
from safetensors.torch import load_file
from torch import Tensor

from tests.support.runs import ssam_scale, write_config

STEPS = 4  # in an epoch: 48 images in batches of 12


def train(home: Path, data: Path, mask: dict[str, Any], *, epochs: int = 2, **perturbation: Any) -> Any:
    """The tracked run of a training with this mask."""
    perturbation = {"rho": 0.05, "mask": mask, **perturbation}
    config = write_config(home / "run.yaml", data, perturbation=perturbation, train={"epochs": epochs})
    assert ssam_scale("train", "--config", config) == 0
    (found,) = client(home).search_runs([client(home).get_experiment_by_name("ssam_scale").experiment_id])
    return found


def client(home: Path) -> mlflow.MlflowClient:
    return mlflow.MlflowClient(f"sqlite:///{home}/mlflow.db")


def history(home: Path, run: Any, metric: str) -> dict[int, float]:
    """Values by step, without those of a window of steps."""
    return {m.step: m.value for m in client(home).get_metric_history(run.info.run_id, metric)}


def artifact(home: Path, run: Any, name: str) -> Path:
    return home / "mlartifacts/ssam_scale" / run.info.run_id / "artifacts/mask" / name


def table(home: Path, run: Any) -> tuple[list[int], dict[str, list[float]]]:
    """Steps, and densities by parameter."""
    with artifact(home, run, "density.csv").open() as file:
        header, *rows = list(csv.reader(file))
    return [int(step) for step in header[2:]], {row[0]: [float(x) for x in row[2:]] for row in rows}


def saved(home: Path, epoch: int = 2) -> dict[str, Tensor]:
    return load_file(home / f"checkpoints/epoch_{epoch:04d}/sparse.safetensors")
