"""What can be known in the first second is said in the first second, by a training and by a dry run."""

from __future__ import annotations

import shutil
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from ssam_scale.config.load import dump, load
from ssam_scale.errors import UserError
from ssam_scale.tracking.store import check_experiment
from tests.support.runs import ssam_scale, write_config


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    capsys.readouterr()
    assert ssam_scale("train", *arguments) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    return err


@pytest.mark.parametrize("form", [[], ["--dry-run"]], ids=["train", "dry run"])
def test_folders_and_stores_are_looked_at_first(
    form: list[str], data: Path, home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before the model is built: one that does not exist would be the next mistake."""
    config = str(write_config(home / "run.yaml", data))
    (home / "file").write_text("")
    (home / "line").write_text("\n")  # which SQLite would overwrite
    (home / "nothing").symlink_to(home / "gone")
    there = sorted(home.rglob("*"))
    for override, told in {
        f"checkpoint.directory={home}/file/c": "file is not a folder; choose another folder",
        f"checkpoint.directory={home}/nothing/c": "nothing is a link to nothing",
        "checkpoint.directory=/proc/c": "checkpoint.directory /proc/c",
        f"tracking.uri=sqlite:///{home}/file/x.db": "is not a folder",
        f"tracking.uri=sqlite:///{home}": "is a folder",
        f"tracking.uri=sqlite:///{home}/run.yaml": "file is not a database",
        "tracking.uri=file:///proc/x": "nothing can be made in /proc",
        f"tracking.uri=file:{home}/file": "file is not a folder; what works: sqlite:///mlflow.db",
        f"tracking.uri={home}/file/x": "file is not a folder",
        "tracking.uri=file://mlruns/x": "is of another machine, mlruns; a folder of this one is file:mlruns/x, or ",
        'tracking.uri="file:"': "names no folder",
        "tracking.uri=smb://there": "is no MLflow tracking URI",
        "tracking.uri=http://127.0.0.1:9": "no MLflow server answers",
        "tracking.uri=http://127.0.0.1:99999": "Port out of range",
        "tracking.uri=http://u:secret@[::1": "tracking.uri [::1: Invalid IPv6 URL",
        "tracking.uri=127.0.0.1:5000": "has no scheme; of a server, write http://127.0.0.1:5000",
        f"tracking.uri=sqlite:///{home}/line": "file is not a database",
        f"checkpoint.directory={'x' * 300}": "File name too long; choose another folder",
        f"checkpoint.resume={home}": "is not a checkpoint",
        f"data.train={data}": "is a folder, and a .beton file is needed; did you mean",
    }.items():
        assert told in refusal(capsys, "--config", config, "model.name=no_such_model", override, *form), override
    assert sorted(home.rglob("*")) == there
    assert (home / "line").read_text() == "\n"


def test_a_service_of_mlflows_is_no_folder_of_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DATABRICKS_CONFIG_FILE", str(tmp_path / "none"))
    with pytest.raises(UserError, match=r"tracking\.uri databricks: Reading Databricks credential"):
        check_experiment("databricks", "x")


def test_an_optimizer_is_looked_at_before_the_model(data: Path, home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = str(write_config(home / "run.yaml", data))
    told = refusal(capsys, "--config", config, "model.name=no_such_model", "optimizer.kwargs={betas: [0.9, 0.99]}")
    assert "sgd takes no betas" in told


def test_printed_defaults_are_taken_again(data: Path, home: Path) -> None:
    """A momentum among them, of an optimizer that has none."""
    resolved = load(write_config(home / "run.yaml", data), ["optimizer.name=adamw"])
    (home / "printed.yaml").write_text(dump(resolved))
    assert ssam_scale("train", "--config", home / "printed.yaml", "--dry-run") == 0


def test_batchnorm_of_a_single_image(data: Path, home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = str(write_config(home / "run.yaml", data, perturbation={"rho": 0.1}))
    told = refusal(capsys, "--config", config, "data.batch_size=12", "train.accumulation=12")
    assert "12 micro-batches of 1 images on each process leave a pass a single image, which BatchNorm of" in told
    told = refusal(capsys, "--config", config, "data.batch_size=12", "perturbation.direction.fraction=0.1")
    assert "perturbation.direction.fraction 0.1 leaves the ascent a single image" in told


def test_validation_by_the_training_images_is_said(data: Path, home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = write_config(home / "run.yaml", data)
    for suffix in (".beton", ".beton.json"):
        shutil.copy(data / f"train{suffix}", home / f"copy{suffix}")
    (home / "bare.beton").symlink_to(data / "train.beton")
    for val in ("copy", "bare"):
        assert ssam_scale("train", "--config", config, f"data.val={home}/{val}.beton", "--dry-run") == 0
        assert f"{val}.beton holds the images of data.train" in capsys.readouterr().out
    assert ssam_scale("train", "--config", config, "--dry-run") == 0
    assert "holds the images" not in capsys.readouterr().out


def test_what_is_said_of_a_run(data: Path, home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = write_config(home / "run.yaml", data, train={"epochs": 1})
    assert ssam_scale("train", "--config", config, "model.num_classes=12") == 0
    assert "model.num_classes 12: " in (said := capsys.readouterr().out)
    assert "outputs are never a label" in said
    assert ssam_scale("train", "--config", config, "model.num_classes=12", "--resume", "auto") == 0
    assert "is of epoch 1, the last: nothing is left to train" in capsys.readouterr().out


def test_a_dry_run_is_told_what_a_run_is_told(data: Path, home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A used folder, a finished run and a file of times were found by the run alone."""
    config = write_config(home / "run.yaml", data, train={"epochs": 1})
    assert ssam_scale("train", "--config", config) == 0
    assert "of an earlier run: go on from it with --resume auto" in refusal(
        capsys, "--config", str(config), "--dry-run"
    )
    assert ssam_scale("train", "--config", config, "--resume", "auto", "--dry-run") == 0
    assert "is of epoch 1, the last: nothing is left to train" in capsys.readouterr().out
    fresh = ("--config", str(config), f"checkpoint.directory={home}/other", "--dry-run")
    assert "--resume is empty; give a checkpoint's folder, or auto" in refusal(capsys, *fresh, "--resume", "")
    told = refusal(capsys, *fresh, "perturbation.rho=0.1", f"tracking.cost_times={home}/gone")
    assert f"tracking.cost_times {home}/gone: No such file" in told


def test_another_programs_database_is_left_alone(data: Path, home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """MLflow made its tables in it."""
    config = write_config(home / "run.yaml", data)
    with closing(sqlite3.connect(home / "other.db")) as connection:
        connection.execute("CREATE TABLE own (value)")
        connection.commit()
    before = (home / "other.db").read_bytes()
    assert ssam_scale("train", "--config", config, f"tracking.uri=sqlite:///{home}/other.db", "--dry-run") == 0
    assert ssam_scale("compare", "--experiment", "x", "--tracking-uri", f"sqlite:///{home}/other.db") == 2
    assert "other.db is a database of something else than MLflow; name another store" in capsys.readouterr().err
    assert (home / "other.db").read_bytes() == before
