"""Looking at every image of a .beton file, and noting what each should be."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ssam_scale.cores import usable_cores
from ssam_scale.errors import UserError

from .beton import Beton, Sidecar, checksum, encoded_sums, inspect

Advance = Callable[[int], None]

_PIECE = 256  # images of a thread's task
_NAMED = 20


def verify(path: Path, advance: Advance = lambda _: None, workers: int | None = None) -> Beton:
    """`inspect`, and every byte compared with what was written, as far as that is known.

    Args:
        path: of the file.
        advance: told the bytes of each piece that is read.
        workers: threads; None: the cores that this process may use.

    Raises:
        UserError: as `inspect`; images are damaged, which it names; or something else in the file is.
    """
    beton = inspect(path)
    if damaged := damaged_images(beton, advance, workers):
        raise UserError(
            f"{path}: {len(damaged):,} of {beton.images:,} images are damaged: {_names(beton, damaged)}; copy or write "
            "it again"
        )
    known = beton.sidecar is not None and beton.sidecar.sha256
    if known and checksum(path) != known:
        raise UserError(f"{path}: its content has changed since it was written (checksum); copy or write it again")
    return beton


def damaged_images(beton: Beton, advance: Advance = lambda _: None, workers: int | None = None) -> list[int]:
    """The images of a file that are not what was written; where no hashes are known, those that libjpeg complains of.

    Args:
        beton: the file.
        advance: told the bytes of each piece that is read.
        workers: threads; None: the cores that this process may use.
    """
    data = np.memmap(beton.path, np.uint8, "r")
    if len(beton.sums):
        hashes = _hashes(beton, data, advance, workers)
        return [int(index) for index in np.flatnonzero(hashes != beton.sums)]
    from ssam_scale.data.ffcv_loader import undecodable

    pieces = _pieces(beton.images)
    found: list[int] = []
    with ThreadPoolExecutor(workers or usable_cores(), "check") as pool:
        for piece, bad in zip(pieces, pool.map(lambda images: undecodable(beton, data, images), pieces), strict=True):
            found += [int(index) for index in piece[bad]]
            advance(int(beton.sizes[piece].sum()))
    return found


def add_checksums(path: Path, advance: Advance = lambda _: None, workers: int | None = None) -> Beton:
    """Note the hash of each image of a file that was written elsewhere, so that damage from now on is noticed.

    Raises:
        UserError: as `inspect`; or an image cannot be decoded as it is, which it names.
    """
    beton = inspect(path)
    if len(beton.sums):
        raise UserError(f"{path}: the hashes of its images are in {Sidecar.path(path).name} already")
    if damaged := damaged_images(beton, advance, workers):
        raise UserError(f"{path}: {len(damaged):,} images cannot be decoded: {_names(beton, damaged)}; write it again")
    sums = encoded_sums(_hashes(beton, np.memmap(path, np.uint8, "r"), lambda _: None, workers))
    sidecar = beton.sidecar or Sidecar(beton.images, [], beton.bytes, checksum(path), {})
    from .write import replacing

    with replacing(Sidecar.path(path)) as (file, _):
        file.write(replace(sidecar, xxh64=sums).dump())
    return inspect(path)


def _hashes(beton: Beton, data: NDArray[np.uint8], advance: Advance, workers: int | None) -> NDArray[np.uint64]:
    from ssam_scale.data.xxh64 import hash_pieces

    found = np.empty(beton.images, np.uint64)

    def of(images: NDArray[np.int64]) -> int:
        hash_pieces(data, beton.starts[images], beton.sizes[images], found[images[0] : images[-1] + 1])
        return int(beton.sizes[images].sum())

    with ThreadPoolExecutor(workers or usable_cores(), "check") as pool:
        for count in pool.map(of, _pieces(beton.images)):
            advance(count)
    return found


def _pieces(images: int) -> Sequence[NDArray[np.int64]]:
    return [np.arange(start, min(start + _PIECE, images)) for start in range(0, images, _PIECE)]


def _names(beton: Beton, images: Sequence[int]) -> str:
    def each() -> Iterator[str]:
        for index in images[:_NAMED]:
            label = int(beton.labels[index])
            named = [] if beton.sidecar is None else beton.sidecar.classes
            yield f"{index} (class {named[label] if label < len(named) else label})"
        if len(images) > _NAMED:
            yield f"and {len(images) - _NAMED:,} more"

    return ", ".join(each())
