"""Sharpness of runs beside their evaluations, and of their checkpoints, sharded or not, by any number of processes."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import mlflow
import pytest
import timm
import torch
from torch import Tensor, nn

from ssam_scale.config.load import load
from ssam_scale.models import build_network
from ssam_scale.sharding import World
from ssam_scale.tracking.shutdown import SAVED
from ssam_scale.train import loop
from ssam_scale.train.build import build_hooks
from ssam_scale.train.hooks import Hook
from ssam_scale.train.progress import Progress
from ssam_scale.train.sharpness import MeasureSharpness, mean_loss
from tests.support.checkout import ROOT
from tests.support.processes import run
from tests.support.runs import CLASSES, VIT, differing, ssam_scale, train_on_ranks, write_config

MEASURED: dict[str, Any] = {"images": 20, "rho": 0.1, "eigenvalues": 2, "probes": 2, "micro_batch": 11}
FROZEN = "model.freeze=[{parameters: ^conv1}]"
# As much as floats of 7 digits and an iteration of the same steps make of another order of summation.
NEAR = 1e-4


@dataclass(frozen=True)
class Runs:
    """The same training with and without measuring."""

    measured: Path
    plain: Path


@pytest.fixture(scope="module")
def runs(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """Of a ResNet with dropout, a frozen stem, averaged weights and another loss, on a part of the images."""
    made = []
    for name, section in (("measured", MEASURED), ("plain", None)):
        home = tmp_path_factory.mktemp(name)
        config = write_config(
            home / "run.yaml",
            data,
            loss={"name": "binary_cross_entropy", "label_smoothing": 0.1},
            train={"epochs": 3, "ema_decay": 0.9},
            perturbation={"rho": 0.05},
            checkpoint={"keep": 5},
            sharpness=section and {**section, "every_epochs": 2},
        )
        assert ssam_scale("train", "--config", config, "model.drop_rate=0.1", FROZEN, "data.subset=36") == 0
        made.append(home)
    return Runs(*made)


def metrics_of(home: Path) -> dict[str, dict[int, float]]:
    """What a run has recorded of sharpness, by name and step."""
    client = mlflow.MlflowClient(f"sqlite:///{home}/mlflow.db")
    [found] = client.search_runs([client.get_experiment_by_name("ssam_scale").experiment_id])
    names = [name for name in found.data.metrics if name.startswith("sharpness/")]
    return {
        name.removeprefix("sharpness/"): {m.step: m.value for m in client.get_metric_history(found.info.run_id, name)}
        for name in names
    }


def test_what_the_last_epoch_does_not_train_is_constant(data: Path, tmp_path: Path) -> None:
    path = write_config(tmp_path / "run.yaml", data, store=False, train={"epochs": 3})
    config = load(path, ["model.freeze=[{parameters: ^conv1}, {parameters: ^fc, until_epoch: 2}]"])
    loss = mean_loss(config, build_network(config), [], World())
    everything = {name for name, _ in build_network(config).named_parameters()}
    assert loss.weights.keys() == everything - {"conv1.weight"}


def asked(section: dict[str, Any]) -> list[str]:
    return [f"--{name.replace('_', '-')}={value}" for name, value in section.items()]


def test_training_is_the_same_bit_for_bit(runs: Runs) -> None:
    for epoch in (1, 2, 3):
        name = f"checkpoints/epoch_{epoch:04d}"
        assert differing(runs.measured / name, runs.plain / name) == []
    assert metrics_of(runs.plain) == {}


def test_it_is_measured_when_it_is_due_and_is_what_the_command_says_of_the_checkpoints(
    runs: Runs, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = metrics_of(runs.measured)
    assert found.keys() == {
        "loss", "gradient_norm", "gap", "eigenvalue_1", "eigenvalue_2", "trace", "trace_error"
    }  # fmt: skip
    assert all(steps.keys() == {6, 9} for steps in found.values())  # after epochs 2 and 3, of 3 steps each
    checkpoints = [runs.measured / f"checkpoints/epoch_{epoch:04d}" for epoch in (2, 3)]
    capsys.readouterr()
    assert ssam_scale("sharpness", *checkpoints, *asked(MEASURED), "--json", "--points=5") == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["epoch"] for row in rows] == [2, 3]
    assert [row["images"] for row in rows] == [20, 20]
    for row, step in zip(rows, (6, 9), strict=True):
        values = {"eigenvalue_1": row["eigenvalues"][0], "eigenvalue_2": row["eigenvalues"][1]}
        for name, steps in found.items():
            assert steps[step] == pytest.approx(values.get(name, row.get(name)), rel=NEAR), name
    assert ssam_scale("sharpness", runs.measured / "checkpoints", *asked(MEASURED), "--no-ema", "--json") == 0
    [raw] = json.loads(capsys.readouterr().out)
    assert raw["epoch"] == 3  # the newest
    assert raw["gap"] != pytest.approx(rows[1]["gap"], rel=0.01)


def test_checkpoints_side_by_side_in_a_table_and_pictures(
    runs: Runs, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoints = [runs.measured / f"checkpoints/epoch_{epoch:04d}" for epoch in (1, 3)]
    out = tmp_path / "new/folder"
    where = ["--data", f"folder:{data}/val", "-o", out, "--plane", "--points=3", "--probes=1", "--directions=2"]
    assert ssam_scale("sharpness", *checkpoints, *where, "--images=5") == 0
    said = capsys.readouterr()
    for word in (
        "sam epoch_0001",
        "sam epoch_0003",
        "gap",
        "eigenvalue 1",
        "trace",
        "mean gap",
        "5 images of folder:",
    ):
        assert word in said.out
    assert sorted(path.name for path in out.iterdir()) == ["curve.svg", "plane.svg", "sharpness.json"]
    for name in ("curve.svg", "plane.svg"):
        assert f"written: {out / name}" in said.err.replace("\n", "")
        text = (out / name).read_text()
        ElementTree.fromstring(text)
        assert "sam epoch_0001" in text
        assert "sam epoch_0003" in text
    for row in json.loads((out / "sharpness.json").read_text()):
        assert row["places"] == [-0.5, 0.0, 0.5]
        assert row["plane"][1] == row["curve"]
        assert row["curve"][1] == row["loss"]


class Once(torch.autograd.Function):
    """Without a second derivative."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return 2 * gradient


