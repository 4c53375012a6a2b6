"""The trace of a symmetric matrix that is known by its products with vectors."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from statistics import fmean, stdev

from torch import Tensor

from .vectors import Vectors


@dataclass(frozen=True)
class Trace:
    """An estimate of the sum of all eigenvalues.

    Attributes:
        value: its mean over the probes.
        error: the standard error of that mean; None of one probe, which does not tell.
        probes: how many there were.
    """

    value: float
    error: float | None
    probes: int


def trace(product: Callable[[Tensor], Tensor], vectors: Vectors, probes: int, *, seed: int = 0) -> Trace:
    """The mean of vᵀ H v over vectors v of random signs, whose expectation is the trace.

    Hutchinson, "A stochastic estimator of the trace of the influence matrix", 1990: of all such vectors, signs have the
    smallest variance, 2 Σ H_ij² over i ≠ j. A diagonal matrix takes one of them.

    Args:
        product: H v of v, as runs. Collective.
        vectors: what they are.
        probes: how many vectors; at least 1.
        seed: of the first; the others' are the next ones.
    """
    found = []
    for probe in range(probes):
        signs = vectors.signs(seed + probe)
        found.append(float(vectors.products([product(signs)], signs)))
    return Trace(fmean(found), stdev(found) / math.sqrt(probes) if probes > 1 else None, probes)
