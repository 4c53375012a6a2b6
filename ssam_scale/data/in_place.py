"""Images that are read from where they lie, without a .beton file: whole files, or pieces of them."""

from __future__ import annotations

import hashlib
import os
import stat
from collections import Counter
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ssam_scale.data.beton import JPEG, table_of
from ssam_scale.data.images import Indices, InMemory
from ssam_scale.data.sources import Sample, Source, printable
from ssam_scale.data.sources.tar import Slice
from ssam_scale.errors import UserError

if TYPE_CHECKING:
    from ssam_scale.data.encode import Encoded

_NO_SUMS = np.zeros(0, np.uint64)


@dataclass(frozen=True)
class Piece:
    """Where an image file lies.

    Attributes:
        path: of the file that it is, or lies in.
        start: bytes of that file before it.
        size: its bytes.
        written: when the file was written to the last time, nanoseconds since 1970.
        name: which it is, below the folder of all; for people, and for the fingerprint. With its suffix.
    """

    path: Path
    start: int
    size: int
    written: int
    name: str

    def read_into(self, buffer: memoryview) -> None:
        """Its content.

        Raises:
            UserError: it is not what it was.
        """
        try:
            file = os.open(self.path, os.O_RDONLY)
            try:
                now, got = os.fstat(file), 0
                while got < self.size and (count := os.preadv(file, [buffer[got:]], self.start + got)):
                    got += count
            finally:
                os.close(file)
        except OSError as error:
            raise UserError(f"{printable(self.path)}: cannot be read any more ({error.strerror})") from error
        if got < self.size or now.st_mtime_ns != self.written:
            raise UserError(
                f"{printable(self.path)}: has changed since the run began; a run needs the same images to its end: "
                "write others under another name"
            )

    def read_bytes(self) -> bytes:
        """Its content; raises as `read_into`."""
        buffer = bytearray(self.size)
        self.read_into(memoryview(buffer))
        return bytes(buffer)


@dataclass(frozen=True)
class InPlace:
    """Labelled images in the order of `pieces`. `Images`.

    What they are when they are decoded is what `data write` would store.

    Args:
        source: one of `SOURCES`.
        path: the folder, or the pattern of files.
        root: what the names of images are below.
        pieces: of each image.
        labels: int64 [images].
        class_names: by label; empty: not known.
        counts: how many images are stored how.
    """

    source: str
    path: Path
    root: Path
    pieces: Sequence[Piece]
    labels: NDArray[np.int64]
    class_names: list[str]
    counts: dict[str, int] = field(default_factory=dict)

    pages, page_size = None, 0
    sums = _NO_SUMS
    assurance = "every image can be decoded; whether it is what it was, nothing says"

    @property
    def parts(self) -> tuple[InPlace]:
        """See `Images`."""
        return (self,)

    @property
    def images(self) -> int:
        """See `Images`."""
        return len(self.labels)

    @property
    def classes(self) -> int:
        """See `Images`."""
        return len(self.class_names) or int(self.labels.max(initial=-1)) + 1

    @property
    def place(self) -> str:
        """See `Images`."""
        return f"{self.source}:{self.path}"

    @property
    def bytes(self) -> int:
        """Of all image files."""
        return sum(piece.size for piece in self.pieces)

    @property
    def fingerprint(self) -> str:
        """By names, sizes and labels: nothing is read for it, so that a change of the same size is not seen."""
        digest = hashlib.sha256(repr(self.class_names).encode())
        for piece, label in zip(self.pieces, self.labels.tolist(), strict=True):
            digest.update(f"{piece.name}\n{piece.size} {label}\n".encode("utf-8", "surrogateescape"))
        return digest.hexdigest()[:32]

    def named(self, image: int) -> str:
        """See `Images`."""
        return printable(self.pieces[image].name)

    def complaint(self, image: int) -> str:
        """See `Images`."""
        from ssam_scale.data.encode import BadImageError

        try:
            self.encoded(image)
            reason = "cannot be decoded"
        except BadImageError as error:
            reason = str(error)
        return f"{printable(self.root / self.pieces[image].name)}: {reason}; mend or remove it"

    def encoded(self, image: int) -> Encoded:
        """What `data write` makes of one that it stores as pixels.

        Raises:
            BadImageError: it is damaged.
        """
        from ssam_scale.data.encode import Encoding, encode

        return encode(self.pieces[image], image, Encoding(None, 90, 0.0, 0))

    def check_content(self) -> None:
        """Nothing is known of it."""

    def reading(self) -> FromFiles:
        """See `Images`."""
        return FromFiles(self)

    def table(self) -> AbstractContextManager[tuple[Path, tuple[str, str]]]:
        """Made for it, and gone afterwards."""
        return table_of(self.labels)


