"""Folders of JPEGs in ImageNet's layout, made up but with the statistics that matter: smooth areas, edges, texture."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray


def make_image(generator: np.random.Generator, height: int, width: int) -> NDArray[np.uint8]:
    """RGB uint8 [height, width, 3]: a smooth background, a few filled shapes, a little noise."""
    coarse = generator.integers(0, 256, (4, 5, 3), np.uint8)
    image = np.ascontiguousarray(cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC))
    for _ in range(3):
        centre = int(generator.integers(width)), int(generator.integers(height))
        colour = tuple(int(value) for value in generator.integers(0, 256, 3))
        cv2.circle(image, centre, int(generator.integers(2, max(3, min(height, width) // 3))), colour, -1)
    noise = np.empty((height, width, 3), np.int16)
    cv2.setRNGSeed(int(generator.integers(1 << 30)))
    cv2.randn(noise, 0, 6)
    return np.clip(image + noise, 0, 255).astype(np.uint8)


def make_image_folder(
    root: Path, classes: int, per_class: int, size_range: tuple[int, int] = (300, 500), seed: int = 0
) -> list[Path]:
    """Write `per_class` JPEGs into each of `classes` folders under `root`; returns their paths, by class, then by name.

    Height and width of each image are drawn from `size_range` (both ends included); equal arguments give equal files.
    """
    generator = np.random.default_rng(seed)
    paths = []
    for label in range(classes):
        folder = root / f"n{label:08d}"
        folder.mkdir(parents=True)
        for number in range(per_class):
            height, width = (int(side) for side in generator.integers(size_range[0], size_range[1] + 1, 2))
            image = cv2.cvtColor(make_image(generator, height, width), cv2.COLOR_RGB2BGR)
            path = folder / f"{folder.name}_{number}.JPEG"
            path.write_bytes(cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, 92])[1].tobytes())
            paths.append(path)
    return paths
