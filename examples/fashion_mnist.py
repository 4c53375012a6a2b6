"""Small batches for the examples: Fashion-MNIST where Debian's package of it is installed, random ones elsewhere."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

FOLDER = Path("/usr/share/datasets/fashion-mnist")


def batches(count: int, size: int, *, rank: int = 0, ranks: int = 1, first: int = 0) -> list[tuple[Tensor, Tensor]]:
    """One process's parts of `count` batches of `size` images over all processes.

    Returns images, float32 (size / ranks, 1, 28, 28) with mean 0 and deviation 1, and labels, int64 (size / ranks,);
    from image number `first` of the training set on.
    """
    images, labels = _fashion_mnist(first, count * size) if FOLDER.exists() else _random(first, count * size)
    return [
        (x.chunk(ranks)[rank], y.chunk(ranks)[rank])
        for x, y in zip(images.split(size), labels.split(size), strict=True)
    ]


def _fashion_mnist(first: int, count: int) -> tuple[Tensor, Tensor]:
    pixels, labels = (
        gzip.decompress((FOLDER / f"train-{n}-ubyte.gz").read_bytes()) for n in ("images-idx3", "labels-idx1")
    )
    x = np.frombuffer(pixels, np.uint8, count * 784, offset=16 + first * 784).reshape(count, 1, 28, 28)
    y = np.frombuffer(labels, np.uint8, count, offset=8 + first)
    return (torch.from_numpy(x.astype(np.float32)) / 255 - 0.286) / 0.353, torch.from_numpy(y.astype(np.int64))


def _random(first: int, count: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(first)
    return torch.randn(count, 1, 28, 28, generator=generator), torch.randint(10, (count,), generator=generator)
