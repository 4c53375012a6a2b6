"""ImageNet's own tars, as they are distributed: a tar of a tar per class to train on, and one of all validation images.

The validation images' labels are in the devkit, as numbers (ILSVRC2012_ID) in an order of its own: its meta.mat says
which class each is. Classes are numbered in the order of their names (n01440764 is 0), as everybody does.
"""

from __future__ import annotations

import io
import re
import struct
import tarfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from ssam_scale.data.progress import Advance
from ssam_scale.data.sources.base import Sample, Source, evenly, printable
from ssam_scale.data.sources.folder import (
    SUFFIXES,
    ClassOrder,
    check_among,
    class_names,
    natural_key,
    of_other_suffixes,
    suffix_of,
)
from ssam_scale.data.sources.tar import Slice, members
from ssam_scale.errors import UserError

VALIDATION = re.compile(r"ILSVRC2012_val_\d{8}")
_CLASS = re.compile(r"n\d{8}")
# What scipy raises, of whatever bytes.
_UNREADABLE = (ValueError, TypeError, LookupError, OSError, NotImplementedError, zlib.error, struct.error)
_META, _TRUTH = "meta.mat", "ILSVRC2012_validation_ground_truth.txt"
_DEVKIT = "ILSVRC2012_devkit_t12.tar.gz"


def train_source(
    tars: Sequence[tuple[Path, Slice | None]],
    root: Path,
    *,
    limit: int | None,
    classes_of: Path | None,
    class_order: ClassOrder,
    advance: Advance,
) -> Source:
    """Images of a tar per class, by class, then by name: the order of the folder that they are unpacked to.

    Args:
        tars: a file each, or parts of one.
        root: the file or folder that they are in.
        limit: at most this many images, evenly from all classes.
        classes_of: number classes as another data set does.
        class_order: of their names.
        advance: told the bytes that are passed.

    Raises:
        UserError: a tar is damaged, or has no images.
    """
    by_class = {Path(path.name if part is None else part.name).stem: (path, part) for path, part in tars}
    if len(by_class) < len(tars):
        raise UserError(f"{printable(root)}: has two tars of one class; remove one")
    found = sorted(by_class, key=natural_key if class_order == "natural" else None)
    classes = found
    if classes_of is not None:
        classes = class_names(classes_of, class_order)
        check_among(classes, found, root, classes_of)
    samples = []
    others: dict[str, int] = {}
    for name in found:
        path, part = by_class[name]
        inside = sorted(_images(members(path, part, advance), others), key=lambda image: image.name)
        if not inside:
            raise UserError(f"{printable(root)}: the tar of class {name} has no images")
        label = classes.index(name)
        samples += [Sample(f"{root / name / image.name}", image, label) for image in inside]
    samples.sort(key=lambda sample: sample.label)  # which keeps the order of names
    return Source(classes, evenly(samples, limit), {"imagenet": "train", "limit": limit}, root, _notes(others))


def validation_source(
    path: Path, labels: Path | None, *, limit: int | None, classes_of: Path | None, advance: Advance
) -> Source:
    """Images of the validation tar, by class, then by name: the order of the folder that a script makes of them.

    Args:
        path: of the tar.
        labels: the devkit, as a tar or unpacked; or a text, see `class_of_image`.
        limit: at most this many images, evenly from all classes.
        classes_of: number classes as another data set does.
        advance: told the bytes that are passed.

    Raises:
        UserError: no labels, or not of these images.
    """
    if labels is None:
        raise UserError(
            f"{printable(path)}: ImageNet's validation images, whose labels are not in there; pass --labels {_DEVKIT}, "
            "which comes from where they come from"
        )
    others: dict[str, int] = {}
    images = sorted(_images(members(path, advance=advance), others), key=lambda image: image.name)
    of = class_of_image(labels, [Path(image.name).stem for image in images])
    found = sorted(set(of))
    classes = found
    if classes_of is not None:
        classes = class_names(classes_of)
        check_among(classes, found, path, classes_of)
    number = {name: label for label, name in enumerate(classes)}
    samples = [
        Sample(f"{path / name / image.name}", image, number[name]) for image, name in zip(images, of, strict=True)
    ]
    samples.sort(key=lambda sample: sample.label)  # which keeps the order of names
    return Source(classes, evenly(samples, limit), {"imagenet": "val", "limit": limit}, path, _notes(others))


