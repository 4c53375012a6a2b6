from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ssam_scale.config.schema import Config
from tests.support.stored import storing
from tests.support.stores import put_store

PERTURBATIONS: dict[str, dict[str, Any] | None] = {
    "base": None,
    "sam": {"rho": 0.1},
    "depth": {"rho": 0.1, "mask": {"pattern": "depth", "cut": [0.25, 0.75]}},
    "element": {"rho": 0.1, "mask": {"pattern": "element", "sparsity": 0.8}},
}


@pytest.fixture
def uri(tmp_path: Path) -> str:
    """An empty SQLite store of the test's own."""
    return f"sqlite:///{put_store(tmp_path / 'mlflow.db')}"


@pytest.fixture
def config(uri: str, tmp_path: Path) -> Callable[..., Config]:
    """`config("sam", seed=1)`: a small valid configuration that tracks into `uri`."""

    def make(method: str = "base", *, seed: int = 0, rho: float | None = None, **tracking: Any) -> Config:
        perturbation = PERTURBATIONS[method]
        if perturbation is not None and rho is not None:
            perturbation = perturbation | {"rho": rho}
        return Config.model_validate(
            {
                "model": {"name": "resnet18", "num_classes": 10},
                "data": {"train": "train.beton", "val": "val.beton", "batch_size": 64, "resolution": 32},
                "optimizer": {"lr": 0.1},
                "perturbation": perturbation,
                "train": {"epochs": 2, "seed": seed},
                "checkpoint": {"directory": tmp_path / "checkpoints"},
                "tracking": {"uri": uri, **tracking},
            }
        )

    return make


@pytest.fixture
def finish(uri: str) -> Callable[..., str]:
    """`finish(config, top1=…, ms=…)` stores a run that ended like that; later calls are later runs."""
    return storing(uri)


@pytest.fixture
def child_environment() -> dict[str, str]:
    """For subprocesses: this checkout is importable, and nothing of an outer launcher shows through."""
    root = str(Path(__file__).resolve().parents[2])
    dropped = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    of_trackers = ("MLFLOW_", "WANDB_")
    kept = {key: value for key, value in os.environ.items() if key not in dropped and not key.startswith(of_trackers)}
    return kept | {"PYTHONPATH": os.pathsep.join([root, kept.get("PYTHONPATH", "")]).rstrip(os.pathsep)}
