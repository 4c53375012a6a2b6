"""Images in a folder of any form, without labels: whatever lies in it, at any depth."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path

from ssam_scale.data.in_place import InPlace, in_place
from ssam_scale.data.sources.base import Sample, Source, printable
from ssam_scale.data.sources.folder import SUFFIXES
from ssam_scale.errors import UserError


def images_of_tree(root: Path) -> tuple[InPlace, dict[str, str]]:
    """The image files of a folder, by name; hidden ones are passed over.

    Args:
        root: the folder; or one image file.

    Returns:
        The images, all of label 0; and, by name, why others cannot be opened.

    Raises:
        UserError: there is none, or no such folder.
    """
    if root.is_file():
        root, paths = root.parent, [root]
    elif root.is_dir():
        paths = sorted(_files(root))
    else:
        raise UserError(f"{printable(root)}: no such folder of images")
    closed = {os.path.relpath(path, root): why for path in paths if (why := _why_closed(path))}
    samples = [Sample(str(path), path, 0) for path in paths if os.path.relpath(path, root) not in closed]
    if not samples:
        hint = f"; {len(closed):,} cannot be opened: {printable(min(closed))}: {closed[min(closed)]}" if closed else ""
        raise UserError(f"{printable(root)}: no images in there ({', '.join(sorted(SUFFIXES))}){hint}")
    return in_place("folder", root, Source([], samples, {}, root)), closed


def _files(root: Path) -> Iterator[Path]:
    """Every file with the suffix of an image; links to folders are followed, but in no circle."""
    known = set()
    for folder, folders, files in os.walk(root, followlinks=True):
        found = os.stat(folder)  # noqa: PTH116
        if (found.st_dev, found.st_ino) in known:
            folders.clear()
            continue
        known.add((found.st_dev, found.st_ino))
        folders[:] = sorted(name for name in folders if name[0] != ".")
        for name in files:
            if name[0] != "." and os.path.splitext(name)[1].lower() in SUFFIXES:  # noqa: PTH122
                yield Path(folder, name)


def _why_closed(path: Path) -> str | None:
    """Why a file cannot be opened, in a few words; None: it can."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # reading a pipe would wait for ever
            return "is no file"
    except OSError as error:
        return "a link to nothing" if path.is_symlink() else error.strerror or str(error)
    return None if os.access(path, os.R_OK) else "may not be read by this user"
