"""Pictures of the loss around minima, those of several networks side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ssam_scale.tracking.drawing import WIDTH, clipped, figure, in_style, legend, look, svg


@dataclass(frozen=True)
class Around:
    """The loss around the weights of one network.

    Attributes:
        label: a short name.
        places: how far along the directions, which are as long as the weights are, filter by filter.
        curve: the loss at each of them along the first direction.
        plane: the same along both: a row for each place along the second one; None: not computed.
    """

    label: str
    places: Sequence[float]
    curve: Sequence[float]
    plane: Sequence[Sequence[float]] | None = None


_ALONG = "filter-normalized random direction"
_PANEL = 2.3  # inches, of a plane's side
_LEVELS = 12
_DECADE = 10.0


def curves_picture(around: Sequence[Around], of: str) -> str:
    """A curve for each network, as SVG; the scale is logarithmic, as the losses of minima and hills differ so much.

    Args:
        around: at least one.
        of: what loss it is, in words.
    """
    from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, NullLocator

    with in_style():
        chart, axes = figure()
        for number, each in enumerate(around):
            colour, line = look(number)
            axes.plot(each.places, each.curve, line, color=colour, label=clipped(each.label))
        axes.set_yscale("log")
        low, high = axes.get_ylim()
        if high < _DECADE * low:  # in which there may be no power of ten, and so no number
            axes.yaxis.set_major_locator(MaxNLocator(5))
            axes.yaxis.set_minor_locator(NullLocator())
        elif high < _DECADE**3 * low:
            axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.set_xlabel(_ALONG)
        axes.set_ylabel(of)
        legend(chart, axes)
        return svg(chart)


def planes_picture(around: Sequence[Around], of: str) -> str:
    """Contours of each network's loss over two directions, as SVG, with the same levels and colours for all.

    Args:
        around: at least one, all with a `plane`.
        of: what loss it is, in words.
    """
    from matplotlib.colors import LogNorm
    from matplotlib.ticker import LogLocator

    planes = [each.plane for each in around if each.plane is not None]
    finite = [value for plane in planes for row in plane for value in row if 0.0 < value < float("inf")]
    low, high = min(finite), max(max(finite), 1.001 * min(finite))
    levels = [low * (high / low) ** (n / _LEVELS) for n in range(_LEVELS + 1)]
    with in_style():
        width = max(WIDTH, _PANEL * len(planes) + 0.9)
        chart, found = figure(_PANEL + 0.6, len(planes), width)
        every = found if isinstance(found, list) else [found]
        for axes, each, plane in zip(every, around, planes, strict=True):
            filled = axes.contourf(
                each.places, each.places, plane, levels, norm=LogNorm(low, high), cmap="viridis", extend="both"
            )
            axes.contour(each.places, each.places, plane, levels, colors="#ffffff", linewidths=0.4)
            axes.plot([0.0], [0.0], "+", color="#ffffff")
            axes.set_title(clipped(each.label, 24), fontsize=10)
            axes.set_aspect("equal")
            axes.set_xticks([each.places[0], 0.0, each.places[-1]])
            axes.set_yticks([each.places[0], 0.0, each.places[-1]])
            axes.grid(visible=False)
        bar = chart.colorbar(filled, ax=every, pad=0.02, ticks=LogLocator(subs=(1.0, 2.0, 5.0)), format="%g")
        bar.set_label(of)
        every[0].set_ylabel("a second one")
        every[len(every) // 2].set_xlabel(_ALONG)
        return svg(chart)
