"""slurm/imagenet_ssam.sh on a real Slurm of two nodes."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from mlflow import MlflowClient
from mlflow.entities import Run

from tests.support import slurm
from tests.support.checkout import ROOT
from tests.support.processes import run, wait_until

pytestmark = [pytest.mark.slow, pytest.mark.skipif(slurm.missing() is not None, reason=str(slurm.missing()))]

SCRIPT = ROOT / "slurm" / "imagenet_ssam.sh"
CONFIG = ROOT / "configs" / "quickstart.yaml"
TWO_NODES = ["--nodes=2", "--gpus-per-node=0"]


@pytest.fixture(scope="module")
def cluster() -> Iterator[slurm.Cluster]:
    with slurm.two_nodes() as cluster:
        yield cluster


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    program = shutil.which("ssam-scale", path=str(ROOT / ".venv" / "bin"))
    assert program, "run launch/setup.sh"
    done = run([program, "data", "fashion-mnist", folder, "--limit", "256", "--val-limit", "128"], cwd=folder)
    assert done.returncode == 0, done.stdout
    return folder


@pytest.fixture
def job(tmp_path) -> Path:
    folder = tmp_path / "a job"
    folder.mkdir()
    return folder


def overrides(images: Path, *more: str) -> list[str]:
    return [
        f"data.train={images}/train.beton",
        f"data.val={images}/val.beton",
        "data.subset=null",
        "data.batch_size=64",
        "data.eval_batch_size=64",
        "schedule.warmup_epochs=0",
        "train.epochs=1",
        "train.eval_epochs=1",
        "checkpoint.every_epochs=1",
        *more,
    ]


def tracked(folder: Path) -> list[Run]:
    client = MlflowClient(f"sqlite:///{folder}/mlflow.db")
    experiment = client.get_experiment_by_name("quickstart")
    assert experiment is not None
    return list(client.search_runs([experiment.experiment_id]))


def test_two_nodes(cluster, images, job):
    number = cluster.submit(*TWO_NODES, SCRIPT, CONFIG, *overrides(images), cwd=job)
    ended = cluster.wait(number, timeout=300)
    log = (job / f"slurm-{number}.out").read_text()
    assert (ended["JobState"], ended["ExitCode"]) == ("COMPLETED", "0:0"), log
    assert "2 node(s) x 1 process(es), 0 GPU(s)" in log
    (only,) = tracked(job)
    assert only.info.status == "FINISHED"
    assert only.data.tags["world_size"] == "2"
    assert (job / "checkpoints" / f"slurm-{number}").is_dir()


def test_a_typo_fails_at_once_with_one_line(cluster, images, job):
    number = cluster.submit(*TWO_NODES, SCRIPT, CONFIG, *overrides(images, "train.epoch=1"), cwd=job)
    ended = cluster.wait(number, timeout=60)
    assert (ended["JobState"], ended["ExitCode"]) == ("FAILED", "2:0")
    log = (job / f"slurm-{number}.out").read_text()
    assert log.splitlines() == [
        "ssam-scale: error: override train.epoch=1: train.epoch: unknown key; did you mean train.epochs?"
    ]
    assert not (job / "mlflow.db").exists()


def test_no_such_config(cluster, job):
    number = cluster.submit(*TWO_NODES, SCRIPT, "resnet5O.yaml", cwd=job)
    assert cluster.wait(number, timeout=60)["ExitCode"] == "2:0"
    assert "resnet5O.yaml: no such file" in (job / f"slurm-{number}.out").read_text()


def test_a_failure_of_the_training_is_the_jobs(cluster, images, job):
    number = cluster.submit(*TWO_NODES, SCRIPT, CONFIG, *overrides(images, "data.train=none.beton"), cwd=job)
    ended = cluster.wait(number, timeout=120)
    assert ended["JobState"] == "FAILED"
    assert ended["ExitCode"] != "0:0"
    assert "none.beton" in (job / f"slurm-{number}.out").read_text()


def test_the_time_limit_is_survived(cluster, images, job):
    """At the signal that Slurm sends before the time limit it is saved and queued again, and goes on where it was."""
    late = ["train.epochs=6", "checkpoint.every_epochs=100"]  # so that nothing else has saved it
    number = cluster.submit(*TWO_NODES, SCRIPT, CONFIG, *overrides(images, *late), cwd=job)
    log = job / f"slurm-{number}.out"
    wait_until(lambda: log.exists() and "epoch 2/6" in log.read_text(), 180, "two epochs")
    cluster.command("scancel", "--batch", "--signal=USR1", number)
    wait_until(lambda: cluster.job(number)["JobState"] == "PENDING", 120, "queued again")
    cluster.command("scontrol", "update", f"JobId={number}", "StartTime=now")  # rather than in two minutes
    ended = cluster.wait(number, timeout=300)
    assert (ended["JobState"], ended["Restarts"]) == ("COMPLETED", "1"), log.read_text()
    first, _, again = log.read_text().partition(f"job {number} (start 2)")
    assert f"job {number} reaches its time limit: it is saved, and queued again" in first
    assert "SIGUSR1: saved as" in first
    assert "epoch 1/6" not in again
    assert "epoch 2/6" not in again
    assert "epoch 6/6" in again
    assert [run.info.status for run in tracked(job)] == ["FINISHED"]


def test_a_job_that_comes_no_further_ends_with_the_reason(cluster, images, job):
    """It was queued again for ever, where its time limit came before anything was saved."""
    number = cluster.submit(*TWO_NODES, SCRIPT, CONFIG, *overrides(images, "train.epochs=600"), cwd=job)
    starts = job / "checkpoints" / f"slurm-{number}" / ".starts.json"

    def begun() -> int:
        return starts.read_text().count("the beginning") if starts.exists() else 0

    for start in (1, 2):
        wait_until(lambda start=start: begun() == start, 180, f"start {start}")
        cluster.command("scontrol", "requeue", number)
        wait_until(lambda: cluster.job(number)["JobState"] == "PENDING", 120, "queued again")
        cluster.command("scontrol", "update", f"JobId={number}", "StartTime=now")
    ended = cluster.wait(number, timeout=300)
    log = (job / f"slurm-{number}.out").read_text()
    assert ended["JobState"] == "FAILED", log
    assert ended["Restarts"] == "2"
    assert "is at the beginning at its start number 3, as it was at the two before: they have saved nothing" in log
