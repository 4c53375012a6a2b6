"""Shards: parts of a data set that several machines write, and `join` makes one file of."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from ssam_scale.errors import UserError


@dataclass(frozen=True)
class Shard:
    """One of several equal parts of a list of images, numbered from 1."""

    number: int
    of: int

    @classmethod
    def parse(cls, text: str) -> Shard:
        """`3/16` is the third of sixteen.

        Raises:
            UserError: it is not.
        """
        found = re.fullmatch(r"\s*(\d{1,9})\s*/\s*(\d{1,9})\s*", text, re.ASCII)
        if found is None or not 1 <= int(found[1]) <= int(found[2]):
            raise UserError(f"--shard {text}: give the number of the shard and how many there are, from 1/16 to 16/16")
        return cls(int(found[1]), int(found[2]))

    def span(self, images: int) -> range:
        """Which of so many images it has.

        Raises:
            UserError: there are more shards than images.
        """
        if self.of > images:
            raise UserError(f"--shard {self}: there are only {images:,} images; give at most as many shards")
        return range((self.number - 1) * images // self.of, self.number * images // self.of)

    def __str__(self) -> str:
        return f"{self.number}/{self.of}"


@dataclass(frozen=True)
class ShardNote:
    """What the sidecar of a shard says of it.

    Attributes:
        shard: which it is.
        images: how many all shards were to have.
        listing: names and labels of all of them, as `sources.listing` has it.
        left_out: name, reason and label of each image of this shard that is not in it.
        kinds: how many images of it were of each kind of file.
        turned: how many have an EXIF orientation that was not applied.
    """

    shard: Shard
    images: int
    listing: str
    left_out: Sequence[tuple[str, str, int]]
    kinds: dict[str, int]
    turned: int
