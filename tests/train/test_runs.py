"""Whole runs: what is resumed equals what was never interrupted, on one process and on several."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import mlflow
import pytest
import torch
import yaml
from safetensors.torch import load_file

from tests.support.runs import RESNET, VIT, differing, launch, ssam_scale, train_on_ranks, write_config
from tests.support.tiers import few

METHODS: dict[str, Any] = {
    "base": None,
    "sam": {"rho": 0.05},
    "ssam-element": {"rho": 0.05, "norm": "dense", "mask": {"pattern": "element", "samples": 8, "refresh_epochs": 2}},
    "ssam-tensor": {
        "rho": 0.05,
        "direction": {"fraction": 0.5},
        "norm": "calibrated",
        "mask": {"pattern": "tensor", "samples": 8},
    },
    "ssam-depth": {
        "rho": 0.05,
        "rho_schedule": "cosine",
        "norm": "calibrated",
        "calibrate_every": 3,
        "adaptive": True,
        "window": [0.0, 0.8],
        "mask": {"pattern": "depth"},
    },
}
# Masks that remember more than which weights they perturb; refreshed within epochs, too.
DRIFTING: dict[str, Any] = {"pattern": "element", "dynamic": {"grow": "fisher"}, "samples": 8, "refresh_steps": 3}
ACCUMULATED: dict[str, Any] = {"pattern": "row", "score": "accumulated", "sparsity_final": 0.9, "refresh_steps": 3}
METHODS["ssam-dynamic"] = {"rho": 0.05, "norm": "calibrated", "mask": DRIFTING}
METHODS["ssam-row"] = {"rho": 0.05, "interval": 2, "mask": ACCUMULATED}
EVERYTHING = {
    "loss": {"mixup": 0.2, "cutmix": 1.0, "label_smoothing": 0.1},
    "train": {"epochs": 3, "accumulation": 2, "ema_decay": 0.9},
    "optimizer": {"name": "adamw", "lr": 0.001, "clip_grad_norm": 1.0},
    "schedule": {"warmup_epochs": 0.5},
    "model": {**RESNET, "drop_path_rate": 0.1, "drop_rate": 0.1},
}


def train(*arguments: str) -> None:
    assert ssam_scale("train", *arguments) == 0


def runs_of(home: Path) -> list[Any]:
    client = mlflow.MlflowClient(f"sqlite:///{home}/mlflow.db")
    return client.search_runs([client.get_experiment_by_name("ssam_scale").experiment_id])


@pytest.mark.parametrize(
    "method", [pytest.param(m, marks=[] if m == "ssam-depth" else pytest.mark.slow) for m in METHODS]
)
def test_resuming_equals_never_having_stopped(
    method: str, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_config(tmp_path / "run.yaml", data, perturbation=METHODS[method], **EVERYTHING)
    checkpoints = tmp_path / "checkpoints"
    train("--config", str(config), "checkpoint.keep=3")
    shutil.move(checkpoints / "epoch_0003", tmp_path / "uninterrupted")
    shutil.rmtree(checkpoints / "epoch_0002")
    train("--config", str(config), "--resume", "auto")
    said = capsys.readouterr().out
    assert "resumed from" in said
    assert differing(tmp_path / "uninterrupted", checkpoints / "epoch_0003") == []
    (one,) = runs_of(tmp_path)  # the tracked run was continued, too
    assert one.info.status == "FINISHED"
    assert one.data.tags["method"] == method
    assert one.data.metrics["epoch"] == 3
    # The cosine's last step, and not the rate that the checkpoint was saved with.
    rates = mlflow.MlflowClient(f"sqlite:///{tmp_path}/mlflow.db").get_metric_history(one.info.run_id, "train/lr")
    by_step = {rate.step: rate.value for rate in rates}
    assert by_step[12] < 0.1 * by_step[4]
    assert 0 <= one.data.metrics["val/top1"] <= 100
    assert not {"val/top5", "val/raw_top5"} & one.data.metrics.keys()  # of four classes it would be 100%
    raw, averaged = one.data.metrics["val/raw_top1"], one.data.metrics["val/top1"]
    assert (
        f"epoch 3/3: top-1 {averaged:.2f}%, validation loss {one.data.metrics['val/loss']:.4f} on 20 images; " in said
    )
    assert f"; without averaging the weights: top-1 {raw:.2f}%, " in said
    if "refresh_steps" in str(METHODS[method]):  # and so were the records of its layers
        table = f"mlartifacts/ssam_scale/{one.info.run_id}/artifacts/mask/density.csv"
        assert (tmp_path / table).read_text().partition("\n")[0] == "parameter,weights,0,3,6,9"


@pytest.mark.slow
def test_a_float16_run_resumes_with_its_loss_scale_and_a_radius_tied_to_the_rate(data: Path, tmp_path: Path) -> None:
    config = write_config(
        tmp_path / "run.yaml",
        data,
        model=VIT,
        perturbation={"rho": 0.1, "rho_schedule": "lr", "rho_final": 0.5},
        train={"epochs": 2, "precision": "fp16"},
    )
    checkpoints = tmp_path / "checkpoints"
    train("--config", str(config))
    shutil.move(checkpoints / "epoch_0002", tmp_path / "uninterrupted")
    scale = json.loads((tmp_path / "uninterrupted/state.json").read_text())["parts"]["scaler"]
    assert scale["scale"] > 1.0
    train("--config", str(config), "--resume", "auto")
    assert differing(tmp_path / "uninterrupted", checkpoints / "epoch_0002") == []
    (one,) = runs_of(tmp_path)
    history = mlflow.MlflowClient(f"sqlite:///{tmp_path}/mlflow.db").get_metric_history
    radii = {m.step: m.value for m in history(one.info.run_id, "perturbation/rho")}
    rates = {m.step: m.value for m in history(one.info.run_id, "train/lr")}
    peak = config_of(config)["optimizer"]["lr"]
    assert radii == {step: pytest.approx(0.1 * (0.5 + 0.5 * rate / peak)) for step, rate in rates.items()}
    assert one.data.metrics["train/loss_scale"] == scale["scale"]
    assert "perturbation/skipped" in one.data.metrics


def test_a_finished_run_says_where_it_is_and_is_left_alone_when_it_is_resumed(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_config(tmp_path / "run.yaml", data)
    train("--config", str(config), "train.epochs=1")
    checkpoint = tmp_path / "checkpoints/epoch_0001"
    where = capsys.readouterr().out.splitlines()[-3:]
    (run,) = runs_of(tmp_path)
    assert where[0] == f"last checkpoint: {checkpoint}"
    assert where[1].endswith(f"mlflow ui --backend-store-uri sqlite:///{tmp_path}/mlflow.db --port 5000")
    assert where[2].endswith(f"http://127.0.0.1:5000/#/experiments/1/runs/{run.info.run_id}")

    before = (checkpoint / "state.json").stat().st_mtime_ns
    train("--config", str(config), "train.epochs=1", "--resume", "auto")
    assert (checkpoint / "state.json").stat().st_mtime_ns == before
    said = capsys.readouterr().out.splitlines()
    assert said[1:] == [f"{checkpoint} is of epoch 1, the last: nothing is left to train", *where[1:]]
    (again,) = runs_of(tmp_path)
    assert (again.info.end_time, again.info.status) == (run.info.end_time, "FINISHED")
    assert again.data.tags == run.data.tags


@pytest.mark.slow
def test_old_checkpoints_are_dropped_and_the_weights_load_into_timm(data: Path, tmp_path: Path) -> None:
    import timm

    config = write_config(tmp_path / "run.yaml", data, train={"epochs": 3}, checkpoint={"keep": 2})
    train("--config", str(config), f"checkpoint.directory={tmp_path}/kept")
    assert sorted(p.name for p in (tmp_path / "kept").iterdir()) == ["epoch_0002", "epoch_0003", "result.json"]
    model = timm.create_model("resnet18", num_classes=4, **RESNET["kwargs"])
    model.load_state_dict(load_file(tmp_path / "kept/epoch_0003/model.safetensors"))


@pytest.mark.slow
def test_what_is_changed_on_resuming_counts(data: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path / "run.yaml", data)
    train("--config", str(config), "train.epochs=1")
    changed = ("optimizer.weight_decay=0.25", "optimizer.lr=0.5", "train.epochs=2")
    train("--config", str(config), "--resume", "auto", *changed)
    state = json.loads((tmp_path / "checkpoints/epoch_0002/state.json").read_text())
    groups = state["parts"]["optimizer"]["param_groups"]
    assert max(group["weight_decay"] for group in groups) == 0.25
    assert {group["initial_lr"] for group in groups} == {0.5}  # which a radius in step with the rate goes by


def test_a_dry_run_leaves_nothing_behind(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = write_config(tmp_path / "run.yaml", data, store=False, perturbation=METHODS["ssam-element"])
    train("--config", str(config), "--dry-run")
    assert (
        "dry run: ssam-element resnet18 on 1 process of 1 node, single, CPU, fp32, one step of 1 micro-batch of"
        in capsys.readouterr().out
    )
    assert [p.name for p in tmp_path.iterdir()] == ["run.yaml"]


def test_the_printed_configuration_is_the_run(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = write_config(tmp_path / "run.yaml", data, perturbation=METHODS["ssam-depth"])
    train("--config", str(config), "train.epochs=7", "--print-config")
    printed = capsys.readouterr().out
    assert "epochs: 7" in printed
    (tmp_path / "again.yaml").write_text(printed)
    train("--config", str(tmp_path / "again.yaml"), "--print-config")
    assert yaml.safe_load(capsys.readouterr().out) == yaml.safe_load(printed)


def config_of(path: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load(path.read_text())
    return loaded


@pytest.mark.slow
@pytest.mark.parametrize("method", few(["ssam-element", "ssam-depth"], "ssam-element"))
def test_one_process_ddp_and_fsdp2_train_the_same_weights(method: str, data: Path, tmp_path: Path) -> None:
    config = write_config(
        tmp_path / "run.yaml",
        data,
        model={**VIT, "drop_rate": 0.1, "drop_path_rate": 0.2, "kwargs": {**VIT["kwargs"], "proj_drop_rate": 0.1}},
        perturbation=METHODS[method],
        train={"epochs": 2, "ema_decay": 0.5, "accumulation": 1},
        loss={"mixup": 0.2, "cutmix": 1.0, "label_smoothing": 0.1},
        optimizer={"name": "sgd", "clip_grad_norm": 1.0},
    )
    train("--config", str(config), f"checkpoint.directory={tmp_path}/single")
    for backend in ("ddp", "fsdp2"):
        train_on_ranks(2, config, f"checkpoint.directory={tmp_path}/{backend}", f"sharding.backend={backend}")
        # 8 steps of the same fp32 arithmetic in another order of summation.
        assert differing(tmp_path / "single/epoch_0002", tmp_path / backend / "epoch_0002", 2e-6) == []
    # What DDP wrote, FSDP2 goes on with, and one process ends as if nothing had happened.
    train_on_ranks(
        2,
        config,
        f"checkpoint.directory={tmp_path}/mixed",
        f"checkpoint.resume={tmp_path}/ddp/epoch_0001",
        "sharding.backend=fsdp2",
    )
    assert differing(tmp_path / "single/epoch_0002", tmp_path / "mixed/epoch_0002", 2e-6) == []


@pytest.mark.slow
def test_resuming_equals_never_having_stopped_on_two_processes(data: Path, tmp_path: Path) -> None:
    """With BatchNorm, whose statistics each process gathers by itself, and checkpoints between evaluations."""
    config = write_config(
        tmp_path / "run.yaml",
        data,
        perturbation=METHODS["ssam-depth"],
        **{**EVERYTHING, "train": {"epochs": 3, "accumulation": 2, "ema_decay": 0.9, "eval_epochs": 3}},
    )
    launch("torchrun", 2, config, "checkpoint.keep=3")
    checkpoints = tmp_path / "checkpoints"
    shutil.move(checkpoints / "epoch_0003", tmp_path / "uninterrupted")
    shutil.rmtree(checkpoints / "epoch_0002")
    train_on_ranks(2, config, "checkpoint.resume=auto")
    assert differing(tmp_path / "uninterrupted", checkpoints / "epoch_0003") == []


@pytest.mark.slow
@pytest.mark.parametrize("stage", few([2, 3], 3))
def test_zero_trains_the_same_weights_and_checkpoints_go_both_ways(stage: int, data: Path, tmp_path: Path) -> None:
    config = write_config(
        tmp_path / "run.yaml",
        data,
        model=VIT,
        perturbation={"rho": 0.05, "norm": "dense", "mask": {"pattern": "element", "samples": 8}},
        train={"epochs": 2, "ema_decay": 0.5, "accumulation": 2},
        # A large eps: AdamW divides by the root of its second moment, also where that is a float's rounding.
        optimizer={"name": "adamw", "lr": 1e-3, "clip_grad_norm": 0.5, "kwargs": {"eps": 1e-3}},
    )
    zero = f"sharding.backend=zero{stage}"
    train("--config", str(config), f"checkpoint.directory={tmp_path}/single")
    train_on_ranks(2, config, f"checkpoint.directory={tmp_path}/zero", zero)
    assert differing(tmp_path / "single/epoch_0002", tmp_path / "zero/epoch_0002", 2e-6) == []
    went_on = f"checkpoint.directory={tmp_path}/went_on"
    train_on_ranks(2, config, went_on, zero, f"checkpoint.resume={tmp_path}/single/epoch_0001")
    assert differing(tmp_path / "single/epoch_0002", tmp_path / "went_on/epoch_0002", 2e-6) == []
    train("--config", str(config), went_on, f"checkpoint.resume={tmp_path}/zero/epoch_0001")
    assert differing(tmp_path / "single/epoch_0002", tmp_path / "went_on/epoch_0002", 2e-6) == []


@pytest.mark.slow
@pytest.mark.parametrize("stage", few([1, 2, 3], 3))
def test_deepspeeds_bf16_weights_have_float32_masters_in_checkpoints(stage: int, data: Path, tmp_path: Path) -> None:
    config = write_config(
        tmp_path / "run.yaml",
        data,
        model=VIT,
        perturbation=METHODS["ssam-depth"],
        train={"epochs": 2, "precision": "bf16", "max_micro_batch": 3},
        optimizer={"name": "adamw", "lr": 1e-3},
    )
    bf16 = f"sharding.deepspeed={{zero_optimization: {{stage: {stage}}}, bf16: {{enabled: true}}}}"
    said = train_on_ranks(2, config, f"checkpoint.directory={tmp_path}/zero", bf16)
    assert f"on 2 processes of 1 node, ZeRO stage {stage}, CPU, bf16\n" in said
    weights = load_file(tmp_path / "zero/epoch_0002/model.safetensors")
    assert {w.dtype for w in weights.values()} == {torch.float32}
    assert any(not torch.equal(w, w.bfloat16().float()) for w in weights.values())
    # One process with float32 weights under autocast goes on from it, and so do the bf16 weights.
    start, where = f"checkpoint.resume={tmp_path}/zero/epoch_0001", f"checkpoint.directory={tmp_path}"
    train("--config", str(config), f"{where}/single", start)
    train_on_ranks(2, config, f"{where}/again", start, bf16)
    assert differing(tmp_path / "zero/epoch_0002", tmp_path / "again/epoch_0002") == []
    # bf16 keeps 8 bits, in 8 steps of AdamW of at most a learning rate each.
    assert differing(tmp_path / "zero/epoch_0002", tmp_path / "single/epoch_0002", 1e-2) == []


@pytest.mark.exhaustive
def test_deepspeeds_launcher_and_configuration_file(data: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path / "run.yaml", data, model=VIT, perturbation=METHODS["ssam-depth"])
    train("--config", str(config), f"checkpoint.directory={tmp_path}/single")
    file = tmp_path / "zero.json"
    file.write_text('{"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 1e2}}')
    arguments = ["--deepspeed", "--deepspeed_config", str(file), f"checkpoint.directory={tmp_path}/zero"]
    launch("deepspeed", 2, config, *arguments)
    assert differing(tmp_path / "single/epoch_0002", tmp_path / "zero/epoch_0002", 2e-6) == []
