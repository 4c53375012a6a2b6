"""What loaders, checks and runs know of labelled images, wherever these lie: in a .beton file, or as they came."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from ssam_scale.data.read_ahead import ReadAhead

Indices = NDArray[np.int64]


@dataclass(frozen=True)
class InMemory:
    """Some images in memory, as `augment.decode` takes them.

    Attributes:
        data: uint8 [bytes], what they lie in.
        starts: int64 [N], where in there each begins.
        sizes: int64 [N], bytes of each.
        is_jpeg: bool [N], JPEG or raw RGB pixels.
        heights: int64 [N], pixels.
        widths: int64 [N], pixels.
        sums: uint64 [N], `xxh3` of the bytes of each, 0 where it is not known; or [0]: of none it is.
    """

    data: NDArray[np.uint8]
    starts: NDArray[np.int64]
    sizes: NDArray[np.int64]
    is_jpeg: NDArray[np.bool_]
    heights: NDArray[np.int64]
    widths: NDArray[np.int64]
    sums: NDArray[np.uint64]


class Reading(Protocol):
    """Images while they are read. Safe to call from many threads."""

    @property
    def at_once(self) -> int:
        """As many images `fetch` may be asked for by a thread, which has memory for what it gives."""

    def begin(self) -> None:
        """An epoch begins.

        Raises:
            UserError: the images are not those that they were.
        """

    def read_ahead(self, images: Indices, memory: int) -> ReadAhead | None:
        """Begin to read the pages that these images lie in before they are fetched; None: they lie in none.

        Args:
            images: in the order in which they will be.
            memory: bytes that all pages may take, on all machines together.
        """

    def fetch(self, images: Indices) -> InMemory:
        """These images, in this order; what cannot be read as an image is an empty JPEG.

        Raises:
            UserError: they are not those that they were.
        """

    def again(self, image: int) -> InMemory | None:
        """One that libjpeg has complained of, in another form, if it is sound all the same."""

    def check(self) -> None:
        """Call it when what `fetch` gave was used, before what was made of it is.

        Raises:
            UserError: it has changed meanwhile.
        """


class Images(Protocol):
    """Labelled images, each known by its number: its place in the order that they lie in."""

    @property
    def path(self) -> Path:
        """Of the file or folder, or the pattern of files."""

    @property
    def parts(self) -> Sequence[Images]:
        """The data sets that they are one after another; of one, itself."""

    @property
    def place(self) -> str:
        """What `data.train` calls them."""

    @property
    def bytes(self) -> int:
        """Of all of them, as they are stored."""

    @property
    def labels(self) -> NDArray[np.int64]:
        """[images]."""

    @property
    def sums(self) -> NDArray[np.uint64]:
        """See `InMemory`, of all images as they are stored."""

    @property
    def pages(self) -> NDArray[np.int64] | None:
        """[images] the page that each lies in; None: they lie in none, so that there is no order by them."""

    @property
    def page_size(self) -> int:
        """Bytes of a page; 0: there are none."""

    @property
    def class_names(self) -> list[str]:
        """By label; empty: nobody has named them."""

    @property
    def fingerprint(self) -> str:
        """32 hexadecimal digits that other images, or another order of them, change."""

    @property
    def counts(self) -> dict[str, int]:
        """How many images are stored how."""

    @property
    def images(self) -> int:
        """How many there are."""

    @property
    def classes(self) -> int:
        """How many classes they are of; where nobody has named them, one more than the highest label."""

    def named(self, image: int) -> str:
        """Which it is, for people."""

    def complaint(self, image: int) -> str:
        """Of a damaged image: which it is, what is wrong with it if that is known, and what would mend it."""

    @property
    def assurance(self) -> str:
        """For people: what is known of images of which each was looked at, and nothing was found."""

    def check_content(self) -> None:
        """Look at all bytes, beside those of images too, as far as it is known what they should be.

        Raises:
            UserError: they are others.
        """

    def reading(self) -> Reading:
        """Begin to read. Raises UserError if that cannot be done here."""

    def table(self) -> AbstractContextManager[tuple[Path, tuple[str, str]]]:
        """A .beton file of whose tables FFCV's loader takes the labels; names of its image's and its label's field."""
