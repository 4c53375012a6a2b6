"""Masks that nobody has to score: all weights, normalization layers, parameters by name."""

from __future__ import annotations

import re
from collections.abc import Iterable

from .plan import Layout, Plan


def whole(layout: Layout, names: Iterable[str]) -> Plan:
    """The plan of perturbing all of the parameters `names`, always, in the order of `layout`."""
    wanted = set(names)
    counts = {name: numel for name, numel in layout.numels.items() if name in wanted}
    cut = first_block(layout, counts)
    return Plan(cut, dict.fromkeys(counts), counts, may_cut=cut > 0)


def first_block(layout: Layout, names: Iterable[str]) -> int:
    """The index of the first block that uses one of the parameters `names`; 0 without any."""
    return min((layout.stages[name] for name in names), default=0)


class Dense:
    """All weights: dense SAM."""

    def check(self, layout: Layout) -> None:
        """Anything will do."""

    def plan(self, layout: Layout, step: int) -> Plan:
        """Everything, from the first block on."""
        return whole(layout, layout.shapes)


class Named:
    """Parameters whose names match regular expressions, whole.

    Args:
        patterns: searched for anywhere in a name, as `re.search` does; one match is enough.

    Raises:
        ValueError: there is no pattern, or one is not a regular expression.
    """

    def __init__(self, *patterns: str) -> None:
        if not patterns:
            raise ValueError("no pattern of parameter names is given; at least one is needed")
        self._patterns = {}
        for pattern in patterns:
            try:
                self._patterns[pattern] = re.compile(pattern)
            except re.error as error:
                raise ValueError(f"{pattern!r} is not a regular expression: {error}") from error

    def check(self, layout: Layout) -> None:
        """Every pattern must match.

        Raises:
            ValueError: one matches no parameter.
        """
        for pattern, compiled in self._patterns.items():
            if not any(compiled.search(name) for name in layout.shapes):
                names = list(layout.shapes)
                some = ", ".join(names[:3]) + (f", … {names[-1]}" if len(names) > 3 else "")
                raise ValueError(f"pattern {pattern!r} matches none of the {len(names)} parameters: {some}")

    def plan(self, layout: Layout, step: int) -> Plan:
        """What matches."""
        return whole(layout, (n for n in layout.shapes if any(p.search(n) for p in self._patterns.values())))


class Norms:
    """The normalization layers alone: SAM-ON (arXiv 2306.04226)."""

    def check(self, layout: Layout) -> None:
        """There must be one.

        Raises:
            ValueError: there is none.
        """
        if not layout.norms & layout.shapes.keys():
            raise ValueError("the model has no normalization layer with weights that could be perturbed")

    def plan(self, layout: Layout, step: int) -> Plan:
        """Their weights and biases."""
        return whole(layout, layout.norms)
