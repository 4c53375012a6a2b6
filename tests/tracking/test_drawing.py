"""Charts can be read: numbers along each axis, and no two things that look alike."""

from __future__ import annotations

import re

import pytest

from ssam_scale.tracking.compare.figures import CostAndGain, frontier_picture
from ssam_scale.tracking.drawing import dot, look
from ssam_scale.tracking.landscape import Around, curves_picture


def test_things_of_one_chart_differ() -> None:
    assert len({look(number) for number in range(32)}) == 32
    assert len({dot(number) for number in range(72)}) == 72


def test_every_method_of_a_study_has_a_look_of_its_own() -> None:
    """The legend of 25 points, each entry with its marker's colour and shape."""
    points = [CostAndGain(n, f"m{n}", 1.0 + n / 25, None, 80.0 + n % 7, None) for n in range(25)]
    drawn = frontier_picture(points).svg
    legend = drawn[drawn.index('id="legend_1"') :]
    shapes = dict(re.findall(r'<path id="(m[0-9a-f]+)" d="([^"]+)"', drawn))
    entries = re.findall(r'<use xlink:href="#(m[0-9a-f]+)"[^>]*style="([^"]+)"', legend)
    assert len(entries) == 25
    assert len({(shapes[name], style) for name, style in entries}) == 25


@pytest.mark.parametrize(("low", "high"), [(1.31, 1.64), (0.002, 0.0021), (3.0, 25.0), (0.01, 40.0), (2.0, 2.0)])
def test_losses_have_numbers_whatever_they_are(low: float, high: float) -> None:
    places = [-0.5, 0.0, 0.5]
    drawn = curves_picture([Around("one", places, [high, low, high])], "loss")
    axis = drawn[drawn.index('id="matplotlib.axis_2"') : drawn.index('id="patch_3"')]
    numbers = [float(text.replace("−", "-")) for text in re.findall(r">([-−0-9.e+]+)</text>", axis)]
    assert len([number for number in numbers if 0.5 * low <= number <= 2 * high]) >= 2
