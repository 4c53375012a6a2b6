"""Compiled decoding, random crops and flips, which depend on seed, epoch and image alone.

FFCV's own augmentations draw from an unseeded generator per thread, so no run can be repeated or resumed exactly. Here
every draw is a hash of (seed, epoch, index of the image in the file, number of the draw): the same for any number of
workers and processes, in any order, and with no state to save.

Everything compiled lies in this one file and refers to FFCV's library by symbol rather than by address, so that
numba can keep the machine code on disk: the first run compiles for some seconds, later ones start at once.
"""

from __future__ import annotations

import ctypes
import math
from typing import Any

import llvmlite.binding  # type: ignore[import-untyped]
import numpy as np
from numba import types

from ssam_scale.data import resize, xxh3
from ssam_scale.native import compiled

# Constants of the SplitMix64 generator.
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)

_TRIES = 10
_FLIP = 0
_FIRST_TRY = 1
_PLACE = _FIRST_TRY + 2 * _TRIES
FIRST_OF_DEVICE = _PLACE + 2
"""The first draw for an image that `decode` does not take."""

_PIXELS_RGB = 0  # turbojpeg's code

_int = types.int64
_pointer = types.uintp
_SYMBOLS = {
    "tjInitDecompress": _pointer(),
    "tjDecompressHeader3": types.int32(_pointer, _pointer, types.uint64, _pointer, _pointer, _pointer, _pointer),
    "tjDecompress2": types.int32(
        _pointer, _pointer, types.uint64, _pointer, types.int32, types.int32, types.int32, types.int32, types.int32
    ),
    "tjDestroy": types.int32(_pointer),
}
_CROP_SYMBOLS = {
    "ssam_scale_crop_new": _pointer(),
    "ssam_scale_crop_free": types.void(_pointer),
    "ssam_scale_crop_decode": types.int32(_pointer, _pointer, types.uint64, *6 * (types.int32,), _pointer, _pointer),
}
_DAMAGED, _NOT_DONE_HERE = 1, 2  # what `crop.c` says
_new_cropper, _free_cropper, _decode_crop = (
    types.ExternalFunction(name, signature) for name, signature in _CROP_SYMBOLS.items()
)
_new_decoder, _read_header, _decode_jpeg, _free_decoder = (
    types.ExternalFunction(f"ssam_scale_{name}", signature) for name, signature in _SYMBOLS.items()
)
_resize = types.ExternalFunction(
    resize.SYMBOL,
    types.void(
        _pointer, _int, _int, _int, _int, _pointer, _int, _pointer, _pointer, _int, _pointer, _int, _pointer, _pointer
    ),
)
_xxh3 = types.ExternalFunction(xxh3.SYMBOL, types.uint64(_pointer, types.uint64))
_table, _resize_slowly = resize.table, resize.slowly


def bind(library: ctypes.CDLL, crops: ctypes.CDLL | None, resizer: ctypes.CDLL | None) -> None:
    """Tell the compiled code where libraries lie; needed once before `decode`.

    Args:
        library: FFCV's, and turbojpeg behind it.
        crops: of `crop.c`; without it `decode` must not be asked for crops.
        resizer: of `resize.c`; likewise.
    """
    for name in (*_CROP_SYMBOLS, resize.SYMBOL):  # a name has to be known, also where nobody calls it
        from_c = resizer if name == resize.SYMBOL else crops
        found = getattr(from_c, name) if from_c is not None else library.tjDestroy
        llvmlite.binding.add_symbol(name, ctypes.cast(found, ctypes.c_void_p).value)
    for name in _SYMBOLS:
        address = ctypes.cast(getattr(library, name), ctypes.c_void_p).value
        llvmlite.binding.add_symbol(f"ssam_scale_{name}", address)
    llvmlite.binding.add_symbol(xxh3.SYMBOL, xxh3.address())


@compiled
def _mix(value: Any) -> Any:
    value = np.uint64(value) + _GOLDEN
    value = (value ^ (value >> np.uint64(30))) * _MIX_1
    value = (value ^ (value >> np.uint64(27))) * _MIX_2
    return value ^ (value >> np.uint64(31))


@compiled
def sample_key(seed: int, epoch: int, index: int) -> Any:
    """The uint64 that all draws for one image in one epoch come from."""
    return _mix(_mix(_mix(np.uint64(seed)) ^ np.uint64(epoch)) ^ np.uint64(index))


@compiled
def uniform(key: Any, draw: int) -> float:
    """Draw number `draw` for this key, evenly distributed over [0, 1)."""
    return np.float64(_mix(np.uint64(key) + np.uint64(draw) * _GOLDEN) >> np.uint64(11)) * 2.0**-53


