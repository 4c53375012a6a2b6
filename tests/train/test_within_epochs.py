"""A run that goes on from within an epoch ends as one that was never interrupted: bit for bit, on the CPU."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import mlflow
import pytest
from safetensors.torch import load_file

from ssam_scale.train.checkpoint.files import read_state
from tests.support.runs import RESNET, VIT, differing, ssam_scale, train_on_ranks, write_config
from tests.support.tiers import few

# Masks, directions and savings that remember something from step to step.
METHODS: dict[str, Any] = {
    "base": None,
    "element": {
        "rho": 0.05,
        "norm": "calibrated",
        "calibrate_every": 3,
        "mask": {"pattern": "element", "dynamic": {"grow": "fisher"}, "samples": 8, "refresh_steps": 3},
    },
    "accumulated": {
        "rho": 0.05,
        "interval": 2,
        "mask": {"pattern": "row", "score": "accumulated", "sparsity_final": 0.9, "refresh_steps": 3},
    },
    "cut": {"rho": 0.05, "rho_schedule": "cosine", "norm": "masked", "mask": {"pattern": "depth"}},
    "cut by cost": {"rho": 0.05, "norm": "masked", "mask": {"pattern": "depth", "draw": "cost", "samples": 8}},
    "reuse": {"rho": 0.05, "interval": 3, "reuse": 0.7},
    "gap": {"rho": 0.05, "gap": 0.6, "window": [0.2, 0.9]},
    "gate": {"rho": 0.05, "gate": {"delta": 0.9}},
    "friendly": {"rho": 0.05, "direction": {"source": "friendly"}, "mask": {"pattern": "element", "score": "weight"}},
    "previous": {"rho": 0.05, "direction": {"source": "previous"}},
    "momentum": {"rho": 3.0, "direction": {"source": "momentum"}},
    "random samples": {"rho": 0.05, "direction": {"fraction": 0.5, "choose": "random"}, "mask": {"pattern": "depth"}},
}
# All that is drawn at random, and all that is averaged; six steps an epoch of two micro-batches.
EVERYTHING: dict[str, Any] = {
    "loss": {"mixup": 0.2, "cutmix": 1.0, "label_smoothing": 0.1},
    "train": {"epochs": 2, "accumulation": 2, "ema_decay": 0.9},
    "optimizer": {"name": "momentum", "lr": 0.01, "momentum": 0.9, "clip_grad_norm": 1.0},
    "schedule": {"warmup_epochs": 0.5},
    "model": {**RESNET, "drop_path_rate": 0.1, "drop_rate": 0.1},
    "tracking": {"log_every": 4},
    "checkpoint": {"every_steps": 1, "keep": 20},
}
BATCH = "data.batch_size=8"
GROWS = "data.progressive={resolution: 24, to_epoch: 1, multiple_of: 8}"


def train(config: Path, *overrides: str, processes: int = 1) -> None:
    if processes > 1:
        train_on_ranks(processes, config, *overrides)
    else:
        assert ssam_scale("train", "--config", config, *overrides) == 0


def logged(database: Path) -> dict[tuple[str, int], float]:
    """What the one run of a store has recorded of losses, densities and accuracies."""
    client = mlflow.MlflowClient(f"sqlite:///{database}")
    (run,) = client.search_runs([client.get_experiment_by_name("ssam_scale").experiment_id])
    names = ("train/loss", "train/lr", "mask/density", "perturbation/kappa", "val/loss", "val/raw_loss")
    return {(name, m.step): m.value for name in names for m in client.get_metric_history(run.info.run_id, name)}


def check_places(home: Path, config: Path, places: list[str], *overrides: str, processes: int = 1) -> None:
    """Resumed from checkpoints within its epochs, a run ends as the uninterrupted one, and records the same."""
    shutil.copy(home / "mlflow.db", home / "empty.db")
    train(config, *overrides, processes=processes)
    (home / "checkpoints").rename(home / "whole")
    whole = logged(home / "mlflow.db")
    for place in places:
        shutil.copy(home / "empty.db", home / f"{place}.db")
        step = int(place.rpartition("_")[2])
        train(
            config,
            f"checkpoint.resume={home}/whole/{place}",
            f"checkpoint.directory={home}/{place}",
            f"tracking.uri=sqlite:///{home}/{place}.db",
            *overrides,
            processes=processes,
        )
        assert differing(home / "whole/epoch_0002", home / place / "epoch_0002") == [], place
        expected, resumed = (records_after(step, records) for records in (whole, logged(home / f"{place}.db")))
        assert resumed == expected, place
        assert {name for name, _ in resumed} >= {"train/loss", "val/loss"}


def records_after(step: int, records: dict[tuple[str, int], float]) -> dict[tuple[str, int], float]:
    """Those of later steps, and the evaluation of an epoch that ends there."""
    return {(name, at): v for (name, at), v in records.items() if at > step or (at == step and name[:3] == "val")}


@pytest.mark.slow
@pytest.mark.parametrize("method", few(METHODS, "element", "cut", "reuse"))
def test_one_process_ends_bit_for_bit_where_it_would_have(method: str, data: Path, home: Path) -> None:
    config = write_config(home / "run.yaml", data, perturbation=METHODS[method], **EVERYTHING)
    # In an epoch's first half; at its end, before its evaluation; in the second epoch.
    check_places(
        home, config, ["epoch_0000_step_000002", "epoch_0000_step_000006", "epoch_0001_step_000009"], BATCH, GROWS
    )


@pytest.mark.slow
@pytest.mark.parametrize("method", few(["base", "element", "cut", "reuse"], "cut"))
@pytest.mark.parametrize("backend", few(["ddp", "fsdp2", "zero0", "zero1", "zero2", "zero3"], "fsdp2"))
def test_two_processes_end_bit_for_bit_where_they_would_have(backend: str, method: str, data: Path, home: Path) -> None:
    """With BatchNorm, whose statistics are another on each process until an epoch ends."""
    config = write_config(home / "run.yaml", data, perturbation=METHODS[method], **EVERYTHING)
    places = ["epoch_0000_step_000002", "epoch_0001_step_000009"]
    check_places(home, config, places, BATCH, f"sharding.backend={backend}", processes=2)


@pytest.mark.slow
def test_other_processes_and_batches_go_on_at_the_same_place(data: Path, home: Path) -> None:
    """The images of an epoch are seen once each, in its order; what goes by the place in the run goes on there."""
    sections = {key: EVERYTHING[key] for key in ("checkpoint", "schedule")}
    config = write_config(
        home / "run.yaml",
        data,
        model={**VIT, "drop_rate": 0.1, "drop_path_rate": 0.2},
        perturbation=METHODS["cut"],
        train={"epochs": 2},
        **sections,
    )
    train(config)
    (home / "checkpoints").rename(home / "whole")
    start = f"checkpoint.resume={home}/whole/epoch_0000_step_000002"
    train(config, start, f"checkpoint.directory={home}/two", processes=2)
    # The same images in each step, whose gradients are summed in another order.
    assert differing(home / "whole/epoch_0002", home / "two/epoch_0002", 2e-6) == []
    # 24 of 48 images are seen: 2 steps of 10 are left, and 4 in the next epoch.
    train(config, start, f"checkpoint.directory={home}/ten", "data.batch_size=10")
    state = read_state(home / "ten/epoch_0002")["parts"]
    assert {key: state["progress"][key] for key in ("epoch", "seen", "step")} == {"epoch": 2, "seen": 0, "step": 8}
    assert int(load_file(home / "ten/epoch_0002/sparse.safetensors")["steps"]) == 2 * 4
    # More than are left: the epoch ends at once, with its evaluation.
    train(config, start, f"checkpoint.directory={home}/all", "data.batch_size=32", "train.epochs=1")
    assert read_state(home / "all/epoch_0001")["evaluation"]["images"] == 20
