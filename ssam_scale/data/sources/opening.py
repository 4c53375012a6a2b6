"""What kind of source a path is, by what lies there."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from ssam_scale.data.progress import progress_of_bytes
from ssam_scale.data.sources.base import Source, expand, printable
from ssam_scale.data.sources.folder import ClassOrder, folder_source
from ssam_scale.data.sources.imagenet import VALIDATION, train_source, validation_source
from ssam_scale.data.sources.parquet import parquet_source
from ssam_scale.data.sources.tar import Slice, members
from ssam_scale.data.sources.webdataset import webdataset_source
from ssam_scale.errors import UserError

_CLASS_TAR = re.compile(r"n\d{8}\.tar")


def open_source(
    path: Path,
    *,
    limit: int | None = None,
    classes_of: Path | None = None,
    class_order: ClassOrder = "text",
    labels: Path | None = None,
    progress: bool = False,
) -> Source:
    """The labelled images of a path, which may be:

    - a folder in ImageNet's layout;
    - ImageNet's own `ILSVRC2012_img_train.tar`, or a folder of the 1,000 tars in it; or `ILSVRC2012_img_val.tar`;
    - shards of WebDataset: a folder of them, one, or `train-{000..146}.tar`;
    - parquet files as Hugging Face has them: a folder, one, or `train-*.parquet`.

    Args:
        path: where they lie.
        limit: at most this many images, evenly from all classes.
        classes_of: number classes as another data set does, see `write_beton`.
        class_order: of the names of classes.
        labels: of ImageNet's validation images.
        progress: show a bar while tars and tables are looked through.

    Raises:
        UserError: it is none of these, damaged, or lacks labels.
    """
    files = _files(path)
    first = files[0]
    inside = next(members(first), None) if first.suffix == ".tar" and first.is_file() else None
    is_validation = inside is not None and VALIDATION.match(inside.name) is not None and not _has_labels(first)
    if labels is not None and not is_validation:
        raise UserError(
            f"--labels {printable(labels)}: is for ImageNet's validation tar; {printable(path)} has its own"
        )
    if not first.is_file():
        return folder_source(path, limit, classes_of, class_order)
    if first.suffix not in (".tar", ".parquet"):
        raise UserError(
            f"{printable(path)}: is a file; give a folder with one folder of images per class, or ImageNet's tar, "
            "WebDataset's shards (.tar) or .parquet files"
        )
    root = path if path.is_dir() else first.parent
    total = sum(file.stat().st_size for file in files)
    with progress_of_bytes(f"Looking through {printable(path.name)}", total, progress) as advance:
        if first.suffix == ".parquet":
            return parquet_source(files, root, limit=limit, classes_of=classes_of, advance=advance)
        if is_validation:
            return validation_source(first, labels, limit=limit, classes_of=classes_of, advance=advance)
        tars: Sequence[tuple[Path, Slice | None]] = ()
        if all(_CLASS_TAR.fullmatch(file.name) for file in files):
            tars = [(file, None) for file in files]
        elif inside is not None and inside.name.endswith(".tar"):
            tars = [(first, part) for part in members(first)]
            root = first
        if tars:
            return train_source(
                tars, root, limit=limit, classes_of=classes_of, class_order=class_order, advance=advance
            )
        return webdataset_source(files, root, limit=limit, classes_of=classes_of, advance=advance)


def _has_labels(tar: Path) -> bool:
    """Whether the second file of a tar is a label: a shard of ImageNet's validation images, under their names."""
    both = members(tar)
    next(both, None)
    second = next(both, None)
    return second is not None and second.name.endswith(".cls")


def _files(path: Path) -> Sequence[Path]:
    """The files of a source that is not a folder of class folders; that folder itself where it is."""
    if not path.is_dir():
        files = expand(path)
        if kinds := {file.suffix for file in files} - {".tar", ".parquet"} if len(files) > 1 else set():
            raise UserError(f"{printable(path)}: a pattern of tars or of parquet files; {min(kinds)} is neither")
        return files
    try:
        entries = sorted(entry for entry in path.iterdir() if not entry.name.startswith("."))
    except OSError as error:
        raise UserError(f"{printable(path)}: cannot be read ({error.strerror})") from error
    if any(entry.is_dir() for entry in entries):
        return [path]
    for suffix in (".parquet", ".tar"):
        if found := [entry for entry in entries if entry.suffix == suffix]:
            return files_of_one_part(path, found)
    return [path]


def files_of_one_part(folder: Path, files: Sequence[Path]) -> Sequence[Path]:
    """The same files, which are those of one part of a data set: training and validation images are never mixed.

    Args:
        folder: that they are in.
        files: all of one suffix.

    Raises:
        UserError: they are of several parts, by their names up to the number.
    """
    parts = sorted({re.sub(r"[-_.]?\d.*", "", file.name) for file in files})
    if len(parts) > 1 and not all(_CLASS_TAR.fullmatch(file.name) for file in files):
        raise UserError(
            f"{printable(folder)}: has files of {', '.join(map(printable, parts))}; say which, "
            f"such as '{printable(folder / parts[-1])}*{files[0].suffix}'"
        )
    return files
