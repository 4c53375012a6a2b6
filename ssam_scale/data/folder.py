"""`folder:PATH`: one folder of images per class, as ImageNet has it, read as it is."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np

from ssam_scale.data.in_place import InPlace, Piece
from ssam_scale.data.write import scan_folder
from ssam_scale.errors import UserError


def open_folder(path: Path) -> InPlace:
    """The images of a folder, in the order that `data write` would write them in.

    Raises:
        UserError: as `scan_folder`; an image is none that can be read.
    """
    classes, samples = scan_folder(path)
    pieces = []
    for sample in samples:
        file = Path(sample.name)
        try:
            found = file.stat()
        except OSError as error:
            raise UserError(f"{file}: cannot be read ({error.strerror})") from error
        if not file.is_file():  # reading a pipe would wait for ever
            raise UserError(f"{file}: is no file; remove it")
        pieces.append(Piece(file, 0, found.st_size, found.st_mtime_ns, str(file.relative_to(path))))
    labels = np.array([sample.label for sample in samples], np.int64)
    return InPlace(
        "folder", path, pieces, labels, classes, dict(Counter(Path(piece.name).suffix.lower() for piece in pieces))
    )
