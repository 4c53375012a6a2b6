"""The readers of others, of the same images: what ours is measured beside."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

Epoch = Callable[[int], int]
"""Reads all images of an epoch, given its number from 0, and returns how many these were."""


def ffcvs(path: Path, resolution: int, batch: int, workers: int) -> Epoch:
    """FFCV's own loader and decoder of a .beton file, with its random order, crops and flips (ffcv-imagenet's).

    Args:
        path: of the file.
        resolution: side of the crops, pixels.
        batch: images of one.
        workers: its threads.
    """
    from .ffcv_import import Loader, OrderOption, own_pipelines

    loader = Loader(
        str(path),
        batch_size=batch,
        num_workers=workers,
        order=OrderOption.RANDOM,
        os_cache=True,
        drop_last=False,
        pipelines=own_pipelines(resolution),
    )

    def epoch(number: int) -> int:
        loader.next_epoch = number
        return sum(len(labels) for _, labels in loader)

    return epoch


def image_folder(folder: Path, resolution: int, batch: int, workers: int) -> Epoch:
    """torchvision's `ImageFolder` under torch's `DataLoader`, with its random crops and flips, uint8 tensors.

    Args:
        folder: one folder of images per class.
        resolution: side of the crops, pixels.
        batch: images of one.
        workers: processes; with one it reads in this process.
    """
    from ssam_scale.models.torchvision_ops import ensure_torchvision

    ensure_torchvision()
    from torchvision.datasets import ImageFolder
    from torchvision.transforms import Compose, PILToTensor, RandomHorizontalFlip, RandomResizedCrop

    crops = Compose([RandomResizedCrop(resolution), RandomHorizontalFlip(), PILToTensor()])
    images = ImageFolder(str(folder), crops)
    # One worker would be a process beside one that waits: it computes here, which is no slower and is measured here.
    others = workers if workers > 1 else 0
    loader: Any = torch.utils.data.DataLoader(images, batch, shuffle=True, num_workers=others)

    def epoch(number: int) -> int:
        torch.manual_seed(number)
        return sum(len(labels) for _, labels in loader)

    return epoch
