"""A user's mistake is one line on the terminal and exit code 2, and nothing is left half-written."""

from __future__ import annotations

import resource
import shutil
import sys
from pathlib import Path

import pytest

from tests.support.processes import run
from tests.support.runs import ssam_scale, write_config


def mistake(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The message of a command that must end with exit code 2."""
    assert ssam_scale("train", *arguments) == 2
    out, err = capsys.readouterr()
    assert "Traceback" not in out + err
    lines = err.strip().splitlines()
    assert len(lines) == 1, err
    return lines[0]


CASES = {
    "model.name=resnet81": "model.name: timm .* knows no model 'resnet81'; nearest: .*resnet18",
    "model.name=tf_efficientnet_b0_ns": "old name for tf_efficientnet_b0.ns_jft_in1k; write tf_efficientnet_b0, or "
    "tf_efficientnet_b0.ns_jft_in1k with model.pretrained=true for its weights",
    "model.pretrained=nowhere.pth": "model.pretrained nowhere.pth: no such file",
    "model.name=efficientnet_b2a": "efficientnet_b2a is timm's old name for efficientnet_b2; write ",
    "model.kwargs={depth: 3}": "model: timm could not build resnet18",
    "optimizer.name=sgdd": "optimizer.name: timm knows no optimizer 'sgdd'; nearest: .*sgd",
    "optimizer.name=adadelta": "optimizer.name adadelta: Adadelta has a rho of its own",
    "optimizer.name=adahessian": "optimizer.name adahessian: Adahessian differentiates the gradient again",
    "optimizer.kwargs={speed: 1}": "optimizer: timm could not build sgd",
    "optimizer.kwargs={betas: [0.9, 2]}": "optimizer.kwargs.betas: sgd takes no betas; it takes .*dampening, nesterov",
    "optimizer.kwargs={eps: 1}": "optimizer.kwargs.eps: sgd takes no eps; it takes ",
    "optimizer.kwargs={foreach: maybe}": "optimizer.kwargs.foreach 'maybe': true or false is needed",
    "optimizer.kwargs={nesterov: 1}": "optimizer.kwargs.nesterov 1: true or false is needed",
    "optimizer={name: adamw, lr: 0.1, momentum: 0.5}": "optimizer.momentum 0.5: adamw has no momentum; .*kwargs.betas",
    "optimizer={name: adamw, lr: 0.1, kwargs: {betas: [0.9, 2]}}": "optimizer: timm could not build adamw with .*: "
    "Invalid beta parameter at index 1: 2",
    'model.kwargs={global_pool: ""}': "model.kwargs.global_pool '': resnet18 pools nothing then",
    "data.batch_size=4000": "48 images are fewer than one batch of 4,000",
    "model.num_classes=3": "label 3 is outside the model's 3 classes; set model.num_classes to 4",
    "data.train=nowhere.beton": "nowhere.beton",
    "sharding={backend: fsdp2, replicas: 2}": "sharding: backend fsdp2 without a launcher",
    "sharding={backend: zero2, deepspeed: {steps_per_print: 9}}": "sharding: backend zero2 without a launcher",
    "sharding.deepspeed={zero_optimization: {}}": "deepspeed: is for the backends zero0 to zero3, and backend is auto",
    "sharding={backend: zero1, deepspeed: {gradient_clipping: 1}}": "clipping: 1 contradicts optimizer.clip_grad_norm",
    "sharding={backend: zero1, deepspeed: {zero_optimization: {stage: 2}}}": "stage: 2 contradicts sharding.backend",
    "sharding.deepspeed={train_micro_batch_size_per_gpu: 4, zero_optimization: {stage: 0}}": "per_gpu: 4, where "
    "data.batch_size 12 is 1 micro-batch of 12 images on each process; set train.max_micro_batch=4",
    "train.accumulation=1\ntrain.max_micro_batch=4": "train.accumulation 1 makes micro-batches of 12 images on 1 "
    "processes, above train.max_micro_batch 4",
    "sharding.backend=zero3\noptimizer.name=lamb": "optimizer.name lamb on sharding.backend zero3: Lamb, as it is set "
    "up, does not step flat pieces of tensors, .* use SGD, AdamW, Lion",
    "sharding.backend=zero1\noptimizer.name=nadamw\noptimizer.kwargs={caution: true}": "NAdamW, as it is set up, does ",
    "checkpoint.resume=nowhere": "checkpoint.resume: nowhere is not a checkpoint",
    "train.epoch=3": "train.epoch.*epochs",
    "perturbation={rho: 0.1, norm: dense, mask: {pattern: depth}}": "norm: dense needs the gradient of the prefix",
    "perturbation={rho: 0.1, mask: {pattern: element, samples: 100}}": "samples 100: an epoch has only 48 images",
    "perturbation={rho: 0.1, mask: {pattern: nm, samples: 8}}": "perturbation.mask: conv1.weight has 3 input features, "
    r"which do not make groups of 4 \(1 of 22 weights\)",
    "perturbation={rho: 0.1, mask: {pattern: named, parameters: [layer, lyer]}}": "perturbation.mask: pattern 'lyer' "
    "matches none of the 65 parameters: conv1.weight",
    "perturbation={rho: 0.1, mask: {pattern: named, parameters: ['[']}}": r'mask.parameters: "\[" is not a regular',
    "tracking.uri=sqlite:////proc/nowhere/mlflow.db": "/proc/nowhere",
}


@pytest.mark.parametrize(("override", "message"), CASES.items(), ids=CASES)
def test_the_message_names_what_was_given_and_what_would_work(
    override: str, message: str, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import re

    config = write_config(tmp_path / "run.yaml", data)
    line = mistake(capsys, "--config", str(config), *override.split("\n"))
    assert re.search(message, line), line
    assert {p.name for p in tmp_path.iterdir()} <= {"run.yaml", "mlflow.db"}


@pytest.mark.parametrize("pattern", ["depth", "block"])
def test_blocks_of_a_model_without_stages(
    pattern: str, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_config(
        tmp_path / "run.yaml",
        data,
        model={"name": "test_byobnet", "num_classes": 4},
        perturbation={"rho": 0.1, "mask": {"pattern": pattern}},
    )
    assert "ByobNet has no stages: the patterns depth and block work on" in mistake(capsys, "--config", str(config))


def test_an_image_size_the_model_cannot_take(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    vit = {"name": "vit_tiny_patch16_224", "num_classes": 4, "kwargs": {"depth": 1}}
    config = write_config(tmp_path / "run.yaml", data, model=vit)
    assert "data.resolution: vit_tiny_patch16_224 cannot take images of 32 px" in mistake(
        capsys, "--config", str(config)
    )


def test_the_sides_of_crops_that_grow_are_looked_at_too(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    vit = {"name": "vit_tiny_patch16_224", "num_classes": 4, "kwargs": {"depth": 1, "img_size": 32}}
    config = write_config(tmp_path / "run.yaml", data, model=vit)
    grows = "data.progressive={resolution: 16, to_epoch: 1}"
    assert "data.progressive: vit_tiny_patch16_224 cannot take images of 16 px" in mistake(
        capsys, "--config", str(config), grows
    )


@pytest.fixture
def trained(data: Path, tmp_path: Path) -> Path:
    """The configuration of a run that has a checkpoint."""
    config = write_config(tmp_path / "run.yaml", data)
    assert ssam_scale("train", "--config", config, "train.epochs=1") == 0
    return config


@pytest.mark.slow
def test_checkpoints_that_do_not_fit(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    checkpoint = tmp_path / "checkpoints/epoch_0001"
    resume = ("--config", str(trained), "--resume", str(checkpoint))
    line = mistake(capsys, *resume, "model.kwargs={channels: [8, 8, 8, 16], stem_width: 8}")
    assert "checkpoint" in line
    assert "fc.weight is (4, 8) there and (4, 16) here" in line
    assert "of resnet18 with 4 classes, does not fit this run's resnet34" in mistake(
        capsys, *resume, "model.name=resnet34"
    )
    assert "made with optimizer.name sgd, this run has adamw" in mistake(capsys, *resume, "optimizer.name=adamw")
    assert "has no averaged weights" in mistake(capsys, *resume, "train.ema_decay=0.9")
    assert "is of a base run, this is a sam run" in mistake(capsys, *resume, "perturbation.rho=0.1")
    line = mistake(capsys, "--config", str(trained))
    assert "has epoch_0001 of an earlier run: go on from it with --resume auto, or choose another folder" in line
    assert "did you mean" in mistake(capsys, "--config", str(trained), "--resume", str(tmp_path / "checkpoints"))

    broken = shutil.copytree(checkpoint, tmp_path / "broken")
    weights = (broken / "model.safetensors").read_bytes()
    (broken / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    assert "broken cannot be read" in mistake(capsys, "--config", str(trained), "--resume", str(broken))
    (broken / "state.json").write_text("{")
    assert "broken cannot be read" in mistake(capsys, "--config", str(trained), "--resume", str(broken))


def test_a_mask_that_leaves_nothing(data: Path, home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mask = {"pattern": "block", "score": "random", "sparsity": 0.9999}
    config = write_config(home / "run.yaml", data, perturbation={"rho": 0.1, "mask": mask})
    line = mistake(capsys, "--config", str(config))
    assert "perturbation.mask: a mask of pattern block and sparsity 0.9999 leaves nothing of" in line


@pytest.mark.slow
def test_checkpoints_of_other_masks(data: Path, home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mask = {"pattern": "element", "score": "weight"}
    config = write_config(home / "run.yaml", data, perturbation={"rho": 0.1, "mask": mask})
    assert ssam_scale("train", "--config", config, "train.epochs=1") == 0
    capsys.readouterr()
    resume = ("--config", str(config), "--resume", "auto")
    line = mistake(capsys, *resume, "perturbation.mask.pattern=row")
    assert "is of a ssam-element run, this is a ssam-row run" in line
    assert "is of a ssam-element run, this is a ssam-dynamic run" in mistake(
        capsys, *resume, "perturbation.mask={pattern: element, dynamic: {}, samples: 8}"
    )
    line = mistake(capsys, *resume, "perturbation.mask.score=accumulated")
    assert "epoch_0001: the saved state has no accumulated scores" in line
    assert line.endswith("perturbation.mask must be the one it was saved with")
    state = home / "checkpoints/epoch_0001/state.json"
    state.write_text(state.read_text().replace('"format": 5', '"format": 3'))
    assert "it has format 3, this version of ssam_scale reads format 5" in mistake(capsys, *resume)


@pytest.mark.slow
def test_a_full_disk_while_saving_leaves_the_last_checkpoint_alone(trained: Path, tmp_path: Path) -> None:
    before = {p.name: p.read_bytes() for p in (tmp_path / "checkpoints/epoch_0001").iterdir()}
    limit = 64 * 1024  # bytes; below a checkpoint's weights, and above all else that a run writes at once
    done = run(
        [
            sys.executable,
            "-c",
            "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
            "from ssam_scale.train.checkpoint import hook; write = hook._written\n"
            # In a process of its own, as the limit holds for all of one, and metrics are written in the background.
            "import os\n"
            "def limited(*a):\n"
            "    said, says = os.pipe()\n"
            "    if os.fork() == 0:\n"
            f"        resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {resource.RLIM_INFINITY}))\n"
            "        os.write(says, write(*a).encode())\n"
            "        os._exit(0)\n"
            "    os.close(says)\n"
            "    with open(said) as pipe:\n        return pipe.read()\n"
            "hook._written = limited\n"
            "from ssam_scale.cli.main import main; main(sys.argv[1:])",
            "train",
            "--config",
            trained,
            "--resume",
            "auto",
        ],
        cwd=tmp_path,
    )
    assert done.returncode == 2, done.stdout
    assert "Traceback" not in done.stdout
    assert "epoch_0002 was not written" in done.stdout
    assert "MiB are free" in done.stdout
    assert {p.name for p in (tmp_path / "checkpoints").iterdir()} == {"epoch_0001", "result.json"}
    assert {p.name: p.read_bytes() for p in (tmp_path / "checkpoints/epoch_0001").iterdir()} == before
