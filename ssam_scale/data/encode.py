"""Encoding one image for a .beton file: decoded, checked for damage, kept as JPEG or as raw pixels."""

from __future__ import annotations

import ctypes
import io
import re
import struct
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import cv2
import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from ssam_scale.data.beton import JPEG, LARGEST_SIDE, PAGE_SIZE, RAW
from ssam_scale.data.scans import missing_scans
from ssam_scale.data.sources.base import Pixels, Stored

_RGB, _CMYK = 0, 11  # turbojpeg's codes
_BITS_PER_SAMPLE, _PHOTOMETRIC, _WHITE_IS_ZERO = 258, 262, 0  # TIFF's
_JPEG_SUFFIXES = {".jpg", ".jpeg", ".jpe", ".jfif", ".mpo"}
_SUFFIXES = {
    "JPEG": _JPEG_SUFFIXES,
    "MPO": _JPEG_SUFFIXES,
    "PNG": {".png"},
    "TIFF": {".tif", ".tiff"},
    "BMP": {".bmp"},
    "WEBP": {".webp"},
    "PPM": {".ppm", ".pgm"},
}


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
    upright: bool = False
    """Turn and mirror pixels as their EXIF orientation says; otherwise they are stored as they lie."""


@dataclass(frozen=True)
class Encoded:
    """An image as it will lie in the file."""

    mode: int
    height: int
    width: int
    data: bytes
    turned: bool = False
    """The file says by EXIF that its pixels are to be turned or mirrored when they are shown, and they were not."""
    kind: str = ""
    """What the file is, for people: its format, and what is unusual about it."""


@dataclass(frozen=True)
class _Loaded:
    """An image file: its pixels, and its own bytes where they can be stored as they are."""

    pixels: Pixels
    original: bytes | None
    turned: bool
    kind: str


def encode(source: Path | Stored | Pixels, index: int, encoding: Encoding) -> Encoded:
    """Encode one image, given by its file or as RGB pixels [height, width, 3]. Safe to call from many threads.

    Raises:
        BadImageError: the file is missing, no image, cut short or damaged, or too large to be stored.
    """
    if isinstance(source, np.ndarray):
        loaded = _Loaded(source, None, False, "pixels")
    else:
        loaded = _load(source, encoding.upright)
    shrunk = _shrink(loaded.pixels, encoding.max_resolution)
    height, width = shrunk.shape[:2]
    if max(height, width) > LARGEST_SIDE:
        raise BadImageError(f"{width}x{height} pixels are too many; write with --max-resolution")
    as_jpeg = np.random.default_rng((encoding.seed, index)).random() < encoding.jpeg_proportion
    if not as_jpeg and shrunk.nbytes <= PAGE_SIZE:
        return Encoded(RAW, height, width, np.ascontiguousarray(shrunk).tobytes(), loaded.turned, loaded.kind)
    is_as_it_was = loaded.original is not None and shrunk is loaded.pixels
    data = loaded.original if is_as_it_was and loaded.original else _compress(shrunk, encoding.quality)
    if len(data) > PAGE_SIZE:
        raise BadImageError(f"{len(data):,} bytes do not fit a page of {PAGE_SIZE:,}; write with --max-resolution")
    return Encoded(JPEG, height, width, data, loaded.turned, loaded.kind)


def stored_bytes(source: Path | Stored | Pixels, encoding: Encoding) -> float:
    """How many bytes `encode` makes of an image in the mean over all indices.

    Raises:
        BadImageError: as `encode`.
    """
    made = encode(source, 0, replace(encoding, jpeg_proportion=1.0))
    raw = 3 * made.height * made.width
    share = encoding.jpeg_proportion if raw <= PAGE_SIZE else 1.0
    return share * len(made.data) + (1 - share) * raw


def _load(stored: Path | Stored, upright: bool) -> _Loaded:
    try:
        data = _read(stored)
        with Image.open(io.BytesIO(data)) as image:
            return _of_jpeg(image, data, stored.name, upright) if _is_jpeg(image) else _of_other(image, stored, upright)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        if isinstance(error, UnidentifiedImageError):
            # Pillow names the buffer it was given, which means nothing to whoever reads the message.
            raise BadImageError(_no_image(data)) from error
        # The path stands before the reason already.
        raise BadImageError((isinstance(error, OSError) and error.strerror) or str(error)) from error


def _read(stored: Path | Stored) -> bytes:
    if isinstance(stored, Path) and stored.exists() and not stored.is_file():  # reading a pipe would wait for ever
        raise BadImageError("not a file")
    data = stored.read_bytes()
    if not data:
        raise BadImageError("empty file")
    return data


def _is_jpeg(image: Image.Image) -> bool:
    return image.format in ("JPEG", "MPO")


def _of_jpeg(image: Image.Image, data: bytes, name: str, upright: bool) -> _Loaded:
    """A JPEG: decoded by libjpeg, whose complaints Pillow would hide."""
    width, height = image.size
    of_four = image.mode == "CMYK"
    progressive = "progressive" in image.info
    if of_four and "adobe" not in image.info:
        raise BadImageError("a CMYK JPEG without Adobe's marker, so that 0 may be all ink or none; convert it to RGB")
    if (missing := missing_scans(data)) is not None:
        raise BadImageError(missing)
    pixels, complaint = _decode_jpeg(data, height, width, of_four=of_four)
    if complaint and not _is_harmless(complaint, progressive):
        raise BadImageError(complaint)
    orientation = _orientation(image)
    kind = _kind(image, name)
    if of_four:
        pixels = np.asarray(image.convert("RGB"))
    # A progressive JPEG takes about three times as long to decode, in every epoch: better compressed anew.
    is_plain = image.format == "JPEG" and not (of_four or progressive or complaint)
    if upright and orientation != 1:
        return _Loaded(_TURNED[orientation](pixels), None, False, kind)
    return _Loaded(pixels, data if is_plain else None, orientation != 1, kind)


