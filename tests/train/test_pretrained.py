"""A run that starts from the weights of another, with other classes, and goes on without them after a stop."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.support.runs import VIT, ssam_scale, write_config


@pytest.mark.slow
def test_fine_tuning_what_was_trained_a_minute_before(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before, after = tmp_path / "before", tmp_path / "after"
    before.mkdir()
    after.mkdir()
    assert ssam_scale("train", "--config", write_config(before / "run.yaml", data, model=VIT), "train.epochs=1") == 0
    weights = before / "checkpoints" / "epoch_0001"
    # A learning rate of nearly 0: what was loaded is what is saved.
    config = write_config(
        after / "run.yaml",
        data,
        model={**VIT, "num_classes": 6, "pretrained": str(weights)},
        optimizer={"name": "sgd", "lr": 1e-12},
        perturbation={"rho": 0.05},
    )
    assert ssam_scale("train", "--config", config, "train.epochs=1", "schedule.name=step") == 0
    said = capsys.readouterr()
    line = next(line for line in (said.out + said.err).splitlines() if "model.pretrained" in line)
    assert f"tensors from {weights / 'model.safetensors'}; new: head.weight, head.bias" in line
    old, new = (load_file(home / "checkpoints" / "epoch_0001" / "model.safetensors") for home in (before, after))
    assert new["head.weight"].shape == (6, 32)
    for name, tensor in old.items():
        if not name.startswith("head."):
            torch.testing.assert_close(new[name], tensor, atol=1e-7, rtol=1e-6)
    shutil.rmtree(before)
    assert ssam_scale("train", "--config", config, "train.epochs=2", "--resume", "auto", "schedule.name=step") == 0
    assert json.loads((after / "checkpoints" / "epoch_0002" / "state.json").read_text())
