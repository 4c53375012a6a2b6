"""What fits is found before training, leaves no trace, and what does not fit ends in one line."""

from __future__ import annotations

import copy
import ctypes
import os
import resource
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import mlflow
import pytest
import torch

from ssam_scale.config.load import load
from ssam_scale.config.micro_batches import MicroBatches
from ssam_scale.config.schema import Config
from ssam_scale.errors import UserError
from ssam_scale.models import staged
from ssam_scale.perturbation import StagedModel
from ssam_scale.sharding import World, join_world
from ssam_scale.train.build import soft_loss
from ssam_scale.train.checkpoint.files import read_state, state_text
from ssam_scale.train.memory import explaining_out_of_memory, is_out_of_memory, largest_micro_batch
from ssam_scale.train.optimizer import base_optimizer
from tests.support.checkout import ROOT
from tests.support.configs import SMALL
from tests.support.networks import small_network
from tests.support.processes import run
from tests.support.ranks import run_fresh_ranks
from tests.support.runs import VIT, differing, ssam_scale, train_on_ranks, write_config

pytestmark = pytest.mark.slow

SIDE, PART = 192, 48
MIB = 2**20


def configuration(tmp_path: Path, *overrides: str) -> Config:
    path = tmp_path / f"small_{os.getpid()}.yaml"  # each rank's own
    path.write_text(SMALL)
    batch = [f"data.batch_size={PART}", f"data.resolution={SIDE}", "train.max_micro_batch=auto"]
    return load(path, [*batch, *overrides])


