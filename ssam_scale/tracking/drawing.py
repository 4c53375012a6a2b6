"""The hand that all charts are drawn in: as SVG, narrow enough that their letters can be read on a telephone."""

from __future__ import annotations

import io
from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any

from ssam_scale.tracking.layer_density import import_matplotlib

WIDTH, HEIGHT = 4.6, 3.0  # inches of 72 points; letters are 9 and 10 points high
_LEGEND_LINE = 0.2
_DOTS = 200  # an inch, of heat maps: enough for hundreds of layers

# Okabe and Ito's colours, which most colour-blind people tell apart; after them the lines change.
_COLOURS = ("#000000", "#d55e00", "#0072b2", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#b3a300")
_LINES = ("-", "--", ":", "-.")
_MARKERS = "osD^v<>P*"  # of which there are one more than colours
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",  # letters stay letters, in the reader's own font
    "svg.hashsalt": "ssam_scale",  # the same drawing is the same file
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans", "Verdana", "sans-serif"],
    "font.size": 10,
    "text.parse_math": False,  # a name may hold a dollar
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e6e6e6",
    "axes.axisbelow": True,
}


def in_style() -> AbstractContextManager[None]:
    """Charts are drawn within."""
    import_matplotlib()
    import matplotlib

    return matplotlib.rc_context(_STYLE)


def figure(height: float = HEIGHT, columns: int = 1, width: float = WIDTH) -> tuple[Any, Any]:
    """A `matplotlib.figure.Figure` with axes; nothing of matplotlib's global state is touched.

    Args:
        height: inches.
        columns: axes side by side, which have their scales in common; of several a list is returned.
        width: inches.
    """
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    made = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasSVG(made)
    if columns == 1:
        return made, made.add_subplot()
    return made, list(made.subplots(1, columns, sharex=True, sharey=True))


def legend(figure: Any, axes: Any) -> None:
    """Below the chart, which is made higher for it; as many columns as its longest entry leaves room for."""
    handles, labels = axes.get_legend_handles_labels()
    columns = max(1, min(3, 54 // (max(map(len, labels), default=0) + 6)))
    figure.set_figheight(figure.get_figheight() + _LEGEND_LINE * -(-len(labels) // columns))
    figure.legend(handles, labels, loc="outside lower left", ncols=columns, frameon=False, fontsize=9)


def svg(figure: Any) -> str:
    """The drawing as text."""
    out = io.StringIO()
    metadata: Mapping[str, None] = {"Date": None, "Creator": None, "Type": None, "Format": None}
    figure.savefig(out, format="svg", metadata=metadata, dpi=_DOTS)
    return out.getvalue()


def look(number: int) -> tuple[str, str]:
    """Colour and line of the chart's `number`-th thing, from 0."""
    return _COLOURS[number % len(_COLOURS)], _LINES[number // len(_COLOURS) % len(_LINES)]


def dot(number: int) -> tuple[str, str]:
    """Colour and marker of the chart's `number`-th point, from 0: no two of the first 72 have both."""
    return _COLOURS[number % len(_COLOURS)], _MARKERS[number % len(_MARKERS)]


def clipped(text: str, length: int = 44) -> str:
    """A name of so many characters at the most."""
    return text if len(text) <= length else text[: length - 1] + "…"
