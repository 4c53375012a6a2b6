"""A folder in ImageNet's layout: one folder of images per class."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, TypeAlias

from ssam_scale.data.beton import Sidecar
from ssam_scale.data.sources.base import Sample, Source, evenly, printable
from ssam_scale.errors import UserError

SUFFIXES = frozenset((".jpg", ".jpeg", ".png", ".bmp", ".ppm", ".pgm", ".tif", ".tiff", ".webp"))
"""What counts as an image in a class folder, in lower case, as for torchvision's ImageFolder."""

ClassOrder: TypeAlias = Literal["text", "natural"]
"""How class folders are sorted: as text, as torchvision's ImageFolder does; or as timm's, numbers by their value."""


def folder_source(
    source: Path, limit: int | None = None, classes_of: Path | None = None, class_order: ClassOrder = "text"
) -> Source:
    """A folder in ImageNet's layout; images lie by class, then by name.

    Raises:
        UserError: as `scan_folder`.
    """
    classes, samples = scan_folder(source, limit, classes_of, class_order)
    notes = [note] if classes_of is None and (note := order_note(classes, class_order)) else []
    if note := passed_over([source / name for name in classes]):
        notes.append(note)
    return Source(classes, samples, {"folder": printable(source.name), "limit": limit}, source, notes)


def natural_key(name: str) -> tuple[list[str | int], str]:
    """What timm's ImageFolder sorts class folders by: numbers by their value, letters whatever their case."""
    parts = re.split(r"(\d+)", name.lower())
    return [int(part) if place % 2 else part for place, part in enumerate(parts)], name


def order_note(classes: Sequence[str], order: ClassOrder) -> str | None:
    """A line, where torchvision and timm would number classes otherwise: labels are not those of the other's models."""
    text, natural = sorted(classes), sorted(classes, key=natural_key)
    if text == natural:
        return None
    place = next(i for i, (one, other) in enumerate(zip(text, natural, strict=True)) if one != other)
    return (
        f"label {place} is class {classes[place]}, in {order} order; it is {text[place]} in text order, torchvision's, "
        f"and {natural[place]} in natural order, timm's (--class-order)"
    )


def scan_folder(
    source: Path, limit: int | None = None, classes_of: Path | None = None, class_order: ClassOrder = "text"
) -> tuple[list[str], list[Sample]]:
    """The class names and the labelled image files of a folder in ImageNet's layout, sorted by class and name.

    Raises:
        UserError: `source` is missing or no folder, has no class folders, or one of them has no images; with
            `classes_of` (see `write_beton`): has a class that is not among those.
    """
    folders = _class_folders(source, class_order)
    if classes_of is not None:
        names = class_names(classes_of, class_order)
        check_among(names, [folder.name for folder in folders], source, classes_of)
        folders = [source / name for name in names]
    try:
        files = [_images(folder) if folder.is_dir() else [] for folder in folders]
    except OSError as error:
        raise UserError(f"{error.filename}: cannot be read ({error.strerror})") from error
    for folder, found in zip(folders, files, strict=True):
        if not found and classes_of is None:
            deeper = any(entry.is_dir() for entry in folder.iterdir())
            hint = (
                f"; it has folders of its own: did you mean {folder}?"
                if deeper
                else "; fill or remove it (`data write --classes-of TRAIN.beton` takes the names of all from there)"
            )
            raise UserError(f"{folder}: a class folder without images ({', '.join(sorted(SUFFIXES))}){hint}")
    if not any(files):
        raise UserError(f"{source}: no images ({', '.join(sorted(SUFFIXES))}) in any of its class folders")
    samples = [Sample(str(path), path, label) for label, found in enumerate(files) for path in found]
    return [folder.name for folder in folders], evenly(samples, limit)


