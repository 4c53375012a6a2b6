"""The length of a run in optimizer steps: where it ends, and that all that goes by its place goes by that."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from ssam_scale.perturbation import StepReport
from ssam_scale.tracking.shutdown import SAVED
from ssam_scale.train import loop
from ssam_scale.train.build import build_hooks
from ssam_scale.train.checkpoint.files import read_state
from ssam_scale.train.hooks import Hook
from ssam_scale.train.length import Length
from ssam_scale.train.progress import Progress
from tests.support.runs import RESNET, differing, ssam_scale, train_on_ranks, write_config
from tests.support.tiers import few
from tests.support.tracked import client, history

STEPS_PER_EPOCH = 4  # of `write_config`: 48 images in batches of 12
STEPS = 6  # an epoch and a half
WITHIN = "epoch_0001_step_000006"
# All that goes by the place in the run, with what BatchNorm and averages remember.
EVERYTHING: dict[str, Any] = {
    "model": {**RESNET, "drop_rate": 0.1, "freeze": [{"parameters": "^conv1", "until_epoch": 1}]},
    "perturbation": {
        "rho": 0.05,
        "rho_schedule": "cosine",
        "norm": "masked",
        "window": [0.1, 0.9],
        "mask": {"pattern": "depth", "draw": "annealed", "cut": [0.0, 0.5], "cut_final": [0.5, 1.0]},
    },
    "loss": {"mixup": 0.2},
    "schedule": {"warmup_epochs": 0.5},
    "optimizer": {"name": "momentum", "lr": 0.05},
    "checkpoint": {"every_steps": 1, "keep": 20},
}


def in_steps(path: Path, data: Path, steps: int = STEPS, **sections: Any) -> Path:
    train = {"epochs": None, "max_steps": steps, **sections.pop("train", {})}
    return write_config(path, data, **{**sections, "train": train})


def state(checkpoint: Path) -> dict[str, Any]:
    found: dict[str, Any] = read_state(checkpoint)["parts"]["progress"]
    return found


def test_a_run_ends_within_an_epoch_is_evaluated_saved_and_complete(
    data: Path, home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = in_steps(home / "run.yaml", data, train={"eval_epochs": 5}, checkpoint={"keep_best": "loss"})
    assert ssam_scale("train", "--config", config) == 0
    said = capsys.readouterr().out
    assert "6 steps, 1.5 epochs of 4 steps of 12 images" in said
    assert f"step {STEPS}/{STEPS}: top-1" in said
    last = home / "checkpoints" / WITHIN
    found = json.loads((home / "checkpoints" / "result.json").read_text())
    assert (found["steps"], found["epochs"]) == (STEPS, 1.5)
    assert read_state(last)["evaluation"]["loss"] == found["loss"]
    assert ssam_scale("train", "--config", config, "--resume", "auto") == 0
    assert f"{last} is of step {STEPS}, the last: nothing is left to train" in capsys.readouterr().out
    assert ssam_scale("train", "--config", config, "--resume", "auto", "--dry-run") == 0
    assert "nothing is left to train" in capsys.readouterr().out


def test_a_dry_run_says_how_long_the_run_is(data: Path, home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert ssam_scale("train", "--config", in_steps(home / "run.yaml", data), "--dry-run") == 0
    assert "the run has 6 steps, 1.5 epochs of 4 steps" in capsys.readouterr().out


@pytest.mark.slow
def test_steps_of_whole_epochs_are_those_epochs_bit_for_bit(data: Path, home: Path) -> None:
    config = write_config(home / "run.yaml", data, **EVERYTHING)
    assert ssam_scale("train", "--config", config, f"checkpoint.directory={home}/epochs") == 0
    steps = ("train.epochs=null", f"train.max_steps={2 * STEPS_PER_EPOCH}", f"checkpoint.directory={home}/steps")
    assert ssam_scale("train", "--config", config, *steps) == 0
    assert differing(home / "epochs/epoch_0002", home / "steps/epoch_0002") == []


@pytest.mark.slow
@pytest.mark.parametrize("backend", few([None, "ddp", "fsdp2", "zero2"], None, "fsdp2"))
def test_resumed_it_ends_bit_for_bit_where_it_would_have(backend: str | None, data: Path, home: Path) -> None:
    """From within its last epoch, with BatchNorm's statistics of each process."""
    config = in_steps(home / "run.yaml", data, **EVERYTHING)

    def train(*overrides: str) -> None:
        if backend is None:
            assert ssam_scale("train", "--config", config, *overrides) == 0
        else:
            train_on_ranks(2, config, f"sharding.backend={backend}", *overrides)

    train()
    (home / "checkpoints").rename(home / "whole")
    whole = json.loads((home / "whole" / "result.json").read_text())
    train(f"checkpoint.resume={home}/whole/epoch_0001_step_000005")
    assert differing(home / "whole" / WITHIN, home / "checkpoints" / WITHIN) == []
    resumed = json.loads((home / "checkpoints" / "result.json").read_text())
    assert {**resumed, "run_id": None} == {**whole, "run_id": None}