class OnceDifferentiable(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return Once.apply(super().forward(x.flatten(1)))


@timm.models.register_model
def once_differentiable(num_classes: int, **kwargs: Any) -> nn.Module:
    return OnceDifferentiable(3 * 32 * 32, num_classes)


def test_a_network_without_a_second_derivative_is_refused_before_the_first_step(
    data: Path, home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    network = {"name": "once_differentiable", "num_classes": CLASSES}
    config = write_config(home / "run.yaml", data, model=network, train={"epochs": 1}, sharpness={"images": 5})
    assert ssam_scale("train", "--config", config) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert "error: sharpness: OnceDifferentiable has an operation without a second derivative" in line
    assert not list(home.glob("checkpoints/epoch_*"))
    assert ssam_scale("train", "--config", config, "sharpness.eigenvalues=0") == 0
    assert metrics_of(home).keys() == {"loss", "gap", "gradient_norm"}


class SignalAfterEvaluation(Hook):
    """Sends SIGTERM to its own process when the first epoch is evaluated."""

    def between_epochs(self, progress: Progress) -> None:
        if progress.epoch == 1:
            os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.slow
def test_a_measurement_is_left_at_a_signal_and_comes_after_the_run_is_resumed(
    data: Path, home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_config(home / "run.yaml", data, train={"epochs": 1}, sharpness={**MEASURED, "probes": 0})

    def hooks(*args: Any) -> list[Hook]:
        every = build_hooks(*args)
        [place] = [number for number, hook in enumerate(every) if isinstance(hook, MeasureSharpness)]
        return [*every[:place], SignalAfterEvaluation(), *every[place:]]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "build_hooks", hooks)
        assert ssam_scale("train", "--config", config) == SAVED
    assert metrics_of(home) == {}
    assert "sharpness at radius" not in capsys.readouterr().out
    assert ssam_scale("train", "--config", config, "--resume", "auto") == 0
    said = capsys.readouterr().out
    assert "epoch 1/1: sharpness at radius 0.1: gap " in said
    assert metrics_of(home)["gap"].keys() == {4}


BACKENDS = ("ddp", "fsdp2", "zero1", "zero2", "zero3")


@pytest.mark.exhaustive  # minutes
@pytest.mark.parametrize("backend", BACKENDS)
def test_processes_share_images_and_vectors_of_sharded_weights(backend: str, data: Path, tmp_path: Path) -> None:
    """Two processes' own measurement; that of their checkpoint by two processes of torchrun; and by one."""
    section = {**MEASURED, "images": 21}
    config = write_config(
        tmp_path / "run.yaml", data, model=VIT, train={"epochs": 1, "ema_decay": 0.9}, sharpness=section
    )
    where = [f"sharding.backend={backend}", "checkpoint.format=sharded"]
    train_on_ranks(2, config, *where)
    saved, plain = tmp_path / "checkpoints/epoch_0001", tmp_path / "plain"
    measured = {name: steps[4] for name, steps in metrics_of(tmp_path).items()}
    train_on_ranks(2, config, *where, "sharpness=null", f"checkpoint.directory={plain}")
    assert differing(saved, plain / "epoch_0001") == []

    options = ["sharpness", saved, *asked(section), "--points=3", "--directions=2"]
    assert ssam_scale(*options, "-o", tmp_path / "one") == 0
    torchrun = [Path(sys.executable).parent / "torchrun", "--standalone", "--nproc_per_node", "2", "-m", "ssam_scale"]
    done = run([*torchrun, *options, "-o", tmp_path / "two"], cwd=ROOT, env={"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stdout
    [one], [two] = (json.loads((tmp_path / name / "sharpness.json").read_text()) for name in ("one", "two"))
    assert one["images"] == two["images"] == 21
    for name in ("loss", "gradient_norm", "gap", "random_gap", "eigenvalues", "trace", "trace_error", "curve"):
        assert two[name] == pytest.approx(one[name], rel=NEAR, abs=1e-6), name
    for name, value in measured.items():
        same = one["eigenvalues"][int(name[-1]) - 1] if name.startswith("eigenvalue") else one[name]
        assert value == pytest.approx(same, rel=NEAR, abs=1e-6), name


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["none"], "none: no such checkpoint here, and no run: "),
        (["empty"], "empty: is not a checkpoint, which has a state.json, and has none in it"),
        (["damaged"], "checkpoint damaged cannot be read: "),
        (["whole", "damaged"], "checkpoint damaged cannot be read: "),
        (["whole", "--data", "no.beton"], "no.beton"),
        (["whole", "--images=0"], "--images is 0; at least 1 is needed"),
        (["whole", "--rho=0"], "--rho is 0; a number above 0 is needed"),
        (["whole", "--rho=nan"], "--rho is nan; a number above 0 is needed"),
        (["whole", "--eigenvalues=-1"], "--eigenvalues is -1; at least 0 are needed"),
        (["whole", "--plane"], "--plane is a picture: say where it goes, with -o FOLDER"),
        (["whole", "-o", "file"], "-o file: "),
        (["whole", "-o", "linked"], "-o linked: curve.svg in it is a link"),
    ],
    ids=lambda value: "_".join(value) if isinstance(value, list) else "",
)
def test_mistakes_are_one_line_before_anything_is_measured(
    runs: Runs,
    arguments: list[str],
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    saved = runs.measured / "checkpoints/epoch_0003"
    shutil.copytree(saved, "damaged")
    with Path("damaged/model.safetensors").open("r+b") as file:
        file.truncate(1000)
    Path("whole").symlink_to(saved)
    for folder in ("empty", "linked"):
        Path(folder).mkdir()
    Path("file").touch()
    Path("linked/curve.svg").symlink_to("/nowhere")
    assert ssam_scale("sharpness", *arguments) == 2
    out = capsys.readouterr()
    assert out.out == ""
    assert [line for line in out.err.splitlines() if said in line] == out.err.splitlines()
