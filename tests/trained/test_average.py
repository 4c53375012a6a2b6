"""`ssam-scale average`: a checkpoint whose weights are the mean of several checkpoints'."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from ssam_scale.config.load import load
from ssam_scale.data import train_loader
from ssam_scale.sharding import World
from ssam_scale.train.checkpoint import network_of
from ssam_scale.train.checkpoint.files import problem_with
from tests.support.runs import ssam_scale, write_config
from tests.support.short_run import ShortRun

pytestmark = pytest.mark.slow

Evaluated = Callable[..., dict[str, Any]]


def weights_of(checkpoint: Path) -> dict[str, Tensor]:
    return {**load_file(checkpoint / "model.safetensors"), **load_file(checkpoint / "ema.safetensors")}


def checkpoints_of(run: ShortRun) -> list[Path]:
    return sorted(run.checkpoint.parent.glob("epoch_*"))


def test_it_is_the_mean_and_everything_works_with_it(
    run: ShortRun, evaluated: Evaluated, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    soup = tmp_path / "soup"
    assert ssam_scale("average", run.checkpoint.parent, "--last", "3", "-o", soup) == 0
    assert "the mean of 3 checkpoints' averaged weights; BatchNorm's statistics are averages" in capsys.readouterr().out
    assert problem_with(soup, World()) is None
    every = [weights_of(path) for path in checkpoints_of(run)]
    for name, tensor in load_file(soup / "model.safetensors").items():
        if tensor.is_floating_point():
            mean = torch.stack([each[name].double() for each in every]).mean(0)
            # Rounded once, to fp32.
            torch.testing.assert_close(tensor, mean.float(), atol=0, rtol=2**-23)
        else:
            assert torch.equal(tensor, every[0][name])
    assert evaluated(soup)["weights"] == "mean of 3 checkpoints'"
    assert ssam_scale("predict", soup, run.data / "val", "-o", tmp_path / "t.csv") == 0
    assert ssam_scale("export", soup, "-o", tmp_path / "exported") == 0
    capsys.readouterr()
    assert ssam_scale("sharpness", soup, "--images=16", "--eigenvalues=0", "--probes=0", "--json") == 0
    [row] = json.loads(capsys.readouterr().out)
    assert row["gap"] > 0.0
    assert row["epoch"] is None
    # A run starts from it, and none goes on from it.
    config = write_config(tmp_path / "run.yaml", run.data)
    assert ssam_scale("train", "--config", config, f"model.pretrained={soup}", "--dry-run") == 0
    assert ssam_scale("train", "--config", config, "--resume", soup) == 2
    assert "soup is an average of weights, which no run goes on from" in capsys.readouterr().err
    # Not even where it lies among a run's own.
    assert ssam_scale("average", *checkpoints_of(run), "-o", tmp_path / "checkpoints/epoch_0009") == 0
    assert ssam_scale("train", "--config", config, "--resume", "auto") == 2
    assert "epoch_0009 cannot be used: it is an average of weights" in capsys.readouterr().err
    # The raw ones are others.
    assert ssam_scale("average", *checkpoints_of(run), "-o", tmp_path / "raw", "--no-ema") == 0
    raw = [load_file(path / "model.safetensors")["fc.weight"].double() for path in checkpoints_of(run)]
    found = load_file(tmp_path / "raw/model.safetensors")["fc.weight"]
    torch.testing.assert_close(found, torch.stack(raw).mean(0).float(), atol=0, rtol=2**-23)


def test_statistics_are_made_anew_from_training_images(run: ShortRun, tmp_path: Path) -> None:
    soup, plain = tmp_path / "soup", tmp_path / "plain"
    assert ssam_scale("average", *checkpoints_of(run), "-o", soup, "--data", run.data / "train") == 0
    assert ssam_scale("average", *checkpoints_of(run), "-o", plain) == 0
    config = load(run.home / "run.yaml")
    network = network_of(plain, config)
    seen: list[Tensor] = []
    network.bn1.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach()))
    loader = train_loader(
        config.data, rank=0, world_size=1, device=torch.device("cpu"), seed=0, micro_batch=8, num_classes=4
    )
    with torch.no_grad():
        for images, _ in loader:
            network.train()(images)
    saved = load_file(soup / "model.safetensors")
    # Of the first layer, whose input depends on weights alone: the mean over batches.
    mean = torch.stack([each.mean((0, 2, 3)) for each in seen]).mean(0)
    torch.testing.assert_close(saved["bn1.running_mean"], mean, atol=1e-5, rtol=1e-4)
    for name, tensor in load_file(plain / "model.safetensors").items():
        if "running" not in name and "num_batches" not in name:
            assert torch.equal(tensor, saved[name]), name


MISUSES: dict[str, tuple[list[str], str]] = {
    "one": (["{last}", "-o", "{out}/s"], "one checkpoint has no average"),
    "a folder": (["{folder}", "-o", "{out}/s"], "has 3 checkpoints; say how many of the newest: --last 5"),
    "more than there are": (["{folder}", "--last", "4", "-o", "{out}/s"], "has 3 checkpoints, of which two or more"),
    "one twice": (["{last}", "{last}", "-o", "{out}/s"], "a checkpoint is given twice"),
    "no checkpoint": (["{last}", "{out}", "-o", "{out}/s"], "cannot be read: state.json cannot be read"),
    "another network": (["{last}", "{other}", "-o", "{out}/s"], "weights of one network are needed"),
    "what is there": (["{last}", "{first}", "-o", "{out}"], "is there already; name another folder"),
    "no such data": (["{last}", "{first}", "-o", "{out}/s", "--data", "{out}/none"], "none: no such file"),
}


@pytest.fixture(scope="module")
def another(tmp_path_factory: pytest.TempPathFactory, run: ShortRun) -> Path:
    """A checkpoint of a network with other classes."""
    home = tmp_path_factory.mktemp("another")
    model = {"name": "resnet18", "num_classes": 6, "kwargs": {"channels": [8, 8, 8, 8], "stem_width": 8}}
    train = {"epochs": 1, "ema_decay": 0.5}
    assert ssam_scale("train", "--config", write_config(home / "run.yaml", run.data, model=model, train=train)) == 0
    return home / "checkpoints/epoch_0001"


@pytest.mark.parametrize("misuse", MISUSES)
def test_misuse_is_a_line_and_nothing_is_written(
    misuse: str, run: ShortRun, another: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("kept")
    first, *_, last = checkpoints_of(run)
    names = {"first": first, "last": last, "folder": last.parent, "other": another, "out": tmp_path}
    capsys.readouterr()
    arguments, said = MISUSES[misuse]
    assert ssam_scale("average", *(argument.format(**names) for argument in arguments)) == 2
    error = capsys.readouterr().err
    assert said.format(**names) in error
    assert error.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
