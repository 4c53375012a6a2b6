from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import torch

from ssam_scale.tracking import environment


def git(folder: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=t", "-c", "user.email=t@example.org"]
    command = ["git", "-C", str(folder), *identity, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def test_commit_and_dirt_are_those_of_the_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "environment.py"
    source.write_text("a = 1\n")
    monkeypatch.setattr(environment, "__file__", str(source))
    monkeypatch.setattr(environment, "_REPOSITORY", tmp_path)
    assert environment.git_tags() == {}  # no repository
    git(tmp_path, "init", "-q")
    assert environment.git_tags() == {}  # a repository that the source is no part of: a virtual environment in it
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-q", "-m", "first")
    commit = git(tmp_path, "rev-parse", "HEAD")
    clean = {"git_commit": commit, "mlflow.source.git.commit": commit, "git_dirty": "false"}
    assert environment.git_tags() == clean
    source.write_text("a = 2\n")
    assert environment.git_tags() == clean | {"git_dirty": "true"}


def test_the_cuda_of_torch_is_tagged(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "version/cuda" not in environment.environment_tags()
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert environment.environment_tags()["version/cuda"] == "13.0"


def test_slurm_jobs_are_tagged(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    assert "slurm_job_id" not in environment.environment_tags()
    monkeypatch.setenv("SLURM_JOB_ID", "42")
    monkeypatch.setenv("SLURM_JOB_NODELIST", "n[1-2]")
    tags = environment.environment_tags()
    assert (tags["slurm_job_id"], tags["slurm_nodes"]) == ("42", "n[1-2]")


def test_world_size_comes_from_the_launcher_where_there_is_no_process_group(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "16")
    assert environment.world_size() == 16


def test_gpus_are_hardware_of_a_run_only_if_it_computes_on_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "A100")
    assert environment.hardware_tags()["gpus"] == "2 × A100"
    assert environment.hardware_tags()["hardware"].startswith("2 × A100; ")
    assert environment.environment_tags("cpu")["gpus"] == "none"
    assert "A100" not in environment.hardware_tags("cpu")["hardware"]
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    assert environment.hardware_tags()["gpus"] == "none"
