"""Small real data sets and configurations for whole runs."""

from __future__ import annotations

import signal
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

from ssam_scale.cli.main import main
from ssam_scale.config.schema import Config
from ssam_scale.data import open_images, write_beton
from ssam_scale.sharding.chunks import whole
from ssam_scale.tracking.shutdown import ENDING
from ssam_scale.train.checkpoint.files import read_state
from ssam_scale.train.checkpoint.saved import open_tensors
from ssam_scale.train.length import Length, length_of
from tests.support.checkout import ROOT
from tests.support.images import make_image_folder
from tests.support.processes import free_port, run
from tests.support.ranks import run_fresh_ranks
from tests.support.stores import put_store

CLASSES = 4
RESNET: dict[str, Any] = {
    "name": "resnet18",
    "num_classes": CLASSES,
    "kwargs": {"channels": [8, 8, 8, 8], "stem_width": 8},
}

# A ViT, because BatchNorm normalises by the batch of each process.
VIT = {
    "name": "vit_tiny_patch16_224",
    "num_classes": 4,
    "kwargs": {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 4, "num_heads": 2},
}


def write_data(folder: Path, *, per_class: int = 12, val_per_class: int = 5) -> None:
    """train.beton and val.beton of four classes of small JPEGs."""
    for name, count, seed in (("train", per_class, 0), ("val", val_per_class, 1)):
        make_image_folder(folder / name, CLASSES, count, (40, 48), seed)
        write_beton(folder / name, folder / f"{name}.beton", progress=False)


def write_config(path: Path, data: Path, *, store: bool = True, **sections: Any) -> Path:
    """A complete configuration of a tiny run beside its checkpoints and, with `store`, its own tracking store."""
    home = path.parent
    if store:
        put_store(home / "mlflow.db")
    values: dict[str, Any] = {
        "model": RESNET,
        "data": {
            "train": str(data / "train.beton"),
            "val": str(data / "val.beton"),
            "batch_size": 12,
            "eval_batch_size": 8,
            "resolution": 32,
            "eval_resolution": 32,
            "workers": 1,
        },
        "optimizer": {"name": "sgd", "lr": 0.05, "weight_decay": 1e-3},
        "train": {"epochs": 2},
        "checkpoint": {"directory": str(home / "checkpoints")},
        # Exporting the network takes longer than training it here.
        "tracking": {"uri": f"sqlite:///{home}/mlflow.db", "log_every": 2, "log_model": False},
    }
    for name, section in sections.items():
        replace = not isinstance(section, dict) or name == "model"
        values[name] = section if replace else {**values.get(name, {}), **section}
    path.write_text(yaml.safe_dump(values))
    return path


def ssam_scale(*arguments: str | Path) -> int:
    """Run the command line in this process; its exit code."""
    handlers = {number: signal.getsignal(number) for number in ENDING}
    try:
        with pytest.raises(SystemExit) as exit_:
            main([str(argument) for argument in arguments])
    finally:
        for number, handler in handlers.items():  # a run that was saved at a signal ignores them to its process's end
            signal.signal(number, handler)
    return int(exit_.value.code or 0)


def tensors_of(checkpoint: Path) -> dict[str, Tensor]:
    """Every tensor of a checkpoint, sharded or not, in full, by part and name."""
    opened = open_tensors(checkpoint, read_state(checkpoint))
    return {f"{part}:{name}": tensor for part in sorted(opened) for name, tensor in whole(opened[part]).items()}


def differing(first: Path, second: Path, tolerance: float = 0.0) -> list[str]:
    """Names of the tensors in which two checkpoints differ by more than `tolerance` anywhere."""
    one, two = tensors_of(first), tensors_of(second)
    assert one.keys() == two.keys()
    near = partial(torch.allclose, rtol=0, atol=tolerance, equal_nan=True)  # what a direction does not remember is NaN
    return [name for name in one if not near(one[name].double(), two[name].double())]


def train_on_ranks(processes: int, config: Path, *overrides: str) -> str:
    """`ssam-scale train` on so many processes, as a launcher would start them but with all imports done; its output."""
    return run_fresh_ranks(processes, main, ["train", "--config", str(config), *overrides])


def launch(launcher: str, processes: int, config: Path, *overrides: str) -> str:
    """`launch/train.py` by torchrun or deepspeed itself; its output."""
    options = {
        "torchrun": ["--standalone", "--nproc_per_node", str(processes)],
        "deepspeed": ["--num_gpus", str(processes), "--master_port", str(free_port())],
    }
    command = [Path(sys.executable).parent / launcher, *options[launcher], "launch/train.py", "--config", config]
    done = run([*command, *overrides], cwd=ROOT, env={"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stdout
    return done.stdout


def run_length(config: Config) -> Length:
    """How long the run is on the data that its configuration names."""
    return length_of(config, open_images(config.data.train).images)
