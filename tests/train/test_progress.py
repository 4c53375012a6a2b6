"""A run that is resumed with steps of another size goes on at the same place: epochs done, not steps done."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlflow
import pytest
import torch

from ssam_scale.masks import Scored
from ssam_scale.perturbation import SparseSAM
from ssam_scale.train import loop
from ssam_scale.train.batches import EpochBatches
from ssam_scale.train.build import Components, build_hooks
from ssam_scale.train.hooks import Hook
from ssam_scale.train.progress import Progress
from tests.support.networks import batches, loss_fn, small_network
from tests.support.runs import VIT, ssam_scale, write_config

EPOCHS = 4
# Everything that changes over a run, or happens now and then: rate, radius, window, refreshes, budget, drop rate, κ.
CHANGING: dict[str, Any] = {
    "model": VIT,
    "schedule": {"warmup_epochs": 1.0, "warmup_lr": 0.01},
    "train": {"epochs": EPOCHS},
    "perturbation": {
        "rho": 0.1,
        "rho_schedule": "cosine",
        "norm": "calibrated",
        "window": [0.0, 0.75],
        "mask": {
            "pattern": "element",
            "dynamic": {"drop": "weight", "grow": "random"},
            "sparsity": 0.2,
            "sparsity_final": 0.9,
            "refresh_epochs": 2,
        },
    },
}


class Places(Hook):
    """What holds in the first step of each epoch."""

    def __init__(self, components: Components) -> None:
        self._opt: SparseSAM = components.opt
        self.seen: dict[int, dict[str, float]] = {}

    def before_step(self, progress: Progress, batches: EpochBatches) -> None:
        if progress.epoch not in self.seen:
            self.seen[progress.epoch] = {
                "lr": self._opt.param_groups[0]["lr"],
                "rho": self._opt.radii[0],
                "density": self._opt.density,
                "refreshed": self._opt.mask.chosen_at == self._opt.steps,  # type: ignore[attr-defined]
            }


@contextmanager
def watched() -> Iterator[list[Places]]:
    """Runs inside have such a hook, the last of all; they are found in the list."""
    made: list[Places] = []

    def hooks(config: Any, world: Any, components: Components, *rest: Any) -> list[Hook]:
        made.append(Places(components))
        return [*build_hooks(config, world, components, *rest), made[-1]]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "build_hooks", hooks)
        yield made


@pytest.mark.slow
def test_a_run_resumed_with_steps_of_another_size_goes_on_at_the_same_place(home: Path, data: Path) -> None:
    config = write_config(home / "run.yaml", data, **CHANGING)
    with watched() as runs:
        assert ssam_scale("train", "--config", config, f"checkpoint.keep={EPOCHS}") == 0
        for batch in (24, 8):
            resume = f"checkpoint.resume={home}/checkpoints/epoch_0002"
            other = [f"data.batch_size={batch}", f"checkpoint.directory={home}/{batch}"]
            assert ssam_scale("train", "--config", config, resume, *other) == 0
    whole, *others = runs
    assert [place["refreshed"] for place in whole.seen.values()] == [True, False, True, False]
    for other in others:
        assert other.seen == {epoch: pytest.approx(whole.seen[epoch]) for epoch in (2, 3)}
    client = mlflow.MlflowClient(f"sqlite:///{home}/mlflow.db")
    runs_of_steps = client.search_runs(
        [client.get_experiment_by_name("ssam_scale").experiment_id], order_by=["attributes.start_time"]
    )
    # The records of both resumed runs go on from those of epoch 2, at step 8; by 2 and by 6 steps an epoch.
    steps = [[point.step for point in client.get_metric_history(run.info.run_id, "val/top1")] for run in runs_of_steps]
    assert steps == [[4, 8, 12, 16], [10, 12], [14, 20]]
    assert [run.data.tags["steps"] for run in runs_of_steps] == ["16", "12", "20"]
    first, *resumed = runs_of_steps
    assert {run.data.tags["resumed_from"] for run in resumed} == {first.info.run_id}


def test_what_is_remembered_by_its_step_moves_along() -> None:
    model = small_network("vit")
    sgd = torch.optim.SGD(model.parameters(), lr=0.05)
    mask = Scored("element", 0.5, score="weight", every=6)
    opt = SparseSAM(model, sgd, rho=0.1, norm="calibrated", calibrate_every=4, mask=mask)
    for batch in batches(9, 4):
        if opt.refresh_is_due:
            opt.refresh()
        opt.step(loss_fn, batch)
    assert mask.chosen_at == 6
    opt.rescale_steps(3)  # three times the batch
    assert (opt.steps, mask.chosen_at) == (3, 2)
    assert not opt.refresh_is_due
    kinds = []
    for batch in batches(3, 4):
        opt.step(loss_fn, batch)
        kinds.append(opt.report.kind if opt.report else "")
    assert "calibrating" in kinds  # and not only when the number of the last one has been passed
    assert opt.refresh_is_due  # though the last refresh was before the step of that number, too
    with pytest.raises(ValueError, match="steps is -1; at least 0"):
        opt.rescale_steps(-1)