def _of_other(image: Image.Image, stored: Path | Stored, upright: bool) -> _Loaded:
    """A file of another format: decoded by Pillow, which torchvision and timm decode by."""
    kind = _kind(image, stored.name)
    pixels = _of_wide_gray(image) if image.mode[0] in "IF" else np.asarray(image.convert("RGB"))
    orientation = _orientation(image)  # in this order: of a TIFF Pillow turns the pixels itself
    if upright and orientation != 1:
        return _Loaded(_TURNED[orientation](pixels), None, False, kind)
    return _Loaded(pixels, None, orientation != 1, kind)


def _of_wide_gray(image: Image.Image) -> Pixels:
    """Gray of more than 8 bits, which Pillow takes for numbers up to 255, so that they turn white; and floats black.

    Raises:
        BadImageError: the format does not say which number is white.
    """
    bits = 16
    inverted = False
    if image.format == "TIFF":
        tags = image.tag_v2  # type: ignore[attr-defined]
        bits, inverted = tags.get(_BITS_PER_SAMPLE, (16,))[0], tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO
    is_known = image.mode.startswith("I;16") or (image.format, image.mode) == ("PPM", "I")
    if image.format not in ("PNG", "TIFF", "PPM") or not is_known:
        raise BadImageError(
            f"pixels of mode {image.mode}, whose range is not known; convert it to 8 bits a channel first"
        )
    gray = (np.asarray(image).astype(np.int64) >> (bits - 8)).astype(np.uint8)
    return np.repeat((255 - gray if inverted else gray)[:, :, None], 3, axis=2)


def _kind(image: Image.Image, name: str) -> str:
    """What a file is, for people: its format, and what is unusual about it."""
    words = [str(image.format)]
    if getattr(image, "n_frames", 1) > 1:
        words.append("its first picture")
    if image.mode == "CMYK":
        words.append("YCCK" if image.info.get("adobe_transform") == 2 else "CMYK")
    elif image.mode.startswith("I"):
        words.append("gray of 16 bits")
    elif image.mode in ("1", "L", "LA"):
        words.append("gray")
    elif image.mode in ("P", "PA"):
        words.append("palette")
    if image.has_transparency_data:
        words.append("without its transparency")
    if "progressive" in image.info:
        words.append("progressive")
    suffix = Path(name).suffix.lower()
    if suffix and suffix not in _SUFFIXES.get(str(image.format), ()):
        words.append(f"named {suffix}")
    return ", ".join(words)


_TURNED: dict[int, Callable[[Pixels], Pixels]] = {
    2: np.fliplr,
    3: lambda pixels: np.rot90(pixels, 2),
    4: np.flipud,
    5: lambda pixels: pixels.swapaxes(0, 1),
    6: lambda pixels: np.rot90(pixels, -1),
    7: lambda pixels: np.rot90(pixels, 2).swapaxes(0, 1),
    8: np.rot90,
}
"""By EXIF orientation, what makes of the pixels [height, width, 3] as they lie those that are shown."""


def _orientation(image: Image.Image) -> int:
    """From 1, as it lies, to 8; of EXIF that cannot be read, which an image of ImageNet has, 1."""
    try:
        found = image.getexif().get(ExifTags.Base.Orientation, 1)
    except (OSError, ValueError, TypeError, SyntaxError, KeyError, IndexError, OverflowError, struct.error):
        return 1
    return found if found in _TURNED else 1


def _is_harmless(complaint: str, progressive: bool) -> bool:
    """Whether no pixel is wrong: of stray bytes between the segments of the header.

    Where they stand before the end of the image, or between the scans of a progressive one, the stream of codes before
    them has ended early, and what it should have said is missing.
    """
    found = re.search(r"extraneous bytes before marker 0x([0-9a-f]{2})", complaint)
    return found is not None and found[1] != "d9" and not progressive


def _no_image(data: bytes) -> str:
    """What is in a file that is no image."""
    if data.startswith(b"version https://git-lfs"):
        return "a pointer of Git LFS in the place of the image, which `git lfs pull` fetches"
    if re.match(rb"\s*<(!doctype )?html", data, re.IGNORECASE):
        return "a page of HTML, as a failed download leaves it"
    known = {b"\xff\xd8": "JPEG", b"\x89PNG": "PNG", b"II*\0": "TIFF", b"MM\0*": "TIFF", b"BM": "BMP"}
    for begin, name in known.items():
        if data.startswith(begin):
            return f"a {name} that Pillow does not read: of an unusual kind, or damaged at its beginning"
    if data[4:8] == b"ftyp":
        brand = data[8:12].decode("ascii", "replace")
        return f"a file of the family of HEIC ({brand}), which is not read; convert it"
    if not re.search(rb"[^\t\n\r\x20-\x7e]", data[:256]):
        return "text, and not an image"
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
