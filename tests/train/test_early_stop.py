"""A run that stops before its length: when, that it is complete then, and that all processes decide alike."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from ssam_scale.config.schema import EarlyStop
from ssam_scale.train.checkpoint.files import read_state
from ssam_scale.train.early_stop import Patience
from tests.support.runs import RESNET, differing, ssam_scale, train_on_ranks, write_config
from tests.support.tiers import few
from tests.support.tracked import client, history

# After the first evaluation none is an improvement.
NEVER_ENOUGH = {"metric": "loss", "patience": 2, "min_delta": 100.0}
STOPPED = "early stop: loss has not improved by more than 100 for 2 evaluations; it was "


def observed(values: list[float], **section: Any) -> tuple[int | None, Patience]:
    """After how many of these evaluations, ten steps apart, the run stops; None: it does not."""
    patience = Patience(EarlyStop(**section))
    for number, value in enumerate(values, start=1):
        patience.observe(value, 10 * number)
        if patience.over:
            return number, patience
    return None, patience


@pytest.mark.parametrize(
    ("section", "values", "stops_after"),
    [
        ({"metric": "top1", "patience": 2}, [10, 20, 20, 19], 4),  # as good is no improvement
        ({"metric": "top1", "patience": 2}, [10, 9, 11, 10, 12, 11], None),  # it is counted anew
        ({"metric": "top5", "patience": 1}, [10, 11, 10], 3),
        ({"metric": "loss", "patience": 1}, [2.0, 1.0, 1.5], 3),
        ({"metric": "top1", "patience": 2, "min_delta": 1.0}, [10, 10.5, 11, 12.5], 3),  # by more than it, of the best
        ({"metric": "top1", "patience": 2, "min_delta": 1.0}, [10, 11.5, 12, 12.6], None),
        ({"metric": "loss", "patience": 2, "min_delta": 0.1}, [1.0, 0.95, 0.85, 0.8, 0.8], 5),
        ({"metric": "loss", "patience": 2}, [1.0, math.nan, math.inf], 3),  # no number is no improvement
        ({"metric": "loss", "patience": 2}, [1.0, -math.inf, 0.9], None),
        ({"metric": "loss", "patience": 3}, [math.nan, math.nan, math.nan], 3),
        ({"metric": "loss", "patience": 3}, [math.nan, math.nan, 5.0, 6.0], None),  # any number is better than none
    ],
)
def test_when_it_stops(section: dict[str, Any], values: list[float], stops_after: int | None) -> None:
    assert observed(values, **section)[0] == stops_after


def test_an_evaluation_that_is_made_again_counts_once() -> None:
    patience = Patience(EarlyStop(patience=2))
    for step in (10, 20, 20, 20):
        patience.observe(1.0, step)
    assert not patience.over
    again = Patience(EarlyStop(patience=2))
    again.load_state_dict(patience.state_dict())
    again.observe(1.0, 20)
    assert (again, again.over) == (patience, False)
    again.observe(1.0, 30)
    assert again.over


def test_what_is_known_of_one_metric_says_nothing_of_another() -> None:
    _, patience = observed([1.0, 1.0], metric="loss", patience=1)
    other = Patience(EarlyStop(metric="top1", patience=1))
    other.load_state_dict(patience.state_dict())
    assert not other.over
    other.observe(50.0, 30)
    assert (other.best, other.over) == (50.0, False)


def test_its_line_says_what_it_was_by() -> None:
    assert str(observed([20.0, 19.0], patience=1)[1]) == (
        "early stop: top1 has not improved for 1 evaluation; it was 20 after step 10"
    )
    assert str(observed([math.nan], patience=1)[1]) == "early stop: top1 was not finite in 1 evaluation"


def test_a_run_that_stops_early_is_complete(data: Path, home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = write_config(
        home / "run.yaml",
        data,
        train={"epochs": 8, "early_stop": NEVER_ENOUGH},
        checkpoint={"keep": 1, "keep_best": "loss", "every_epochs": 8},
        schedule={"name": "poly", "kwargs": {"decay_rate": 1.0}},
        tracking={"log_every": 1},
    )
    assert ssam_scale("train", "--config", config) == 0
    assert STOPPED in capsys.readouterr().out
    folder = home / "checkpoints"
    found = json.loads((folder / "result.json").read_text())
    assert (found["epochs"], found["steps"], found["stopped_early"]) == (3, 12, True)
    assert {path.name for path in folder.glob("epoch_*")} == {"epoch_0003"}  # saved where it ends, whenever that is
    assert read_state(folder / "epoch_0003")["evaluation"]["loss"] == found["loss"]
    run = client(home).get_run(found["run_id"])
    assert run.info.status == "FINISHED"
    assert history(home, run, "train/stopped_early") == {12: 1.0}
    # Up to there it was the run of eight epochs.
    assert history(home, run, "train/lr") == {s + 1: pytest.approx(0.05 * (1 - s / 32)) for s in range(12)}
    for dry in ([], ["--dry-run"]):
        assert ssam_scale("train", "--config", config, "--resume", "auto", *dry) == 0
        said = capsys.readouterr().out
        assert "epoch_0003 is of epoch 3, where the run has stopped early: nothing is left to train" in said
    assert json.loads((folder / "result.json").read_text()) == found


@pytest.mark.slow
def test_with_more_patience_or_none_it_goes_on_as_if_it_had_not_stopped(data: Path, home: Path) -> None:
    config = write_config(home / "run.yaml", data, train={"epochs": 4, "early_stop": NEVER_ENOUGH})
    assert ssam_scale("train", "--config", config, "train.early_stop=null", f"checkpoint.directory={home}/whole") == 0
    for number, more in enumerate(("train.early_stop=null", "train.early_stop.patience=3")):
        folder = f"checkpoint.directory={home}/{number}"
        assert ssam_scale("train", "--config", config, folder) == 0
        assert not (home / str(number) / "epoch_0004").exists()
        assert ssam_scale("train", "--config", config, folder, "--resume", "auto", more) == 0
        assert differing(home / "whole/epoch_0004", home / str(number) / "epoch_0004") == []
        assert json.loads((home / str(number) / "result.json").read_text())["stopped_early"] is False


@pytest.mark.slow
def test_resumed_it_stops_where_it_would_have(data: Path, home: Path) -> None:
    """With an evaluation every two epochs, of averaged weights; from before and from within what it waits for."""
    config = write_config(
        home / "run.yaml",
        data,
        model={**RESNET, "freeze": [{"parameters": "^conv1", "until_epoch": 3}]},
        train={"epochs": 20, "eval_epochs": 2, "ema_decay": 0.5, "early_stop": NEVER_ENOUGH},
        checkpoint={"every_steps": 1, "keep": 40},
    )
    assert ssam_scale("train", "--config", config) == 0
    whole = json.loads((home / "checkpoints" / "result.json").read_text())
    assert (whole["epochs"], whole["stopped_early"]) == (6, True)
    for place in ("epoch_0001_step_000006", "epoch_0004", "epoch_0005_step_000022"):
        folder = home / place
        resume = (f"checkpoint.resume={home}/checkpoints/{place}", f"checkpoint.directory={folder}")
        assert ssam_scale("train", "--config", config, *resume) == 0
        assert differing(home / "checkpoints/epoch_0006", folder / "epoch_0006") == []
        assert {**json.loads((folder / "result.json").read_text()), "run_id": None} == {**whole, "run_id": None}


@pytest.mark.slow
@pytest.mark.parametrize("backend", few(["ddp", "fsdp2", "zero2"], "ddp"))
def test_two_processes_stop_at_the_same_place(backend: str, data: Path, home: Path) -> None:
    config = write_config(home / "run.yaml", data, train={"epochs": 8, "early_stop": NEVER_ENOUGH})
    said = train_on_ranks(2, config, f"sharding.backend={backend}")
    assert said.count(STOPPED) == 1
    assert json.loads((home / "checkpoints" / "result.json").read_text())["epochs"] == 3
    assert "stopped early: nothing is left" in train_on_ranks(
        2, config, f"sharding.backend={backend}", "checkpoint.resume=auto"
    )


@pytest.mark.parametrize(
    ("section", "said"),
    [
        (
            "{metric: top5, patience: 2}",
            "train.early_stop.metric top5: of model.num_classes 4 all are among the best",
        ),
        ("{metric: top2, patience: 2}", 'train.early_stop.metric: must be top1, top5 or loss, given "top2"'),
        ("{metric: loss}", "train.early_stop.patience is missing"),
        ("{patience: 0}", "train.early_stop.patience: must be greater than or equal to 1, given 0"),
        ("{patience: 2, min_delta: -1}", "train.early_stop.min_delta: must be greater than or equal to 0, given -1"),
        ("{patience: 2, mode: max}", "train.early_stop.mode: unknown key"),
    ],
)
def test_what_cannot_be_meant_is_a_line(
    section: str, said: str, data: Path, home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_config(home / "run.yaml", data)
    assert ssam_scale("train", "--config", config, f"train.early_stop={section}") == 2
    assert said in capsys.readouterr().err
