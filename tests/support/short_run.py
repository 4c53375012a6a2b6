"""A short run that what comes after training is tried on."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from ssam_scale.tracking.store import open_store
from tests.support.runs import ssam_scale, write_config, write_data


@dataclass(frozen=True)
class ShortRun:
    """Three epochs of a small ResNet with averaged weights, and its data beside it.

    Attributes:
        data: with train/ and val/, 5 images of each of 4 classes, and the .beton files of both.
        home: of the configuration, the checkpoints and the store.
        id: of the tracked run.
        name: of the tracked run.
        metrics: the latest that it has recorded.
    """

    data: Path
    home: Path
    id: str
    name: str
    metrics: dict[str, float]

    @property
    def checkpoint(self) -> Path:
        return self.home / "checkpoints/epoch_0003"

    @property
    def store(self) -> str:
        return f"sqlite:///{self.home}/mlflow.db"


def short_run(home: Path) -> ShortRun:
    """Trains in a folder."""
    data = home / "data"
    write_data(data)
    train = {"epochs": 3, "ema_decay": 0.5}
    config = write_config(home / "run.yaml", data, train=train, checkpoint={"keep": 3})
    assert ssam_scale("train", "--config", config) == 0
    found = json.loads((home / "checkpoints/result.json").read_text())
    tracked = open_store(f"sqlite:///{home}/mlflow.db", create=False).get_run(found["run_id"])
    return ShortRun(data, home, found["run_id"], tracked.info.run_name, tracked.data.metrics)
