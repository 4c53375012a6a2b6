"""A picture of `LayerDensities`: layers down, records across."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ssam_scale.tracking.layers import LayerDensities

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
    from matplotlib import colormaps
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure

    rows, columns = len(densities.sizes), len(densities.steps)
    labels = [f"{name}  {_short(size)}" for name, size in densities.sizes.items()]
    width = min(max(0.25 * columns, 3.0), 10.0) + 0.055 * max(map(len, labels)) + 1.3
    height = max(_ROW_INCHES * min(rows, _LABELLED_ROWS), 1.0) + 1.1
    result = Figure(figsize=(width, height), dpi=_DPI, layout="constrained")
    FigureCanvasAgg(result)
    axes = result.add_subplot()
    image = axes.imshow(
        [[column[row] for column in densities.columns] for row in range(rows)],
        cmap=colormaps["viridis"].with_extremes(under="#d9d9d9"),
        norm=Normalize(1e-9, 1.0),  # so that 0 is below the scale
        aspect="auto",
        interpolation="nearest",
    )
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


def _short(number: int) -> str:
    """Three digits and a letter: 36.9k."""
    for unit, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= unit:
            return f"{number / unit:.3g}{letter}"
    return str(number)
