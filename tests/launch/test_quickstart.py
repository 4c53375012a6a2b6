"""launch/quickstart.sh itself, shortened, from a copy of the working tree in a folder with a space in its name."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from mlflow import MlflowClient

from tests.support.processes import run

METHODS = ["base", "sam", "ssam-element", "ssam-depth"]


def quickstart(clone: Path, *arguments: str, **env: str):
    # The environment's own installation of the package is of the checkout that was set up, not of this copy.
    path = os.pathsep.join([str(clone), os.environ.get("PYTHONPATH", "")])
    env = {"PYTHONPATH": path, "COLUMNS": "140", **env}
    return run(["bash", clone / "launch" / "quickstart.sh", *arguments], cwd=Path("/"), env=env, timeout=800)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("launcher", "processes"),
    [
        pytest.param("deepspeed", 2, marks=pytest.mark.exhaustive),
        pytest.param("torchrun", 2, marks=pytest.mark.exhaustive),
        ("torchrun", 1),
    ],
)
def test_short(clone, launcher, processes):
    override = [] if launcher == "deepspeed" else ["data.resolution=28"]
    done = quickstart(clone, "--short", *override, LAUNCHER=launcher, PROCESSES=str(processes))
    where = "2 processes of 1 node, DDP" if processes == 2 else "1 process of 1 node, single"
    assert done.returncode == 0, done.stdout
    lines = done.stdout.splitlines()
    for number, method in enumerate(METHODS, 1):
        title = next(i for i, line in enumerate(lines) if f"Training {number} of {len(METHODS)}: " in line)
        assert f"({processes} processes, started by {launcher})" in lines[title]
        # The launcher is no backend: what each method ran on is said before it is trained.
        after = lines[title:]
        assert any(line.startswith(f"{method} resnet18 on {where}, ") for line in after[:40]), after
    table = [line for line in done.stdout.splitlines() if line.startswith("│")]
    assert sorted(line.split()[1] for line in table) == sorted(METHODS), done.stdout
    assert "ui --backend-store-uri sqlite:///mlflow.db" in done.stdout

    client = MlflowClient(f"sqlite:///{clone}/mlflow.db")
    experiment = client.get_experiment_by_name("quickstart-short")
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id])
    assert sorted(run.data.tags["method"] for run in runs) == sorted(METHODS)
    assert {run.info.status for run in runs} == {"FINISHED"}
    assert {run.data.tags["world_size"] for run in runs} == {str(processes)}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data"], "quickstart: --data needs a folder"),
        (["--data", "/no/such"], "quickstart: --data /no/such: has no folder train; expected train/ and val/ in it"),
        (
            ["perturbation=null"],
            "quickstart: perturbation=null: the quickstart sets perturbation itself, to compare the methods; "
            "use ssam-scale train for other runs",
        ),
        (["--quick"], "quickstart: unknown option --quick; there are --data DIR and --short"),
    ],
)
def test_wrong_arguments(clone, arguments, message):
    done = quickstart(clone, *arguments)
    assert done.returncode == 2
    assert done.stdout == f"{message}\n"


def test_wrong_launcher(clone):
    done = quickstart(clone, LAUNCHER="mpirun")
    assert done.returncode == 2
    assert done.stdout == "quickstart: LAUNCHER=mpirun: there are deepspeed and torchrun\n"


def test_a_wrong_override_shows_before_anything_is_written(clone):
    done = quickstart(clone, "--short", "train.epoch=3")
    assert done.returncode == 2
    assert done.stdout.splitlines()[-1].endswith("train.epoch: unknown key; did you mean train.epochs?")
    assert not (clone / "data").exists()


def test_help(clone):
    done = quickstart(clone, "--help")
    assert done.returncode == 0
    assert "bash launch/quickstart.sh --data DIR" in done.stdout
