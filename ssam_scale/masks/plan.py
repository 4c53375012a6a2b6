"""What a mask is, for the step: which weights one step perturbs, and from which block on."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Protocol

from .subset import Part


@dataclass(frozen=True)
class Layout:
    """The weights that a mask chooses from, in the model's order.

    Attributes:
        shapes: of each parameter over all processes, by name.
        stages: index of the first block that uses each parameter, by name.
        depth: number of blocks; 1 for a model that cannot be cut.
        starts: row-major position of the first element of this process's shard in each parameter; 0 if not given.
        contracted: names of the weights of linear layers and convolutions, whose second dimension is summed over.
        norms: names of the parameters of normalization layers.
    """

    shapes: Mapping[str, tuple[int, ...]]
    stages: Mapping[str, int]
    depth: int
    starts: Mapping[str, int] = field(default_factory=dict)
    contracted: frozenset[str] = frozenset()
    norms: frozenset[str] = frozenset()

    @cached_property
    def numels(self) -> dict[str, int]:
        """Elements of each parameter over all processes."""
        return {name: math.prod(shape) for name, shape in self.shapes.items()}

    @cached_property
    def total(self) -> int:
        """All elements."""
        return sum(self.numels.values())

    def only(self, names: Collection[str]) -> Layout:
        """The layout of a part of the parameters."""
        shapes = {name: shape for name, shape in self.shapes.items() if name in names}
        return Layout(shapes, self.stages, self.depth, self.starts, self.contracted, self.norms)


@dataclass(frozen=True)
class Plan:
    """What one step perturbs.

    Attributes:
        cut: index of the first perturbed block; the blocks before it run once and serve both passes.
        weights: what is perturbed of each parameter's local shard, by name; None: all of it. What is not named is not
            perturbed anywhere and needs no ascent gradient.
        counts: how many weights of each parameter in `weights` are perturbed, over all processes.
        may_cut: whether `cut` is above 0 here or may be in another step.
    """

    cut: int
    weights: Mapping[str, Part | None]
    counts: Mapping[str, int]
    may_cut: bool = False

    @property
    def takes_parts(self) -> bool:
        """Whether it perturbs single weights or rows of a parameter, and not only whole ones."""
        return any(part is not None for part in self.weights.values())

    @property
    def perturbed(self) -> int:
        """Number of perturbed weights over all processes."""
        return sum(self.counts.values())


class Mask(Protocol):
    """A source of plans."""

    def check(self, layout: Layout) -> None:
        """Look at the weights that the mask is going to choose from.

        Raises:
            ValueError: it cannot.
        """

    def plan(self, layout: Layout, step: int) -> Plan:
        """What step number `step` (from 0) perturbs; the same on every process and every time it is asked."""
