"""What a crop is resized to: Pillow's pixels and OpenCV's, and the same from the C file as from Python."""

from __future__ import annotations

import ctypes
from typing import Any

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from ssam_scale.data import resize
from ssam_scale.data.resize import INTERPOLATIONS, slowly, table

Pixels = NDArray[np.uint8]

pytestmark = pytest.mark.skipif(resize.library() is None, reason="no C compiler")

sizes = st.tuples(st.integers(1, 90), st.integers(1, 90))
seeds = st.integers(0, 2**32 - 1)
interpolations = st.sampled_from(INTERPOLATIONS)


def photograph(seed: int, rows: int, columns: int) -> Pixels:
    """Rough and smooth parts."""
    draw = np.random.default_rng(seed)
    coarse = draw.integers(0, 256, (rows // 4 + 1, columns // 4 + 1, 3), np.uint8)
    smooth = np.asarray(Image.fromarray(coarse).resize((columns, rows), Image.Resampling.BICUBIC), np.int64)
    return np.clip(smooth + draw.integers(-20, 21, smooth.shape), 0, 255).astype(np.uint8)


def arguments(image: Pixels, height: int, width: int, interpolation: str) -> tuple[Any, ...]:
    rows, columns, _ = image.shape
    code, enlarges = INTERPOLATIONS.index(interpolation), rows < height or columns < width
    tables = (table(code, n, side, 0, side, enlarges) for n, side in ((rows, height), (columns, width)))
    return height, width, *next(tables), *next(tables)


def resized(image: Pixels, height: int, width: int, interpolation: str, mirrored: bool = False) -> Pixels:
    """By the compiled file."""
    _, _, tops, row_weights, lefts, column_weights = arguments(image, height, width, interpolation)
    out = np.full(3 * height * width + 8, 77, np.uint8)
    columns = image.shape[1]
    scratch = np.full(3 * columns + 1 + 5 * width, np.nan, np.float32)
    library, whole = resize.library(), ctypes.c_int64
    assert library is not None

    def at(array: NDArray[Any]) -> ctypes.c_void_p:
        return ctypes.c_void_p(array.ctypes.data)

    library.ssam_scale_resize(
        at(image), whole(image.strides[0]), whole(columns), whole(height), whole(width), at(tops),
        whole(row_weights.shape[1]), at(row_weights), at(lefts), whole(column_weights.shape[1]), at(column_weights),
        whole(mirrored), at(scratch), at(out),
    )  # fmt: skip
    assert (out[3 * height * width :] == 77).all()  # nothing is written behind the last pixel
    return out[: 3 * height * width].reshape(height, width, 3)


@given(seeds, sizes, sizes, interpolations, st.booleans())
@settings(max_examples=300, deadline=None)
def test_the_c_file_makes_the_pixels_that_python_makes(
    seed: int, size: tuple[int, int], wanted: tuple[int, int], interpolation: str, mirrored: bool
) -> None:
    image, out = photograph(seed, *size), np.empty((*wanted, 3), np.uint8)
    slowly(image, *arguments(image, *wanted, interpolation), mirrored, out)
    assert np.array_equal(resized(image, *wanted, interpolation, mirrored), out)


@given(seeds, sizes, sizes, st.sampled_from(["bilinear", "bicubic"]))
@settings(max_examples=300, deadline=None)
def test_pixels_are_pillows_rounded_once(
    seed: int, size: tuple[int, int], wanted: tuple[int, int], interpolation: str
) -> None:
    """Pillow resizes floats, a channel at a time, without rounding them: nor do we before the end."""
    image = photograph(seed, *size)
    kind = Image.Resampling[interpolation.upper()]
    channels = [Image.fromarray(image[..., each].astype(np.float32)).resize(wanted[::-1], kind) for each in range(3)]
    theirs = np.clip(np.stack([np.asarray(each) for each in channels], axis=-1), 0.0, 255.0)
    assert np.abs(resized(image, *wanted, interpolation) - theirs).max() <= 0.5 + 1e-3


@given(seeds, sizes, sizes)
@settings(max_examples=300, deadline=None)
def test_they_are_those_of_pillows_bytes_but_for_a_step(
    seed: int, size: tuple[int, int], wanted: tuple[int, int]
) -> None:
    """Those round to whole steps between their two passes: what torchvision gives."""
    image = photograph(seed, *size)
    theirs = np.asarray(Image.fromarray(image).resize(wanted[::-1], Image.Resampling.BILINEAR), np.int64)
    assert np.abs(resized(image, *wanted, "bilinear") - theirs).max() <= 1


@given(seeds, sizes, sizes)
@settings(max_examples=300, deadline=None)
def test_by_area_they_are_opencvs(seed: int, size: tuple[int, int], wanted: tuple[int, int]) -> None:
    """And so FFCV's. Its weights are of 11 bits where it enlarges."""
    image = photograph(seed, *size)
    theirs = cv2.resize(image, wanted[::-1], interpolation=cv2.INTER_AREA).astype(np.int64)
    difference = np.abs(resized(image, *wanted, "area") - theirs)
    assert difference.max() <= 1


@given(seeds, sizes, interpolations)
@settings(max_examples=100, deadline=None)
def test_its_own_size_leaves_an_image_as_it_is(seed: int, size: tuple[int, int], interpolation: str) -> None:
    image = photograph(seed, *size)
    assert np.array_equal(resized(image, *size, interpolation), image)
    assert np.array_equal(resized(image, *size, interpolation, mirrored=True), image[:, ::-1])


@given(st.integers(0, 255), sizes, sizes, interpolations)
@settings(max_examples=100, deadline=None)
def test_one_colour_stays_that_colour(
    value: int, size: tuple[int, int], wanted: tuple[int, int], interpolation: str
) -> None:
    image = np.full((*size, 3), value, np.uint8)
    assert (resized(image, *wanted, interpolation) == value).all()


@given(st.integers(1, 3000), st.integers(1, 600), interpolations, st.booleans())
@settings(max_examples=300, deadline=None)
def test_weights_are_of_pixels_that_there_are_and_add_up_to_one(
    length: int, side: int, interpolation: str, enlarges: bool
) -> None:
    code, enlarges = INTERPOLATIONS.index(interpolation), enlarges or side > length
    firsts, weights = table(code, length, side, 0, side, enlarges)
    assert firsts.min() >= 0
    assert firsts.max() + weights.shape[1] <= length
    assert (np.diff(firsts) >= 0).all()
    assert np.abs(weights.sum(axis=1) - 1.0).max() < 1e-5
    some = table(code, length, side, side // 3, side - side // 3, enlarges)
    assert np.array_equal(some[0], firsts[side // 3 :]) or some[1].shape != weights.shape


def test_a_box_of_a_larger_image() -> None:
    image = photograph(0, 50, 60)
    box = image[7:40, 11:52]
    assert np.array_equal(resized(box, 20, 30, "bilinear"), resized(np.ascontiguousarray(box), 20, 30, "bilinear"))
