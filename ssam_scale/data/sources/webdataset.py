"""WebDataset's shards: tars in which the files of a sample follow each other, alike up to the first dot."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

from ssam_scale.data.progress import Advance
from ssam_scale.data.sources.base import Sample, Source, evenly, printable
from ssam_scale.data.sources.folder import SUFFIXES, class_names
from ssam_scale.data.sources.tar import Slice, members
from ssam_scale.errors import UserError

_DIGITS = 6
"""Of labels. Every number up to the largest becomes a class: ids in the place of labels would fill the memory."""


def webdataset_source(
    shards: Sequence[Path],
    root: Path,
    *,
    limit: int | None,
    classes_of: Path | None,
    advance: Advance,
) -> Source:
    """Images of shards with a `.cls` each, in the order in which they lie.

    A `.cls` has a number or the name of a class. Numbers have no names but what `classes_of` has.

    Args:
        shards: the tars.
        root: the folder that they are in.
        limit: at most this many images, evenly from all classes.
        classes_of: a data set whose classes are numbered in the same way.
        advance: told the bytes that are passed.

    Raises:
        UserError: a tar is damaged; a sample has no label or several images.
    """
    images: list[tuple[Slice, str]] = []
    for shard in shards:
        images += _of_shard(shard, advance)
    if not images:
        raise UserError(f"{printable(root)}: has no images with a .cls beside them")
    labels, classes = numbered([text for _, text in images], classes_of, root)
    samples = [
        Sample(f"{image.path / image.member}", image, label) for (image, _), label in zip(images, labels, strict=True)
    ]
    notes = []
    if classes_of is None and images[0][1].isdecimal():
        notes.append("numbers in the place of names of classes; --classes-of would name them")
    return Source(classes, evenly(samples, limit), {"webdataset": len(shards), "limit": limit}, root, notes)


def numbered(labels: Sequence[str], classes_of: Path | None, root: Path) -> tuple[list[int], list[str]]:
    """Numbers of labels that are numbers or names, and what the classes are called.

    Raises:
        UserError: they are some of each, negative, too large to number classes, or more than another data set has.
    """
    numbers = [label for label in labels if label.isdecimal()]
    if numbers and len(numbers) < len(labels):
        other = next(label for label in labels if not label.isdecimal())
        raise UserError(f"{printable(root)}: labels are numbers ({numbers[0]}) and others ({other!r}); make them one")
    if not numbers:
        names = sorted(set(labels)) if classes_of is None else class_names(classes_of)
        place = {name: number for number, name in enumerate(names)}
        if missing := next((label for label in labels if label not in place), None):
            raise UserError(f"{printable(root)}: class {missing} is not among the {len(names):,} of {classes_of}")
        return [place[label] for label in labels], names
    if large := next((label for label in labels if len(label.lstrip("0")) > _DIGITS), None):
        raise UserError(f"{printable(root)}: label {large[:20]}: too large for the number of a class; its id, perhaps?")
    found = [int(label) for label in labels]
    names = [str(number) for number in range(max(found) + 1)] if classes_of is None else class_names(classes_of)
    if max(found) >= len(names):
        raise UserError(f"{printable(root)}: label {max(found)}, and {classes_of} has {len(names):,} classes, from 0")
    return found, names


def _of_shard(shard: Path, advance: Advance) -> list[tuple[Slice, str]]:
    """The images of a tar, each with what its `.cls` says."""
    found = []
    for key, files in groupby(members(shard, advance=advance), _key):
        images: list[Slice] = []
        label: str | None = None
        for file in files:
            suffix = file.name.partition(".")[2].lower()
            if f".{suffix.rpartition('.')[2]}" in SUFFIXES:
                images.append(file)
            elif suffix == "cls":
                label = file.read_bytes().decode("utf-8", "backslashreplace").strip()
        if len(images) > 1:
            raise UserError(f"{printable(shard)}: {printable(key)} has several images; which is meant is not said")
        if images and label is None:
            raise UserError(
                f"{printable(shard)}: {printable(key)} has an image and no .cls, which would be its label (a tar of "
                "class folders has to be unpacked)"
            )
        found += [(image, label) for image in images if label is not None]
    return found


def _key(file: Slice) -> str:
    """What the files of one sample have in common."""
    return file.member.removesuffix(file.name) + file.name.partition(".")[0]
