"""The first line that a run prints says what is trained on what: backend, stage, processes and device."""

from __future__ import annotations

from pathlib import Path

import mlflow
import pytest

from ssam_scale.config.schema import Sharding
from ssam_scale.sharding import World
from tests.support.ranks import run_ranks
from tests.support.runs import VIT, ssam_scale, train_on_ranks, write_config
from tests.support.tiers import few

ALONE = "on 1 process of 1 node, single"


@pytest.mark.slow
def test_one_process(data: Path, home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = write_config(home / "run.yaml", data, perturbation={"rho": 0.1}, train={"epochs": 1, "accumulation": 2})
    assert ssam_scale("train", "--config", config) == 0
    assert capsys.readouterr().out.splitlines()[:2] == [
        f"sam resnet18 {ALONE}, CPU, fp32",
        "1 epochs of 4 steps of 12 images, 2 micro-batches of 6 images on each process",
    ]
    assert ssam_scale("train", "--config", config, "--dry-run", f"checkpoint.directory={home}/other") == 0
    said = capsys.readouterr().out
    assert said.startswith(f"dry run: sam resnet18 {ALONE}, CPU, fp32, one step of 2 micro-batches of 6 images on each")


def test_one_process_that_no_launcher_started(data: Path, home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """There is nobody to share weights or states with, and what a launcher would be needed for is left out."""
    config = write_config(home / "run.yaml", data, sharding={"backend": "zero2"}, train={"epochs": 1})
    assert ssam_scale("train", "--config", config) == 0
    assert capsys.readouterr().out.startswith(
        f"base resnet18 {ALONE} (without a launcher there is nobody to share with: not zero2), CPU, fp32\n"
    )
    client = mlflow.MlflowClient(f"sqlite:///{home}/mlflow.db")
    (run,) = client.search_runs([client.get_experiment_by_name("ssam_scale").experiment_id])
    assert run.data.tags["backend"] == "single"


def test_which_backend_it_is() -> None:
    for backend, alone, launched_alone, two in [
        ("auto", "single", "single", "ddp"),
        ("single", "single", "single", "single"),
        ("ddp", "single", "ddp", "ddp"),
        ("fsdp2", "single", "fsdp2", "fsdp2"),
        ("zero2", "single", "zero2", "zero2"),
    ]:
        sharding = Sharding.model_validate({"backend": backend})
        assert sharding.backend_on(1, launched=False) == alone
        assert sharding.backend_on(1) == launched_alone
        assert sharding.backend_on(2) == two
    for asked in ({"backend": "fsdp2", "replicas": 2}, {"backend": "zero1", "deepspeed": {"steps_per_print": 9}}):
        assert Sharding.model_validate(asked).backend_on(1, launched=False) == asked["backend"]


def _where(world: World) -> tuple[bool, int, str]:
    return world.launched, world.nodes, world.devices()


def test_the_processes_of_a_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    assert run_ranks(2, _where) == [(True, 1, "CPU")] * 2
    monkeypatch.setenv("SLURM_NNODES", "3")
    assert _where(World()) == (False, 1, "CPU")


TITLES = {
    "ddp": "DDP",
    "fsdp2": "FSDP2",
    "fsdp2 sharding.replicas=2": "FSDP2 with 2 replicas",
    "zero3": "ZeRO stage 3",
}


@pytest.mark.slow
@pytest.mark.parametrize("backend", few(TITLES, "fsdp2 sharding.replicas=2", "zero3"))
def test_two_processes_on_each_backend(backend: str, data: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path / "run.yaml", data, model=VIT, train={"epochs": 1})
    said = train_on_ranks(2, config, *f"sharding.backend={backend} checkpoint.directory={tmp_path}/run".split())
    assert f"base vit_tiny_patch16_224 on 2 processes of 1 node, {TITLES[backend]}, CPU, fp32\n" in said
