"""Parameters that are named by regular expressions."""

from __future__ import annotations

import re

from ssam_scale.checks import described, matches_none
from ssam_scale.config.mask_sections import NamedMask

from .plan import Layout, Mask, Plan
from .registry import RunInfo, register_mask


class Named:
    """Whole parameters whose names match regular expressions.

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
            if not isinstance(pattern, str):
                raise TypeError(f'{described(pattern)} is no pattern; regular expressions are needed: Named("a", "b")')
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
                raise ValueError(f"pattern {pattern!r} {matches_none(list(layout.shapes))}")

    def plan(self, layout: Layout, step: int) -> Plan:
        """The parameters that match."""
        return Plan.of_parameters(
            layout, (n for n in layout.shapes if any(p.search(n) for p in self._patterns.values()))
        )


@register_mask(NamedMask, "whole parameters whose names match regular expressions")
def build(section: NamedMask, run: RunInfo) -> Mask:
    """The mask of its section."""
    return Named(*section.parameters)
