"""What a mask is, for the step: which weights one step perturbs, and from which block on."""

from __future__ import annotations

import random
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


@dataclass(frozen=True)
class Layout:
    """The weights that a mask chooses from, in the model's order.

    Attributes:
        numels: elements of each parameter over all processes, by name.
        stages: index of the first block that uses each parameter, by name.
        depth: number of blocks; 1 for a model that cannot be cut.
    """

    numels: Mapping[str, int]
    stages: Mapping[str, int]
    depth: int

    @property
    def total(self) -> int:
        """All elements."""
        return sum(self.numels.values())

    def only(self, names: Collection[str]) -> Layout:
        """The layout of a part of the parameters."""
        numels = {name: numel for name, numel in self.numels.items() if name in names}
        return Layout(numels, {name: self.stages[name] for name in numels}, self.depth)


@dataclass(frozen=True)
class Plan:
    """What one step perturbs.

    Attributes:
        cut: index of the first perturbed block; the blocks before it run once and serve both passes.
        weights: what is perturbed of each parameter, by name: None for all of it, else booleans shaped like the local
            shard. What is not named is not perturbed and needs no ascent gradient.
        perturbed: number of perturbed weights over all processes.
    """

    cut: int
    weights: Mapping[str, Tensor | None]
    perturbed: int


class Mask(Protocol):
    """A source of plans."""

    def plan(self, layout: Layout, step: int) -> Plan:
        """What step number `step` (from 0) perturbs; the same on every process and every time it is asked."""


class Dense:
    """All weights: dense SAM."""

    def plan(self, layout: Layout, step: int) -> Plan:
        """Everything, from the first block on."""
        return Plan(0, dict.fromkeys(layout.numels), layout.total)


class Depth:
    """All weights from a cut on, drawn uniformly anew at each step (a moving cut) or fixed.

    Args:
        cut: lowest and highest depth of the cut as shares of the number of blocks, in [0, 1]. A share s stands for the
            block of index round(s · blocks), at most the last; equal shares fix the cut.
        seed: of the draws. The draw is a function of seed and step alone, so every process makes the same one and a
            resumed run continues the sequence.

    Raises:
        ValueError: shares outside [0, 1] or in the wrong order.
    """

    def __init__(self, cut: tuple[float, float] = (0.0, 1.0), seed: int = 0) -> None:
        if not 0.0 <= cut[0] <= cut[1] <= 1.0:
            raise ValueError(f"cut is {cut}; two shares in [0, 1], the smaller first, are needed")
        self.cut = cut
        self.seed = seed

    def plan(self, layout: Layout, step: int) -> Plan:
        """The suffix of this step's cut."""
        low, high = (min(round(share * layout.depth), layout.depth - 1) for share in self.cut)
        cut = random.Random(f"cut {self.seed} {step}").randint(low, high)
        names = [name for name, stage in layout.stages.items() if stage >= cut]
        return Plan(cut, dict.fromkeys(names), sum(layout.numels[name] for name in names))
