"""The learning rate over a run."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch

from ssam_scale.config.load import load
from ssam_scale.train.learning_rate import scheduler
from ssam_scale.train.length import Length
from tests.support.runs import write_config


@pytest.mark.parametrize(("name", "kwargs"), [("cosine", {}), ("poly", {"decay_rate": 1.0})])
def test_it_warms_up_to_the_peak_and_decays_from_there_to_the_end(
    name: str, kwargs: dict[str, Any], tmp_path: Path
) -> None:
    schedule = {"name": name, "warmup_epochs": 2, "min_lr": 0.01, "kwargs": kwargs}
    path = write_config(tmp_path / "run.yaml", tmp_path, schedule=schedule, optimizer={"lr": 1.0}, train={"epochs": 10})
    base = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    rates_of = scheduler(load(path), base, Length.of_epochs(10, 100, 10))
    rates = []
    for step in range(100):
        rates_of.step_update(step)
        rates.append(base.param_groups[0]["lr"])
    warm, decay = rates[:20], rates[20:]
    assert warm == pytest.approx([step / 20 for step in range(20)])
    assert decay[0] == 1.0
    assert all(a > b for a, b in itertools.pairwise(decay))
    assert decay[-1] == pytest.approx(0.01, abs=0.02)
    if name == "poly":
        assert decay[40] == pytest.approx((1.0 + 0.01) / 2)
