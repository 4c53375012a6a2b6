"""Runs that are recorded elsewhere than in MLflow, beside it, or nowhere."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from ssam_scale.tracking.shutdown import SAVED
from ssam_scale.tracking.store import open_store
from ssam_scale.train import loop
from ssam_scale.train.build import build_hooks
from ssam_scale.train.hooks import Hook
from ssam_scale.train.progress import Progress
from tests.support.runs import differing, ssam_scale, train_on_ranks, write_config
from tests.support.wandb_files import history, last, run_id, wandb_files

ALL = "tracking.trackers=[mlflow,tensorboard,wandb]"
MASK = {"rho": 0.05, "mask": {"pattern": "tensor", "samples": 8}}


def folder_of(home: Path) -> Path:
    return home / "checkpoints"


def read(home: Path) -> EventAccumulator:
    sizes = {"scalars": 0, "images": 0, "tensors": 0}
    return EventAccumulator(str(folder_of(home) / "tensorboard"), size_guidance=sizes).Reload()


def in_mlflow(home: Path) -> dict[str, list[tuple[int, float]]]:
    """Step and value of each metric's points, in order; those of the machine, which are MLflow's own, left out."""
    (run,) = runs_of(home)
    client = open_store(f"sqlite:///{home}/mlflow.db", create=False)
    return {
        key: [(point.step, point.value) for point in client.get_metric_history(run.info.run_id, key)]
        for key in run.data.metrics
        if not key.startswith("system/")
    }


def runs_of(home: Path) -> list[Any]:
    client = open_store(f"sqlite:///{home}/mlflow.db", create=False)
    found = client.search_runs([client.get_experiment_by_name("ssam_scale").experiment_id])
    return sorted(found, key=lambda run: run.info.start_time)


def test_every_metric_of_a_run_is_the_same_everywhere(
    data: Path, home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_config(home / "run.yaml", data, perturbation=MASK, tracking={"probe_every": 3})
    assert ssam_scale("train", "--config", config, ALL) == 0
    expected = in_mlflow(home)
    assert {"train/loss", "val/top1", "probe/dense", "mask/density", "summary/top1", "time/sparse/step"} <= {*expected}
    tensorboard = read(home)
    # It keeps values in float32.
    assert {
        key: [(point.step, point.value) for point in tensorboard.Scalars(key)] for key in tensorboard.Tags()["scalars"]
    } == {key: [(step, pytest.approx(value, rel=1e-6)) for step, value in of] for key, of in expected.items()}
    (file,) = wandb_files(folder_of(home))
    # It has one value of a metric for a step, the last one.
    assert {key: dict(of) for key, of in history(file).items() if not key.startswith("picture/")} == {
        key: dict(of) for key, of in expected.items() if not key.startswith("summary/")
    }
    summary = last(file, "summary")
    for key, of in expected.items():
        if key.startswith("summary/"):
            assert summary[key] == of[-1][1]
    assert tensorboard.Tags()["images"] == ["mask/density"]
    assert {"config/text_summary", "tags/text_summary", "description/text_summary"} <= {*tensorboard.Tags()["tensors"]}
    assert last(file, "config")["model"]["name"] == "resnet18"
    said = capsys.readouterr().out
    assert f"tensorboard --logdir {folder_of(home)}/tensorboard" in said
    assert f"wandb sync {folder_of(home)}/wandb/offline-run-*-{run_id(file)}" in said


WATCHED = """
import sys
seen = []
sys.addaudithook(lambda event, given: seen.append(str(given[:2])) if event == "subprocess.Popen" else None)
from ssam_scale.__main__ import main
try:
    main(sys.argv[1:])
except SystemExit as ended:
    code = ended.code
print("code", code or 0)
print("imported", *[name for name in ("mlflow", "tensorboard") if name in sys.modules])  # timm imports wandb
print("started", *[each for each in seen if "watchdog" in each or "wandb" in each])
"""


@pytest.mark.slow
def test_without_tracking_there_is_no_store_no_library_and_no_watcher(data: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path / "run.yaml", data, store=False, perturbation=MASK, tracking=None)
    done = subprocess.run(
        [sys.executable, "-c", WATCHED, "train", "--config", config], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    *said, code, imported, started = done.stdout.splitlines()
    assert (code, imported.split(), started.split()) == ("code 0", ["imported"], ["started"])
    assert any(line.startswith("epoch 2/2: top-1") for line in said)
    assert said[-1] == f"last checkpoint: {folder_of(tmp_path)}/epoch_0002"
    assert {path.name for path in tmp_path.iterdir()} == {"run.yaml", "checkpoints"}
    assert {path.name for path in folder_of(tmp_path).iterdir()} == {"epoch_0001", "epoch_0002", "result.json"}
    result = json.loads((folder_of(tmp_path) / "result.json").read_text())
    assert (result["run_id"], result["epochs"]) == (None, 2)


class Interrupted(Hook):
    """Sends SIGTERM to its own process when the first epoch's last step is done."""

    def after_epoch(self, progress: Progress) -> None:
        if progress.epoch == 1:
            os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.slow
