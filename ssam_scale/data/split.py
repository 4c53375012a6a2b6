"""Disjoint draws of a data set's training images, as .beton files: to train on, and to choose settings by."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ssam_scale.data.encode import Encoding
from ssam_scale.data.fashion_mnist import CLASSES, ENCODING, FOLDER, read_part
from ssam_scale.data.loaders import draws
from ssam_scale.data.sources import Sample, scan_folder
from ssam_scale.data.write import up_to_date, write_samples
from ssam_scale.errors import UserError

# Small images, read many times: as raw pixels there is nothing to decode.
_RAW = Encoding(max_resolution=None, quality=95, jpeg_proportion=0.0, seed=0)
_VAL = ("val", "test")


@dataclass(frozen=True)
class Split:
    """The files.

    Attributes:
        train: to train on.
        tune: other training images, to choose settings by.
        val: to compare by.
    """

    train: Path
    tune: Path
    val: Path


def prepare_split(
    out: Path, source: str, folder: Path | None, *, train: int, tune: int, val: int | None, progress: bool = True
) -> Split:
    """Write `out`/train.beton, tune.beton and val.beton; what is there and made the same way is left alone.

    The images of train.beton are those that `data.subset` would choose from the whole training set.

    Args:
        out: folder, made if missing.
        source: `fashion-mnist`, or `folder`.
        folder: of `folder`, with train/ and val/ (or test/) in it; of `fashion-mnist`, of the idx files. None: the
            files are there already, or the idx files where Debian's package has them.
        train: images of the first.
        tune: of the second.
        val: of the third; None: all.
        progress: show a bar on standard error.

    Raises:
        UserError: `folder` is missing and needed, or holds too few images.
    """
    split = Split(*(out / f"{name}.beton" for name in ("train", "tune", "val")))
    encoding = ENCODING if source == "fashion-mnist" else _RAW
    counts: dict[Path, int | None] = {split.train: train, split.tune: tune, split.val: val}

    def made(path: Path) -> dict[str, Any]:
        return {"split": source, "part": path.stem, "train": train, "tune": tune, "val": val}

    if all(up_to_date(path, encoding, made(path)) for path in counts):
        return split
    if source == "fashion-mnist":
        classes, training, validation = _of_fashion_mnist(folder or FOLDER)
    else:
        classes, training, validation = _of_folder(folder)
    samples = training()
    if train + tune > len(samples):
        raise UserError(
            f"{folder or FOLDER}: has {len(samples):,} training images, and {train:,} to train on and {tune:,} to tune "
            "by are asked for"
        )
    chosen = [[samples[index] for index in draw] for draw in draws(len(samples), train, tune)]
    evaluated = validation()
    if val is not None:
        if val > len(evaluated):
            raise UserError(f"{folder or FOLDER}: has {len(evaluated):,} validation images, and {val:,} are asked for")
        evaluated = [evaluated[index] for index in draws(len(evaluated), val)[0]]
    for path, part in zip(counts, (*chosen, evaluated), strict=True):
        write_samples(part, classes, path, encoding, source=made(path), workers=1, progress=progress)
    return split


_Read = Callable[[], Sequence[Sample]]


def _of_fashion_mnist(folder: Path) -> tuple[list[str], _Read, _Read]:
    return CLASSES, lambda: read_part(folder, "train"), lambda: read_part(folder, "val")


def _of_folder(folder: Path | None) -> tuple[list[str], _Read, _Read]:
    if folder is None:
        raise UserError("--data is missing: a folder with train/ and val/ (or test/), each with a folder per class")
    val = next((folder / name for name in _VAL if (folder / name).is_dir()), None)
    if not (folder / "train").is_dir() or val is None:
        lacks = "train" if val is not None else " or ".join(_VAL)
        raise UserError(f"--data {folder}: has no folder {lacks}; expected train/ and val/ (or test/) in it")
    classes, samples = scan_folder(folder / "train")
    return classes, lambda: samples, lambda: scan_folder(val, classes_of=folder / "train")[1]
