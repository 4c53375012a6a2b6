"""Density of each layer over a run, as a table that a resumed run continues and as a heat map."""

from __future__ import annotations

import csv
import io
import os
import sys
import tempfile
from array import array
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from ssam_scale.tracking.store import environment
from ssam_scale.tracking.threads import Background

TABLE, PICTURE = "mask/density.csv", "mask/density.png"  # artifacts of a run


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


# Beyond this many columns every second one is dropped, and from then on only every second (fourth, …) is added.
_COLUMNS = 1000


class LayerDensities:
    """The share of each parameter's weights that is perturbed, one column for each record.

    Attributes:
        sizes: weights of each parameter over all processes, by name, in the network's order.
        steps: the step of each column, rising.
        columns: densities in [0, 1], parallel to `sizes`.
    """

    def __init__(self) -> None:
        self.sizes: dict[str, int] = {}
        self.steps: list[int] = []
        self.columns: list[array[float]] = []
        self._stride, self._passed = 1, 0

    def add(self, counts: Mapping[str, float], sizes: Mapping[str, int], step: int) -> bool:
        """Add a column in the place of those of this step and later ones, which a resumed run makes again.

        Args:
            counts: perturbed weights of each parameter that has any, over all processes.
            sizes: all weights of each parameter.
            step: of the record.

        Returns:
            Whether there is a new column: where there were very many records, only some are kept.
        """
        if dict(sizes) != self.sizes:
            self.sizes, self.steps, self.columns = dict(sizes), [], []
        while self.steps and self.steps[-1] >= step:
            self.steps.pop()
            self.columns.pop()
        self._passed += 1
        if self.steps and self._passed < self._stride:
            return False
        self._passed = 0
        self.steps.append(step)
        self.columns.append(array("f", [counts.get(name, 0) / max(size, 1) for name, size in sizes.items()]))
        if len(self.steps) > _COLUMNS:
            self.steps, self.columns = self.steps[::2], self.columns[::2]
            self._stride *= 2
        return True

    def copy(self) -> LayerDensities:
        """What is there now; later additions do not show in it."""
        result = LayerDensities()
        result.sizes, result.steps, result.columns = self.sizes, self.steps.copy(), self.columns.copy()
        return result

    def table(self) -> str:
        """CSV: a row for each parameter, with its name, its weights, and its density in a column for each step."""
        out = io.StringIO()
        writer = csv.writer(out, lineterminator="\n")
        writer.writerow(["parameter", "weights", *self.steps])
        for row, (name, size) in enumerate(self.sizes.items()):
            writer.writerow([name, size, *(f"{column[row]:.4g}" for column in self.columns)])
        return out.getvalue()

    @classmethod
    def from_table(cls, text: str) -> LayerDensities:
        """Read what `table` wrote.

        Raises:
            ValueError: it is no such table.
        """
        header, *rows = list(csv.reader(io.StringIO(text))) or [[]]
        if header[:2] != ["parameter", "weights"] or any(len(row) != len(header) for row in rows):
            raise ValueError("no table of layer densities")
        result = cls()
        result.sizes = {row[0]: int(row[1]) for row in rows}
        result.steps = [int(step) for step in header[2:]]
        result.columns = [array("f", [float(row[2 + i]) for row in rows]) for i in range(len(result.steps))]
        return result


_DPI = 120
_ROW_INCHES = 0.13
_LABELLED_ROWS = 300  # of more, only some are labelled, and they share the height of these
_LABELLED_STEPS = 8


def draw(densities: LayerDensities, steps: str, path: Path) -> None:
    """Write a PNG in which every layer is a row, in the network's order from top to bottom, and every record a column.

    Grey is a layer of which nothing is perturbed.

    Args:
        densities: with at least one parameter and one column.
        steps: what the steps of the columns are, in words.
        path: of the file.
    """
    figure(densities, steps).savefig(path, format="png")


def figure(densities: LayerDensities, steps: str) -> Any:
    """The picture as a `matplotlib.figure.Figure`; nothing of matplotlib's global state is touched."""
    # Takes half a second to import, which only those pay who draw.
    import_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows, columns = len(densities.sizes), len(densities.steps)
    labels = [f"{name}  {_short(size)}" for name, size in densities.sizes.items()]
    width = min(max(0.25 * columns, 3.0), 10.0) + 0.055 * max(map(len, labels)) + 1.3
    height = max(_ROW_INCHES * min(rows, _LABELLED_ROWS), 1.0) + 1.1
    result = Figure(figsize=(width, height), dpi=_DPI, layout="constrained")
    FigureCanvasAgg(result)
    axes = result.add_subplot()
    image = draw_densities(axes, densities)
    every = -(-rows // _LABELLED_ROWS)
    axes.set_yticks(range(0, rows, every), labels[::every], fontsize=6)
    every = -(-columns // _LABELLED_STEPS)
    axes.set_xticks(range(0, columns, every), [f"{step:,}" for step in densities.steps[::every]], fontsize=7)
    axes.tick_params(length=2)
    axes.set_xlabel(steps, fontsize=8)
    axes.set_title("perturbed share of each parameter's weights", fontsize=8, loc="left")
    # Of the same height in a tall picture as in a small one.
    bar = result.colorbar(image, ax=axes, extend="min", shrink=min(1.0, 3.0 / height), anchor=(0.0, 1.0), aspect=15)
    bar.set_ticks([1e-9, 0.25, 0.5, 0.75, 1.0], labels=["0", "0.25", "0.5", "0.75", "1"])
    bar.ax.tick_params(labelsize=7)
    bar.ax.set_xlabel("grey: none", fontsize=7, labelpad=14)
    return result


def draw_densities(axes: Any, densities: LayerDensities) -> Any:
    """Draw a row for each parameter and a column for each step, grey where nothing is perturbed; the image."""
    from matplotlib import colormaps
    from matplotlib.colors import Normalize

    return axes.imshow(
        [[column[row] for column in densities.columns] for row in range(len(densities.sizes))],
        cmap=colormaps["viridis"].with_extremes(under="#d9d9d9"),
        norm=Normalize(1e-9, 1.0),  # so that 0 is below the scale
        aspect="auto",
        interpolation="nearest",
    )


def import_matplotlib() -> None:
    """Import it whatever MPLBACKEND says: it may be inherited from a notebook whose backend is not installed here."""
    if "matplotlib" in sys.modules:
        return
    # What somebody else's attempt has left, which failed by that backend: the package would lack what is there already.
    for name in [name for name in sys.modules if name.startswith("matplotlib.")]:
        del sys.modules[name]
    with environment(MPLBACKEND=None):  # importing fails for good where that is no backend
        import matplotlib
    # For whoever draws with pyplot in this process, as matplotlib itself would have done.
    if asked := os.environ.get("MPLBACKEND"):
        with suppress(ValueError):
            matplotlib.rcParams["backend"] = asked


def _short(number: int) -> str:
    """Three digits and a letter: 36.9k."""
    for unit, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= unit:
            return f"{number / unit:.3g}{letter}"
    return str(number)
