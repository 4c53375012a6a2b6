"""slurm/sweep.sh before it submits anything."""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.checkout import ROOT
from tests.support.processes import run

SWEEP = ROOT / "slurm" / "sweep.sh"
CONFIG = ROOT / "configs" / "quickstart.yaml"


def sweep(folder: Path, *words: str | Path) -> subprocess.CompletedProcess[str]:
    return run(["bash", SWEEP, *words], cwd=folder, env={"PYTHON": sys.executable})


@pytest.mark.slow
def test_it_says_which_task_does_what(tmp_path: Path) -> None:
    own = "half: perturbation.direction.fraction=0.5;  perturbation.rho=0.3"
    words = [
        "a",
        "--methods=base,msam",
        "--seeds",
        "7,5",
        "--method",
        own,
        "--array-limit",
        "2",
        "--nodes=4",
        "--check",
    ]
    done = sweep(tmp_path, *words, CONFIG, "train.epochs=3")
    assert done.returncode == 0, done.stdout
    _, *table, last = done.stdout.splitlines()
    assert [line.split() for line in table] == [
        [str(task), method, seed, f"checkpoints/a/{method}-seed-{seed}"]
        for task, (method, seed) in enumerate((m, s) for m in ("base", "msam", "half") for s in ("7", "5"))
    ]
    assert shlex.split(last) == [
        "sbatch",
        "--array=0-5%2",
        "--job-name=a",
        "--output=sweeps/a/slurm-%A_%a.out",
        "--nodes=4",
        str(ROOT / "slurm/imagenet_ssam.sh"),
    ]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "sweep: a name is needed: bash slurm/sweep.sh NAME"),
        (["a/b"], "sweep: a/b: a sweep's name is of letters"),
        (["a", "--seeds", "1,b"], "sweep: --seeds 1,b: whole numbers are needed"),
        (["a", "--seeds", "1,1"], "sweep: --seeds 1,1: one is there twice"),
        (["a", "--seeds"], "sweep: --seeds needs a value"),
        (["a", "--methods", "sam,sam"], "sweep: a method is named twice among sam sam"),
        (
            ["a", "--method", "perturbation.rho=1"],
            "sweep: --method 'perturbation.rho=1': give 'NAME: OVERRIDE; OVERRIDE'",
        ),
        (["a", "--array=0-3"], "sweep: --array=0-3: a sweep computes its array"),
        (["a", "-N", "2"], "sweep: -N: sbatch's options are given as --option=value here"),
        (["a", "--array-limit=0"], "sweep: --array-limit 0: a whole number from 1 on is needed"),
        (["a", str(CONFIG), "train.seed=3"], "sweep: train.seed=3: a sweep sets train.seed itself"),
    ],
    ids=lambda value: " ".join(Path(word).name for word in value) if isinstance(value, list) else "",
)
def test_a_mistake_is_one_line(tmp_path: Path, words: list[str], message: str) -> None:
    done = sweep(tmp_path, *words)
    assert done.returncode == 2
    assert done.stdout.startswith(message)
    assert done.stdout.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_method_that_is_none_is_told_before_anything_is_submitted(tmp_path: Path) -> None:
    done = sweep(tmp_path, "a", "--methods", "sma", CONFIG)
    assert done.returncode == 2
    assert "perturbation.preset: must be sam, " in done.stdout
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """Of `ssam-scale sweep`, in a folder of its own."""
    path = tmp_path / "files" / "radius.yaml"
    path.parent.mkdir()
    path.write_text(f"config: {CONFIG}\nmethods: [base, sam]\ngrid: {{perturbation.rho: [0.1, 0.2]}}\n")
    return path


@pytest.mark.slow
def test_a_file_says_methods_and_values(tmp_path: Path, file: Path) -> None:
    done = sweep(tmp_path, file, "--nodes=2", "--array-limit=2", "--check")
    assert done.returncode == 0, done.stdout
    *table, last = done.stdout.splitlines()
    names = ["base-seed-0", "sam-rho=0.1-seed-0", "sam-rho=0.2-seed-0"]
    assert [line.rpartition("/")[2] for line in table] == [f"{name})" for name in names]
    assert "--array=0-2%2 --job-name=radius --output=sweeps/radius/slurm-%A_%a.out --nodes=2" in last
    assert [path.name for path in tmp_path.iterdir()] == ["files"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--seeds", "1"], "sweep: --seeds: {file} says that itself"),
        (["--methods=sam"], "sweep: --methods: {file} says that itself"),
        (["train.epochs=3"], "sweep: train.epochs=3: {file} says that itself, by config: and overrides:"),
        ([str(CONFIG)], f"sweep: {CONFIG}: {{file}} says that itself, by config: and overrides:"),
    ],
    ids=["seeds", "methods", "override", "config"],
)
def test_a_file_is_not_said_otherwise(tmp_path: Path, file: Path, words: list[str], message: str) -> None:
    done = sweep(tmp_path, file, *words)
    assert (done.returncode, done.stdout.strip()) == (2, message.format(file=file))


def test_a_mistake_in_a_file_is_told_before_anything_is_submitted(tmp_path: Path, file: Path) -> None:
    file.write_text(file.read_text().replace("rho", "roh"))
    done = sweep(tmp_path, file)
    assert done.returncode == 2
    assert "perturbation.roh: unknown key; did you mean perturbation.rho?" in done.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["files"]
