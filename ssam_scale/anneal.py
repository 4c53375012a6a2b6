"""Cosine annealing: what radii, sparsities and cuts that change over training have in common."""

from __future__ import annotations

import math


def cosine_annealed(first: float, last: float, progress: float) -> float:
    """The value between `first` and `last` after a share `progress` of the time; `last` from 1 on."""
    return last + (first - last) * 0.5 * (1.0 + math.cos(math.pi * min(progress, 1.0)))
