"""Images by what `data.train` and `data.val` say: a .beton file, or a source and where it lies."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from ssam_scale.config.section import in_parts
from ssam_scale.data.beton import Sidecar, inspect
from ssam_scale.data.folder import open_folder
from ssam_scale.data.images import Images
from ssam_scale.data.write import class_names

_OPENED_BY: dict[str, Callable[[Path], Images]] = {"": inspect, "folder": open_folder}


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
    """The names of the classes of images, by label, without a look at these; empty: not known, or there are none.

    Raises:
        UserError: what has them cannot be understood.
    """
    source, path = in_parts(place)
    if source == "folder":
        return class_names(path) if path.is_dir() else []
    sidecar = None if source else Sidecar.load(path)
    return [] if sidecar is None else sidecar.classes
