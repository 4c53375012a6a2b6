"""Looking at every image of a data set, and noting what each of a .beton file should be."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import accumulate
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ssam_scale.config.section import in_parts
from ssam_scale.cores import usable_cores
from ssam_scale.errors import UserError

from .beton import Beton, Sidecar, checksum, encoded_sums, inspect
from .images import Images
from .opening import open_images
from .sources.base import expand
from .xxh3 import xxh3

Advance = Callable[[int], None]

_PIECE = 256  # images of a thread's task
_NAMED = 20


def verify(place: Path, advance: Advance = lambda _: None, workers: int | None = None) -> Images:
    """`open_images`, and every image looked at: of a file every byte, as far as is known what it should be.

    Args:
        place: of the images, as `data.train` has it.
        advance: told the bytes of each piece that is read.
        workers: threads; None: the cores that this process may use.

    Raises:
        UserError: as `open_images`; images are damaged, which it names; or something else in a file is.
    """
    images = open_images(place)
    if damaged := damaged_images(images, advance, workers):
        raise UserError(
            f"{place}: {len(damaged):,} of {images.images:,} images are damaged: {_names(images, damaged)}; copy or "
            "write them again"
        )
    for part in images.parts:
        part.check_content()
    return images


def damaged_images(images: Images, advance: Advance = lambda _: None, workers: int | None = None) -> list[int]:
    """The images that are not what was written; where no hashes are known, those that libjpeg complains of.

    Args:
        images: all of them.
        advance: told the bytes of each piece that is read.
        workers: threads; None: the cores that this process may use.
    """
    if len(images.parts) > 1:  # of each is known what is
        firsts = accumulate((part.images for part in images.parts), initial=0)
        return [
            first + image
            for first, part in zip(firsts, images.parts, strict=False)
            for image in damaged_images(part, advance, workers)
        ]
    if len(images.sums):
        hashes = _hashes(images, advance, workers)
        return [int(index) for index in np.flatnonzero(hashes != images.sums)]
    from ssam_scale.data.ffcv_loader import undecodable

    pieces, reading, each = _pieces(images.images), images.reading(), images.bytes / max(images.images, 1)
    found: list[int] = []
    with ThreadPoolExecutor(workers or usable_cores(), "check") as pool:
        for piece, bad in zip(pieces, pool.map(lambda piece: undecodable(reading, piece), pieces), strict=True):
            found += [int(index) for index in piece[bad]]
            advance(round(each * len(piece)))
    return found


def add_checksums(path: Path, advance: Advance = lambda _: None, workers: int | None = None) -> Beton:
    """Note the hash of each image of a file that was written elsewhere, so that damage from now on is noticed.

    Raises:
        UserError: as `inspect`; or an image cannot be decoded as it is, which it names.
    """
    if len(expand(path)) > 1:
        raise UserError(f"--add-checksums: {path} is several files; give one at a time")
    if in_parts(path)[0]:
        raise UserError(f"--add-checksums: of {path} none can be kept; write it with `ssam-scale data write`")
    beton = inspect(path)
    if len(beton.sums):
        raise UserError(f"{path}: the hashes of its images are in {Sidecar.path(path).name} already")
    if damaged := damaged_images(beton, advance, workers):
        raise UserError(f"{path}: {len(damaged):,} images cannot be decoded: {_names(beton, damaged)}; write it again")
    sums = encoded_sums(_hashes(beton, lambda _: None, workers))
    sidecar = beton.sidecar or Sidecar(beton.images, [], beton.bytes, checksum(path), {})
    from .write import replacing

    with replacing(Sidecar.path(path)) as (file, _):
        file.write(replace(sidecar, xxh3=sums).dump())
    return inspect(path)


def _hashes(images: Images, advance: Advance, workers: int | None) -> NDArray[np.uint64]:
    reading = images.reading()
    found = np.empty(images.images, np.uint64)

    def of(piece: NDArray[np.int64]) -> int:
        stored = reading.fetch(piece)
        for index, start, size in zip(piece, stored.starts, stored.sizes, strict=True):
            found[index] = xxh3(stored.data[start : start + size])
        return int(stored.sizes.sum())

    with ThreadPoolExecutor(workers or usable_cores(), "check") as pool:
        for count in pool.map(of, _pieces(images.images)):
            advance(count)
    return found


def _pieces(images: int) -> Sequence[NDArray[np.int64]]:
    return [np.arange(start, min(start + _PIECE, images)) for start in range(0, images, _PIECE)]


def _names(images: Images, damaged: Sequence[int]) -> str:
    names, labels = images.class_names, images.labels

    def each() -> Iterator[str]:
        for index in damaged[:_NAMED]:
            label = int(labels[index])
            yield f"{images.named(index)} (class {names[label] if label < len(names) else label})"
        if len(damaged) > _NAMED:
            yield f"and {len(damaged) - _NAMED:,} more"

    return ", ".join(each())