@contextmanager
def only(more: int) -> Iterator[None]:
    """This process gets so many bytes more than it has, and no others."""
    now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (now + more, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def give_back_at_once() -> None:
    """What is freed is the system's again, and does not stay with this process."""
    mallopt, mmap_threshold = ctypes.CDLL("libc.so.6").mallopt, -3
    assert mallopt(mmap_threshold, 2**16)


def network() -> StagedModel:
    """Without convolutions but the first, whose library wants memory of its own for every new size of a batch."""
    import timm

    size = {"img_size": SIDE, "patch_size": 8, "embed_dim": 32, "depth": 4, "num_heads": 2}
    return staged(timm.create_model("vit_tiny_patch16_224", num_classes=10, **size))


def search(config: Config, world: World, backend: str = "single") -> int:
    model = network()
    return largest_micro_batch(
        config, world, backend, model, partial(base_optimizer, config), soft_loss(config, torch.float32)
    )


def test_where_nothing_runs_out_it_is_the_whole(tmp_path: Path) -> None:
    assert search(configuration(tmp_path), World()) == PART


def _check_limited(tmp_path: str) -> None:
    """A step keeps some 5 MB an image: the less memory there is, the fewer images."""
    give_back_at_once()
    config = configuration(Path(tmp_path))
    search(configuration(Path(tmp_path), "data.batch_size=2"), World())  # threads and libraries are there now
    found = []
    for mebibytes in (800, 200, 120, 80):
        with only(mebibytes * MIB):
            found.append(search(config, World()))
    print(found)
    assert found[0] == PART
    assert found == sorted(found, reverse=True)
    assert len(set(found)) >= 3
    assert all(PART % images == 0 for images in found)


def test_it_is_the_most_that_fits(tmp_path: Path) -> None:
    run_fresh_ranks(1, _check_limited, str(tmp_path))


def test_no_room_for_an_image(tmp_path: Path) -> None:
    bucket = "sharding={backend: zero2, deepspeed: {zero_optimization: {reduce_bucket_size: 1000000000000000}}}"
    with pytest.raises(UserError) as caught:
        search(configuration(tmp_path, bucket), World(), "zero2")
    assert "one device has no room for an image; with a backend that shards them, set a number" in str(caught.value)


def _check_agreement(tmp_path: str) -> None:
    """One process has less memory than the other, and both take what it can."""
    give_back_at_once()
    config = configuration(Path(tmp_path), f"data.batch_size={2 * PART}")
    with join_world() as world:
        search(configuration(Path(tmp_path), "data.batch_size=4"), world)
        with only(80 * MIB if world.rank else 4000 * MIB):
            found = search(config, world, "ddp")
        assert world.smallest(found) == found == -world.smallest(-found)
        assert 0 < found < PART


def test_the_processes_agree(tmp_path: Path) -> None:
    run_fresh_ranks(2, _check_agreement, str(tmp_path))


@pytest.mark.parametrize(
    "overrides",
    [
        ["perturbation=null"],
        ["perturbation.mask=null", "perturbation.adaptive=true", "optimizer.clip_grad_norm=1.0"],
        ["perturbation.direction.fraction=0.5", "train.ema_decay=0.9", "loss.mixup=0.2"],
        ["perturbation.interval=2", "perturbation.reuse=0.7", "optimizer.name=adamw", "optimizer.lr=1.0e-3"],
        ["sharding={backend: zero2, deepspeed: {zero_optimization: {reduce_bucket_size: 1000}}}"],
    ],
)
def test_it_leaves_no_trace(overrides: list[str], tmp_path: Path) -> None:
    config = configuration(tmp_path, "data.batch_size=6", *overrides)
    model = small_network("resnet", drop_path_rate=0.2)
    before, draws = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    backend = config.sharding.backend_on(1)
    optimizer = partial(base_optimizer, config)
    assert largest_micro_batch(config, World(), backend, model, optimizer, soft_loss(config, torch.float32)) == 6
    assert torch.equal(torch.get_rng_state(), draws)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_a_mistake_is_not_taken_for_a_lack_of_memory(tmp_path: Path) -> None:
    config, model = configuration(tmp_path), small_network("resnet")

    def wrong(forward: Any, batch: Any) -> torch.Tensor:
        raise RuntimeError("shapes do not match")

    with pytest.raises(RuntimeError, match="shapes do not match"):
        largest_micro_batch(config, World(), "single", model, partial(base_optimizer, config), wrong)


# ---- what is said


def test_running_out_of_memory_is_one_line(tmp_path: Path) -> None:
    def said(split: MicroBatches | None, *overrides: str) -> str:
        config = configuration(tmp_path, *overrides)
        with pytest.raises(UserError) as caught, explaining_out_of_memory(config, split):
            torch.empty(2**60, dtype=torch.uint8)
        assert "\n" not in str(caught.value)
        assert is_out_of_memory(caught.value.__cause__ or caught.value)
        return str(caught.value)

    line = said(MicroBatches(4, 2, 256))
    assert line.startswith(
        "out of memory with 2 micro-batches of 256 images on each process; try train.max_micro_batch=128, or "
        "train.activation_checkpointing=true ("
    )
    assert "allocate" in line
    line = said(MicroBatches(4, 2, 12), "train.max_micro_batch=null", "train.accumulation=2")
    assert "try train.accumulation=null train.max_micro_batch=6, or train.act" in line
    line = said(MicroBatches(1, 1, 1), "train.activation_checkpointing=true")
    assert "on each process; use smaller images or a smaller network (" in line
    assert "out of memory before the first step; a backend that shards" in said(None)


def test_other_errors_stay_what_they_are(tmp_path: Path) -> None:
    for error in (RuntimeError("shapes"), ValueError("out of memory"), KeyboardInterrupt()):
        with pytest.raises(type(error)) as caught, explaining_out_of_memory(configuration(tmp_path)):
            raise error
        assert caught.value is error
    for lack in (
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        RuntimeError("CUDA error: out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        MemoryError(),
    ):
        assert is_out_of_memory(lack)


# ---- whole runs


def params_of(home: Path) -> dict[str, str]:
    client = mlflow.MlflowClient(f"sqlite:///{home}/mlflow.db")
    (run,) = client.search_runs([client.get_experiment_by_name("ssam_scale").experiment_id])
    return dict(run.data.params)


def test_a_run_whose_micro_batch_is_found(data: Path, home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = write_config(home / "run.yaml", data, perturbation={"rho": 0.1}, train={"epochs": 1}, loss={"mixup": 0.2})
    found = ["train.max_micro_batch=auto"]
    assert ssam_scale("train", "--config", config, *found) == 0
    assert "12 images, 1 micro-batch of 12 images on each process, found to fit\n" in capsys.readouterr().out
    params = params_of(home)
    assert (params["train.accumulation"], params["train.micro_batch"], params["train.max_micro_batch"]) == (
        "1",
        "12",
        "auto",
    )
    shutil.move(home / "checkpoints", home / "auto")
    assert ssam_scale("train", "--config", config, f"tracking.uri=sqlite:///{home}/other.db") == 0
    assert differing(home / "auto/epoch_0001", home / "checkpoints/epoch_0001") == []
    assert (
        ssam_scale(
            "train",
            "--config",
            config,
            *found,
            "train.epochs=2",
            "--dry-run",
            "--resume",
            str(home / "auto/epoch_0001"),
        )
        == 0
    )
    assert "one step of 1 micro-batch of 12 images on each process" in capsys.readouterr().out


def test_a_resumed_run_takes_the_micro_batch_that_it_was_begun_with(
    data: Path, home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_config(home / "run.yaml", data, train={"epochs": 1, "max_micro_batch": "auto"})
    assert ssam_scale("train", "--config", config) == 0
    state = home / "checkpoints/epoch_0001/state.json"
    saved = read_state(state.parent)
    assert saved["micro_batches"] == {"processes": 1, "accumulation": 1, "images": 12}
    resume = ["--config", str(config), "--resume", "auto", "train.epochs=2", "--dry-run"]
    for split, overrides, expected in (
        ({"processes": 1, "accumulation": 3, "images": 4}, [], "3 micro-batches of 4 images"),  # less memory there
        ({"processes": 2, "accumulation": 1, "images": 6}, [], "1 micro-batch of 12 images"),  # other processes
        ({"processes": 1, "accumulation": 3, "images": 4}, ["data.batch_size=6"], "1 micro-batch of 6 images"),
        ({"processes": 1, "accumulation": 3, "images": 4}, ["train.max_micro_batch=6"], "2 micro-batches of 6 images"),
        (None, [], "1 micro-batch of 12 images"),
    ):
        state.write_text(state_text({**saved, "micro_batches": split}))
        capsys.readouterr()
        assert ssam_scale("train", *resume, *overrides) == 0
        assert expected in capsys.readouterr().out


def test_it_is_found_before_deepspeed_is_told(data: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path / "run.yaml", data, model=VIT, perturbation={"rho": 0.1}, train={"epochs": 1})
    for name, overrides in {"plain": [], "auto": ["train.max_micro_batch=auto"]}.items():
        where = f"checkpoint.directory={tmp_path}/{name}"
        said = train_on_ranks(2, config, "sharding.backend=zero2", where, *overrides)
        assert "1 micro-batch of 6 images on each process" in said
    assert differing(tmp_path / "plain/epoch_0001", tmp_path / "auto/epoch_0001") == []


def test_a_training_that_runs_out_of_memory_is_one_line_and_the_hint_helps(data: Path, tmp_path: Path) -> None:
    """Activations of 48 images of 224 pixels take more than a gigabyte, those of 3 images less than a tenth of it."""
    config = write_config(
        tmp_path / "run.yaml", data, model={"name": "resnet18", "num_classes": 4}, train={"epochs": 1}
    )
    code = (
        "import resource, sys, mlflow, ssam_scale.data.ffcv_loader, ssam_scale.train\n"
        "from pathlib import Path\n"
        "from ssam_scale.cli.main import main\n"
        "now = int(Path('/proc/self/statm').read_text().split()[0]) * resource.getpagesize()\n"
        "resource.setrlimit(resource.RLIMIT_AS, (now + 1100 * 2**20,) * 2)\n"
        "main(sys.argv[1:])"
    )
    arguments = ["train", "--config", config, "data.batch_size=48", "data.resolution=224", "data.workers=1"]
    command = [sys.executable, "-c", code, *arguments]
    environment = {"MALLOC_ARENA_MAX": "2", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = run(command, cwd=tmp_path, env=environment)
    assert done.returncode == 2, done.stdout
    assert "Traceback" not in done.stdout
    [line] = [line for line in done.stdout.splitlines() if "error:" in line]
    assert "out of memory with 1 micro-batch of 48 images on each process; try train.max_micro_batch=24, or" in line
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    (failed,) = client.search_runs([client.get_experiment_by_name("ssam_scale").experiment_id])
    assert failed.info.status == "FAILED"
    assert "out of memory with 1 micro-batch of 48 images" in failed.data.tags["failure"]
    done = run([*command, "train.max_micro_batch=3"], cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stdout
