"""Files and loaders that the tests of this folder share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ssam_scale.config.schema import Data
from ssam_scale.data.encode import Encoding
from ssam_scale.data.loaders import ImageLoader, eval_loader, train_loader
from ssam_scale.data.write import Sample, write_samples
from tests.support.images import make_image

NUMBERED = 53
"""Images in `numbered`: prime, so that nothing divides it."""


@pytest.fixture(scope="session")
def numbered(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of images of many sizes, JPEG and raw, whose labels are their indices: who is who after shuffling."""
    generator = np.random.default_rng(7)
    samples = [
        Sample(str(index), make_image(generator, *(int(side) for side in generator.integers(20, 90, 2))), index)
        for index in range(NUMBERED)
    ]
    out = tmp_path_factory.mktemp("numbered") / "numbered.beton"
    write_samples(
        samples, [str(k) for k in range(NUMBERED)], out, Encoding(None, 90, 0.5, 0), source={}, progress=False
    )
    return out


Make = Callable[..., ImageLoader]


def config(beton: Path, **values: Any) -> Data:
    """A data section that reads `beton` for training and evaluation at 24 pixels."""
    values = {"train": beton, "val": beton, "batch_size": 8, "resolution": 24, "eval_resolution": 24, **values}
    return Data(**values)


def training(beton: Path, rank: int = 0, world_size: int = 1, seed: int = 3, **values: Any) -> ImageLoader:
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
