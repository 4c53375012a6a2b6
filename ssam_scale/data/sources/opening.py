"""What kind of source a path is, by what lies there."""

from __future__ import annotations

from pathlib import Path

from ssam_scale.data.sources.base import Source
from ssam_scale.data.sources.folder import ClassOrder, folder_source


def open_source(
    path: Path,
    *,
    limit: int | None = None,
    classes_of: Path | None = None,
    class_order: ClassOrder = "text",
    labels: Path | None = None,
) -> Source:
    """The labelled images of a path."""
    return folder_source(path, limit, classes_of, class_order)