def passed_over(folders: Sequence[Path]) -> str | None:
    """A line, where images are not taken: beside class folders, in folders inside of them, or of other suffixes."""
    deeper: list[Path] = []
    others: dict[str, int] = {}
    for folder in folders:
        if not folder.is_dir():
            continue
        with os.scandir(folder) as entries:
            for entry in entries:
                suffix = os.path.splitext(entry.name)[1].lower()  # noqa: PTH122
                if entry.name.startswith("."):
                    continue
                if os.path.isdir(entry.path):  # noqa: PTH112 - a link in a circle is none; DirEntry's raises
                    deeper.append(Path(entry.path))
                elif suffix not in SUFFIXES:
                    kind = suffix_of(entry.name)
                    others[kind] = others.get(kind, 0) + 1
    beside: list[str] = []
    for parent in {folder.parent for folder in folders}:
        names = [entry.name for entry in os.scandir(parent) if entry.is_file()]
        beside += [name for name in names if name[0] != "." and os.path.splitext(name)[1].lower() in SUFFIXES]  # noqa: PTH122
    notes = []
    if beside:
        images = "image" if len(beside) == 1 else "images"
        notes.append(f"{len(beside):,} {images} beside the class folders ({printable(min(beside))})")
    if deeper:
        notes.append(
            f"{len(deeper):,} {'folder' if len(deeper) == 1 else 'folders'} in class folders ({printable(min(deeper))})"
        )
    if others:
        notes.append(of_other_suffixes(others))
    return f"passed over {' and '.join(notes)}" if notes else None


def of_other_suffixes(counts: dict[str, int]) -> str:
    """What files are that are passed over, by suffix."""
    each = ", ".join(f"{count:,} {suffix}" for suffix, count in sorted(counts.items()))
    return f"files whose suffix is not that of an image that is read ({each})"


def suffix_of(name: str) -> str:
    """In lower case, for people."""
    return printable(os.path.splitext(name)[1].lower()) or "without a suffix"  # noqa: PTH122


def class_names(of: Path, class_order: ClassOrder = "text") -> list[str]:
    """The classes of a folder in ImageNet's layout, in this order, or of a .beton file, in that of their numbers.

    Raises:
        UserError: it is neither, or a file without the .json that names its classes.
    """
    if of.is_dir():
        return [folder.name for folder in _class_folders(of, class_order)]
    sidecar = Sidecar.load(of)
    if sidecar is None:
        what = f"no {Sidecar.path(of).name} beside it, which would name its classes" if of.exists() else "no such file"
        raise UserError(f"--classes-of {of}: {what}; give the folder or the .beton file of the training images")
    return sidecar.classes


def _class_folders(source: Path, class_order: ClassOrder) -> list[Path]:
    """The folders of a data set's classes, sorted by name."""
    if not source.is_dir():
        what = "is a file" if source.exists() else "no such folder"
        raise UserError(f"{source}: {what}; give a folder with one folder of images per class")
    try:
        entries = [entry for entry in source.iterdir() if not entry.name.startswith(".")]
        if gone := sorted(entry for entry in entries if entry.is_symlink() and not entry.exists()):
            raise UserError(f"{gone[0]}: a link to nothing, in the place of a class folder; mend or remove it")
        folders = sorted(entry for entry in entries if entry.is_dir())
        if class_order == "natural":
            folders.sort(key=lambda folder: natural_key(folder.name))
        if not folders:
            loose = "only files" if any(source.iterdir()) else "nothing"
            raise UserError(
                f"{source}: {loose} in there; needs one folder of images per class, as ImageNet's train/ has"
            )
    except OSError as error:
        raise UserError(f"{error.filename}: cannot be read ({error.strerror})") from error
    for folder in folders:
        try:
            folder.name.encode()
        except UnicodeEncodeError:
            name = printable(folder.name)
            raise UserError(
                f"{printable(source)}: the class folder {name} has a name that is not UTF-8; rename it"
            ) from None
    return folders


def check_among(names: Sequence[str], found: Sequence[str], source: Path, classes_of: Path) -> None:
    """Classes that were found are among those of another data set, of which some may be missing.

    Raises:
        UserError: one is not.
    """
    if others := [name for name in found if name not in set(names)]:
        few = ", ".join(others[:3]) + (f" and {len(others) - 3:,} more" if len(others) > 3 else "")
        are, them = ("is", "it") if len(others) == 1 else ("are", "them")
        raise UserError(
            f"{source}: {few} {are} not among the {len(names):,} classes of {classes_of}; rename or remove {them}"
        )


def _images(folder: Path) -> list[Path]:
    with os.scandir(folder) as entries:
        names = [entry.name for entry in entries if os.path.splitext(entry.name)[1].lower() in SUFFIXES]  # noqa: PTH122
    return [folder / name for name in sorted(names) if not name.startswith(".")]
