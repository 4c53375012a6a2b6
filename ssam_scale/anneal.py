"""A value that moves along half a cosine: what radii, sparsities and cuts that change over training have in common."""

from __future__ import annotations

import math


def along_half_cosine(first: float, last: float, done: float) -> float:
    """Where something is that moves from `first` to `last`, once a share `done` of its way in time has passed."""
    return last + (first - last) * 0.5 * (1.0 + math.cos(math.pi * min(done, 1.0)))
