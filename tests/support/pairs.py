"""Pairwise coverage: cases among which every two values of two axes come together at least once."""

from __future__ import annotations

import itertools
import random
from collections.abc import Mapping, Sequence


def pairwise(axes: Mapping[str, Sequence[str]], seed: int = 0) -> list[dict[str, str]]:
    """Cases, each with one value of each axis; found greedily, the same each time.

    Args:
        axes: the values of each axis by its name.
        seed: of what is tried.
    """
    names, draw = list(axes), random.Random(seed)

    def pairs(case: Mapping[str, str]) -> set[tuple[str, str, str, str]]:
        return {(a, case[a], b, case[b]) for a, b in itertools.combinations(names, 2)}

    wanted = {(a, x, b, y) for a, b in itertools.combinations(names, 2) for x, y in itertools.product(axes[a], axes[b])}
    cases = []
    while wanted:
        a, x, b, y = min(wanted)
        tried = [{name: draw.choice(axes[name]) for name in names} | {a: x, b: y} for _ in range(50)]
        cases.append(max(tried, key=lambda case: len(pairs(case) & wanted)))
        wanted -= pairs(cases[-1])
    return cases
