"""Files that are mapped into memory, one behind another, from which their images are decoded."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import sys
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ssam_scale.data.images import Indices, InMemory
from ssam_scale.data.read_ahead import Placed, ReadAhead, most_at_once, spans
from ssam_scale.data.truncated import MappedFile
from ssam_scale.errors import UserError

_MAP_FIXED = 0x10  # Linux's and the BSDs'


class Tables(Protocol):
    """What is known of images that lie in files. Attributes are as `Beton` has them, all int64 or bool [images]."""

    @property
    def starts(self) -> NDArray[np.int64]:
        """Where each begins, in bytes from the beginning of the memory that the files are mapped into."""

    @property
    def sizes(self) -> NDArray[np.int64]:
        """Bytes."""

    @property
    def is_jpeg(self) -> NDArray[np.bool_]:
        """JPEG or raw RGB pixels."""

    @property
    def heights(self) -> NDArray[np.int64]:
        """Pixels."""

    @property
    def widths(self) -> NDArray[np.int64]:
        """Pixels."""

    @property
    def sums(self) -> NDArray[np.uint64]:
        """See `InMemory`."""

    @property
    def pages(self) -> NDArray[np.int64]:
        """Of each, counted as `starts` is."""

    @property
    def page_size(self) -> int:
        """Bytes."""


class Mapped:
    """The files. A `Reading`.

    They lie in one range of addresses, so that an image of any of them is found by a number, and decoding them costs
    what it costs from one file. No file stays open.

    Args:
        tables: of their images.
        files: where each lies in that range, the first at 0.

    Raises:
        UserError: one cannot be mapped.
    """

    def __init__(self, tables: Tables, files: Sequence[Placed]) -> None:
        self._tables, self._placed = tables, files
        self._files = [MappedFile(file.path) for file in files]
        # Addresses that nobody else gets; between two files they are zeros.
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        self._memory = mmap.mmap(-1, files[-1].start + files[-1].bytes, flags, mmap.PROT_READ)
        self._data = np.frombuffer(self._memory, np.uint8)
        for file in files:
            try:
                _map(file, self._data.ctypes.data + file.start)
            except OSError as error:
                raise UserError(
                    f"{file.path}: cannot be mapped into memory ({error.strerror}); {_remedy(error)}"
                ) from error

    at_once = sys.maxsize
    """Nothing is read by `fetch`."""

    def begin(self) -> None:
        """See `Reading`."""
        for file in self._files:
            file.check_unchanged()

    def read_ahead(self, images: Indices, memory: int) -> ReadAhead:
        """See `Reading`."""
        pages = spans(self._tables.pages, images)
        fits = sum(file.bytes for file in self._placed) <= memory
        return ReadAhead(
            self._placed, self._memory, self._tables.page_size, pages, None if fits else 2 * most_at_once(pages)
        )

    def fetch(self, images: Indices) -> InMemory:
        """Where they lie in memory."""
        tables = self._tables
        return InMemory(
            self._data,
            tables.starts[images],
            tables.sizes[images],
            tables.is_jpeg[images],
            tables.heights[images],
            tables.widths[images],
            tables.sums[images] if len(tables.sums) else tables.sums,
        )

    def again(self, image: int) -> InMemory | None:
        """None: what was written is what libjpeg takes without a word."""
        return None

    def check(self) -> None:
        """See `Reading`."""
        for file in self._files:
            file.check()


def _map(file: Placed, address: int) -> None:
    """Have a file's bytes at an address. Raises OSError."""
    libc: Any = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    descriptor = os.open(file.path, os.O_RDONLY)
    try:
        flags = mmap.MAP_SHARED | _MAP_FIXED
        if libc.mmap(address, file.bytes, mmap.PROT_READ, flags, descriptor, 0) != address:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number))
    finally:
        os.close(descriptor)


def _remedy(error: OSError) -> str:
    if error.errno == errno.ENOMEM:
        return "raise the limit of addresses (ulimit -v)"
    return "copy it to a file system that has mmap"
