"""Base optimizers of a run: fused where torch can, unless the configuration says otherwise."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from ssam_scale.bench.networks import setting_of
from ssam_scale.bench.scenarios import sgd, sgd_by_shape
from ssam_scale.config.schema import Config
from ssam_scale.train.optimizer import base_optimizer
from tests.support.runs import VIT, differing, ssam_scale, write_config


def optimizer(name: str, **kwargs: Any) -> Any:
    config = Config.model_validate(
        {
            "model": {"name": "resnet18"},
            "data": {"train": "a", "val": "b", "batch_size": 4},
            "optimizer": {"name": name, "lr": 0.1, "kwargs": kwargs},
            "train": {"epochs": 1},
        }
    )
    return base_optimizer(config, nn.Linear(3, 2))


@pytest.mark.parametrize("name", ["sgd", "SGD", "momentum", "adam", "adamw"])
def test_torchs_own_are_fused_unless_it_is_said(name: str) -> None:
    assert all(group["fused"] for group in optimizer(name).param_groups)
    for said in ({"fused": False}, {"foreach": True}, {"foreach": False}):
        made = optimizer(name, **said)
        assert not made.defaults["fused"]
        assert made.defaults["foreach"] == said.get("foreach")


@pytest.mark.parametrize("name", ["lamb", "lion", "sgdp", "nadamw", "adamwlegacy"])
def test_timms_own_are_what_they_were(name: str) -> None:
    assert not optimizer(name).defaults.get("fused")


def test_benchmarks_take_the_same() -> None:
    network = setting_of("test_vit", 32, 4).network()
    for made in (sgd(network), sgd_by_shape(network)):
        assert made.defaults["fused"] is True


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_a_run_goes_on_from_what_was_not_fused(
    name: str, data: Path, home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adamw = {"lr": 1e-3, "kwargs": {"eps": 1e-3}} if name == "adamw" else {"lr": 0.05}
    sections: dict[str, Any] = {"optimizer": {"name": name, "clip_grad_norm": 1.0, **adamw}, "model": VIT}
    config = write_config(home / "run.yaml", data, **sections)
    last = home / "checkpoints/epoch_0002"
    assert ssam_scale("train", "--config", config) == 0
    shutil.move(last, home / "fused")
    shutil.rmtree(home / "checkpoints")
    assert ssam_scale("train", "--config", config, "optimizer.kwargs.fused=false", "checkpoint.keep=3") == 0
    shutil.rmtree(last)
    assert ssam_scale("train", "--config", config, "--resume", "auto") == 0
    assert "resumed from" in capsys.readouterr().out
    # The same arithmetic in another order of operations, in each of eight steps.
    assert differing(home / "fused", last, tolerance=1e-5) == []
