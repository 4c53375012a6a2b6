"""Keeps the files of a run about its layers up to date, at next to no cost."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

from ssam_scale.tracking.background import Background
from ssam_scale.tracking.heatmap import draw
from ssam_scale.tracking.layers import LayerDensities

TABLE, PICTURE = "mask/density.csv", "mask/density.png"


class LayerRecorder:
    """Collects layer densities, and stores them as a table and as a heat map in the background.

    Args:
        store: puts a file into a folder of the run's artifacts; called from another thread.
        known: the table of the run that is resumed.
    """

    def __init__(self, store: Callable[[Path, str], None], known: str | None = None) -> None:
        self._store = store
        self._densities = LayerDensities()
        if known is not None:
            with suppress(ValueError):  # somebody else's
                self._densities = LayerDensities.from_table(known)
        self._background = Background({TABLE: 0.005, PICTURE: 1.0})

    def add(self, counts: Mapping[str, float], sizes: Mapping[str, int], step: int, steps: str) -> None:
        """See `Run.log_layers`."""
        if not self._densities.add(counts, sizes, step):
            return
        now = self._densities.copy()
        self._background.put(TABLE, lambda: self._write(TABLE, lambda path: path.write_text(now.table())))
        self._background.put(PICTURE, lambda: self._write(PICTURE, lambda path: draw(now, steps, path)))

    def close(self, timeout: float) -> None:
        """Store what is left for at most `timeout` seconds."""
        self._background.close(timeout)

    def _write(self, name: str, write: Callable[[Path], object]) -> None:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / Path(name).name
            write(path)
            self._store(path, str(Path(name).parent))
