"""Shards: parts of a data set that several machines write, which `join` makes one file of, or are read as they are."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ssam_scale.data.beton import Beton, Sidecar
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


@dataclass(frozen=True)
class Part:
    """A shard that has been written.

    Attributes:
        beton: the file.
        sidecar: what lies beside it.
        note: what that says of the shard.
        made: its recipe without what is of this shard alone.
    """

    beton: Beton
    sidecar: Sidecar
    note: ShardNote
    made: dict[str, Any]


def is_shard(beton: Beton) -> bool:
    """Whether a file is one, as far as what lies beside it says."""
    return beton.sidecar is not None and "shard" in beton.sidecar.recipe


def all_of_one(whole: Path, files: Sequence[Beton]) -> list[Part]:
    """All shards of a data set in their order.

    Args:
        whole: what they are to be, for people.
        files: the shards, in any order.

    Raises:
        UserError: a file is no shard, or of another data set; one is missing or given twice; there are none.
    """
    parts: dict[int, Part] = {}
    first: Part | None = None
    for file in files:
        part = _read(file)
        first = first or part
        if (difference := _difference(first, part)) is not None:
            raise UserError(f"{file.path}: {difference}; give the shards of one data set")
        number = part.note.shard.number
        if number in parts:
            raise UserError(
                f"{file.path} and {parts[number].beton.path}: both are shard {part.note.shard}; give it once"
            )
        parts[number] = part
    if first is None:
        raise UserError(f"{whole}: no shards to join; give the files of `ssam-scale data write --shard`")
    of = first.note.shard.of
    if missing := [number for number in range(1, of + 1) if number not in parts]:
        few = ", ".join(map(str, missing[:10])) + (" …" if len(missing) > 10 else "")
        raise UserError(
            f"{whole}: {len(missing):,} of {of:,} shards are missing: {few}; write them (`ssam-scale data write … "
            f"--shard {missing[0]}/{of}`) and give them, too"
        )
    return [parts[number] for number in range(1, of + 1)]


def _read(beton: Beton) -> Part:
    path, sidecar = beton.path, beton.sidecar
    if sidecar is None or not is_shard(beton):
        beside = "" if sidecar else f" (no {Sidecar.path(path).name} beside it, which would say so)"
        raise UserError(
            f"{path}: is no shard{beside}; give shards of one data set alone, as `ssam-scale data write --shard` "
            "writes them; `ssam-scale data join` makes one file of them"
        )
    note = sidecar.recipe["shard"]
    try:
        known = ShardNote(**{**note, "shard": Shard(**note["shard"])})
        known.shard.span(known.images)
    except (KeyError, TypeError) as error:
        raise UserError(f"{Sidecar.path(path)}: does not say which shard it is ({error}); write it again") from error
    if len(beton.sums) != beton.images:
        raise UserError(f"{Sidecar.path(path)}: lacks the hashes of its images; write it again")
    made = {key: value for key, value in sidecar.recipe.items() if key != "shard"}
    return Part(beton, sidecar, known, made)


def _difference(one: Part, other: Part) -> str | None:
    """What tells shards of two data sets apart; None: nothing does."""
    if one.note.shard.of != other.note.shard.of:
        return f"is one of {other.note.shard.of:,} shards, and {one.beton.path} one of {one.note.shard.of:,}"
    if (one.note.listing, one.note.images, one.sidecar.classes) != (
        other.note.listing,
        other.note.images,
        other.sidecar.classes,
    ):
        return f"is of other images or classes than {one.beton.path}"
    for key in sorted(one.made.keys() | other.made.keys()):
        if (given := other.made.get(key)) != (before := one.made.get(key)):
            return f"was written with {key.replace('_', ' ')} {given}, and {one.beton.path} with {before}"
    return None