class Signalled(Hook):
    """Sends SIGTERM to its own process in the run's last step, or when that is done, before the evaluation."""

    def __init__(self, where: str) -> None:
        self._where = where

    def after_step(self, progress: Progress, report: StepReport) -> None:
        if self._where == "step" and progress.step == STEPS:
            os.kill(os.getpid(), signal.SIGTERM)

    def after_epoch(self, progress: Progress) -> None:
        if self._where == "evaluation" and progress.step == STEPS:
            os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.slow
@pytest.mark.parametrize("where", ["step", "evaluation"])
def test_interrupted_at_its_end_it_is_not_complete_and_the_resumed_one_is(where: str, data: Path, home: Path) -> None:
    config = in_steps(home / "run.yaml", data, model=EVERYTHING["model"])
    assert ssam_scale("train", "--config", config, f"checkpoint.directory={home}/whole") == 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "build_hooks", lambda *args: [Signalled(where), *build_hooks(*args)])
        assert ssam_scale("train", "--config", config) == SAVED
    assert not (home / "checkpoints" / "result.json").exists()
    assert ssam_scale("train", "--config", config, "--resume", "auto") == 0
    assert differing(home / "whole" / WITHIN, home / "checkpoints" / WITHIN) == []
    found, whole = (json.loads((home / name / "result.json").read_text()) for name in ("checkpoints", "whole"))
    assert found["loss"] == whole["loss"]


@pytest.mark.slow
def test_the_rate_comes_down_at_the_last_step_and_records_end_there(data: Path, home: Path) -> None:
    config = in_steps(
        home / "run.yaml", data, schedule={"name": "poly", "kwargs": {"decay_rate": 1.0}}, tracking={"log_every": 1}
    )
    assert ssam_scale("train", "--config", config) == 0
    run = client(home).get_run(json.loads((home / "checkpoints" / "result.json").read_text())["run_id"])
    rates = history(home, run, "train/lr")
    assert rates == {step + 1: pytest.approx(0.05 * (1 - step / STEPS)) for step in range(STEPS)}
    assert history(home, run, "epoch") == {4: 1.0, 6: 1.5}
    assert list(history(home, run, "val/top1")) == [4, 6]


@pytest.mark.slow
def test_a_longer_run_goes_on_with_the_rest_of_the_epoch(data: Path, home: Path) -> None:
    """With a rate and weights that do not go by the length, it is the longer run from the beginning."""
    plain: dict[str, Any] = {"schedule": {"name": "step", "kwargs": {"decay_epochs": 100}}, "checkpoint": {"keep": 9}}
    config = in_steps(home / "run.yaml", data, **plain)
    assert ssam_scale("train", "--config", config) == 0
    longer = ("--resume", "auto", "train.max_steps=9")
    assert ssam_scale("train", "--config", config, *longer) == 0
    assert ssam_scale("train", "--config", config, "train.max_steps=9", f"checkpoint.directory={home}/whole") == 0
    assert differing(home / "checkpoints/epoch_0002_step_000009", home / "whole/epoch_0002_step_000009") == []
    assert ssam_scale("train", "--config", config, *longer[:2], "train.max_steps=7") == 0  # shorter: complete
    assert state(home / "checkpoints/epoch_0002_step_000009")["step"] == 9


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("schedule.warmup_epochs=1.5", "schedule.warmup_epochs 1.5 must be less than train.max_steps 6, which is 1.5 "),
        (
            "model.freeze=[{parameters: conv1, until_epoch: 2}]",
            "model.freeze.0.until_epoch 2 must be less than train",
        ),
        ("data.progressive={resolution: 24, to_epoch: 3}", "data.progressive.to_epoch 3 must be less than train.max_"),
        ("trajectory={kind: mesa, start_epoch: 2}", "trajectory.start_epoch 2 must be less than train.max_steps 6, "),
        ("data.batch_size=64", "48 images are fewer than one batch of 64"),
        ("train.epochs=3", "epochs 3 and max_steps 6 both say how long the run is; leave one of them out"),
        ("train.max_steps=null", "epochs is missing, or max_steps: one of them says how long the run is"),
        ("train.max_steps=0", "train.max_steps: must be greater than or equal to 1"),
    ],
)
def test_what_cannot_be_meant_is_a_line_before_any_work(
    override: str, said: str, data: Path, home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ssam_scale("train", "--config", in_steps(home / "run.yaml", data), override) == 2
    error = capsys.readouterr().err
    assert said in error
    assert "Traceback" not in error
    assert not (home / "checkpoints").exists()


@pytest.mark.parametrize("steps", [1, 4, 6, 8, 9])
def test_progress_has_as_many_steps_as_the_run_and_is_ended_after_what_ends_it(steps: int) -> None:
    progress = Progress(Length(50, 12, steps, in_epochs=False))
    while not progress.ended:
        assert progress.steps_left > 0
        while progress.steps_left:
            progress.after_step()
            assert not progress.ended
        progress.after_epoch()
    assert (progress.step, progress.place) == (steps, steps)
    assert progress.epochs == steps / STEPS_PER_EPOCH
    again = Progress(progress.length)
    again.load_state_dict(progress.state_dict())
    assert again == progress
    longer = Progress(Length(50, 12, steps + 1, in_epochs=False))
    longer.load_state_dict(progress.state_dict())
    assert longer.steps_left == 1