def in_place(name: str, path: Path, source: Source) -> InPlace:
    """The images of a source of `data write`, in the order that they would be written in.

    Args:
        name: one of `SOURCES`.
        path: what stands behind it.
        source: the images: files, or pieces of files.

    Raises:
        UserError: a file is none, or gone.
    """
    stats: dict[Path, os.stat_result] = {}

    def piece(sample: Sample) -> Piece:
        where = sample.source
        file = where if isinstance(where, Path) else where.path if isinstance(where, Slice) else None
        if file is None:
            raise UserError(f"{printable(path)}: its images lie in tables; write it with `ssam-scale data write`")
        if (found := stats.get(file)) is None:
            try:
                stats[file] = found = file.stat()
            except OSError as error:
                raise UserError(f"{printable(file)}: cannot be read ({error.strerror})") from error
            if not stat.S_ISREG(found.st_mode):  # reading a pipe would wait for ever
                raise UserError(f"{printable(file)}: is no file; remove it")
        start, size = (where.start, where.size) if isinstance(where, Slice) else (0, found.st_size)
        return Piece(file, start, size, found.st_mtime_ns, os.path.relpath(sample.name, source.root))

    pieces = [piece(sample) for sample in source.samples]
    counts = Counter(Path(each.name).suffix.lower() for each in pieces)
    labels = np.array([sample.label for sample in source.samples], np.int64)
    return InPlace(name, path, source.root, pieces, labels, source.classes, dict(counts))


class FromFiles:
    """Image files that are read when they are needed. A `Reading`.

    JPEGs go to the loader's decoder as they are. What that does not take (other formats, progressive JPEGs, those of
    four colours) or complains of, is what `data write` makes of it, made anew each time.

    Args:
        images: the files.
    """

    def __init__(self, images: InPlace) -> None:
        from ssam_scale.data.jpeg_header import jpeg_sizes  # imports numba

        self._images, self._sizes_of = images, jpeg_sizes

    at_once = 8
    """Those that the loader's decoder does not take are pixels in memory, of up to a page of 8 MiB each."""

    def begin(self) -> None:
        """Nothing: each file is looked at when it is read."""

    def read_ahead(self, images: Indices, memory: int) -> None:
        """They lie in no pages."""

    def fetch(self, images: Indices) -> InMemory:
        """Read into memory of their own."""
        pieces = [self._images.pieces[image] for image in images.tolist()]
        sizes = np.array([piece.size for piece in pieces], np.int64)
        starts = np.cumsum(sizes) - sizes
        data = np.empty(int(sizes.sum()), np.uint8)
        view = data.data
        for piece, start in zip(pieces, starts.tolist(), strict=True):
            piece.read_into(view[start : start + piece.size])
        heights, widths = np.empty(len(pieces), np.int64), np.empty(len(pieces), np.int64)
        self._sizes_of(data, starts, sizes, heights, widths)
        is_jpeg = np.ones(len(pieces), np.bool_)
        if (others := np.flatnonzero(heights == 0)).size:
            made = [self._encoded(int(images[place])) for place in others]
            ends = len(data) + np.cumsum([len(each.data) for each in made])
            data = np.concatenate([data, *(np.frombuffer(each.data, np.uint8) for each in made)])
            for place, end, each in zip(others, ends, made, strict=True):
                is_jpeg[place], heights[place], widths[place] = each.mode == JPEG, each.height, each.width
                starts[place], sizes[place] = end - len(each.data), len(each.data)
        return InMemory(data, starts, sizes, is_jpeg, heights, widths, _NO_SUMS)

    def again(self, image: int) -> InMemory | None:
        """What `data write` makes of it, if it takes it."""
        made = self._encoded(image)
        if not made.data:
            return None
        start, size, height, width = (
            np.array([value], np.int64) for value in (0, len(made.data), made.height, made.width)
        )
        is_jpeg = np.array([made.mode == JPEG])
        return InMemory(np.frombuffer(made.data, np.uint8), start, size, is_jpeg, height, width, _NO_SUMS)

    def check(self) -> None:
        """Nothing: what was read is in memory."""

    def _encoded(self, image: int) -> Encoded:
        """An empty JPEG of a damaged one."""
        from ssam_scale.data.encode import BadImageError, Encoded

        try:
            return self._images.encoded(image)
        except BadImageError:
            return Encoded(JPEG, 1, 1, b"")