@pytest.mark.parametrize("trackers", ["null", "{trackers: [tensorboard, wandb], log_every: 2}"])
def test_an_interrupted_run_goes_on_as_if_it_had_not_been(trackers: str, data: Path, home: Path) -> None:
    config = write_config(home / "run.yaml", data, perturbation=MASK)
    arguments = ["train", "--config", config, f"tracking={trackers}"]
    assert ssam_scale(*arguments, f"checkpoint.directory={home}/whole") == 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "build_hooks", lambda *args: [Interrupted(), *build_hooks(*args)])
        assert ssam_scale(*arguments) == SAVED
    assert ssam_scale(*arguments, "--resume", "auto") == 0
    assert differing(home / "whole/epoch_0002", folder_of(home) / "epoch_0002") == []
    whole, resumed = (json.loads((home / name / "result.json").read_text()) for name in ("whole", "checkpoints"))
    assert whole == resumed
    if trackers == "null":
        return
    for key in ("train/loss", "val/top1"):
        first, second = (
            [(point.step, point.value) for point in EventAccumulator(str(place / "tensorboard")).Reload().Scalars(key)]
            for place in (home / "whole", folder_of(home))
        )
        assert first == second
    one, two = wandb_files(folder_of(home))
    assert run_id(one) == run_id(two)
    (whole_file,) = wandb_files(home / "whole")
    assert history(one)["train/loss"] + history(two)["train/loss"] == history(whole_file)["train/loss"]


@pytest.mark.slow
def test_a_run_may_leave_mlflow_and_come_back(data: Path, home: Path) -> None:
    config = write_config(home / "run.yaml", data)
    resume = ["train", "--config", config, "--resume", "auto"]
    assert ssam_scale(*resume, "train.epochs=1") == 0
    assert ssam_scale(*resume, "train.epochs=2", "tracking=null") == 0
    (run,) = runs_of(home)
    assert run.data.metrics["epoch"] == 1
    assert ssam_scale(*resume, "train.epochs=3") == 0
    (run,) = runs_of(home)  # it is known again
    assert (run.info.status, run.data.metrics["epoch"], run.data.tags["resumed"]) == ("FINISHED", 3, "1")
    assert [step for step, _ in in_mlflow(home)["val/top1"]] == [4, 12]


@pytest.mark.slow
def test_a_run_that_began_untracked_is_in_mlflow_from_where_it_is_turned_on(data: Path, home: Path) -> None:
    config = write_config(home / "run.yaml", data)
    resume = ["train", "--config", config, "--resume", "auto"]
    assert ssam_scale(*resume, "train.epochs=1", "tracking=null") == 0
    assert ssam_scale(*resume, "train.epochs=2") == 0
    (run,) = runs_of(home)
    assert run.data.tags["metrics_from_step"] == "5"
    assert [step for step, _ in in_mlflow(home)["val/top1"]] == [8]


@pytest.mark.slow
def test_only_the_first_process_records(data: Path, home: Path) -> None:
    config = write_config(home / "run.yaml", data)
    train_on_ranks(2, config, "tracking.trackers=[tensorboard,wandb]")
    assert len(list((folder_of(home) / "tensorboard").iterdir())) == 1
    assert len(wandb_files(folder_of(home))) == 1
    assert [point.step for point in read(home).Scalars("train/loss")] == [2, 4, 6, 8]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_a_tracker_that_is_not_installed_is_an_error_before_anything_is_made(
    name: str, data: Path, tmp_path: Path
) -> None:
    config = write_config(tmp_path / "run.yaml", data, store=False, tracking={"trackers": [name]})
    code = f"import sys; sys.modules[{name!r}] = None; from ssam_scale.__main__ import main; main(sys.argv[1:])"
    done = subprocess.run(
        [sys.executable, "-c", code, "train", "--config", config], cwd=tmp_path, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (
        2,
        f"ssam-scale: error: tracking.trackers: {name} needs the package {name}, which is not installed: pip install "
        f"'ssam_scale[{name}]', or name other trackers\n",
    )
    assert {path.name for path in tmp_path.iterdir()} == {"run.yaml"}


@pytest.mark.exhaustive
def test_a_sweep_without_mlflow_ends_without_a_comparison(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    train = {"epochs": 1, "device": "cpu"}
    write_config(tmp_path / "run.yaml", data, store=False, train=train, perturbation=MASK, tracking=None)
    (tmp_path / "first.yaml").write_text("config: run.yaml\nmethods: [base]\nseeds: [0]\n")
    assert ssam_scale("sweep", "first.yaml") == 0
    assert "not compared: MLflow, which is not among tracking.trackers, has none of the runs" in capfd.readouterr().out
    assert not (tmp_path / "mlflow.db").exists()
    assert (tmp_path / "checkpoints/first/base-seed-0/result.json").exists()


def test_doctor_says_where_a_run_is_recorded(data: Path, home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = write_config(home / "run.yaml", data)
    assert ssam_scale("doctor", "--config", config, ALL) == 0
    said = capsys.readouterr().out
    assert f"tensorboard: {folder_of(home)}/tensorboard" in said
    assert f"wandb: {folder_of(home)}/wandb, offline" in said
    assert "takes experiment 'ssam_scale'" in said
    assert ssam_scale("doctor", "--config", config, "tracking=null") == 0
    assert "tracking" not in capsys.readouterr().out


@pytest.mark.parametrize(
    "command",
    [["compare"], ["evaluate", "a run"], ["sharpness", "0123456789abcdef0123456789abcdef"]],
    ids=lambda command: command[0],
)
def test_what_reads_a_store_says_in_a_line_that_there_is_none(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert ssam_scale(*command) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "there is no database mlflow.db" in said
