"""Which classes are taken for which, as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ssam_scale.errors import UserError
from ssam_scale.folders import why_not_a_file, write_whole
from ssam_scale.tracking.layer_density import import_matplotlib

SUFFIXES = (".png", ".svg", ".pdf")
_LABELLED = 60  # of more classes, only some are labelled
_CELL, _LARGEST = 0.16, 11.0  # inches
_DPI = 150


def check_picture(path: Path) -> None:
    """Refuse a picture that could not be written, before anything is computed.

    Raises:
        UserError: of another suffix than `SUFFIXES`, or nothing can be put there.
    """
    if path.suffix not in SUFFIXES:
        raise UserError(f"--picture {path}: name it {', '.join(path.with_suffix(s).name for s in SUFFIXES)}")
    if (problem := why_not_a_file(path)) is not None:
        raise UserError(f"--picture {path}: {problem}")


def draw_confusions(path: Path, names: Sequence[str], counts: NDArray[np.int64], title: str) -> None:
    """Write a picture with a row for each class, and in it the share of its images that are taken for each class.

    Args:
        path: of a kind in `SUFFIXES`; written whole or not at all.
        names: of the classes.
        counts: int64 [classes, classes], images of the row's class that were taken for the column's.
        title: above it.

    Raises:
        UserError: it cannot be written.
    """
    import_matplotlib()
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.colors import PowerNorm
    from matplotlib.figure import Figure

    total = counts.sum(1, keepdims=True)
    shares = np.divide(counts, total, out=np.zeros(counts.shape), where=total > 0)
    side = min(max(_CELL * len(names), 2.5), _LARGEST)
    letters = 0.055 * min(max(map(len, names), default=0), 24)
    with matplotlib.rc_context({"text.parse_math": False, "svg.fonttype": "none"}):
        figure = Figure(figsize=(side + letters + 1.0, side + letters + 0.6), dpi=_DPI, layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        # A root, so that what is rare can be seen beside a full diagonal.
        image = axes.imshow(shares, cmap="magma_r", norm=PowerNorm(0.5, 0.0, 1.0), interpolation="nearest")
        every = -(-len(names) // _LABELLED)
        ticks = [name if len(name) <= 24 else f"{name[:23]}…" for name in names[::every]]
        axes.set_xticks(range(0, len(names), every), ticks, fontsize=6, rotation=90)
        axes.set_yticks(range(0, len(names), every), ticks, fontsize=6)
        axes.tick_params(length=2)
        axes.set_xlabel("taken for", fontsize=8)
        axes.set_ylabel("is", fontsize=8)
        axes.set_title(title, fontsize=8, loc="left")
        bar = figure.colorbar(image, ax=axes, shrink=min(1.0, 3.0 / side), anchor=(0.0, 1.0), aspect=15)
        bar.set_ticks([0.0, 0.1, 0.5, 1.0], labels=["0", "10%", "50%", "100%"])
        bar.ax.tick_params(labelsize=7)
        bar.ax.set_xlabel("of a row", fontsize=7)
        try:
            write_whole(path, lambda beside: figure.savefig(beside, format=path.suffix[1:]))
        except OSError as error:
            raise UserError(f"--picture {path}: was not written: {error.strerror or error}") from error
