"""Draw docs/pictures/step.svg: where the time of a step goes, to scale, for the base optimizer, dense SAM and a cut.

python docs/pictures/step.py

A network of six blocks; a block's forward takes 1, its backward 2 (gradients of inputs and of weights, 1 each).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

OUT = Path(__file__).with_name("step.svg")
BLOCKS, CUT = 6, 3  # the second half is perturbed
UNIT, LEFT, HEIGHT, GAP, ROW = 22, 150, 30, 16, 104
TOP = 78
SHADES = {"prefix": "#b8c4d0", "ascent": "#f2b45c", "descent": "#7aa6d8"}
INK, QUIET = "#1b1f24", "#57606a"


class Row:
    """One step from left to right."""

    def __init__(self, index: int, title: str, share: str) -> None:
        self.x, self.y = float(LEFT), float(TOP + index * ROW)
        self.parts = [
            f'<text x="{LEFT - 14}" y="{self.y + 14}" text-anchor="end" font-weight="600">{title}</text>',
            f'<text x="{LEFT - 14}" y="{self.y + 30}" text-anchor="end" fill="{QUIET}">{share}</text>',
        ]

    def forward(self, first: int, stop: int, shade: str) -> None:
        """Blocks `first` to `stop`."""
        for block in range(first, stop):
            self._block(block, 1, shade)

    def backward(self, first: int, stop: int, shade: str, prefix: str | None = None) -> None:
        """From block `stop` − 1 down to `first`."""
        for block in reversed(range(first, stop)):
            self._block(block, 2, prefix if prefix and block < CUT else shade)

    def _block(self, block: int, units: int, shade: str) -> None:
        width = units * UNIT
        fill = SHADES[shade]
        self.parts.append(
            f'<rect x="{self.x}" y="{self.y}" width="{width}" height="{HEIGHT}" fill="{fill}" stroke="white"/>'
        )
        self.parts.append(f'<text x="{self.x + width / 2}" y="{self.y + 20}" text-anchor="middle">{block + 1}</text>')
        self.x += width

    def span(self, start: float, words: str) -> None:
        """A bracket below everything since `start`."""
        y = self.y + HEIGHT + 7
        self.parts.append(f'<path d="M{start + 1} {y - 4}V{y}H{self.x - 1}V{y - 4}" fill="none" stroke="{QUIET}"/>')
        middle = (start + self.x) / 2
        self.parts.append(f'<text x="{middle}" y="{y + 15}" text-anchor="middle" fill="{QUIET}">{words}</text>')

    def mark(self, words: str, anchor: str = "middle") -> None:
        """A moment in which the weights change, with its words above."""
        x = self.x + GAP / 2
        self.parts.append(f'<path d="M{x} {self.y - 6}V{self.y + HEIGHT}" stroke="{INK}" stroke-width="2"/>')
        self.parts.append(f'<text x="{x}" y="{self.y - 11}" text-anchor="{anchor}">{words}</text>')
        self.x += GAP


def rows() -> Iterator[Row]:
    """The base optimizer, dense SAM, SAM behind a cut."""
    base = Row(0, "base optimizer", "3 = 1.0 ×")
    base.forward(0, BLOCKS, "prefix")
    base.backward(0, BLOCKS, "prefix")
    base.span(LEFT, "one pass at w: forward, then backward")
    base.mark("step")
    yield base

    dense = Row(1, "dense SAM", "6 = 2.0 ×")
    dense.forward(0, BLOCKS, "ascent")
    dense.backward(0, BLOCKS, "ascent")
    dense.span(LEFT, "ascent pass at w, for ε")
    dense.mark("w + ε")
    start = dense.x
    dense.forward(0, BLOCKS, "descent")
    dense.backward(0, BLOCKS, "descent")
    dense.span(start, "descent pass at w + ε, for the step")
    dense.mark("w, step")
    yield dense

    cut = Row(2, "only blocks 4–6", "3 + 3t = 1.5 ×")
    cut.forward(0, CUT, "prefix")
    cut.span(LEFT, "prefix")
    start = cut.x
    cut.forward(CUT, BLOCKS, "ascent")
    cut.backward(CUT, BLOCKS, "ascent")
    cut.span(start, "ascent pass of the suffix")
    cut.mark("w + ε")
    start = cut.x
    cut.forward(CUT, BLOCKS, "descent")
    cut.backward(0, BLOCKS, "descent", prefix="prefix")
    cut.span(start, "descent pass: suffix at w + ε, prefix at w")
    cut.mark("w, step")
    yield cut


def picture() -> str:
    """The SVG file."""
    drawn = list(rows())
    width, height = max(row.x for row in drawn) + 26, TOP + len(drawn) * ROW - 40
    key = [("prefix", "not perturbed: run once"), ("ascent", "ascent pass"), ("descent", "descent pass")]
    legend, x = [], float(LEFT)
    for shade, words in key:
        legend.append(f'<rect x="{x}" y="18" width="14" height="14" fill="{SHADES[shade]}"/>')
        legend.append(f'<text x="{x + 20}" y="30">{words}</text>')
        x += 40 + 6.4 * len(words)
    legend.append(f'<text x="{x}" y="30" fill="{QUIET}">numbers are blocks; widths are time</text>')
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" '
        'font-family="Helvetica, Arial, sans-serif" font-size="12" '
        f'fill="{INK}" role="img" aria-labelledby="title">',
        '<title id="title">Time of a step: base optimizer, dense SAM, and SAM behind a cut</title>',
        f'<rect width="{width:g}" height="{height:g}" fill="white"/>',
        *legend,
        *(part for row in drawn for part in row.parts),
        "</svg>",
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    OUT.write_text(picture(), encoding="utf-8")
