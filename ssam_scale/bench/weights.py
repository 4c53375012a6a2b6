"""What the cost model knows of a network's weights, and of what one kind of step perturbs."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from ssam_scale.perturbation import Levers

from .predict import StepShape

FLOAT = 4  # bytes


@dataclass(frozen=True)
class Weight:
    """One parameter.

    Attributes:
        shape: over all processes.
        stage: the first stage that uses it.
        unit: the block that FSDP2 gathers it with; None: the root's own.
        group: index of its parameter group in the base optimizer.
    """

    shape: tuple[int, ...]
    stage: int
    unit: int | None
    group: int = 0

    @property
    def numel(self) -> int:
        """Elements."""
        return math.prod(self.shape)

    def padded(self, shards: int) -> int:
        """Elements over all processes when each has as many whole rows."""
        rows = self.shape[0] if self.shape else 1
        return -(-rows // shards) * shards * math.prod(self.shape[1:])


Weights = Mapping[str, Weight]
"""By name, in the order in which the optimizer has them."""


Between = Callable[[str, tuple[int, ...]], Sequence[int]]


@dataclass(frozen=True)
class Ascent:
    """What one kind of step does beyond the base optimizer's.

    Attributes:
        share: of the run's steps that are of this kind.
        shape: which stages run again and for which gradients; without an ascent, see `StepShape.ascends`.
        needed: names of the parameters whose gradients the ascent needs.
        computed: names of those that its backward computes a gradient of, or of some of whose rows.
        perturbed: perturbed elements by parameter.
        partly: whether single elements or rows of parameters are perturbed, whose ε is a copy.
        singly: whether single elements are, which takes a bit for each.
        between: where backends can send the perturbed elements of a parameter only: of a parameter of which some are,
            how many lie between each two neighbours of increasing positions. None: they send the whole.
        dense: whether the gradient of every weight is needed.
        shares_prefix: whether the stages before the cut run once for both passes.
        levers: which savings are made.
        reuses: steps after this one that go by what it brought (LookSAM).
    """

    share: float
    shape: StepShape
    needed: frozenset[str]
    computed: frozenset[str]
    perturbed: Mapping[str, int]
    partly: bool = False
    singly: bool = False
    between: Between | None = None
    dense: bool = False
    shares_prefix: bool = False
    levers: Levers = field(default_factory=Levers)
    reuses: int = 0

    def perturbed_between(self, name: str, bounds: tuple[int, ...]) -> Sequence[int]:
        """How many elements of a perturbed parameter are to be sent from between each two neighbouring positions."""
        if self.between is not None:
            return self.between(name, bounds)
        return [end - start for start, end in itertools.pairwise(bounds)]

    def reduced_between(self, name: str, bounds: tuple[int, ...]) -> Sequence[int]:
        """The same of the gradient of one that is needed."""
        if self.between is not None and not self.dense and name in self.perturbed:
            return self.between(name, bounds)
        return [end - start for start, end in itertools.pairwise(bounds)]
