"""What a writer knows of where images come from: names of classes, and labelled images in an order that stays."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ssam_scale.errors import UserError

Pixels = NDArray[np.uint8]


class Stored(Protocol):
    """An image file that lies in another one, or is a file of its own (a `Path`)."""

    @property
    def path(self) -> Path:
        """Of the file that it lies in."""

    @property
    def name(self) -> str:
        """Its own, with a suffix if it has one."""

    def read_bytes(self) -> bytes:
        """The content; from many threads. Raises OSError."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One labelled image to be written."""

    name: str
    source: Path | Stored | Pixels
    label: int


@dataclass(frozen=True)
class Source:
    """Labelled images, in an order that depends on nothing but what they are and lie in.

    Attributes:
        classes: names of the labels, in their order.
        samples: the images.
        recipe: what they are, for the file's sidecar.
        root: what their names are below.
        notes: lines that whoever writes them should read.
    """

    classes: list[str]
    samples: Sequence[Sample]
    recipe: dict[str, Any]
    root: Path
    notes: list[str] = field(default_factory=list)


def state_of(source: Path | Stored | Pixels) -> str:
    """Size and last change of the file that an image is, or lies in; of what is in memory or gone there is none."""
    if isinstance(source, np.ndarray):
        return ""
    try:
        found = (source if isinstance(source, Path) else source.path).stat()
    except OSError:
        return ""
    return f"{found.st_size:x}-{found.st_mtime_ns:x}"


def evenly(samples: Sequence[Sample], limit: int | None) -> list[Sample]:
    """At most so many, in the same order: the first of every class, then the second of every class, …

    So small extracts still hold all classes.
    """
    if limit is None:
        return list(samples)
    seen: dict[int, int] = {}
    places = []
    for index, sample in enumerate(samples):
        place = seen.get(sample.label, 0)
        places.append((place, sample.label, index))
        seen[sample.label] = place + 1
    return [samples[index] for index in sorted(index for _, _, index in sorted(places)[:limit])]


def listing(samples: Sequence[Sample], root: Path | None = None) -> str:
    """SHA-256 of names and labels in their order, which tells one list of images from another.

    Args:
        samples: the images.
        root: what their names are below, which is left out: the same folder may lie elsewhere on another machine.
    """
    digest = hashlib.sha256()
    below = "" if root is None else f"{root}{os.sep}"
    for sample in samples:
        digest.update(f"{sample.name.removeprefix(below)}\n{sample.label}\n".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


def printable(name: str | Path) -> str:
    r"""A name that can be printed and kept as text: of bytes that are no UTF-8, `\xe9` and the like."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def expand(pattern: Path) -> list[Path]:
    """The files of a pattern, as a shell and WebDataset have them: `train-{000..146}.tar`, `{a,b}.tar`, `train-*.tar`.

    They come in the order of what is in braces; those of a `*` by name. A path that is there is itself, whatever
    characters it has.

    Raises:
        UserError: there is none, or one of those in braces is missing.
    """
    if pattern.exists() or not re.search(r"[*?\[{]", str(pattern)):
        return [pattern]
    found = [path for text in _unfolded(str(pattern), pattern) for path in _matching(Path(text))]
    if gone := [path for path in found if not path.exists()]:
        more = f", and {len(gone) - 1:,} more of {len(found):,}" if len(gone) > 1 else ""
        raise UserError(f"{printable(gone[0])}: no such file{more}")
    return found


def _matching(path: Path) -> list[Path]:
    """The files that a pattern without braces has, by name; a path itself."""
    if path.exists() or not re.search(r"[*?\[]", str(path)):
        return [path]
    base = Path(path.anchor) if path.is_absolute() else Path()
    found = sorted(base.glob(str(path.relative_to(base)) if path.is_absolute() else str(path)))
    if not found:
        raise UserError(f"{printable(path)}: no file fits this pattern")
    return found


def _unfolded(text: str, pattern: Path) -> list[str]:
    """What braces stand for: `{01..16}` for numbers of as many digits, `{one,other}` for both, others for itself."""
    for begin in (place for place, sign in enumerate(text) if sign == "{"):
        alternatives = _alternatives(text, begin, pattern)
        if alternatives is not None:
            inside, end = alternatives
            behind = _unfolded(text[end:], pattern)
            return [
                f"{text[:begin]}{each}{rest}" for one in inside for each in _unfolded(one, pattern) for rest in behind
            ]
    return [text]


def _alternatives(text: str, begin: int, pattern: Path) -> tuple[list[str], int] | None:
    """What the brace that opens at `begin` has to choose from, and where it ends; None: it is a sign like others."""
    depth, parts, start = 0, [], begin + 1
    for place in range(begin, len(text)):
        depth += (text[place] == "{") - (text[place] == "}")
        if (text[place] == "," and depth == 1) or not depth:
            parts.append(text[start:place])
            start = place + 1
        if not depth:
            break
    else:
        return None
    if len(parts) > 1:
        return parts, start
    if (span := re.fullmatch(r"(\d+)\.\.(\d+)", parts[0])) is None:
        return None
    first, last = span[1], span[2]
    width = len(first) if len(first) == len(last) or first.startswith("0") else 0
    numbers = range(int(first), int(last) + 1)
    if not numbers:
        raise UserError(f"{printable(pattern)}: {{{first}..{last}}} is empty; give the lower number first")
    return [f"{number:0{width}d}" for number in numbers], start
