"""A machine or a library that a run cannot be had on: one line and exit code 2, before anything is read or written."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path

import pytest
import torch

from ssam_scale.sharding.zero import version as zero_version
from tests.support.machine import Machine
from tests.support.processes import free_port
from tests.support.runs import ssam_scale, write_config


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Machine:
    (tmp_path / "dev").mkdir()
    return Machine(monkeypatch, tmp_path / "dev")


@pytest.fixture
def config(data: Path, tmp_path: Path) -> Path:
    return write_config(tmp_path / "run.yaml", data)


def refusal(capsys: pytest.CaptureFixture[str], config: Path, *arguments: str) -> str:
    """What a training ends with."""
    there = sorted(config.parent.rglob("*"))
    assert ssam_scale("train", "--config", config, *arguments) == 2
    out, err = capsys.readouterr()
    assert out.count("\n") <= 1  # what is to be trained on what
    assert err.count("\n") == 1
    assert sorted(config.parent.rglob("*")) == there
    return err.removeprefix("ssam-scale: ").rstrip()


def test_a_gpu_where_there_is_none(machine: Machine, config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    machine.has(gpus=0, seen=0, cuda=None)
    line = refusal(capsys, config, "train.device=cuda")
    assert line.startswith("error: a GPU was asked for (train.device=cuda), but torch ")
    assert line.endswith("; or ask for the CPU: train.device=cpu")


def test_a_cpu_torch_beside_gpus(machine: Machine, config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    machine.has(gpus=2, seen=0, cuda=None)
    line = refusal(capsys, config)
    assert line.startswith("error: this machine has 2 NVIDIA GPUs (")
    assert "is a build for the CPU; install one for CUDA" in line
    assert ssam_scale("train", "--config", config, "train.device=cpu", "--dry-run") == 0
    assert ssam_scale("cost", "--config", config, "--repeats", "1") == 2
    assert "is a build for the CPU" in capsys.readouterr().err
    assert ssam_scale("bench", "steps") == 2
    assert capsys.readouterr().err.endswith("; or ask for the CPU: CUDA_VISIBLE_DEVICES= before the command\n")
    assert ssam_scale("bench", "storage") == 2


def test_more_processes_than_gpus(machine: Machine, config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    machine.has(gpus=2, seen=2)
    machine.says(RANK="1", WORLD_SIZE="3", LOCAL_RANK="1", LOCAL_WORLD_SIZE="3")
    assert refusal(capsys, config).startswith(
        "process 1: error: 3 processes were started on this machine, and it has 2 GPUs; start no more than 2 "
    )


@pytest.mark.parametrize(("backend", "others"), [("auto", "fp16 or fp32"), ("zero2", "fp32, or fp16 on ddp or fsdp2")])
def test_bf16_on_a_gpu_that_only_pretends_it(
    backend: str, others: str, machine: Machine, config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    machine.has(gpus=1, seen=1)
    machine.has_models("Tesla V100-SXM2-16GB", (7, 0))
    assert refusal(capsys, config, "train.precision=bf16", f"sharding.backend={backend}") == (
        "error: train.precision bf16: Tesla V100-SXM2-16GB has none (its compute capability is 7.0, bf16 needs 8.0); "
        f"use {others}"
    )
    assert ssam_scale("cost", "--config", config, "train.precision=bf16") == 2
    assert "bf16 needs 8.0" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize(
    ("version", "message"),
    [
        ("0.14.0", "DeepSpeed 0.14.0 is not supported: at least 0.19.8 and below 0.20.0 is needed; "),
        ("0.20.1", "DeepSpeed 0.20.1 is not supported: at least 0.19.8 and below 0.20.0 is needed; "),
        (None, "DeepSpeed cannot be imported (No module named 'deepspeed'); bash launch/setup.sh installs it"),
    ],
)
@pytest.mark.parametrize("backend", ["zero0", "zero3"])
def test_a_deepspeed_that_is_not_supported(
    backend: str,
    version: str | None,
    message: str,
    machine: Machine,
    config: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    known = metadata.version

    def found(name: str) -> str:
        if name == "deepspeed" and version is None:
            raise metadata.PackageNotFoundError(name)
        return str(version) if name == "deepspeed" else known(name)

    def missing(device: torch.device) -> None:
        raise ModuleNotFoundError("No module named 'deepspeed'")

    monkeypatch.setattr(metadata, "version", found)
    if version is None:
        monkeypatch.setattr(zero_version, "_imported", missing)
    machine.says(RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()))
    assert refusal(capsys, config, f"sharding.backend={backend}").startswith(f"error: {message}")
