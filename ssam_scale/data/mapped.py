"""A .beton file that is mapped into memory, from which its images are decoded."""

from __future__ import annotations

import mmap
import sys
from typing import TYPE_CHECKING

import numpy as np

from ssam_scale.data.images import Indices, InMemory
from ssam_scale.data.truncated import MappedFile
from ssam_scale.errors import UserError

if TYPE_CHECKING:
    from ssam_scale.data.beton import Beton


class Mapped:
    """The file. A `Reading`.

    Args:
        beton: its tables.

    Attributes:
        mapping: of the whole file.

    Raises:
        UserError: it cannot be mapped.
    """

    def __init__(self, beton: Beton) -> None:
        self._beton, self._file = beton, MappedFile(beton.path)
        try:
            mapped = np.memmap(beton.path, np.uint8, "r")
        except OSError as error:
            raise UserError(
                f"{beton.path}: cannot be mapped into memory ({error.strerror}); copy it to a file system that has mmap"
            ) from error
        self.mapping: mmap.mmap = mapped._mmap  # type: ignore[attr-defined]
        self._data = np.asarray(mapped)

    at_once = sys.maxsize
    """Nothing is read by `fetch`."""

    def begin(self) -> None:
        """See `Reading`."""
        self._file.check_unchanged()

    def fetch(self, images: Indices) -> InMemory:
        """Where they lie in the mapping."""
        beton = self._beton
        return InMemory(
            self._data,
            beton.starts[images],
            beton.sizes[images],
            beton.is_jpeg[images],
            beton.heights[images],
            beton.widths[images],
            beton.sums[images] if len(beton.sums) else beton.sums,
        )

    def again(self, image: int) -> InMemory | None:
        """None: what was written is what libjpeg takes without a word."""
        return None

    def check(self) -> None:
        """See `Reading`."""
        self._file.check()
