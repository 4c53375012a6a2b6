"""Fashion-MNIST, 70,000 labelled photographs of clothes, from Debian's package straight into .beton files."""

from __future__ import annotations

import gzip
import zlib
from dataclasses import dataclass, replace
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from ssam_scale.data.encode import Encoding
from ssam_scale.data.sources import Sample
from ssam_scale.data.write import up_to_date, write_samples
from ssam_scale.errors import UserError

FOLDER = Path("/usr/share/datasets/fashion-mnist")
"""Where the package puts its files."""

CLASSES = [
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
]

ENCODING = Encoding(max_resolution=None, quality=95, jpeg_proportion=1.0, seed=0)
"""How they are stored, unless asked for otherwise."""

_PACKAGE = "dataset-fashion-mnist"
_PREFIXES = {"train": "train", "val": "t10k"}


@dataclass(frozen=True)
class Prepared:
    """The two files, and whether anything had to be written."""

    train: Path
    val: Path
    written: bool


def prepare_fashion_mnist(
    out: Path,
    *,
    idx_folder: Path = FOLDER,
    size: int = 28,
    limit: int | None = None,
    val_limit: int | None = None,
    quality: int = ENCODING.quality,
    workers: int | None = None,
    progress: bool = True,
) -> Prepared:
    """Write `out`/train.beton (60,000 images) and `out`/val.beton (10,000) as RGB JPEGs of size x size pixels.

    Files that are there already, whole and made the same way, are left alone.

    Args:
        out: folder, made if missing.
        idx_folder: folder of the four idx.gz files.
        size: side in pixels; the originals have 28.
        limit: only this many training images.
        val_limit: only this many validation images.
        quality: JPEG quality.
        workers: threads; None for the cores this process may use.
        progress: show a bar with the remaining time on standard error.

    Raises:
        UserError: the package is not installed or damaged, or `out` cannot be written.
    """
    encoding = replace(ENCODING, quality=quality)
    written = False
    for name, count in (("train", limit), ("val", val_limit)):
        target = out / f"{name}.beton"
        source = {"dataset": "fashion-mnist", "part": name, "size": size, "limit": count}
        if up_to_date(target, encoding, source):
            continue
        samples = read_part(idx_folder, name, size=size, limit=count)
        write_samples(samples, CLASSES, target, encoding, source=source, workers=workers, progress=progress)
        written = True
    return Prepared(out / "train.beton", out / "val.beton", written)


def read_part(idx_folder: Path, part: str, *, size: int = 28, limit: int | None = None) -> list[Sample]:
    """Labelled images of `train` or `val`, RGB.

    Args:
        idx_folder: folder of the four idx.gz files.
        part: which.
        size: side in pixels.
        limit: only this many.

    Raises:
        UserError: the package is not installed, or damaged.
    """
    prefix = _PREFIXES[part]
    images = _read_idx(idx_folder / f"{prefix}-images-idx3-ubyte.gz", dimensions=3)[:limit]
    labels = _read_idx(idx_folder / f"{prefix}-labels-idx1-ubyte.gz", dimensions=1)[:limit]
    if len(images) != len(labels):
        raise UserError(f"{idx_folder}: {len(images):,} images but {len(labels):,} labels; reinstall {_PACKAGE}")
    return [
        Sample(f"{prefix} image {number}", _rgb(image, size), int(label))
        for number, (image, label) in enumerate(zip(images, labels, strict=True))
    ]


def _rgb(gray: NDArray[np.uint8], size: int) -> NDArray[np.uint8]:
    if gray.shape != (size, size):
        shrinks = size < gray.shape[0]
        gray = np.asarray(cv2.resize(gray, (size, size), interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_CUBIC))
    return np.repeat(gray[:, :, None], 3, axis=2)


def _read_idx(path: Path, dimensions: int) -> NDArray[np.uint8]:
    """An array of bytes in idx format: two zero bytes, type 8, number of dimensions, their sizes big-endian, data."""
    try:
        data = gzip.decompress(path.read_bytes())
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file; install Fashion-MNIST with `apt-get install {_PACKAGE}`") from error
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path}: cannot be read ({error}); reinstall {_PACKAGE}") from error
    start = 4 + 4 * dimensions
    shape = tuple(int(side) for side in np.frombuffer(data[4:start], ">u4"))
    if data[:4] != bytes((0, 0, 8, dimensions)) or len(data) - start != int(np.prod(shape)):
        raise UserError(f"{path}: not an idx file of bytes in {dimensions} dimensions; reinstall {_PACKAGE}")
    return np.frombuffer(data, np.uint8, offset=start).reshape(shape)
