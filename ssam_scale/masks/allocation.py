"""How a budget of weights is allocated to layers: globally, uniformly, or by Erdős–Rényi-Kernel."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from ssam_scale.config.mask_sections import Allocation

from .plan import Layout


def budgets(allocation: Allocation, layout: Layout, budget: int) -> list[int]:
    """How many weights to choose of each parameter; or of all of them together, a list of one.

    Args:
        allocation: `global` compares the scores of all parameters; `uniform` and `erk` give each its own budget.
        layout: the weights to choose from.
        budget: over all parameters.
    """
    if allocation == "global":
        return [budget]
    if allocation == "uniform":
        return uniform(list(layout.numels.values()), budget)
    return erk(layout.shapes, budget)


def uniform(numels: Sequence[int], budget: int) -> list[int]:
    """The same density everywhere, to a weight: together exactly `budget`."""
    return _whole_numbers([budget * n / sum(numels) for n in numels], numels, budget)


def erk(shapes: Mapping[str, tuple[int, ...]], budget: int) -> list[int]:
    """Densities in proportion to (sum of a layer's dimensions) / (their product), at most 1; together exactly `budget`.

    Erdős–Rényi-Kernel (RigL, arXiv 1911.11134, section 3.1): small layers are kept denser. Where the rule asks for
    more than a layer has, it gets all of its weights and the others share the rest.

    Args:
        shapes: of each parameter.
        budget: weights over all layers, at most all of them.
    """
    numels = [math.prod(shape) for shape in shapes.values()]
    raw = [sum(shape) / numel if shape else 1.0 for shape, numel in zip(shapes.values(), numels, strict=True)]
    full: set[int] = set()
    while True:
        rest = [i for i in range(len(numels)) if i not in full]
        mass = sum(raw[i] * numels[i] for i in rest)
        left = budget - sum(numels[i] for i in full)
        factor = left / mass if mass else 0.0
        over = {i for i in rest if factor * raw[i] > 1.0}
        if not over:
            break
        full |= over
    return _whole_numbers([n if i in full else factor * raw[i] * n for i, n in enumerate(numels)], numels, budget)


def _whole_numbers(shares: Sequence[float], numels: Sequence[int], budget: int) -> list[int]:
    """`shares`, each rounded down or up so that they sum to `budget`: up where the most was cut off."""
    counts = [min(math.floor(share), n) for share, n in zip(shares, numels, strict=True)]
    missing = budget - sum(counts)
    by_remainder = sorted(range(len(shares)), key=lambda i: counts[i] - shares[i])
    for i in [i for i in by_remainder if counts[i] < numels[i]][:missing]:
        counts[i] += 1
    return counts
