"""slurm/imagenet_ssam.sh on a real Slurm of two nodes."""

from __future__ import annotations

import math
import os
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from mlflow import MlflowClient
from mlflow.entities import Run

from ssam_scale.train.checkpoint import newest
from tests.support import slurm
from tests.support.checkout import ROOT
from tests.support.processes import run, wait_until
from tests.support.runs import differing

pytestmark = [pytest.mark.slow, pytest.mark.skipif(slurm.missing() is not None, reason=str(slurm.missing()))]

SCRIPT = ROOT / "slurm" / "imagenet_ssam.sh"
SWEEP = ROOT / "slurm" / "sweep.sh"
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
def job(cluster: slurm.Cluster, tmp_path: Path) -> Iterator[Path]:
    """A folder to submit jobs from, none of which outlives the test."""
    folder = tmp_path / "a job"
    folder.mkdir()
    yield folder
    slurm.cancel_all(cluster)


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
    """The second has fewer cores, which is its own number of threads."""
    number = cluster.submit(*TWO_NODES, SCRIPT, CONFIG, *overrides(images), cwd=job, env={"OMP_NUM_THREADS": ""})
    ended = cluster.wait(number, timeout=300)
    log = (job / f"slurm-{number}.out").read_text()
    assert (ended["JobState"], ended["ExitCode"]) == ("COMPLETED", "0:0"), log
    assert "2 node(s) x 1 process(es) by torchrun, 0 GPU(s)" in log
    for node, cores in zip(("n1", "n2"), slurm.CORES, strict=True):
        assert f"node {node}: {cores} cores, {cores} threads a process" in log
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


EPOCHS = 16
"""So many that a signal that follows the second comes before the last."""

LATE = [f"train.epochs={EPOCHS}", "checkpoint.every_epochs=100"]  # nothing else saves
SAME = {"OMP_NUM_THREADS": "1"}  # sums are in the same order