def _images(files: Iterable[Slice], others: dict[str, int]) -> Iterator[Slice]:
    """Those whose suffix is an image's; the rest is counted by suffix."""
    for file in files:
        if Path(file.name).suffix.lower() in SUFFIXES:
            yield file
        else:
            kind = suffix_of(file.name)
            others[kind] = others.get(kind, 0) + 1


def _notes(others: dict[str, int]) -> list[str]:
    return [f"passed over {of_other_suffixes(others)}"] if others else []


def class_of_image(labels: Path, images: Sequence[str]) -> list[str]:
    """The class of each validation image, such as n01440764.

    Args:
        labels: the devkit, as a tar or unpacked; its ground truth, beside its meta.mat; a text with a class in each
            line, in the order of the images' numbers; or one that names image and class in each line, as Kaggle's.
        images: names of the images without their suffix, sorted.

    Raises:
        UserError: the labels cannot be read, or there are not as many.
    """
    try:
        truth, meta = _devkit(labels)
    except (OSError, tarfile.TarError, EOFError, zlib.error) as error:
        raise UserError(f"--labels {printable(labels)}: cannot be read ({error})") from error
    lines = [line for line in truth.decode("utf-8", "replace").splitlines() if line.strip()]
    pairs = [(VALIDATION.search(line), _CLASS.search(line)) for line in lines]
    named = {image[0]: name[0] for image, name in pairs if image and name}
    if named:
        if missing := [image for image in images if image not in named]:
            raise UserError(f"--labels {printable(labels)}: has no class for {missing[0]}")
        return [named[image] for image in images]
    if len(lines) != len(images):
        raise UserError(f"--labels {printable(labels)}: has {len(lines):,} labels of {len(images):,} images")
    if all(_CLASS.fullmatch(line.strip()) for line in lines):
        return [line.strip() for line in lines]
    if not all(line.strip().isdecimal() for line in lines):
        raise UserError(
            f"--labels {printable(labels)}: neither a devkit nor a text with one class (n01440764) in each line"
        )
    if meta is None:
        raise UserError(
            f"--labels {printable(labels)}: has the devkit's own numbers, which only its {_META} translates; put it "
            f"beside, or give {_DEVKIT}"
        )
    names = _class_of_number(meta, labels)
    try:
        return [names[int(line)] for line in lines]
    except KeyError as error:
        raise UserError(f"--labels {printable(labels)}: its {_META} has no class of the number {error}") from error


def _devkit(labels: Path) -> tuple[bytes, bytes | None]:
    """The ground truth and, if it is there, what says which classes its numbers are."""
    if labels.is_dir():
        folders = [folder for folder in (labels, labels / "data") if (folder / _TRUTH).is_file()]
        if not folders:
            raise UserError(f"--labels {printable(labels)}: has no {_TRUTH}; give {_DEVKIT}, or where it was unpacked")
        labels = folders[0] / _TRUTH
    elif labels.exists() and not labels.is_file():  # reading a pipe would wait for ever
        raise UserError(f"--labels {printable(labels)}: not a file; give {_DEVKIT}")
    elif tarfile.is_tarfile(labels):
        inside: dict[str, bytes] = {}
        with tarfile.open(labels) as tar:
            for member in tar:
                name = member.name.rpartition("/")[2]
                if member.isreg() and name in (_META, _TRUTH) and (file := tar.extractfile(member)) is not None:
                    inside[name] = file.read()
        if _TRUTH not in inside:
            raise UserError(f"--labels {printable(labels)}: a tar without {_TRUTH}; give {_DEVKIT}")
        return inside[_TRUTH], inside.get(_META)
    beside = labels.with_name(_META)
    return labels.read_bytes(), beside.read_bytes() if beside.is_file() else None


def _class_of_number(meta: bytes, labels: Path) -> dict[int, str]:
    """Classes by their ILSVRC2012_ID; those that have others below them are no labels."""
    from scipy.io import loadmat

    try:
        synsets = loadmat(io.BytesIO(meta), squeeze_me=True)["synsets"].reshape(-1)
        return {
            int(number): str(name)
            for number, name, children in zip(
                synsets["ILSVRC2012_ID"], synsets["WNID"], synsets["num_children"], strict=True
            )
            if not int(children)
        }
    except _UNREADABLE as error:
        raise UserError(f"--labels {printable(labels)}: its {_META} cannot be read ({error})") from error
