"""What the cost model needs to know of a network and of the next step of a SparseSAM."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from ssam_scale.masks import Bits, Plan, Rows, unpack
from ssam_scale.perturbation import Levers, SparseSAM, StagedModel

from .compute import StepShape

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


def weights_of(network: StagedModel, optimizer: torch.optim.Optimizer | None = None) -> dict[str, Weight]:
    """All parameters of a network before it is spread, by name.

    Args:
        network: in stages.
        optimizer: over its parameters, in their order; None: one with a single parameter group.
    """
    units = {id(p): index for index, stage in enumerate(network.stages) for p in stage.block.parameters()}
    groups = (
        {}
        if optimizer is None
        else {id(p): index for index, group in enumerate(optimizer.param_groups) for p in group["params"]}
    )
    stages = network.stage_of_parameters()
    return {
        name: Weight(tuple(p.shape), stages[name], units.get(id(p)), groups.get(id(p), 0))
        for name, p in network.model.named_parameters()
    }


def ascent_of(
    opt: SparseSAM, weights: Weights, *, dense: bool, shares_prefix: bool, share: float = 1.0, plan: Plan | None = None
) -> Ascent:
    """What the next step does beyond the base optimizer's.

    Args:
        opt: the optimizer, on one process.
        weights: of its network before it was spread.
        dense: whether the ascent needs the gradient of every weight.
        shares_prefix: whether the stages before a cut run once for both passes.
        share: of all steps that are of this kind.
        plan: another one than the next step's.
    """
    plan = opt.plan if plan is None else plan
    depth = opt.pool.layout.depth
    if not any(opt.radii):
        return Ascent(share, StepShape(0, (0.0,) * depth, 0), frozenset(), frozenset(), {})
    cut = plan.cut if shares_prefix and not dense else 0
    elide = opt.levers.elide and not dense
    needed = frozenset(name for name in weights if dense or name in plan.weights)
    there = {name: w.numel for name, w in weights.items() if w.stage >= cut and (not elide or name in needed)}
    computed = dict(there)
    if elide:  # of rows, only those are computed
        computed |= {name: plan.counts[name] for name, part in plan.weights.items() if isinstance(part, Rows)}
    return Ascent(
        share,
        StepShape(cut, _shares(computed, weights, depth), plan.perturbed, opt.fraction),
        needed,
        frozenset(there),
        plan.counts,
        partly=plan.takes_parts,
        singly=any(isinstance(part, Bits) for part in plan.weights.values()),
        between=_between(plan) if plan.takes_parts and opt.levers.pack else None,
        dense=dense,
        shares_prefix=cut > 0,
        levers=opt.levers,
    )


def _between(plan: Plan) -> Between:
    """See `Ascent.between`."""

    @functools.cache
    def before(name: str) -> torch.Tensor | None:
        """How many elements are perturbed before each position."""
        part = plan.weights[name]
        if part is None:
            return None
        assert isinstance(part, (Bits, Rows))
        flags = unpack(part.packed) if isinstance(part, Bits) else part.keep.repeat_interleave(part.size)
        return torch.cat([torch.zeros(1, dtype=torch.int64), flags.cumsum(0).cpu()])

    @functools.cache
    def between(name: str, bounds: tuple[int, ...]) -> list[int]:
        if (counts := before(name)) is None:
            return [end - start for start, end in itertools.pairwise(bounds)]
        return counts[torch.tensor(bounds)].diff().tolist()

    return between


def _shares(computed: Mapping[str, int], weights: Weights, depth: int) -> tuple[float, ...]:
    """Of each stage, the share of its weights whose gradient is computed."""
    whole, kept = [0] * depth, [0] * depth
    for name, w in weights.items():
        whole[w.stage] += w.numel
        kept[w.stage] += computed.get(name, 0)
    return tuple(k / w if w else 0.0 for k, w in zip(kept, whole, strict=True))