@pytest.fixture(scope="module")
def uninterrupted(cluster: slurm.Cluster, images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The last checkpoint of a job that nothing has happened to."""
    job = tmp_path_factory.mktemp("uninterrupted")
    number = cluster.submit(*TWO_NODES, SCRIPT, CONFIG, *overrides(images, *LATE), cwd=job, env=SAME)
    assert cluster.wait(number, timeout=400)["JobState"] == "COMPLETED", (job / f"slurm-{number}.out").read_text()
    return last_checkpoint(job, number)


def last_checkpoint(job: Path, number: str) -> Path:
    return job / "checkpoints" / f"slurm-{number}" / f"epoch_{EPOCHS:04d}"


def run_now(cluster: slurm.Cluster, number: str, log: Path, start: int = 2) -> None:
    """A job that was queued again, rather than in two minutes; back when that start of it has begun.

    Before, its state means little: while Slurm still ends the start before, it may read PENDING, and then FAILED. In
    the second in which that has ended, slurmd takes the next start for it, and refuses it ("Job credential revoked").
    """
    told = -math.inf

    def begun() -> bool:
        nonlocal told
        if f"job {number} (start {start})" in log.read_text():
            return True
        if time.monotonic() > told + 20.0 and cluster.job(number)["JobState"] == "PENDING":
            cluster.command("scontrol", "update", f"JobId={number}", "StartTime=now+4")
            told = time.monotonic()
        return False

    wait_until(begun, 180, f"start {start} of job {number}")


def test_preemption_is_survived(cluster, images, job, uninterrupted):
    """Slurm (22.05) sends SIGTERM to the processes and not to the script, and ends the job as TIMEOUT if it goes on."""
    number = cluster.submit(*TWO_NODES, SCRIPT, CONFIG, *overrides(images, *LATE), cwd=job, env=SAME)
    log = job / f"slurm-{number}.out"
    wait_until(lambda: log.exists() and "epoch 2/" in log.read_text(), 180, "two epochs")
    urgent = cluster.submit(
        "--partition=urgent", "--nodes=2", "--exclusive", "--output=urgent.out", "--wrap", "hostname", cwd=job
    )
    run_now(cluster, number, log)
    ended = cluster.wait(number, timeout=400)
    assert (ended["JobState"], ended["Restarts"]) == ("COMPLETED", "1"), log.read_text()
    assert cluster.job(urgent)["JobState"] == "COMPLETED"
    first, _, again = log.read_text().partition(f"job {number} (start 2)")
    assert f"job {number} is preempted: it is saved where a step ended in time, and queued again" in first
    assert "SIGTERM: saved as" in first
    assert "epoch 2/" not in again
    assert differing(uninterrupted, last_checkpoint(job, number)) == []


def test_a_node_that_is_lost_is_survived(cluster, images, job, uninterrupted):
    """Nothing is saved by whom it meets: the job goes on from what was saved before, once the node has come back.

    As it does by itself here (ReturnToService=2), where only the controller took it for lost.
    """
    number = cluster.submit(
        *TWO_NODES, SCRIPT, CONFIG, *overrides(images, *LATE, "checkpoint.every_steps=6"), cwd=job, env=SAME
    )
    log = job / f"slurm-{number}.out"
    checkpoints = job / "checkpoints" / f"slurm-{number}"
    wait_until(lambda: newest(checkpoints) is not None, 180, "a checkpoint")
    cluster.command("scontrol", "update", "NodeName=n2", "State=DOWN", "Reason=lost")
    run_now(cluster, number, log)
    ended = cluster.wait(number, timeout=400)
    assert (ended["JobState"], ended["Restarts"]) == ("COMPLETED", "1"), log.read_text()
    _, _, again = log.read_text().partition(f"job {number} (start 2)")
    assert "resumed from" in again
    assert differing(uninterrupted, last_checkpoint(job, number)) == []


def test_the_time_limit_is_survived(cluster, images, job, uninterrupted):
    """At the signal that Slurm sends before the time limit it is saved and queued again, and goes on where it was."""
    number = cluster.submit(*TWO_NODES, SCRIPT, CONFIG, *overrides(images, *LATE), cwd=job, env=SAME)
    log = job / f"slurm-{number}.out"
    wait_until(lambda: log.exists() and "epoch 2/" in log.read_text(), 180, "two epochs")
    cluster.command("scancel", "--batch", "--signal=USR1", number)
    run_now(cluster, number, log)
    ended = cluster.wait(number, timeout=300)
    assert (ended["JobState"], ended["Restarts"]) == ("COMPLETED", "1"), log.read_text()
    first, _, again = log.read_text().partition(f"job {number} (start 2)")
    assert f"job {number} reaches its time limit: it is saved, and queued again" in first
    assert "SIGUSR1: saved as" in first
    assert "epoch 2/" not in again
    assert differing(uninterrupted, last_checkpoint(job, number)) == []
    assert [run.info.status for run in tracked(job)] == ["FINISHED"]


def test_a_job_that_comes_no_further_ends_with_the_reason(cluster, images, job):
    """It was queued again for ever, where its time limit came before anything was saved."""
    number = cluster.submit(*TWO_NODES, SCRIPT, CONFIG, *overrides(images, "train.epochs=600"), cwd=job)
    log = job / f"slurm-{number}.out"
    starts = job / "checkpoints" / f"slurm-{number}" / ".starts.json"

    def begun() -> int:
        return starts.read_text().count("the beginning") if starts.exists() else 0

    for start in (1, 2):
        wait_until(lambda start=start: begun() == start, 180, f"start {start}")
        cluster.command("scontrol", "requeue", number)
        run_now(cluster, number, log, start + 1)
    ended = cluster.wait(number, timeout=300)
    assert (ended["JobState"], ended["Restarts"]) == ("FAILED", "2"), log.read_text()
    reason = "is at the beginning at its start number 3, as it was at the two before: they have saved nothing"
    assert reason in log.read_text()


@pytest.mark.exhaustive  # examples start by it in the slow tier
def test_deepspeed_as_the_launcher(cluster, images, job):
    number = cluster.submit(*TWO_NODES, SCRIPT, CONFIG, *overrides(images), cwd=job, env={"LAUNCHER": "deepspeed"})
    ended = cluster.wait(number, timeout=300)
    log = (job / f"slurm-{number}.out").read_text()
    assert ended["JobState"] == "COMPLETED", log
    assert "2 node(s) x 1 process(es) by deepspeed" in log
    assert "on 2 processes of 2 nodes" in log
    assert (job / f"slurm-{number}.hosts").read_text() == "n1 slots=1\nn2 slots=1\n"


# What stands for a container's runtime notes what it was told, and runs the command on the host.
APPTAINER = """#!/bin/bash
printf '%s\\n' "$@" >>"$NOTES"
while [[ $1 != *.sif ]]; do shift; done
shift
exec "$@"
"""
PYXIS = """#!/bin/bash
kept=()
for word; do
    case $word in
    --container-*) printf '%s\\n' "$word" >>"$NOTES" ;;
    *) kept+=("$word") ;;
    esac
