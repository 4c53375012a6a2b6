"""Resizing by a filter that widens as the image shrinks, as Pillow and torchvision (`antialias`) do.

`resize.c` does it; where there is no C compiler `slowly` does, to the same pixels.
"""

from __future__ import annotations

import ctypes
import functools
import math
from pathlib import Path
from typing import Any, get_args

import numpy as np

from ssam_scale.config.schema import Interpolation
from ssam_scale.native import c_library, compiled

INTERPOLATIONS: tuple[str, ...] = get_args(Interpolation)
"""By their codes in compiled code."""
_BILINEAR, _BICUBIC, _AREA = range(3)
_EXACT = 1e-9  # of products that should be whole numbers
_REACH = 1.0, 2.0, 1.0  # of their filters, pixels of the image or of the result, whichever are larger

SYMBOL = "ssam_scale_resize"


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled `resize.c`; None: it cannot be compiled here."""
    # A product and a sum in one operation, where there is one, would round otherwise than where there is none.
    return c_library(Path(__file__).with_name("resize.c"), ("-ffp-contract=off",))


@compiled
def weight(interpolation: int, distance: float) -> float:
    """The filter of an interpolation, at a distance from its middle: the triangle, or Keys' cubic with a = −1/2."""
    x = abs(distance)
    if interpolation == _BICUBIC:
        if x < 1.0:
            return ((1.5 * x - 2.5) * x) * x + 1.0
        return -0.5 * (((x - 5.0) * x + 8.0) * x - 4.0) if x < 2.0 else 0.0
    return max(0.0, 1.0 - x)


@compiled
def table(interpolation: int, length: int, resized: int, start: int, side: int, enlarges: bool) -> tuple[Any, Any]:
    """Of which pixels of a line of `length` each of `side` is the weighted mean, which begin at `start` of `resized`.

    Args:
        interpolation: a code of `INTERPOLATIONS`.
        length: pixels.
        resized: pixels of the result, were it whole.
        start: the first of them that is wanted.
        side: how many are.
        enlarges: whether the image has fewer pixels than the result in either direction: OpenCV's, and so FFCV's, area
            is a kind of bilinear interpolation then.

    Returns:
        The first pixel of each, rising, int32 [side], and the weights of those from there on, float32 [side, taps].
    """
    inverse = resized / length
    scale = 1.0 / inverse if interpolation == _AREA else length / resized  # OpenCV rounds twice, and then cuts off
    wide = max(scale, 1.0)
    area, reach = interpolation == _AREA, _REACH[interpolation] * wide
    firsts, ends = np.empty(side, np.int32), np.empty(side, np.int32)
    for place in range(side):
        x = start + place
        middle = (x + 0.5) * scale
        if area and enlarges:
            firsts[place] = min(math.floor(x * scale), length - 1)
            ends[place] = min(firsts[place] + 2, length)
        elif area:
            firsts[place] = math.floor(x * scale + _EXACT)
            ends[place] = min(length, math.ceil((x + 1) * scale - _EXACT))
        else:
            firsts[place], ends[place] = max(0, int(middle - reach + 0.5)), min(length, int(middle + reach + 0.5))
    # All have as many taps, so that loops over them have no branches; some weights are zero.
    taps = (ends - firsts).max()
    weights = np.zeros((side, taps), np.float32)
    for place in range(side):
        x = start + place
        begin, total = min(firsts[place], length - taps), 0.0
        past = np.float32((x + 1) - (firsts[place] + 1) * inverse)
        second = float(past - math.floor(past)) if past > 0.0 else 0.0
        for pixel in range(firsts[place], ends[place]):
            value = 0.0
            if area and enlarges:
                value = second if pixel > firsts[place] else 1.0 - second
            elif area:
                value = min(pixel + 1.0, (x + 1) * scale) - max(float(pixel), x * scale)
            else:
                value = weight(interpolation, (pixel + 0.5 - (x + 0.5) * scale) / wide)
            weights[place, pixel - begin] = value
            total += value
        for tap in range(taps):
            weights[place, tap] = weights[place, tap] / total if total else np.float32(tap == 0)
        firsts[place] = begin
    return firsts, weights


@compiled
def slowly(
    pixels: Any, height: int, width: int, tops: Any, row_weights: Any, lefts: Any, column_weights: Any,
    mirrored: bool, out: Any,
) -> None:  # fmt: skip
    """What `resize.c` does, from uint8 [rows, columns, 3] to uint8 [height, width, 3], written to `out`."""
    half, most, none = np.float32(0.5), np.float32(255.0), np.float32(0.0)
    columns = pixels.shape[1]
    row = np.empty((columns, 3), np.float32)
    for y in range(height):
        for x in range(columns):
            for channel in range(3):
                total = row_weights[y, 0] * np.float32(pixels[tops[y], x, channel])
                for tap in range(1, row_weights.shape[1]):
                    total = total + row_weights[y, tap] * np.float32(pixels[tops[y] + tap, x, channel])
                row[x, channel] = total
        for x in range(width):
            for channel in range(3):
                total = half
                for tap in range(column_weights.shape[1]):
                    total = total + column_weights[x, tap] * row[lefts[x] + tap, channel]
                out[y, width - 1 - x if mirrored else x, channel] = np.uint8(min(max(total, none), most))