@compiled
def _fill_uniforms(seed: int, epoch: int, indices: Any, first: int, out: Any) -> None:
    for k in range(len(indices)):
        key = sample_key(seed, epoch, indices[k])
        for draw in range(out.shape[1]):
            out[k, draw] = uniform(key, first + draw)


def uniforms(seed: int, epoch: int, indices: Any, first: int, count: int) -> Any:
    """Draws for images in one epoch, float64 [N, count], evenly distributed over [0, 1).

    Args:
        seed: of the run.
        epoch: from 0.
        indices: int64 [N], of the images.
        first: number of the first draw; those below `FIRST_OF_DEVICE` are taken by `decode`.
        count: draws for each.
    """
    out = np.empty((len(indices), count))
    _fill_uniforms(seed, epoch, np.ascontiguousarray(indices, np.int64), first, out)
    return out


@compiled
def random_crop(
    key: Any, height: int, width: int, scale_low: float, scale_high: float, ratio_low: float, ratio_high: float
) -> tuple[int, int, int, int]:
    """Top, left, height and width of a random crop, distributed as torchvision's RandomResizedCrop.

    Area is a share of the image in [scale_low, scale_high], width over height lies in [ratio_low, ratio_high] and is
    even in its logarithm. After ten draws that do not fit: the largest central crop within the ratios.
    """
    log_low, log_high = math.log(ratio_low), math.log(ratio_high)
    for attempt in range(_TRIES):
        draw = _FIRST_TRY + 2 * attempt
        area = height * width * (scale_low + (scale_high - scale_low) * uniform(key, draw))
        ratio = math.exp(log_low + (log_high - log_low) * uniform(key, draw + 1))
        crop_width, crop_height = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < crop_width <= width and 0 < crop_height <= height:
            top = int(uniform(key, _PLACE) * (height - crop_height + 1))
            left = int(uniform(key, _PLACE + 1) * (width - crop_width + 1))
            return top, left, crop_height, crop_width
    crop_height, crop_width = height, width
    if width < ratio_low * height:
        crop_height = min(height, max(1, round(width / ratio_low)))
    elif width > ratio_high * height:
        crop_width = min(width, max(1, round(height * ratio_high)))
    return (height - crop_height) // 2, (width - crop_width) // 2, crop_height, crop_width


@compiled
def centre_crop(height: int, width: int, share: float, side: int) -> tuple[int, int, int, int]:
    """Height and width that torchvision's Resize gives an image, and top and left of CenterCrop's square in that.

    The shorter side is resized to side / share, as timm does.
    """
    shorter, longer = min(height, width), max(height, width)
    resized = math.floor(side / share)
    beside = int(resized * longer / shorter)
    new_height, new_width = (resized, beside) if height <= width else (beside, resized)
    return new_height, new_width, round((new_height - side) / 2.0), round((new_width - side) / 2.0)