done
exec @SRUN@ "${kept[@]}"
"""


@pytest.fixture
def runtimes(tmp_path: Path) -> dict[str, str]:
    """The environment of a cluster that has both runtimes."""
    folder = tmp_path / "bin"
    folder.mkdir()
    srun = shutil.which("srun") or pytest.fail("no srun")
    for name, text in (("apptainer", APPTAINER), ("srun", PYXIS.replace("@SRUN@", srun))):
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    path = os.pathsep.join([str(folder), os.environ["PATH"]])
    return {"PATH": path, "NOTES": str(tmp_path / "notes"), "PYTHON": str(ROOT / ".venv/bin/python")}


@pytest.mark.exhaustive
@pytest.mark.parametrize("image", ["an image.sif", "ssam_scale:latest"])
def test_in_a_container(cluster, images, job, tmp_path, runtimes, image):
    (job / "an image.sif").touch()
    environment = {**runtimes, "CONTAINER_IMAGE": image, "CONTAINER_MOUNTS": "/data,/scratch:/tmp/scratch"}
    number = cluster.submit(*TWO_NODES, SCRIPT, CONFIG, *overrides(images), cwd=job, env=environment)
    ended = cluster.wait(number, timeout=300)
    log = (job / f"slurm-{number}.out").read_text()
    assert ended["JobState"] == "COMPLETED", log
    assert "on 2 processes of 2 nodes" in log
    mounts = f"{ROOT}:{ROOT},{job}:{job},/data:/data,/scratch:/tmp/scratch"
    notes = (tmp_path / "notes").read_text().splitlines()
    if image.endswith(".sif"):
        assert notes[:6] == ["exec", "--bind", mounts, "--pwd", str(job), image]
        assert notes.count("exec") == 3  # the check, and one on each node
    else:
        each = [f"--container-image={image}", f"--container-mounts={mounts}", f"--container-workdir={job}"]
        assert notes == each * 2


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"CONTAINER_RUNTIME": "apptainer"}, "CONTAINER_RUNTIME=apptainer without a CONTAINER_IMAGE"),
        (
            {"CONTAINER_IMAGE": "a", "CONTAINER_RUNTIME": "podman"},
            "CONTAINER_RUNTIME=podman: there are apptainer and pyxis",
        ),
        ({"CONTAINER_IMAGE": "none.sif"}, "CONTAINER_IMAGE=none.sif: no such file"),
        ({"LAUNCHER": "mpirun"}, "LAUNCHER=mpirun: there are torchrun and deepspeed"),
        ({"SSAM_SWEEP": "list"}, "SSAM_SWEEP=list: only for a task of an array"),
    ],
    ids=["no image", "unknown runtime", "no file", "launcher", "sweep"],
)
def test_what_cannot_be_started_is_one_line(cluster, job, runtimes, environment, message):
    number = cluster.submit(*TWO_NODES, SCRIPT, cwd=job, env=runtimes | environment)
    assert cluster.wait(number, timeout=60)["ExitCode"] == "2:0"
    (line,) = (job / f"slurm-{number}.out").read_text().splitlines()
    assert line.startswith(f"imagenet_ssam: {message}")


@pytest.mark.exhaustive  # a file of one is swept in the slow tier
def test_a_sweep(cluster, images, job):
    """An array: a folder each, one group; a task that is queued again takes no other with it."""
    words = ["first", "--nodes=1", "--gpus-per-node=0", "--methods", "base,sam", "--seeds", "3", CONFIG]
    done = run(["bash", SWEEP, *words, *overrides(images)], cwd=job, env=cluster.env, timeout=120)
    assert done.returncode == 0, done.stdout
    *table, last = done.stdout.splitlines()
    assert [line.split() for line in table] == [
        ["task", "method", "seed", "folder"],
        ["0", "base", "3", "checkpoints/first/base-seed-3"],
        ["1", "sam", "3", "checkpoints/first/sam-seed-3"],
    ]
    array = last.split()[-1]
    for task in (0, 1):
        ended = cluster.wait(f"{array}_{task}", timeout=300)
        assert ended["JobState"] == "COMPLETED", (job / f"sweeps/first/slurm-{array}_{task}.out").read_text()
    assert {run.data.tags["group"] for run in tracked(job)} == {"first"}
    assert {run.data.tags["method"] for run in tracked(job)} == {"base", "sam"}
    for method in ("base", "sam"):
        assert newest(job / f"checkpoints/first/{method}-seed-3") is not None
    assert (job / "sweeps/first/tasks.txt").read_text().splitlines() == table


def test_a_file_of_a_sweep(cluster, images, job):
    """The same runs as `ssam-scale sweep` does on one machine, of which it then knows."""
    values = "".join(f"  {key}: {value}\n" for key, _, value in (each.partition("=") for each in overrides(images)))
    (job / "two.yaml").write_text(f"config: {CONFIG}\nmethods: [base, sam]\noverrides:\n{values}")
    words = ["two.yaml", "--nodes=1", "--gpus-per-node=0"]
    done = run(["bash", SWEEP, *words], cwd=job, env=cluster.env, timeout=120)
    assert done.returncode == 0, done.stdout
    array = done.stdout.split()[-1]
    for task in (0, 1):
        ended = cluster.wait(f"{array}_{task}", timeout=300)
        assert ended["JobState"] == "COMPLETED", (job / f"sweeps/two/slurm-{array}_{task}.out").read_text()
    done = run([sys.executable, "-m", "ssam_scale", "sweep", "two.yaml"], cwd=job, env=cluster.env)
    assert done.returncode == 0, done.stdout
    assert done.stdout.startswith("2 of 2 runs are done")
    assert "gain / SAM" in done.stdout
