"""Runs whose cut is annealed or drawn by cost: what is drawn, recorded, saved and taken up again."""

from __future__ import annotations

import csv
import math
import shutil
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch

from ssam_scale.train import loop
from ssam_scale.train.build import build_hooks
from ssam_scale.train.hooks import Hook
from tests.support.runs import differing, ssam_scale, write_config
from tests.support.tracked import STEPS, artifact, client, history, saved, table
from tests.support.tracked import train as train_with

pytestmark = pytest.mark.slow

COST = {"pattern": "depth", "draw": "cost", "cut": [0.25, 1.0], "samples": 8, "refresh_steps": 3}


def test_a_run_that_draws_by_cost_records_why_and_resumes_as_if_never_stopped(home: Path, data: Path) -> None:
    run = train_with(home, data, COST)
    assert run.data.tags["method"] == "ssam-depth"
    assert history(home, run, "time/refresh").keys() == {0, 3, 6}
    assert history(home, run, "mask/samples") == {0: 8, 3: 8, 6: 8}
    assert table(home, run)[0] == [STEPS, 2 * STEPS]
    kept = saved(home)
    assert int(kept["chosen_at"]) == 6
    with (artifact(home, run, "cuts") / "step_00000006.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [int(row["block"]) for row in rows] == list(range(8))
    for key, tensor in (("fisher_mass", kept["fisher_mass"]), ("ascent_seconds", kept["ascent_seconds"])):
        assert [float(row[key]) for row in rows] == pytest.approx(tensor.tolist(), rel=1e-5)  # six digits
    worth = kept["fisher_mass"].flip(0).cumsum(0).flip(0) / kept["ascent_seconds"] * (torch.arange(8) >= 2)
    assert [float(row["probability"]) for row in rows] == pytest.approx((worth / worth.sum()).tolist(), rel=1e-4)

    # The times are measured once: those of a machine that is now faster or slower would draw other cuts.
    checkpoints = home / "checkpoints"
    shutil.move(checkpoints / "epoch_0002", home / "uninterrupted")
    assert ssam_scale("train", "--config", home / "run.yaml", "--resume", "auto") == 0
    assert differing(home / "uninterrupted", checkpoints / "epoch_0002") == []


def test_without_a_temporary_folder_the_table_of_cuts_is_missing_and_the_run_is_the_same(
    home: Path, data: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """What is only looked at ends no training: tables and pictures."""

    def built(*arguments: Any) -> list[Hook]:
        monkeypatch.setattr(tempfile, "tempdir", str(home / "nowhere"))  # once the run is being recorded
        return build_hooks(*arguments)

    monkeypatch.setattr(loop, "build_hooks", built)
    run = train_with(home, data, COST)
    assert run.data.metrics["mask/samples"] == 8
    for what in ("mask/cuts/step_00000000.csv", "mask/cuts/step_00000006.csv", "density.png"):
        assert any(what in message and "nowhere" in message for message in caplog.messages), what


def test_another_draw_does_not_take_up_the_checkpoint_of_one_by_cost(
    home: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train_with(home, data, {**COST, "refresh_steps": None}, epochs=1)
    capsys.readouterr()
    mask = "perturbation.mask={pattern: depth}"
    assert ssam_scale("train", "--config", home / "run.yaml", "--resume", "auto", "train.epochs=2", mask) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "the saved state has a moving cut drawn by cost, this optimizer a Depth" in said
    assert "perturbation.mask must be the one it was saved with" in said


def test_an_annealed_cut_goes_through_the_network_over_the_run(home: Path, data: Path) -> None:
    run = train_with(home, data, {"pattern": "depth", "draw": "annealed", "cut": 0, "cut_final": 1})
    steps, densities = table(home, run)
    assert steps == [STEPS, 2 * STEPS]
    cuts = [min(round(8 * 0.5 * (1 - math.cos(math.pi * step / (2 * STEPS)))), 7) for step in range(2 * STEPS)]
    for block in range(8):
        [name] = [n for n in densities if n.startswith(f"layer{block // 2 + 1}.{block % 2}.conv1")]
        shares = [sum(cut <= block for cut in part) / STEPS for part in (cuts[:STEPS], cuts[STEPS:])]
        assert densities[name] == pytest.approx(shares), name
    assert "fisher_mass" not in saved(home)


def test_a_dry_run_measures_and_draws_but_records_nothing(
    home: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_config(home / "run.yaml", data, perturbation={"rho": 0.05, "mask": COST}, train={"accumulation": 2})
    assert ssam_scale("train", "--config", config, "--dry-run") == 0
    assert "dry run: ssam-depth resnet18" in capsys.readouterr().out
    assert not client(home).get_experiment_by_name("ssam_scale")
