"""Images by what `data.train` and `data.val` say: a .beton file, or a source and where it lies."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

from ssam_scale.config.section import in_parts
from ssam_scale.data.beton import Sidecar, inspect
from ssam_scale.data.images import Images
from ssam_scale.data.in_place import InPlace, in_place
from ssam_scale.data.sources import class_names, printable
from ssam_scale.data.sources.base import expand
from ssam_scale.data.sources.folder import folder_source
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
    sidecar = Sidecar.load(path)
    return [] if sidecar is None else sidecar.classes


def _open_folder(path: Path) -> InPlace:
    """One folder of images per class, as ImageNet has it."""
    return in_place("folder", path, folder_source(path))


def _open_shards(pattern: Path) -> InPlace:
    """Shards of WebDataset: a tar, a pattern of tars, or a folder of them."""
    inside = sorted(pattern.glob("*.tar")) if pattern.is_dir() else expand(pattern)
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


_OPENED_BY: dict[str, Callable[[Path], Images]] = {"": inspect, "folder": _open_folder, "wds": _open_shards}
