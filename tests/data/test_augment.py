"""Crops: inside the image, distributed as torchvision's, and a function of seed, epoch and image alone."""

from __future__ import annotations

import math

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from ssam_scale.data.augment import centre_crop, random_crop, sample_key, uniform

sides = st.integers(1, 3000)
keys = st.integers(0, 2**64 - 1)


@given(keys, sides, sides, st.floats(0.01, 1.0), st.floats(0.01, 1.0), st.floats(0.2, 1.0), st.floats(1.0, 5.0))
@settings(max_examples=400, deadline=None)
def test_a_crop_lies_inside_the_image(
    key: int, height: int, width: int, scale_1: float, scale_2: float, low: float, high: float
) -> None:
    scale = sorted((scale_1, scale_2))
    top, left, rows, columns = random_crop(np.uint64(key), height, width, *scale, low, high)
    assert rows >= 1
    assert columns >= 1
    assert 0 <= top <= height - rows
    assert 0 <= left <= width - columns


@given(keys, st.integers(100, 3000), st.integers(100, 3000))
@settings(max_examples=300, deadline=None)
def test_area_and_aspect_stay_within_their_bounds(key: int, height: int, width: int) -> None:
    _, _, rows, columns = random_crop(np.uint64(key), height, width, 0.08, 1.0, 3 / 4, 4 / 3)
    rounding = 1.0 / min(rows, columns)
    assert 3 / 4 * (1 - 2 * rounding) <= columns / rows <= 4 / 3 * (1 + 2 * rounding)
    if 0.75 < width / height < 4 / 3:  # otherwise the fallback may be smaller
        assert rows * columns >= 0.08 * height * width * (1 - 3 * rounding)


def test_the_centre_crop_of_a_square_at_its_own_size_is_all_of_it() -> None:
    assert centre_crop(28, 28, 1.0, 28) == (28, 28, 0, 0)
    assert centre_crop(28, 28, 1.0, 56) == (56, 56, 0, 0)
    assert centre_crop(256, 341, 0.875, 224) == (256, 341, 16, 58)
    assert centre_crop(375, 500, 0.875, 224) == (256, 341, 16, 58)


def reference_crop(generator: np.random.Generator, height: int, width: int) -> tuple[int, int, int, int]:
    """RandomResizedCrop as torchvision documents it, scale (0.08, 1), ratio (3/4, 4/3)."""
    for _ in range(10):
        area = height * width * generator.uniform(0.08, 1.0)
        ratio = math.exp(generator.uniform(math.log(3 / 4), math.log(4 / 3)))
        columns, rows = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < columns <= width and 0 < rows <= height:
            return (
                int(generator.integers(0, height - rows + 1)),
                int(generator.integers(0, width - columns + 1)),
                rows,
                columns,
            )
    if width / height < 3 / 4:
        rows, columns = round(width / (3 / 4)), width
    elif width / height > 4 / 3:
        rows, columns = height, round(height * (4 / 3))
    else:
        rows, columns = height, width
    return (height - rows) // 2, (width - columns) // 2, rows, columns


def test_crops_are_distributed_as_torchvisions() -> None:
    generator = np.random.default_rng(0)
    draws = 20_000
    for height, width in ((375, 500), (500, 200), (40, 400)):
        ours = np.array(
            [random_crop(np.uint64(sample_key(1, 2, k)), height, width, 0.08, 1.0, 3 / 4, 4 / 3) for k in range(draws)]
        )
        theirs = np.array([reference_crop(generator, height, width) for _ in range(draws)])
        for column in range(4):
            # Kolmogorov-Smirnov: the distance that two equal distributions exceed once in 1,000 times.
            grid = np.arange(501)
            one = np.searchsorted(np.sort(ours[:, column]), grid, side="right") / draws
            two = np.searchsorted(np.sort(theirs[:, column]), grid, side="right") / draws
            assert np.abs(one - two).max() < 1.95 * math.sqrt(2 / draws)


def test_draws_are_even_and_unrelated() -> None:
    values = np.array(
        [[uniform(np.uint64(sample_key(0, epoch, k)), d) for d in range(4)] for epoch in range(8) for k in range(2500)]
    )
    assert ((values >= 0) & (values < 1)).all()
    share = np.histogram(values, bins=20, range=(0, 1))[0] / values.size
    assert np.abs(share - 0.05).max() < 0.003
    assert np.abs(np.corrcoef(values.T) - np.eye(4)).max() < 0.03
    by_epoch = values[:, 0].reshape(8, -1)
    assert np.abs(np.corrcoef(by_epoch) - np.eye(8)).max() < 0.1


@given(st.integers(0, 2**31), st.integers(0, 10**6), st.integers(0, 10**9))
@settings(max_examples=100, deadline=None)
def test_every_part_of_the_key_counts(seed: int, epoch: int, index: int) -> None:
    key = sample_key(seed, epoch, index)
    assert key == sample_key(seed, epoch, index)
    assert (
        len(
            {
                key,
                sample_key(seed + 1, epoch, index),
                sample_key(seed, epoch + 1, index),
                sample_key(seed, epoch, index + 1),
            }
        )
        == 4
    )
