"""Which answer is right: images' classes, or labels of a file, as classes of the network; and which classes are scored.

ImageNet-A and ImageNet-R hold 200 of the 1,000 classes, in folders of the same names: logits of others are left out, as
their authors do (2006.16241, 1907.07174). The folders of ImageNetV2 (1902.10811) are numbered as classes are. ReaL
(2006.07159) gives each image of ImageNet's validation set all labels that are right of it, or none.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ssam_scale.data import Images
from ssam_scale.errors import UserError

from .network import Trained

NONE = -1
"""In `Key.answers`: no further answer is right."""

_FEW = 3


@dataclass(frozen=True)
class Key:
    """The right answers.

    Attributes:
        classes: int64 [scored], the network's classes whose logits count, rising; None: all of them.
        answers: int64 [images, most], by image, which of these are right, as places in `classes`; `NONE` fills up.
        one_each: whether they are labels, one an image, so that there are a loss and an accuracy by class.
        said: which classes are scored, for people.
    """

    classes: NDArray[np.int64] | None
    answers: NDArray[np.int64]
    one_each: bool
    said: str

    @property
    def counted(self) -> NDArray[np.bool_]:
        """[images] whether an image has an answer."""
        return (self.answers != NONE).any(1)


def by_folders(images: Images, trained: Trained) -> Key:
    """The classes of images as the network's: by their names, by numbers that are their names, or by their own numbers.

    Args:
        images: at least one, with labels.
        trained: whose classes are meant.

    Raises:
        UserError: they are not among the network's classes.
    """
    own, theirs, place = images.class_names, trained.class_names, images.place
    if not own or own == theirs:
        if not 0 <= images.labels.min() <= images.labels.max() < trained.classes:
            outside = int(images.labels[(images.labels < 0) | (images.labels >= trained.classes)][0])
            raise UserError(f"{place}: label {outside}, and {trained.source} tells {trained.classes:,} classes apart")
        return Key(None, images.labels[:, None], True, _said(trained.classes, trained.classes, ""))
    known = {name: label for label, name in enumerate(theirs)}
    if all(name in known for name in own):
        by_label, how = np.array([known[name] for name in own]), ", by name"
    elif all(name.isdecimal() and int(name) < trained.classes for name in own):
        by_label, how = np.array([int(name) for name in own]), ", whose numbers folders have as names"
    elif not theirs and len(own) == trained.classes:
        by_label, how = np.arange(len(own)), ", in the order of their names, as nobody has named the network's"
    else:
        raise UserError(_not_among(own, trained, place))
    if len(set(by_label.tolist())) < len(by_label):  # 1 and 01
        raise UserError(f"{place}: two of its classes are the same number, {_twice(by_label)}; rename one of them")
    classes = np.sort(by_label)
    answers = np.searchsorted(classes, by_label)[images.labels][:, None]
    scored = None if len(classes) == trained.classes else classes
    return Key(scored, answers.astype(np.int64), True, _said(len(classes), trained.classes, how))


def by_labels(images: Images, trained: Trained, file: Path) -> Key:
    """What a file says of each image: all labels that are right, of which any counts as such.

    Args:
        images: whose names the file has.
        trained: whose classes are meant.
        file: JSON: `{name: [labels]}`, or, as ReaL's, `[[labels], …]` in the order of the numbers that names end with,
            from 1. Labels are numbers or names of classes; an image with none does not count.

    Raises:
        UserError: it is no such file, lacks an image, or has labels that are no classes.
    """
    labels_of = _read(file)
    names = [PurePath(images.named(image)).name for image in range(images.images)]
    places = [_entry(labels_of, name) for name in names]
    if missing := [name for name, found in zip(names, places, strict=True) if found is None]:
        more = f" and {len(missing) - 1:,} others" if len(missing) > 1 else ""
        raise UserError(f"--labels {file}: has nothing on {missing[0]}{more} of {images.place}")
    known = {name: label for label, name in enumerate(trained.class_names)}
    every = [[_label(each, known, trained, file) for each in found or ()] for found in places]
    if not any(every):
        raise UserError(f"--labels {file}: has no label for any image of {images.place}")
    answers = np.full((len(every), max(map(len, every))), NONE, np.int64)
    for row, found in zip(answers, every, strict=True):
        row[: len(found)] = found
    without = sum(not found for found in every)
    said = _said(trained.classes, trained.classes, f", by {file.name}")
    return Key(None, answers, False, said + (f"; {without:,} images without a label do not count" if without else ""))


def _said(scored: int, classes: int, how: str) -> str:
    return f"{scored:,} of {classes:,} classes scored{how}"


def _twice(by_label: NDArray[np.int64]) -> int:
    values, counts = np.unique(by_label, return_counts=True)
    return int(values[counts > 1][0])


def _not_among(own: Sequence[str], trained: Trained, place: str) -> str:
    if not trained.class_names:
        return (
            f"{place}: has {len(own):,} classes, and {trained.source} tells {trained.classes:,} apart, whose names are "
            "not known; name folders by their numbers, or put the training images where data.train says"
        )
    odd = [name for name in own if name not in set(trained.class_names)]
    few = ", ".join(odd[:_FEW]) + (f" and {len(odd) - _FEW:,} more" if len(odd) > _FEW else "")
    return (
        f"{place}: {few} {'is' if len(odd) == 1 else 'are'} not among the {trained.classes:,} classes of "
        f"{trained.source} (such as {trained.class_names[0]}); name folders as those, or by their numbers"
    )


def _read(file: Path) -> Mapping[str, Any] | Sequence[Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"--labels {file}: cannot be read ({error.strerror})") from error
    except ValueError as error:  # not JSON, or not text
        raise UserError(f"--labels {file}: is no JSON ({error})") from error
    entries = list(found.values()) if isinstance(found, dict) else found if isinstance(found, list) else None
    if not entries or not all(isinstance(entry, (list, int, str)) for entry in entries):
        raise UserError(f"--labels {file}: needed are labels by image: {{name: [labels]}}, or ReaL's [[labels], …]")
    return found


def _entry(labels_of: Mapping[str, Any] | Sequence[Any], name: str) -> Sequence[Any] | None:
    """What is said of an image, with or without its suffix."""
    found: Any = None
    if isinstance(labels_of, Mapping):
        found = labels_of.get(name, labels_of.get(PurePath(name).stem))
    elif (number := re.search(r"(\d+)$", PurePath(name).stem)) and 1 <= int(number[1]) <= len(labels_of):
        found = labels_of[int(number[1]) - 1]
    return found if found is None or isinstance(found, list) else [found]


def _label(given: Any, known: Mapping[str, int], trained: Trained, file: Path) -> int:
    if isinstance(given, int) and not isinstance(given, bool) and 0 <= given < trained.classes:
        return given
    if isinstance(given, str) and given in known:
        return known[given]
    raise UserError(
        f"--labels {file}: {json.dumps(given)[:60]} is none of the {trained.classes:,} classes of {trained.source}"
    )
