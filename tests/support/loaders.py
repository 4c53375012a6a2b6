"""Loaders of a small file of numbered images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ssam_scale.config.schema import Data
from ssam_scale.data.loaders import ImageLoader, eval_loader, train_loader

NUMBERED = 53
"""Images in `numbered`: prime, so that nothing divides it."""


def config(beton: Path, **values: Any) -> Data:
    """A data section that reads `beton` for training and evaluation at 24 pixels."""
    values = {"train": beton, "val": beton, "batch_size": 8, "resolution": 24, "eval_resolution": 24, **values}
    return Data(**values)


def training(
    beton: Path, rank: int = 0, world_size: int = 1, seed: int = 3, *, indices: bool = False, **values: Any
) -> ImageLoader:
    """A training loader of one process; `batch_size` is shared among the processes."""
    data = config(beton, **values)
    return train_loader(
        data,
        rank=rank,
        world_size=world_size,
        device=torch.device("cpu"),
        seed=seed,
        micro_batch=data.batch_size // world_size,
        num_classes=NUMBERED,
        indices=indices,
    )


def evaluation(
    beton: Path, rank: int = 0, world_size: int = 1, num_classes: int = NUMBERED, **values: Any
) -> ImageLoader:
    """An evaluation loader of one process."""
    return eval_loader(
        config(beton, **values),
        rank=rank,
        world_size=world_size,
        device=torch.device("cpu"),
        num_classes=num_classes,
    )
