"""Images by what `data.train` and `data.val` say: .beton files, or a source and where it lies."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

from ssam_scale.config.section import SOURCES, in_parts
from ssam_scale.data.beton import Sidecar, inspect
from ssam_scale.data.images import Images
from ssam_scale.data.in_place import InPlace, in_place
from ssam_scale.data.several import several
from ssam_scale.data.sources import class_names, printable
from ssam_scale.data.sources.base import expand
from ssam_scale.data.sources.folder import folder_source
from ssam_scale.data.sources.opening import files_of_one_part
from ssam_scale.data.sources.webdataset import webdataset_source
from ssam_scale.errors import UserError


def open_images(place: Path) -> Images:
    """Find out what images there are; none is read.

    Args:
        place: as `data.train` has it.

    Raises:
        UserError: there are none, or something is wrong with what is there.
    """
    source, path = in_parts(place)
    if not source and (other := re.match(r"\w+:", str(place))) and not place.exists():
        raise UserError(
            f"{printable(place)}: no such file, and no source of images is called {other[0]}; there are "
            + ", ".join(f"{known}:" for known in SOURCES)
        )
    return _OPENED_BY[source](path)


def names_of_classes(place: Path) -> list[str]:
    """The names of the classes of images, by label, without a look at more than is needed; empty: not known.

    Raises:
        UserError: what has them cannot be understood.
    """
    source, path = in_parts(place)
    if source == "folder":
        return class_names(path) if path.is_dir() else []
    if source:
        return open_images(place).class_names
    sidecar = Sidecar.load(expand(path)[0])
    return [] if sidecar is None else sidecar.classes


def _open_files(pattern: Path) -> Images:
    """A .beton file, or a pattern of them."""
    files = expand(pattern)
    return inspect(pattern) if files == [pattern] else several(pattern, files)


def _open_folder(path: Path) -> InPlace:
    """One folder of images per class, as ImageNet has it."""
    return in_place("folder", path, folder_source(path))


def _open_shards(pattern: Path) -> InPlace:
    """Shards of WebDataset: a tar, a pattern of tars, or a folder of them."""
    inside: Sequence[Path]
    if pattern.is_dir():
        # Hidden ones are no shards, but what systems leave beside files.
        inside = files_of_one_part(pattern, sorted(tar for tar in pattern.glob("*.tar") if tar.name[0] != "."))
    else:
        inside = expand(pattern)
    if not inside:
        raise UserError(f"{printable(pattern)}: has no .tar in it; give shards of WebDataset, or folder:{pattern}")
    try:
        known = tuple((shard, found.st_size, found.st_mtime_ns) for shard in inside for found in (shard.stat(),))
    except FileNotFoundError as error:
        raise UserError(f"{printable(error.filename)}: no such file") from error
    return replace(_indexed(known), path=pattern)


@lru_cache(maxsize=4)
def _indexed(known: tuple[tuple[Path, int, int], ...]) -> InPlace:
    """For it all tars have to be read through, and a run asks several times; sizes and times tell others from these."""
    shards = [shard for shard, _, _ in known]
    root = shards[0].parent
    source = webdataset_source(shards, root, limit=None, classes_of=None, advance=lambda _: None)
    # Numbers are no names: of other shards they may be more.
    named = replace(source, classes=[]) if all(name.isdecimal() for name in source.classes) else source
    return in_place("wds", root, named)


_OPENED_BY: dict[str, Callable[[Path], Images]] = {"": _open_files, "folder": _open_folder, "wds": _open_shards}
