"""What a mask is: a `Mask` looks at a `Layout` of weights and says what a step perturbs of them, a `Plan`."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Protocol

from .subset import Subset


@dataclass(frozen=True)
class Layout:
    """Names, shapes and blocks of the weights that a mask chooses from, in the model's order.

    Attributes:
        shapes: of each parameter over all processes, by name.
        stages: index of the first block that uses each parameter, by name.
        depth: number of blocks; 1 for a model that is not in stages and so cannot be cut.
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
    _suffixes: dict[tuple[int, bool], Plan] = field(default_factory=dict, init=False, repr=False, compare=False)

    @cached_property
    def numels(self) -> dict[str, int]:
        """Elements of each parameter over all processes."""
        return {name: math.prod(shape) for name, shape in self.shapes.items()}

    @cached_property
    def total(self) -> int:
        """All elements."""
        return sum(self.numels.values())

    @cached_property
    def first_stage(self) -> int:
        """The index of the first block that uses one of the weights; 0 without any."""
        return first_block(self, self.shapes)

    def suffix(self, cut: int, may_cut: bool) -> Plan:
        """The plan that perturbs all weights from a cut on; kept, because a step asks for one.

        Args:
            cut: index of the first perturbed block.
            may_cut: see `Plan`.
        """
        key = cut, may_cut
        if key not in self._suffixes:
            plan = Plan.of_parameters(self, (name for name in self.shapes if self.stages[name] >= cut))
            self._suffixes[key] = replace(plan, cut=cut, may_cut=may_cut)
        return self._suffixes[key]

    def only(self, names: Collection[str]) -> Layout:
        """The layout of these parameters alone."""
        shapes = {name: shape for name, shape in self.shapes.items() if name in names}
        return Layout(shapes, self.stages, self.depth, self.starts, self.contracted, self.norms)


@dataclass(frozen=True)
class Plan:
    """Which weights one step perturbs.

    Attributes:
        cut: index of the first perturbed block; the blocks before it (the prefix) run once and serve both passes.
        weights: which elements of each parameter's local shard, by name; None: all of them. A parameter that is not
            named is perturbed on no process and needs no ascent gradient.
        counts: how many weights of each parameter in `weights` are perturbed, over all processes.
        may_cut: whether `cut` is above 0 here or may be in another step.
        full: as `weights`, of the full parameters, from a mask that knows them; None: only the shards' are known here.
    """

    cut: int
    weights: Mapping[str, Subset | None]
    counts: Mapping[str, int]
    may_cut: bool = False
    full: Mapping[str, Subset | None] | None = None

    @classmethod
    def nothing(cls) -> Plan:
        """The plan of a step without an ascent."""
        return cls(0, {}, {})

    @classmethod
    def of_parameters(cls, layout: Layout, names: Iterable[str]) -> Plan:
        """The plan that perturbs the parameters `names`, in full and in the order of `layout`."""
        wanted = set(names)
        counts = {name: numel for name, numel in layout.numels.items() if name in wanted}
        cut = first_block(layout, counts)
        return cls(cut, dict.fromkeys(counts), counts, may_cut=cut > 0)

    @cached_property
    def perturbs_subsets(self) -> bool:
        """Whether it perturbs single weights or rows of some parameter, and not only parameters in full."""
        return any(subset is not None for subset in self.weights.values())

    @cached_property
    def perturbed(self) -> int:
        """Number of perturbed weights over all processes."""
        return sum(self.counts.values())


def first_block(layout: Layout, names: Iterable[str]) -> int:
    """The index of the first block that uses one of the parameters `names`; 0 without any."""
    return min((layout.stages[name] for name in names), default=0)


class Mask(Protocol):
    """Says which weights each step perturbs."""

    def check(self, layout: Layout) -> None:
        """Refuse weights that the mask cannot choose from.

        Raises:
            ValueError: these are such.
        """

    def plan(self, layout: Layout, step: int) -> Plan:
        """What step number `step` (from 0) perturbs: the same on every process and every time it is asked."""
