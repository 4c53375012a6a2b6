"""Several .beton files that are one data set: the images of the first, then those of the second, and so on."""

from __future__ import annotations

import hashlib
from bisect import bisect
from collections import Counter
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ssam_scale.data.beton import Beton, Sidecar, inspect, table_of
from ssam_scale.data.mapped import Mapped
from ssam_scale.data.read_ahead import Placed
from ssam_scale.data.shard import all_of_one, is_shard
from ssam_scale.data.sources.base import printable
from ssam_scale.errors import UserError


@dataclass(frozen=True)
class Several:
    """The files. `Images`, and `Tables` of the memory that they are mapped into.

    There each begins a whole number of pages behind the one before, so that pages are numbered over all of them.

    Attributes:
        path: the pattern that they were given by.
        parts: of them, in their order.
        page_size: bytes of a page; the largest, of which others are a half, a quarter and so on.
        labels: int64 [images].
        heights: int64 [images], pixels.
        widths: int64 [images], pixels.
        is_jpeg: bool [images], stored as JPEG or as raw pixels.
        starts: int64 [images], where the bytes of each begin.
        sizes: int64 [images], how many these are.
        sums: uint64 [images], `xxh3` of them, 0 where it is not known; or [0]: of none it is.
        firsts: the number of each file's first image.
        begins: where each file begins, bytes.
    """

    path: Path
    parts: Sequence[Beton]
    page_size: int
    labels: NDArray[np.int64]
    heights: NDArray[np.int64]
    widths: NDArray[np.int64]
    is_jpeg: NDArray[np.bool_]
    starts: NDArray[np.int64]
    sizes: NDArray[np.int64]
    sums: NDArray[np.uint64]
    firsts: Sequence[int]
    begins: Sequence[int]

    @property
    def place(self) -> str:
        """See `Images`."""
        return str(self.path)

    @property
    def bytes(self) -> int:
        """Of all files."""
        return sum(part.bytes for part in self.parts)

    @property
    def images(self) -> int:
        """See `Images`."""
        return len(self.labels)

    @property
    def class_names(self) -> list[str]:
        """See `Images`; they are the same in all."""
        return self.parts[0].class_names

    @property
    def classes(self) -> int:
        """See `Images`."""
        return len(self.class_names) or int(self.labels.max(initial=-1)) + 1

    @property
    def counts(self) -> dict[str, int]:
        """See `Images`."""
        return dict(sum((Counter(part.counts) for part in self.parts), Counter(dict.fromkeys(self.parts[0].counts, 0))))

    @property
    def fingerprint(self) -> str:
        """See `Images`; another order of the files is another one."""
        return hashlib.sha256(" ".join(part.fingerprint for part in self.parts).encode()).hexdigest()[:32]

    @property
    def pages(self) -> NDArray[np.int64]:
        """See `Images`."""
        return self.starts // self.page_size

    @property
    def assurance(self) -> str:
        """See `Images`: what is known of all of them."""
        return next((part.assurance for part in self.parts if part.sidecar is None), self.parts[0].assurance)

    def named(self, image: int) -> str:
        """See `Images`."""
        part, own = self._place_of(image)
        return f"{part.named(own)} of {printable(part.path)}"

    def complaint(self, image: int) -> str:
        """See `Images`."""
        part, own = self._place_of(image)
        return part.complaint(own)

    def check_content(self) -> None:
        """See `Images`."""
        for part in self.parts:
            part.check_content()

    def reading(self) -> Mapped:
        """See `Images`."""
        files = zip(self.parts, self.begins, strict=True)
        return Mapped(self, [Placed(part.path, part.bytes, begin) for part, begin in files])

    def table(self) -> AbstractContextManager[tuple[Path, tuple[str, str]]]:
        """Made for it, and gone afterwards."""
        return table_of(self.labels)

    def _place_of(self, image: int) -> tuple[Beton, int]:
        """The file that an image is of, and its number there."""
        number = bisect(self.firsts, image) - 1
        return self.parts[number], image - self.firsts[number]


def several(pattern: Path, files: Sequence[Path]) -> Several:
    """Files as one data set: shards in the order of their numbers, others in the one that is given.

    Args:
        pattern: what they were given by.
        files: what fits it.

    Raises:
        UserError: as `inspect`; one is given twice, empty, or has other classes; or they are shards, and not all of one
            data set.
    """
    parts = [inspect(file) for file in files]
    if any(map(is_shard, parts)):
        parts = [shard.beton for shard in all_of_one(pattern, parts)]
    else:
        _check_others(parts)
    page_size = max(part.page_size for part in parts)
    pages = [-(-part.bytes // page_size) for part in parts]
    begins = [page_size * before for before in _before(pages)]
    firsts = _before([part.images for part in parts])
    return Several(
        pattern,
        parts,
        page_size,
        labels=np.concatenate([part.labels for part in parts]),
        heights=np.concatenate([part.heights for part in parts]),
        widths=np.concatenate([part.widths for part in parts]),
        is_jpeg=np.concatenate([part.is_jpeg for part in parts]),
        starts=np.concatenate([begin + part.starts for begin, part in zip(begins, parts, strict=True)]),
        sizes=np.concatenate([part.sizes for part in parts]),
        sums=_sums(parts),
        firsts=firsts,
        begins=begins,
    )


def _before(counts: Sequence[int]) -> list[int]:
    """Of each the sum of those before it."""
    return list(accumulate(counts, initial=0))[:-1]


def _sums(parts: Sequence[Beton]) -> NDArray[np.uint64]:
    if not any(len(part.sums) for part in parts):
        return parts[0].sums
    return np.concatenate([part.sums if len(part.sums) else np.zeros(part.images, np.uint64) for part in parts])


def _check_others(parts: Sequence[Beton]) -> None:
    """Whether files that are no shards can be one data set.

    Raises:
        UserError: they cannot.
    """
    known: dict[str, Beton] = {}
    for part in parts:
        if not part.images:
            raise UserError(f"{printable(part.path)}: holds no images; remove it, or write it again")
        _check_classes(parts[0], part)
        content = str(part.path.resolve()) if part.sidecar is None else part.fingerprint
        if (same := known.get(content)) is not None:
            raise UserError(
                f"{printable(part.path)} and {printable(same.path)}: have the same content, so that each image would "
                "be there twice; give one of them"
            )
        known[content] = part


def _check_classes(first: Beton, part: Beton) -> None:
    if part.class_names == first.class_names:
        return
    both = f"{printable(part.path)} and {printable(first.path)}"
    for one, other in ((first, part), (part, first)):
        if not one.class_names:
            beside = Sidecar.path(one.path).name
            raise UserError(
                f"{both}: nothing names the classes of {printable(one.path.name)}, and those of "
                f"{printable(other.path.name)} have names; copy {printable(beside)}, too, or write it again"
            )
    raise UserError(
        f"{both} {other_classes(part.class_names, first.class_names)}; write one with --classes-of the other"
    )


def other_classes(one: Sequence[str], other: Sequence[str]) -> str:
    """In what the names of two sets of images' classes, which differ, do so: words to follow the names of the sets."""
    # Labels number the class folders, so a folder that only one of the two has shifts all labels after it.
    odd = sorted(set(one) ^ set(other))
    how = f"different classes (only one has {', '.join(odd[:3])})" if odd else "the same classes in another order"
    return f"have {how}, so their labels mean different things"
