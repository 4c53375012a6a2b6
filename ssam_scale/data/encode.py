"""Encoding one image for a .beton file: decoded, checked for damage, kept as JPEG or as raw pixels."""

from __future__ import annotations

import ctypes
import io
import re
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, UnidentifiedImageError

from ssam_scale.data.beton import JPEG, LARGEST_SIDE, PAGE_SIZE, RAW

Pixels = NDArray[np.uint8]

_RGB, _CMYK = 0, 11  # turbojpeg's codes
# Pillow takes them for numbers up to 255: floats up to 1 become black, and 16 bits white.
_UNKNOWN_RANGE = {"F", "I", "I;16", "I;16B", "I;16L", "I;16N"}


class BadImageError(Exception):
    """An image that cannot be stored; the message says why."""


@dataclass(frozen=True)
class Encoding:
    """How images are stored."""

    max_resolution: int | None
    """Longer images are shrunk until their longer side has this many pixels; None: never."""
    quality: int
    """JPEG quality of images that are compressed here; JPEG files that need no change keep their own bytes."""
    jpeg_proportion: float
    """Share of the images stored as JPEG, the rest as raw pixels: larger on disk, nothing to decode when read."""
    seed: int
    """Which images those are depends on this and the image's index alone."""


@dataclass(frozen=True)
class Encoded:
    """An image as it will lie in the file."""

    mode: int
    height: int
    width: int
    data: bytes
    turned: bool = False
    """The file says by EXIF that its pixels are to be turned or mirrored when they are shown, and they were not."""


def encode(source: Path | Pixels, index: int, encoding: Encoding) -> Encoded:
    """Encode one image, given by its file or as RGB pixels [height, width, 3]. Safe to call from many threads.

    Raises:
        BadImageError: the file is missing, no image, cut short or damaged, or too large to be stored.
    """
    original, pixels, turned = _load(source) if isinstance(source, Path) else (None, source, False)
    shrunk = _shrink(pixels, encoding.max_resolution)
    height, width = shrunk.shape[:2]
    if max(height, width) > LARGEST_SIDE:
        raise BadImageError(f"{width}x{height} pixels are too many; write with --max-resolution")
    as_jpeg = np.random.default_rng((encoding.seed, index)).random() < encoding.jpeg_proportion
    if not as_jpeg and shrunk.nbytes <= PAGE_SIZE:
        return Encoded(RAW, height, width, np.ascontiguousarray(shrunk).tobytes(), turned)
    data = original if original is not None and shrunk is pixels else _compress(shrunk, encoding.quality)
    if len(data) > PAGE_SIZE:
        raise BadImageError(f"{len(data):,} bytes do not fit a page of {PAGE_SIZE:,}; write with --max-resolution")
    return Encoded(JPEG, height, width, data, turned)


def _load(path: Path) -> tuple[bytes | None, Pixels, bool]:
    """The pixels of an image file, its own bytes where they can be stored as they are, and whether EXIF turns them."""
    if path.exists() and not path.is_file():  # reading a pipe would wait for ever
        raise BadImageError("not a file")
    try:
        data = path.read_bytes()
        if not data:
            raise BadImageError("empty file")
        with Image.open(io.BytesIO(data)) as image:
            width, height = image.size
            if image.mode in _UNKNOWN_RANGE:
                raise BadImageError(
                    f"pixels of mode {image.mode}, whose range is not known; convert it to 8 bits a channel first"
                )
            if image.format != "JPEG" or image.mode not in ("RGB", "L"):
                if image.format in ("JPEG", "MPO"):  # which Pillow decodes without a word about damage
                    progressive = "progressive" in image.info
                    complaint = _decode_jpeg(data, height, width, of_four=image.mode == "CMYK")[1]
                    if complaint and not _is_harmless(complaint, progressive):
                        raise BadImageError(complaint)
                pixels = np.asarray(image.convert("RGB"))
                return None, pixels, _is_turned(image)  # in this order: of a TIFF Pillow turns the pixels itself
            turned = _is_turned(image)
            # A progressive JPEG takes about three times as long to decode, in every epoch: better compressed anew.
            plain = "progressive" not in image.info
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        if isinstance(error, UnidentifiedImageError):
            # Pillow names the buffer it was given, which means nothing to whoever reads the message.
            raise BadImageError(_no_image(data)) from error
        # The path stands before the reason already.
        raise BadImageError((isinstance(error, OSError) and error.strerror) or str(error)) from error
    pixels, complaint = _decode_jpeg(data, height, width)
    if complaint and not _is_harmless(complaint, progressive=not plain):
        raise BadImageError(complaint)
    return (data if plain and not complaint else None), pixels, turned


def _is_harmless(complaint: str, progressive: bool) -> bool:
    """Whether no pixel is wrong: of stray bytes between the segments of the header.

    Where they stand before the end of the image, or between the scans of a progressive one, the stream of codes before
    them has ended early, and what it should have said is missing.
    """
    found = re.search(r"extraneous bytes before marker 0x([0-9a-f]{2})", complaint)
    return found is not None and found[1] != "d9" and not progressive


def _is_turned(image: Image.Image) -> bool:
    return image.getexif().get(ExifTags.Base.Orientation, 1) in range(2, 9)


def _no_image(data: bytes) -> str:
    """What is in a file that is no image."""
    if data.startswith(b"version https://git-lfs"):
        return "a pointer of Git LFS in the place of the image, which `git lfs pull` fetches"
    if re.match(rb"\s*<(!doctype )?html", data, re.IGNORECASE):
        return "a page of HTML, as a failed download leaves it"
    return "not an image that Pillow knows"


def _decode_jpeg(data: bytes, height: int, width: int, *, of_four: bool = False) -> tuple[Pixels, str]:
    """Decode as the loader does later; the string is libjpeg's first complaint, if any, which Pillow would hide.

    Args:
        data: the file's bytes.
        height: pixels.
        width: pixels.
        of_four: to four channels, of CMYK; of three, of RGB.
    """
    from ssam_scale.data.ffcv_import import lib  # takes seconds, so not before it is needed

    lib.tjInitDecompress.restype = ctypes.c_void_p
    lib.tjGetErrorStr.restype = ctypes.c_char_p
    pixels = np.empty((height, width, 4 if of_four else 3), np.uint8)
    decoder = ctypes.c_void_p(lib.tjInitDecompress())
    try:
        target = ctypes.c_void_p(pixels.ctypes.data)
        size = ctypes.c_ulong(len(data))
        if lib.tjDecompress2(decoder, data, size, target, width, 0, height, _CMYK if of_four else _RGB, 0) == 0:
            return pixels, ""
        return pixels, (lib.tjGetErrorStr() or b"damaged JPEG").decode("utf-8", "replace")  # the text is per thread
    finally:
        lib.tjDestroy(decoder)


def _shrink(pixels: Pixels, max_resolution: int | None) -> Pixels:
    """The same object where nothing has to be done."""
    height, width = pixels.shape[:2]
    if max_resolution is None or max(height, width) <= max_resolution:
        return pixels
    ratio = max_resolution / max(height, width)
    size = (max(1, round(width * ratio)), max(1, round(height * ratio)))
    return np.asarray(cv2.resize(pixels, size, interpolation=cv2.INTER_AREA), np.uint8)


def _compress(pixels: Pixels, quality: int) -> bytes:
    done, data = cv2.imencode(".jpg", cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, quality])
    if not done:
        raise BadImageError("cannot be compressed as JPEG")
    return bytes(data.tobytes())