@compiled
def decode(
    data: Any,
    starts: Any,
    sizes: Any,
    jpegs: Any,
    heights: Any,
    widths: Any,
    indices: Any,
    training: bool,
    seed: int,
    epoch: int,
    crop: tuple[float, float, float, float],
    flip: float,
    share: float,
    interpolation: int,
    crops: bool,
    resizes: bool,
    sums: Any,
    out: Any,
    bad: Any,
) -> None:
    """Decode, crop, resize and flip images of a .beton file.

    Args:
        data: uint8 [bytes], what the images lie in.
        starts: int64 [N], where in `data`.
        sizes: int64 [N], bytes.
        jpegs: bool [N], JPEG or raw RGB pixels.
        heights: int64 [N], pixels.
        widths: int64 [N], pixels.
        indices: int64 [N], the images' indices in the file: what augmentation depends on.
        training: random crop and flip, or central crop.
        seed: what augmentation depends on, too.
        epoch: likewise.
        crop: scale_low, scale_high, ratio_low, ratio_high of `random_crop`.
        flip: probability of a horizontal flip.
        share: of `centre_crop`.
        interpolation: a code of `resize.INTERPOLATIONS`.
        crops: of JPEGs decode no more than the crop, where that is possible: the same pixels.
        resizes: by `resize.c`: the same pixels, too.
        sums: uint64 [N], what `xxh3` makes of the bytes of each, 0 where it is not known; or [0].
        out: uint8 [N, height, width, 3], written to.
        bad: bool [N], set for images that are not what was written, have another size than the table says, or that
            libjpeg complains of.
    """
    # One buffer for all images: FFCV's decoders keep one of the largest image's size for every image of five batches.
    largest = 1
    for k in range(len(indices)):
        if jpegs[k]:
            largest = max(largest, 3 * heights[k] * widths[k])
    buffer = np.empty(largest, np.uint8)
    side_y, side_x = out.shape[1], out.shape[2]
    scratch = np.empty(1, np.float32)
    decoder = _new_decoder()
    cropper = _new_cropper() if crops else np.uintp(0)
    noted = np.empty(4, np.int32)  # of a header: width, height, subsampling, colours; of a crop: where it begins, width
    note = np.uintp(noted.ctypes.data)
    for k in range(len(indices)):
        height, width = heights[k], widths[k]
        stored = data[starts[k] : starts[k] + sizes[k]]
        pixels = np.uintp(stored.ctypes.data)
        if len(sums) and sums[k] and _xxh3(pixels, np.uint64(sizes[k])) != sums[k]:
            bad[k] = True
            continue
        key = sample_key(seed, epoch, indices[k])
        if training:
            top, left, rows, columns = random_crop(key, height, width, crop[0], crop[1], crop[2], crop[3])
            enlarges = rows < side_y or columns < side_x
            tops, row_weights = _table(interpolation, rows, side_y, 0, side_y, enlarges)
            lefts, column_weights = _table(interpolation, columns, side_x, 0, side_x, enlarges)
        else:
            new_height, new_width, first_row, first_column = centre_crop(height, width, share, side_y)
            enlarges = height < new_height or width < new_width
            tops, row_weights = _table(interpolation, height, new_height, first_row, side_y, enlarges)
            lefts, column_weights = _table(interpolation, width, new_width, first_column, side_x, enlarges)
            top, left = tops[0], lefts[0]
            rows, columns = tops[-1] - top + row_weights.shape[1], lefts[-1] - left + column_weights.shape[1]
            for index in range(side_y):
                tops[index] -= top
            for index in range(side_x):
                lefts[index] -= left
        if jpegs[k]:
            source, pixels = pixels, np.uintp(buffer.ctypes.data)
            code = np.int32(_NOT_DONE_HERE)
            if crops:
                code = _decode_crop(
                    cropper, source, np.uint64(sizes[k]), np.int32(height), np.int32(width), np.int32(top),
                    np.int32(left), np.int32(rows), np.int32(columns), pixels, note,
                )  # fmt: skip
            if code == 0:
                height, width, top, left = rows, int(noted[1]), 0, int(noted[0])
            elif code == _NOT_DONE_HERE:
                code = _read_header(
                    decoder, source, np.uint64(sizes[k]), note, note + np.uintp(4), note + np.uintp(8),
                    note + np.uintp(12),
                )  # fmt: skip
                # Of another size than the table's, it would be scaled to that, or leave what the image before it was.
                if code == 0 and noted[0] == width and noted[1] == height:
                    # No flags: the exact transform, pixel for pixel what Pillow gives. FFCV's `imdecode` asks for the
                    # fast one, which is off by up to 8 steps and, in today's turbojpeg, no faster.
                    code = _decode_jpeg(
                        decoder, source, np.uint64(sizes[k]), pixels, np.int32(width), np.int32(0),
                        np.int32(height), np.int32(_PIXELS_RGB), np.int32(0),
                    )  # fmt: skip
                else:
                    code = np.int32(_DAMAGED)
            if code != 0:
                bad[k] = True
                continue
        mirrored = training and uniform(key, _FLIP) < flip
        begin = 3 * (top * width + left)
        if resizes:
            if len(scratch) < 3 * columns + 1 + 5 * side_x:
                scratch = np.empty(3 * columns + 1 + 5 * side_x, np.float32)
            _resize(
                pixels + np.uintp(begin), 3 * width, columns, side_y, side_x, np.uintp(tops.ctypes.data),
                row_weights.shape[1], np.uintp(row_weights.ctypes.data), np.uintp(lefts.ctypes.data),
                column_weights.shape[1], np.uintp(column_weights.ctypes.data), np.int64(mirrored),
                np.uintp(scratch.ctypes.data), np.uintp(out[k].ctypes.data),
            )  # fmt: skip
        else:
            image = (buffer if jpegs[k] else stored)[: 3 * height * width].reshape((height, width, 3))
            box = image[top : top + rows, left : left + columns]
            _resize_slowly(box, side_y, side_x, tops, row_weights, lefts, column_weights, mirrored, out[k])
    _free_decoder(decoder)
    if crops:
        _free_cropper(cropper)
